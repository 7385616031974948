"""A selection rule as settings of the LSA backend, so that a server follows it."""

from pathlib import Path
from typing import Any

from vllm_lsa.config import GIB
from vllm_lsa.errors import LsaError
from vllm_lsa.evaluation.rule import SelectionRule
from vllm_lsa.indexer import MemoryIndexer
from vllm_lsa.indexer.trained import find
from vllm_lsa.memory.geometry import KVGeometry

_INDEXERS = {"newest": "recency", "usage": "usage", "random": "random", "mean_key": "mean_key", "quest": "quest"}


def served_settings(method: str, rule: SelectionRule, checkpoint: Path | None) -> dict[str, Any]:
    """The value of "lsa" in --additional-config under which a server does what the rule says.

    checkpoint: the folder that the rule's trained parts come from. Raises LsaError in one line, which names the method,
    if the backend has no settings for the rule.
    """
    trained = isinstance(rule.lookahead, MemoryIndexer)
    name = str(checkpoint) if trained else _INDEXERS.get(str(rule.lookahead))
    if name is None:
        raise LsaError(f"--methods {method} cannot be served: no indexer starts from {rule.lookahead}; leave it out")
    if trained and find(name) is None:
        raise LsaError(f"--indexer {name} cannot be served: give a checkpoint folder, as 'vllm-lsa train' writes it")
    demand = "off" if rule.demand is None else rule.demand.name
    lookahead = "indexer"
    if demand == "product" and not trained:
        if name not in ("usage", "recency"):
            raise LsaError(f"--methods {method} cannot be served with --indexer: leave one of them out")
        name, lookahead = str(checkpoint), name
    return {
        "indexer": name,
        "lookahead": lookahead,
        "demand": demand,
        "budget": rule.budget,
        **{key: getattr(rule, key) for key in ("chunk_tokens", "period", "sets", "sink_tokens", "recency_tokens")},
        **{key: getattr(rule, key) for key in ("demand_chunks", "demand_threshold")},
    }


def pool_gib(geometry: KVGeometry, budget: float, shortest: int, longest: int) -> float:
    """`device_pool_gib` for requests of such numbers of tokens, one at a time, so that they follow a budget.

    A request keeps everything while that fits, so the pool is the largest in which the shortest one does not, unless
    the budget is 1.
    """
    slots = geometry.num_lanes * geometry.chunks(longest if budget == 1 else shortest) - (budget < 1)
    return (slots + 0.5) * geometry.page_bytes / GIB  # half a slot more, lest rounding loses one
