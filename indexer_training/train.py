"""Trains the query sides of all layers, without the backbone. ``python -m indexer_training.train --out DIR``

Makes train/indexer.safetensors, the weights of a scorer for each layer, and train/recall.json: how much of the next
window's attention mass the scores capture, per layer or by the ensemble of a few (see `ensemble`), and which layers
are worth it. train/state.pt is there to go on from after a kill.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from indexer_training import ensemble, v4_model
from indexer_training.backbone import Shape
from indexer_training.distributed import Group
from indexer_training.label import Union, counts_of, forced_of
from indexer_training.masses import Masses, dense
from indexer_training.settings import Settings
from indexer_training.workspace import Workspace, log, progress, write_json, write_tensors
from vllm_lsa.indexer import IndexerConfig, MemoryIndexer
from vllm_lsa.indexer.memory_indexer import LayerIndexer
from vllm_lsa.indexer.rotary import RopeConfig

PARTS = 2  # a step's gradient is summed in at least so many parts, so that one process sums as two do
WARM_UP = 20
MEASURED = 8  # times that the validation windows are looked at, besides once before the first step
KINDS = ("newest", "usage", "trained", "oracle")
_MASKED = -1e4


def untrained(work: Workspace) -> MemoryIndexer:
    """An indexer with a scorer for each layer of the backbone (V4: each candidate), its weights random."""
    s = work.settings
    if s.v4:
        return v4_model.untrained(work)
    shape = Shape.read(Path(s.model))
    path = work.folder("capture") / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        about, inv_freq = json.loads(file.metadata()["rotary"]), file.get_tensor("inv_freq")
    config = IndexerConfig(
        kind=s.form,
        backbone=shape.name,
        layers=tuple(range(shape.layers)),
        hidden_size=shape.heads * shape.head_dim,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rank=min(s.rank, shape.heads * shape.head_dim),
        rope=RopeConfig.model_validate({"style": about["style"], "dims": about["dims"]}),
        input="query",
        attention_scaling=about["scaling"],
        # A constant changes no softmax; an ensemble compares layers, so there `level` sets it.
        bias=s.shared or s.loss != "soft",
        weights_bias=True,
        usage=not s.shared,  # the paper's score has no usage
        chunk_tokens=s.chunk_tokens,
        period=s.period,
    )
    torch.manual_seed(s.seed)
    return MemoryIndexer(config, inv_freq)


@torch.no_grad()
def initialise(indexer: MemoryIndexer, work: Workspace) -> None:
    """Make each scorer's query what the layer's own last query is, as near as the rank allows, and heads weigh alike.

    Below full rank it is the projection onto the principal directions of the queries that were captured.
    """
    config = indexer.config
    files = [safe_open(work.shard("capture", i), framework="pt") for i in work.settings.training]
    for layer in config.layers:
        scorer = indexer.layer(layer)
        width = config.hidden_size
        second, count = torch.zeros(width, width), 0
        for file in files:
            x = file.get_slice("query")[layer].float()
            second += x.T @ x
            count += len(x)
        if config.rank < width:
            basis = torch.linalg.eigh(second.double())[1].flip(-1)[:, : config.rank].T.float()
        else:
            basis = torch.eye(width)
        scorer.wq_a.weight.copy_(basis)
        scorer.wq_b.weight.copy_(basis.T)
        # The norm takes the length from a query; a usual one is given back.
        scorer.q_norm_weight.fill_(((basis @ second * basis).sum() / count / config.rank).sqrt())
        scorer.weights_proj.weight.zero_()
        assert scorer.weights_bias is not None
        together = 1 if config.kind == "per_layer" else config.kv_heads  # KV heads that one score sums over
        scorer.weights_bias.fill_(config.head_dim**-0.5 / together)


@dataclass
class Batch:
    """Some cycles of one window, on the device. S cycles, N chunks; the tensors with layers have them first.

    query [L, S, F] and keys [L, N, Hkv, D] are fp16 (V4: of its candidates, see `v4_capture`); counts [S] chunks of the
    past; positions [S] of the queries, the middle of the window that is learned; fixed bool [S, N]: not learned.

    Its methods give every layer's labels [S, G, N] in G sets of scores: those of KV heads, or with `union`, which then
    stands for all of the four fields after keys, one.
    """

    query: torch.Tensor
    keys: torch.Tensor
    upcoming: Masses
    last: Masses
    positive: torch.Tensor
    hard: torch.Tensor
    counts: torch.Tensor
    positions: torch.Tensor
    fixed: torch.Tensor
    union: Union | None = None
    layers: Sequence[int] | None = None
    """What query and keys are of; None: of all layers."""

    def logits(self, scorer: LayerIndexer, layer: int) -> torch.Tensor:
        """[S, G, N]"""
        place = layer if self.layers is None else self.layers.index(layer)
        query, keys = self.query[place], self.keys[place]
        if self.union is not None:
            keys = keys.squeeze(1) if keys.shape[1] == 1 else keys
            return scorer(query, keys, self.positions).unsqueeze(1)
        return scorer.head_logits(query, keys, self.positions, self.usage(layer), self.counts)

    def mass(self, layer: int) -> torch.Tensor:
        """Of the window to come, fp32 [S, G, N]."""
        if self.union is not None:
            return self.union.mass.unsqueeze(1)
        return dense(at(self.upcoming, layer), self.counts, self.fixed.shape[1])

    def usage(self, layer: int) -> torch.Tensor:
        """Noted of the period before, fp32 [S, G, N]."""
        if self.union is not None:
            return self.union.usage.unsqueeze(1)
        return dense(at(self.last, layer), self.counts, self.fixed.shape[1])

    def positives(self, layer: int) -> torch.Tensor:
        """Bool [S, G, N]."""
        if self.union is not None:
            return self.union.golden.bool().unsqueeze(1)
        return self.scatter(self.positive[layer], self.upcoming.chunk[layer])

    def hard_negatives(self, layer: int) -> torch.Tensor:
        """Bool [S, G, N]."""
        if self.union is not None:
            return self.union.hard.bool().unsqueeze(1)
        return self.scatter(self.hard[layer], self.last.chunk[layer])

    def room(self, settings: Settings) -> torch.Tensor:
        """Chunks that the budget leaves beside what is always kept and what a period writes, at least 1: [S, 1, 1]."""
        past = torch.arange(self.fixed.shape[1], device=self.fixed.device) < self.counts.unsqueeze(1)
        held = (self.fixed & past).sum(1) + settings.period // settings.chunk_tokens
        return ((settings.budget * self.counts).long() - held).clamp(min=1)[:, None, None]

    def caught(self, score: torch.Tensor, mass: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        """Sum of the free mass [S, G, N] in the `room` chunks that score best, newer ones behind older equals."""
        order = score.masked_fill(self.fixed.unsqueeze(1), -math.inf).argsort(dim=-1, descending=True, stable=True)
        places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(-1, order, places)
        return (mass * (rank < room)).sum()

    def scatter(self, chosen: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Bool [S, Hkv, N] of flags [S, Hkv, K] for the chunks of an index."""
        everywhere = torch.zeros(*index.shape[:2], self.fixed.shape[1], dtype=torch.bool, device=index.device)
        return everywhere.scatter_(-1, index.long(), chosen.bool())


