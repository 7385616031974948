"""Draws docs/architecture.png: ``python docs/picture.py`` (needs matplotlib)."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402, the backend has to be chosen first
from matplotlib.patches import FancyBboxPatch  # noqa: E402

INK, KV, INDEX, CONTROL = "#222222", "#1f6fb4", "#b3541e", "#777777"
figure = plt.figure(figsize=(13, 8.2), dpi=110)
axes = figure.add_axes((0, 0, 1, 1))
axes.set(xlim=(0, 130), ylim=(0, 82))
axes.axis("off")


def band(y: float, height: float, title: str, colour: str) -> None:
    axes.add_patch(FancyBboxPatch((2, y), 126, height, boxstyle="round,pad=0,rounding_size=1.2", fc=colour, ec="none"))
    axes.text(126.5, y + height - 1.2, title, ha="right", va="top", fontsize=10.5, weight="bold", color="#555555")


def box(x: float, y: float, width: float, height: float, title: str, text: str, edge: str = INK) -> None:
    style = "round,pad=0,rounding_size=0.8"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, fc="white", ec=edge, lw=1.4))
    axes.text(x + width / 2, y + height - 1, title, ha="center", va="top", fontsize=10.5, weight="bold", color=edge)
    axes.text(x + width / 2, y + height - 3.6, text, ha="center", va="top", fontsize=9, color=INK, linespacing=1.3)


def path(points: list[tuple[float, float]], colour: str = INK, dashed: bool = False) -> None:
    """A line through the points with an arrow head at its end."""
    style = {"color": colour, "lw": 1.5, "ls": "--" if dashed else "-"}
    axes.plot(*zip(*points, strict=True), **style, solid_joinstyle="round")
    axes.annotate("", points[-1], points[-2], arrowprops={"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, **style})


def label(x: float, y: float, text: str, colour: str, side: str = "left") -> None:
    axes.text(x, y, text, ha=side, va="center", fontsize=8.8, color=colour, linespacing=1.25)


band(64, 16.5, "once a step", "#f1f1ee")
box(5, 66, 22, 10, "scheduler output", "vLLM: new, cached,\nfinished, preempted,\nblock copies", CONTROL)
box(36, 66, 22, 10, "request mirror", "block ids and length of\neach live request; blocks\nwith a new owner")
box(
    67,
    66,
    26,
    10,
    "lookahead scheduler",
    "who keeps all, who keeps a\nselected set; every period steps\npolicy + select(), then fetch",
)
box(102, 66, 23, 10, "step plan", "per lane: slot tables,\nhost pages, prompt rows,\nchunks that become full")
for x0, x1 in ((27, 36), (58, 67), (93, 102)):
    path([(x0, 71), (x1, 71)])

band(40, 20, "each layer: q, k, v in, out comes back", "#eaf1f7")
box(5, 43, 21, 11.5, "1 write-through", "k, v of the new tokens,\nRoPE applied, to both\ntiers", KV)
box(29.5, 43, 21, 11.5, "2 index cells", "of the chunks that this\nstep completes", INDEX)
box(54, 43, 21, 11.5, "3 demand", "q against the cells:\nabsent chunks come in,\nthe least used leave", INDEX)
box(78.5, 43, 21, 11.5, "4 resident decode", "attention over the slots\nin the row's table:\nout, log-sum-exp", KV)
box(
    103,
    43,
    22.5,
    11.5,
    "5 streamed part",
    "kept chunks without a slot,\nthe history of prompts;\nmerged by log-sum-exp",
    KV,
)
for x0, x1 in ((26, 29.5), (50.5, 54), (75, 78.5), (99.5, 103)):
    path([(x0, 48.7), (x1, 48.7)])
path([(113.5, 66), (113.5, 62), (15.5, 62), (15.5, 54.5)], CONTROL)
label(64, 63.1, "plan", CONTROL, "center")

band(19, 16.5, "device memory", "#f8efe4")
box(29.5, 21, 25, 9.5, "index cells", "vLLM's paged KV cache,\na cell per chunk and KV head", INDEX)
box(62, 21, 36, 9.5, "slot pool", "pages of resident chunks, any lane in any slot;\npinned, cached (LRU) or free", KV)
box(104, 21, 20, 9.5, "staging", "two halves of 4,096 tokens\nthat take turns", KV)
band(2, 12.5, "host memory", "#e9f2e8")
box(29.5, 3.2, 84.5, 8.6, "host store", "all pages of every block; a row per vLLM block id, its lanes together", KV)

path([(11, 43), (11, 7.5), (29.5, 7.5)], KV)
label(12, 27, "k, v", KV)
path([(21, 43), (21, 37.6), (66, 37.6), (66, 30.5)], KV)
label(22, 38.7, "and where there is a slot", KV)
path([(40, 43), (40, 30.5)], INDEX)
path([(51, 30.5), (51, 36), (62, 36), (62, 43)], INDEX)
path([(70, 43), (70, 30.5)], INDEX, dashed=True)
label(70.7, 33, "asks", INDEX)
path([(89, 30.5), (89, 43)], KV)
path([(109, 30.5), (109, 43)], KV)
path([(75, 11.8), (75, 21)], KV)
label(76, 17, "fetch: selected and demanded chunks", KV)
path([(109, 11.8), (109, 21)], KV)
label(110, 17, "stream", KV)

figure.savefig(Path(__file__).with_name("architecture.png"))
