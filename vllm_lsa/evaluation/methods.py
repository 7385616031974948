"""The methods that ``vllm-lsa eval`` compares, as selection rules at equal device bytes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vllm_lsa.config import DEMAND_RECENCY, LsaConfig
from vllm_lsa.errors import LsaError
from vllm_lsa.evaluation.command import METHODS
from vllm_lsa.evaluation.indexes import FourBit, KeyIndex, MeanKey, Product
from vllm_lsa.evaluation.rule import SelectionRule
from vllm_lsa.indexer.fingerprint import fingerprint_of
from vllm_lsa.indexer.trained import Trained, find, read


def load_trained(path: Path, model: Path, device: torch.device) -> Trained:
    """The checkpoint in `path`, or the shipped one of that name.

    Raises LsaError in one line if it is damaged, or was made for another model.
    """
    trained = read(find(str(path)) or path, device)
    trained.indexer.require_backbone(fingerprint_of(model))
    return trained


def make_rules(names: Sequence[str], trained: Trained | None, settings: dict[str, Any]) -> dict[str, SelectionRule]:
    """A rule for each method but dense, its budget still to be set by `at_total`.

    settings: fields of `SelectionRule` that all methods take; what is not among them has the server's defaults: sets
    per KV head, chunks of 16 tokens, or those of the checkpoint for methods that use it, and 128 newest tokens, or 32
    with demand. Raises LsaError on an unknown method, or one that needs a checkpoint while there is none.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise LsaError(f"--methods {unknown[0]} is not known: use some of {', '.join(METHODS)}")
    served = LsaConfig.parse({})
    config = trained.config if trained is not None else None
    index: KeyIndex = FourBit() if trained is None or trained.tables is None else Product(trained.tables)
    demand: dict[str, Any] = {
        "demand": index, "demand_chunks": served.demand_chunks, "demand_threshold": served.demand_threshold,
        "recency_tokens": DEMAND_RECENCY,
        "chunk_tokens": config.chunk_tokens if config is not None else 8,
        "layer_weights": config.layer_weights if config is not None else None,
    }  # fmt: skip
    lookahead: dict[str, Any] = {"lookahead": "usage"}
    if trained is not None and config is not None:
        # As the server does: mean keys come from the product cells where there are any.
        keys = MeanKey() if trained.tables is None else index
        lookahead = {"lookahead": trained.indexer, "lookahead_keys": keys, "chunk_tokens": config.chunk_tokens}
        lookahead |= {"period": config.period, "layer_weights": config.layer_weights}
        if config.kind == "shared":
            lookahead |= {"sets": "shared"}
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

    It is more than the budget where that is less than what serving needs at least.
    """
    at = starts.flatten() + (rule.period - 1 if rule.demand is not None else 0)
    chunks = caps = 0
    for layer in range(layers):
        rooms = rule.rooms(at, layer)
        caps += int(rooms.caps.sum())
        chunks += int((rooms.full + rooms.own).sum())
    return caps / chunks