def at(masses: Masses, layer: int) -> Masses:
    """Those of one layer."""
    return Masses(*(x[layer] for x in masses))


class Windows:
    """Captured windows as batches; read from the files, or kept on a GPU that has room for them."""

    def __init__(self, work: Workspace, device: str) -> None:
        self.work = work
        self.device = device
        self.counts = counts_of(work.settings)
        self.fixed = forced_of(work.settings, self.counts)
        # The cycle's queries turn as if they stood in the middle of the window that they are to predict; the published
        # scorer's as the native indexer's do.
        ahead = -1 if work.settings.v4 else work.settings.window // 2
        self.positions = torch.tensor(work.settings.starts) + ahead
        self._kept: dict[int, dict[str, torch.Tensor]] = {}

    def read(self, window: int) -> dict[str, torch.Tensor]:
        if window in self._kept:
            return self._kept[window]
        x = load_file(self.work.shard("capture", window))
        for name in ("query_moment", "key_sum", "key_sample"):
            x.pop(name, None)
        if self.work.settings.shared:
            x = {name: x[name] for name in ("query", "keys")}
        x |= load_file(self.work.shard("label", window))
        x = {name: t.to(self.device) for name, t in x.items()}
        if self.device != "cpu" and torch.cuda.mem_get_info()[0] > 16 << 30:
            self._kept[window] = x
        return x

    def batch(self, window: int, cycles: torch.Tensor) -> Batch:
        """The cycles, integers [S], of a window."""
        x = self.read(window)
        on = cycles.to(self.device)
        counts, positions, fixed = (y[cycles].to(self.device) for y in (self.counts, self.positions, self.fixed))
        query, keys = x["query"][:, on], x["keys"]
        if self.work.settings.shared:
            none = torch.empty(0, device=self.device)
            nothing = Masses(none, none, none)
            union = Union(*(x[name][on] for name in Union._fields))
            layers = self.work.settings.candidates
            return Batch(query, keys, nothing, nothing, none, none, counts, positions, fixed, union, layers)
        upcoming, last = (Masses(*(x[f"{kind}_{p}"][:, on] for p in Masses._fields)) for kind in ("next", "last"))
        return Batch(query, keys, upcoming, last, x["positive"][:, on], x["hard"][:, on], counts, positions, fixed)


