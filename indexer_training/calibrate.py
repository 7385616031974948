"""What turns scores into sets: product tables, weights of layers, thresholds. ``python -m indexer_training.calibrate``

Makes calibrate/product.safetensors (`ProductTables`, for all layers of the backbone) and calibrate/calibration.json:
layer_weights, damage, thresholds and budget_shares (see `IndexerConfig`). Layers are shared out over processes. One set
for all layers (``--form shared``) has one threshold per budget, and no damage, weights or shares of layers.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tqdm import tqdm

from indexer_training.backbone import quiet
from indexer_training.data import is_synthetic
from indexer_training.distributed import Group
from indexer_training.ensemble import cuts, held_share, scores
from indexer_training.product import fit_layer
from indexer_training.settings import Settings
from indexer_training.train import Windows, read_trained
from indexer_training.workspace import Workspace, log, progress, write_json, write_tensors
from vllm_lsa.indexer import MemoryIndexer
from vllm_lsa.indexer.product import ProductTables

_LEAST_DAMAGE = 1e-5  # nats per token: less cannot be told from rounding


def fit_layers(work: Workspace, group: Group, layers: int) -> None:
    """Fit the tables of each layer to what was captured of all windows, unless they are there."""
    s = work.settings
    folder = work.folder("calibrate")
    mine = list(group.mine(range(layers)))
    left = [layer for layer in mine if not (folder / f"layer_{layer:03d}.safetensors").exists()]
    files = [safe_open(work.shard("capture", i), framework="pt") for i in range(s.documents)]
    for layer in progress(left, "calibrate", group, " layers", len(mine) - len(left)):

        def of(name: str, layer: int = layer) -> list[torch.Tensor]:
            return [file.get_slice(name)[layer].to(s.torch_device()).float() for file in files]

        mean = torch.stack(of("key_sum")).sum(0) / (len(files) * s.context)
        moment = torch.stack(of("query_moment")).mean(0)
        tables = fit_layer(moment, mean, torch.cat(of("key_sample"), 1), s.subspaces, seed=s.seed * 1009 + layer)
        write_tensors(folder / f"layer_{layer:03d}.safetensors", tables)


def gather(work: Workspace, layers: int) -> ProductTables:
    """The tables of all layers, in one file; as they are after the rounding in it."""
    folder = work.folder("calibrate")
    parts = [load_file(folder / f"layer_{layer:03d}.safetensors") for layer in range(layers)]
    path = folder / "product.safetensors"
    whole: dict[str, Any] = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    ProductTables(**whole).save(path)
    return ProductTables.load(path)


def rule_of(settings: Settings, budget: float, **changes: Any) -> Any:
    """The `SelectionRule` that measurements are made with: the form's sets, chunks demanded by usage."""
    from vllm_lsa.evaluation.rule import SelectionRule

    fields: dict[str, Any] = {
        "budget": budget,
        "chunk_tokens": settings.chunk_tokens,
        "period": settings.period,
        "sets": "shared" if settings.shared else "per_head",
        "sink_tokens": settings.sink_tokens,
        "recency_tokens": settings.recency_tokens,
        "demand_chunks": settings.demand_chunks,
        "lookahead": "usage",
        "decay": settings.usage_decay,
    }
    return SelectionRule(**{**fields, **changes})


def measure_damage(work: Workspace, tables: ProductTables) -> list[float]:
    """KL, nats per token, that each layer does alone when it is sparse, on documents of the training text."""
    from vllm_lsa.evaluation.indexes import Product
    from vllm_lsa.evaluation.offline import SparseModel

    s = work.settings
    documents = [i for i in s.training if not is_synthetic(i, s.retrieval_share)] or s.training
    documents = documents[: s.damage_windows]
    model = None
    found = []
    bar = tqdm(total=len(documents) * tables.layers, desc="damage", unit=" layers")
    for i in documents:
        path = work.folder("calibrate") / f"damage_{i:05d}.json"
        if not path.exists():
            quiet()
            model = model or SparseModel(s.model, s.torch_device(), getattr(torch, s.dtype))
            rule = rule_of(s, s.damage_budget, demand=Product(tables.to(s.torch_device())))
            tokens = load_file(work.shard("data", i))["tokens"].long()
            write_json(path, model.damage([tokens], rule, every=s.measure_every, progress=lambda _: bar.update()))
        else:
            bar.update(tables.layers)
        found.append(json.loads(path.read_text()))
    bar.close()
    return [sum(values) / len(values) for values in zip(*found, strict=True)]


