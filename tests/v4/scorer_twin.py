"""The memory indexer (lsa.md §3) and the choice of pages, in float64 and by loops: what selections must be."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

Weights = dict[str, torch.Tensor]


def frequencies(factor: float = 16, length: int = 65536) -> np.ndarray:
    """YaRN with base 160000 and β 32 and 1. V4-Flash's factor and original length, unless told."""
    i = np.arange(32)
    plain = 160000.0 ** (-i / 32)
    turns = length * plain / (2 * np.pi)
    # The ramp is over the pair's number, between those that turn 32 times and once, rounded outwards.
    low = math.floor(np.interp(-np.log(32), -np.log(turns), i))
    high = math.ceil(np.interp(-np.log(1), -np.log(turns), i))
    slowed = np.clip((i - low) / (high - low), 0, 1)
    return plain * (1 - slowed) + plain / factor * slowed


def reference(
    w: Weights, hidden: np.ndarray, position: int, keys: np.ndarray, speeds: np.ndarray | None = None
) -> np.ndarray:
    """Logits float64 [N] of one row hidden float64 [hidden_size] with keys float64 [N, 128]. speeds: V4-Flash's."""
    wq_a, wq_b, norm, proj = (
        w[name].double().numpy() for name in ("wq_a.weight", "wq_b.weight", "q_norm_weight", "weights_proj.weight")
    )
    y = wq_a @ hidden
    y = y / np.sqrt(np.mean(y * y) + 1e-6) * norm
    q = (wq_b @ y).reshape(-1, 128)
    turn = np.exp(1j * position * (frequencies() if speeds is None else speeds))
    pairs = (q[:, 64::2] + 1j * q[:, 65::2]) * turn
    q[:, 64::2], q[:, 65::2] = pairs.real, pairs.imag
    weights = (proj @ hidden) * 128**-0.5 * len(q) ** -0.5
    return weights @ np.maximum(q @ keys.T, 0)


class Scorers:
    """A joint file, `retrievers.l<c4 layer>.<name>`, or a folder that training wrote, for the model in a folder."""

    def __init__(self, path: Path, model: Path) -> None:
        self._layers: dict[int, Weights] = {}
        self._about = json.loads((path / "config.json").read_text()) if path.is_dir() else {}
        self._rope = json.loads((model / "config.json").read_text())["rope_scaling"]
        for name, x in load_file(path / "model.safetensors" if path.is_dir() else path).items():
            match = re.fullmatch(r"retrievers\.l(\d+)\.(.+)", name)
            assert match
            self._layers.setdefault(int(match[1]), {})[match[2]] = x

    def threshold(self, budget: float) -> float:
        """What training found for a budget; a joint file's is 0.5."""
        return float(self._about["thresholds"][f"{budget:g}"][0]) if self._about else 0.5

    @property
    def layers(self) -> list[int]:
        return sorted(self._layers)

    def scores(
        self, hidden: Mapping[int, np.ndarray], position: int, keys: Mapping[int, np.ndarray], mode: str
    ) -> np.ndarray:
        """float64 [N]: sigmoids of the layers' logits, their maximum ("or") or mean. By layer: see `reference`."""
        speeds = frequencies(self._rope["factor"], self._rope["original_max_position_embeddings"])
        logits = [reference(w, hidden[n], position, keys[n], speeds) for n, w in self._layers.items()]
        every = [1 / (1 + np.exp(-x)) for x in logits]
        return np.max(every, 0) if mode == "or" else np.mean(every, 0)


def best_pages(
    scores: list[float], budget: int, threshold: float, recency: int, sink: int, by: str = "max"
) -> list[bool]:
    """`select_pages` of one request, page after page."""
    n = len(scores)
    pages = [scores[i : i + 64] for i in range(0, n, 64)]
    keep = [False] * len(pages)
    for entry in range(n):
        if entry < sink or entry >= n - recency or entry == n - 1:
            keep[entry // 64] = True
    ranking = []
    for i, page in enumerate(pages):
        over = sum(x > threshold for x in page)
        key = (max(page), i) if by == "max" else (over, max(page), i)
        ranking.append((key, i, over))
    ranking.sort(reverse=True)
    for _, i, over in ranking:
        if over and sum(keep) < budget:
            keep[i] = True
    for _, i, _ in ranking:
        if sum(kept and len(page) == 64 for kept, page in zip(keep, pages, strict=True)) < 512 // 64:
            keep[i] = True
    return keep