def loss_of(logits: torch.Tensor, batch: Batch, layer: int, settings: Settings) -> torch.Tensor:
    """Sum over cycles and sets of scores of the loss of logits [S, G, N]; a scalar."""
    fixed = batch.fixed.unsqueeze(1)
    hard = batch.hard_negatives(layer)
    if settings.loss == "soft":
        mass = batch.mass(layer).masked_fill(fixed, 0)
        # A hard negative counts as if there were hard_weight of it. Mass is not normalised: cycles whose attention goes
        # to chunks that are kept anyway matter less.
        weighted = (logits + math.log(settings.hard_weight) * hard).masked_fill(fixed, _MASKED)
        return (mass * (weighted.logsumexp(-1, keepdim=True) - logits)).sum()
    positive = batch.positives(layer)
    target = positive.float()
    each = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if settings.loss == "focal":
        wrong = (target - logits.sigmoid()).abs()
        each = each * wrong.square()
    easy = ~positive & ~fixed & ~hard
    share = (positive.sum(-1, keepdim=True).float() / easy.sum(-1, keepdim=True).clamp(min=1)).clamp(max=1)
    # Easy negatives weigh together as much as the positives.
    weight = target + settings.hard_weight * (hard & ~fixed) + share * easy
    return (each * weight.masked_fill(fixed, 0)).sum(-1).div(weight.sum(-1).clamp(min=1)).sum()


def learning_rate(step: int, settings: Settings) -> float:
    """At a step, from 0: a short way up, then down a cosine."""
    up = min(1.0, (step + 1) / min(WARM_UP, settings.steps))
    return settings.learning_rate * up * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def plan(step: int, settings: Settings) -> tuple[int, torch.Tensor]:
    """The window of a step and its cycles. The seed and the step alone decide, so a resumed run goes on the same."""
    windows = settings.training
    epoch, place = divmod(step, len(windows))
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(settings.seed * 7919 + epoch))
    generator = torch.Generator().manual_seed((settings.seed * 7919 + 1) * 100_003 + step)
    cycles = torch.randperm(len(settings.starts), generator=generator)[: settings.cycles]
    return windows[int(order[place])], cycles.sort().values


