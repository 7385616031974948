"""The methods that ``vllm-lsa eval`` compares, as selection rules at equal device bytes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vllm_lsa.errors import LsaError
from vllm_lsa.evaluation.command import METHODS
from vllm_lsa.evaluation.indexes import FourBit, KeyIndex, MeanKey, Product
from vllm_lsa.evaluation.rule import SelectionRule
from vllm_lsa.indexer import MemoryIndexer
from vllm_lsa.indexer.checkpoint import CONFIG, WEIGHTS
from vllm_lsa.indexer.fingerprint import fingerprint_of
from vllm_lsa.indexer.product import ProductTables
from vllm_lsa.indexer.trained import find


@dataclass(frozen=True)
class Trained:
    """A checkpoint: its indexer and the tables of its demand index on the device. digest: of its files."""

    path: Path
    indexer: MemoryIndexer
    tables: ProductTables | None
    digest: str


def load_trained(path: Path, model: Path, device: torch.device) -> Trained:
    """The checkpoint in `path`, or the shipped one of that name.

    Raises LsaError in one line if it is damaged, or was made for another model.
    """
    path = find(str(path)) or path
    indexer = MemoryIndexer.load(path, device)
    indexer.require_backbone(fingerprint_of(model))
    files = [path / CONFIG, path / WEIGHTS] if path.is_dir() else [path]
    tables, index = None, indexer.config.demand_index
    if index is not None:
        files.append(path / index.file)
        tables = ProductTables.load(path / index.file).to(device)
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return Trained(path, indexer, tables, digest.hexdigest()[:12])


def make_rules(names: Sequence[str], trained: Trained | None, settings: dict[str, Any]) -> dict[str, SelectionRule]:
    """A rule for each method but dense, its budget still to be set by `at_total`.

    settings: fields of `SelectionRule` that all methods take; what is not among them has the server's defaults: sets
    per KV head, chunks of 16 tokens, or those of the checkpoint for methods that use it, and 128 newest tokens, or 32
    with demand. Raises LsaError on an unknown method, or one that needs a checkpoint while there is none.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise LsaError(f"--methods {unknown[0]} is not known: use some of {', '.join(METHODS)}")
    config = trained.indexer.config if trained is not None else None
    index: KeyIndex = FourBit() if trained is None or trained.tables is None else Product(trained.tables)
    demand: dict[str, Any] = {
        "demand": index, "demand_chunks": 8, "demand_threshold": 0.002, "recency_tokens": 32,
        "chunk_tokens": config.chunk_tokens if config is not None else 8,
        "layer_weights": config.layer_weights if config is not None else None,
    }  # fmt: skip
    lookahead: dict[str, Any] = {"lookahead": "usage"}
    if trained is not None and config is not None:
        # As the server does: mean keys come from the product cells where there are any.
        keys = MeanKey() if trained.tables is None else index
        lookahead = {"lookahead": trained.indexer, "lookahead_keys": keys, "chunk_tokens": config.chunk_tokens}
        lookahead |= {"period": config.period, "layer_weights": config.layer_weights}
    elif "lookahead" in names:
        raise LsaError("--methods lookahead needs a trained indexer: give --indexer, or leave it out")
    own: dict[str, dict[str, Any]] = {
        "lsa": {**demand, **lookahead},
        "lookahead": lookahead,
        "demand": {**demand, "lookahead": "newest"},
        "demand_alone": {**demand, "lookahead": "none"},
        "usage+demand": {**demand, "lookahead": "usage"},
        "recency+demand": {**demand, "lookahead": "newest"},
        "recency": {"lookahead": "newest"},
        "random": {"lookahead": "random"},
        "mean_key": {"lookahead": "mean_key"},
        "quest": {"lookahead": "quest"},
    }
    base = {"sets": "per_head", "chunk_tokens": 16}
    return {name: SelectionRule(**{**base, **own[name], **settings}) for name in names if name != "dense"}


def at_total(rule: SelectionRule, total: float, head_dim: int) -> SelectionRule | None:
    """The rule at `total` device bytes over KV bytes, its index included; None if the index leaves nothing."""
    budget = total - rule.index_share(head_dim)
    return replace(rule, budget=min(budget, 1.0)) if budget > 0 else None


def resident_share(rule: SelectionRule, starts: torch.Tensor, layers: int) -> float:
    """Most chunks that are resident over all chunks at the end of blocks, what is forced included, mean over layers.

    It is more than the budget where forced chunks alone are.
    """
    chunks = caps = 0
    for layer in range(layers):
        rooms = rule.rooms(starts.flatten(), layer)
        caps += int(rooms.caps.sum())
        chunks += int((rooms.full + rooms.own).sum())
    return caps / chunks