def weights_of(damage: Sequence[float], power: float) -> list[float]:
    """How a budget is spread over layers: damage to the power, mean 1."""
    raw = [max(value, _LEAST_DAMAGE) ** power for value in damage]
    return [value * len(raw) / sum(raw) for value in raw]


def shares_of(budget: float, weights: Sequence[float], settings: Settings) -> list[float]:
    """Share of its chunks that each layer keeps: what is always kept, and of the rest by weight."""
    least = min(budget, (settings.sink_tokens + settings.recency_tokens + settings.period) / settings.context)
    return [min(1.0, least + (budget - least) * weight) for weight in weights]


@torch.no_grad()
def thresholds_of(
    indexer: MemoryIndexer, layers: Sequence[int], shares: Sequence[Sequence[float]], windows: Windows
) -> list[list[float]]:
    """Per budget and layer the score, ``sigmoid(logit)``, that so many chunks exceed on average.

    shares: per budget and layer, of all chunks of the past, those that are always kept included.
    """

    def of_layer(place: int, layer: int) -> list[float]:
        scorer = indexer.layer(layer)
        return cuts(lambda batch: batch.logits(scorer, layer).sigmoid(), [each[place] for each in shares], windows)

    found = [of_layer(place, layer) for place, layer in enumerate(layers)]
    return [list(of_budget) for of_budget in zip(*found, strict=True)]


def run(work: Workspace, group: Group) -> dict[str, Any]:
    """Fit what is not fitted yet."""
    s = work.settings
    indexer, about = read_trained(work)
    count = len(indexer.layers)
    if s.v4:
        if group.leads:
            log("calibrate: DeepSeek-V4 is served without demand, so thresholds alone and no product tables")
    else:
        fit_layers(work, group, count)
    group.barrier()
    if not group.leads:
        return {}
    tables = None if s.v4 else gather(work, count)
    device = s.torch_device()
    windows = Windows(work, device)
    budgets = s.budgets
    if s.v4:
        held = held_share(windows)
        budgets = tuple(budget for budget in budgets if budget > held)
        if budgets != s.budgets:
            log(f"calibrate: {held:.1%} of {s.context} tokens are always kept: no threshold for budgets below")
    names = [f"{budget:g}" for budget in budgets]
    path = work.folder("calibrate") / "calibration.json"
    if s.shared:
        indexer.to(device)
        found = cuts(lambda batch: scores(indexer, about["layers"], about["ensemble"], batch), budgets, windows)
        by_budget = {name: [value] for name, value in zip(names, found, strict=True)}
        write_json(path, {"layer_weights": None, "damage": None, "thresholds": by_budget, "budget_shares": {}})
        return {}
    assert tables is not None
    damage = None
    weights = [1.0] * count
    if s.damage:
        damage = measure_damage(work, tables)
        weights = weights_of(damage, s.damage_power)
    else:
        log("calibrate: --no-damage, so every layer gets the same share of a budget")
    layers = about["layers"]
    shares = [shares_of(budget, [weights[layer] for layer in layers], s) for budget in s.budgets]
    thresholds = thresholds_of(indexer.to(device), layers, shares, windows)
    calibration = {
        "layer_weights": weights if s.damage else None,
        "damage": damage,
        "thresholds": dict(zip(names, thresholds, strict=True)),
        "budget_shares": dict(zip(names, shares, strict=True)),
    }
    write_json(path, calibration)
    return {}


if __name__ == "__main__":
    from indexer_training.cli import step_main

    step_main("calibrate")