@torch.no_grad()
def recall(
    indexer: MemoryIndexer, windows: Windows, settings: Settings, kinds: tuple[str, ...] = KINDS
) -> dict[str, list[float]]:
    """Share of the next window's free attention mass in the chunks that are chosen within the budget, per layer.

    By the newest, by usage, by the trained scores, and by the mass itself (oracle). Mean over cycles of the validation
    windows, each weighted by its free mass.
    """
    caught = torch.zeros(len(kinds) + 1, len(indexer.layers), dtype=torch.float64)
    for window in settings.validation:
        batch = windows.batch(window, torch.arange(len(settings.starts)))
        room, found = batch.room(settings), []
        for layer in indexer.layers:
            mass = batch.mass(layer).masked_fill(batch.fixed.unsqueeze(1), 0)
            scores = [_score(kind, indexer, batch, layer, mass) for kind in kinds]
            found.append(torch.stack([*(batch.caught(score, mass, room) for score in scores), mass.sum()]))
        caught += torch.stack(found, 1).double().cpu()
    shares = caught[:-1] / caught[-1].clamp(min=1e-12)
    return {name: [round(float(x), 5) for x in row] for name, row in zip(kinds, shares, strict=True)}


def _score(kind: str, indexer: MemoryIndexer, batch: Batch, layer: int, mass: torch.Tensor) -> torch.Tensor:
    """What one of KINDS ranks chunks by, [S, G, N]; mass: of the window to come."""
    if kind == "trained":
        return batch.logits(indexer.layer(layer), layer)
    if kind == "usage":
        return batch.usage(layer)
    return mass if kind == "oracle" else torch.arange(mass.shape[-1], device=mass.device).float().expand_as(mass)


class Best:
    """The weights of each layer as they were when its scores were best on the validation windows.

    Layers are trained side by side but have nothing to do with each other, and some learn by heart before others.
    """

    def __init__(self, layers: int) -> None:
        """layers: how many."""
        self.recall = [-1.0] * layers
        self.weights: dict[str, torch.Tensor] = {}

    def note(self, indexer: MemoryIndexer, windows: Windows, settings: Settings) -> None:
        """Measure the indexer as it is now."""
        found = recall(indexer, windows, settings, ("trained",))["trained"]
        for place, (layer, value) in enumerate(zip(indexer.layers, found, strict=True)):
            if value > self.recall[place]:
                self.recall[place] = value
                names = indexer.layer(layer).state_dict(prefix=f"retrievers.l{layer}.")
                self.weights |= {name: x.detach().clone() for name, x in names.items()}


