"""The shared form: which layers choose the one set for all of them, and how their scores combine."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from vllm_lsa.indexer import MemoryIndexer

if TYPE_CHECKING:
    from indexer_training.train import Batch, Windows

Mode = Literal["or", "mean"]
MODES: tuple[Mode, ...] = ("or", "mean")


@torch.no_grad()
def cuts(score: Callable[["Batch"], torch.Tensor], shares: Sequence[float], windows: "Windows") -> list[float]:
    """For each share the score that so many of the past's chunks exceed, on average over the validation windows.

    score: gives [S, G, N]. shares: of all chunks of the past, those that are always kept included; 0 where all fit.
    """
    s = windows.work.settings
    scores, past, held = [], 0, 0
    for window in s.validation:
        batch = windows.batch(window, torch.arange(len(s.starts)))
        values = score(batch)
        scores.append(values[~batch.fixed.unsqueeze(1).expand_as(values)])
        sets = values.shape[1]
        past += sets * int(batch.counts.sum())
        held += sets * len(batch.counts) * (s.period // s.chunk_tokens)
    ordered = torch.cat(scores).sort(descending=True).values
    held += past - len(ordered)
    rooms = [int(share * past) - held for share in shares]
    return [float(ordered[max(room, 0)]) if room < len(ordered) else 0.0 for room in rooms]


def held_share(windows: "Windows") -> float:
    """Share of the past's chunks that no score decides: always kept, or room for what a period writes."""
    s = windows.work.settings
    past = torch.arange(windows.fixed.shape[1]) < windows.counts.unsqueeze(1)
    held = int((windows.fixed & past).sum()) + len(windows.counts) * (s.period // s.chunk_tokens)
    return held / int(windows.counts.sum())


@torch.no_grad()
def level(indexer: MemoryIndexer, windows: "Windows") -> None:
    """Set each layer's bias so that as many of its scores exceed 0.5 as the budget has room for.

    A softmax leaves open where a layer's logits stand, and the maximum would go to the layer where they stand highest.
    """

    def shift(layer: int) -> None:
        scorer = indexer.layer(layer)
        assert scorer.bias is not None
        (cut,) = cuts(lambda batch: batch.logits(scorer, layer), [windows.work.settings.budget], windows)
        scorer.bias.sub_(cut)

    for layer in indexer.layers:
        shift(layer)


def scores(indexer: MemoryIndexer, layers: Sequence[int], mode: Mode, batch: "Batch") -> torch.Tensor:
    """What is deployed: the ensemble's scores [S, 1, N]."""
    return indexer.ensemble(logits_of(indexer, layers, batch), mode).unsqueeze(1)


def logits_of(indexer: MemoryIndexer, layers: Sequence[int], batch: "Batch") -> dict[int, torch.Tensor]:
    """Logits [S, N] of each of the layers."""
    return {layer: batch.logits(indexer.layer(layer), layer).squeeze(1) for layer in layers}


def greedy(
    recall_of: Callable[[Sequence[int]], float], candidates: Sequence[int], most: int, min_gain: float
) -> list[tuple[int, float]]:
    """The layer that helps most, time after time, each with the recall from it on; the first one in any case.

    recall_of: of an ensemble of layers, in ascending order. Ends at `most` layers, or when none adds over min_gain.
    """
    chosen: list[tuple[int, float]] = []
    while len(chosen) < most:
        have = [layer for layer, _ in chosen]
        recalls = {layer: recall_of(sorted([*have, layer])) for layer in candidates if layer not in have}
        if not recalls:
            break
        best = max(recalls, key=recalls.__getitem__)
        if chosen and recalls[best] - chosen[-1][1] <= min_gain:
            break
        chosen.append((best, recalls[best]))
    return chosen


@torch.no_grad()
def choose(indexer: MemoryIndexer, windows: "Windows", found: dict[str, list[float]]) -> dict[str, Any]:
    """Layers and mode by the recall, on the validation windows, of the very ensemble that is then deployed.

    found: `train.recall` of every layer alone. Returns what recall.json says: layers, ascending; ensemble, the mode;
    gains, what each layer added, the first one to usage; recall, of one set for all, in lists of one value; alone, that
    of every layer by itself; ways, in each mode the layers as they were taken, with the recall from there on.
    """
    s = windows.work.settings
    batches = [windows.batch(window, torch.arange(len(s.starts))) for window in s.validation]
    logits = [logits_of(indexer, indexer.layers, batch) for batch in batches]
    masses = [batch.mass(indexer.layers[0]).masked_fill(batch.fixed.unsqueeze(1), 0) for batch in batches]
    total = max(sum(float(mass.sum()) for mass in masses), 1e-12)

    def recall_of(mode: Mode, layers: Sequence[int]) -> float:
        caught = 0.0
        for batch, of_layers, mass in zip(batches, logits, masses, strict=True):
            score = indexer.ensemble({layer: of_layers[layer] for layer in layers}, mode).unsqueeze(1)
            caught += float(batch.caught(score, mass, batch.room(s)))
        return caught / total

    # The published layout has no word for the mode, and the maximum is what it means.
    modes = MODES[:1] if s.v4 else MODES
    ways = {mode: greedy(partial(recall_of, mode), indexer.layers, s.layers, s.min_gain) for mode in modes}
    best = max(modes, key=lambda mode: ways[mode][-1][1])
    recall, gains = found["usage"][0], {}
    for layer, value in ways[best]:
        gains[layer], recall = round(value - recall, 5), value
    return {
        "layers": sorted(gains),
        "ensemble": best,
        "gains": [gains[layer] for layer in sorted(gains)],
        "recall": {name: [round(recall, 5) if name == "trained" else values[0]] for name, values in found.items()},
        "alone": found["trained"],
        "ways": {mode: [[layer, round(value, 5)] for layer, value in way] for mode, way in ways.items()},
    }