def train(indexer: MemoryIndexer, work: Workspace, windows: Windows, group: Group) -> dict[str, Any]:
    """All optimiser steps, from the last saved state on. Then the leader has the best weights of each layer."""
    s = work.settings
    for layer in indexer.layers if s.loss == "soft" else ():
        bias = indexer.layer(layer).bias
        if bias is not None:
            bias.requires_grad_(False)  # its gradient is rounding, which the optimiser would blow up
    parameters = [p for p in indexer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=s.learning_rate, weight_decay=s.weight_decay or 0.0, eps=1e-7, foreach=True
    )
    path = work.folder("train") / "state.pt"
    first, best = 0, Best(len(indexer.layers))
    if path.exists():
        state = torch.load(path, map_location=windows.device, weights_only=True)
        indexer.load_state_dict(state["indexer"])
        optimizer.load_state_dict(state["optimizer"])
        first, best.recall, best.weights = int(state["step"]), state["recall"], state["best"]
    elif group.leads:
        best.note(indexer, windows, s)
    every = max(1, s.steps // MEASURED)
    parts = max(PARTS, group.size)
    losses = []
    for step in progress(range(first, s.steps), "train", group, " steps", first):
        window, cycles = plan(step, s)
        optimizer.zero_grad(set_to_none=False)
        total = torch.zeros((), device=windows.device)
        for part in group.mine(range(parts)):
            batch = windows.batch(window, cycles[part::parts])
            for layer in indexer.layers:  # one at a time: a graph of all would take much memory
                logits = batch.logits(indexer.layer(layer), layer)
                loss = loss_of(logits, batch, layer, s) / (len(cycles) * len(indexer.layers) * logits.shape[1])
                loss.backward()
                total += loss.detach()
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        group.add([*gradients, total])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for options in optimizer.param_groups:
            options["lr"] = learning_rate(step, s)
        optimizer.step()
        losses.append(total)
        if group.leads and ((step + 1) % every == 0 or step + 1 == s.steps):
            best.note(indexer, windows, s)
        if group.leads and (step + 1) % s.save_every == 0 and step + 1 < s.steps:
            unfinished = path.with_name(path.name + ".unfinished")
            content = {"step": step + 1, "indexer": indexer.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**content, "recall": best.recall, "best": best.weights}, unfinished)
            os.replace(unfinished, path)
    if group.leads:
        indexer.load_state_dict(best.weights)
        if s.shared and s.loss == "soft":
            ensemble.level(indexer, windows)
    values = [float(x) for x in losses]
    some = max(1, len(values) // 10)
    return {"loss_first": sum(values[:some]) / some, "loss_last": sum(values[-some:]) / some} if values else {}


def choose_layers(found: dict[str, list[float]], min_gain: float) -> list[int]:
    """Layers whose scorer gains more than min_gain over usage alone; the best one if there is none."""
    gains = [trained - usage for trained, usage in zip(found["trained"], found["usage"], strict=True)]
    return [i for i, gain in enumerate(gains) if gain > min_gain] or [max(range(len(gains)), key=gains.__getitem__)]


def run(work: Workspace, group: Group) -> dict[str, Any]:
    """Train, and measure what it brought."""
    s = work.settings
    folder = work.folder("train")
    device = s.torch_device()
    windows = Windows(work, device)
    indexer = untrained(work)
    facts: dict[str, Any] = {}
    if not (folder / "indexer.safetensors").exists():
        if not (folder / "state.pt").exists():
            if s.v4:
                begin = v4_model.initialise(indexer, work)
                if group.leads:
                    log(f"train: scorers begin with {begin}")
            else:
                initialise(indexer, work)
        group.barrier()  # no one looks for the state after it may have been written
        indexer.to(device)
        facts = train(indexer, work, windows, group)
        if group.leads:
            write_tensors(folder / "indexer.safetensors", indexer.state_dict())
    elif group.leads:
        indexer.load_state_dict(load_file(folder / "indexer.safetensors"))
        indexer.to(device)
    if group.leads:
        found = recall(indexer, windows, s)
        if s.shared:
            choice = ensemble.choose(indexer, windows, found)
            if s.v4:
                native = untrained(work)
                v4_model.initialise(native, work)
                choice["alone_before"] = recall(native.to(device), windows, s, ("trained",))["trained"]
        else:
            layers = choose_layers(found, s.min_gain)
            gains = [round(found["trained"][i] - found["usage"][i], 5) for i in layers]
            choice = {"layers": layers, "gains": gains, "recall": found}
        write_json(folder / "recall.json", {"budget": s.budget, **choice})
        (folder / "state.pt").unlink(missing_ok=True)
        mean = {name: round(sum(x) / len(x), 4) for name, x in choice["recall"].items()}
        parameters = sum(p.numel() for p in indexer.parameters())
        facts |= {"recall": mean, "layers": len(choice["layers"]), "parameters": parameters}
        return facts
    return {}


def read_trained(work: Workspace) -> tuple[MemoryIndexer, dict[str, Any]]:
    """The indexer of all layers, on the CPU, and recall.json."""
    folder = work.folder("train")
    indexer = untrained(work)
    indexer.load_state_dict(load_file(folder / "indexer.safetensors"))
    return indexer.requires_grad_(False).eval(), json.loads((folder / "recall.json").read_text())


if __name__ == "__main__":
    from indexer_training.cli import step_main

    step_main("train")
