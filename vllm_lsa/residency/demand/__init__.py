"""Demand: which chunks that are not resident a layer reads for the query of this very step."""

import torch

from vllm_lsa.errors import LsaError
from vllm_lsa.residency.demand.base import Demand, IndexedDemand
from vllm_lsa.residency.demand.four_bit import FourBitDemand
from vllm_lsa.residency.demand.mean_key import MeanKeyDemand
from vllm_lsa.residency.demand.off import NoDemand

_INDEXED: dict[str, type[IndexedDemand]] = {kind.name: kind for kind in (MeanKeyDemand, FourBitDemand)}


def make_demand(name: str, k: int, chunk_tokens: int, head_dim: int, dtype: torch.dtype) -> Demand:
    """The demand called `name` with at most `k` chunks per layer and step. Raises LsaError if there is none."""
    if name == NoDemand.name:
        return NoDemand()
    if name not in _INDEXED:
        raise LsaError(f"lsa.demand={name!r} is not known: use one of {', '.join([NoDemand.name, *_INDEXED])}")
    return _INDEXED[name](k, chunk_tokens, head_dim, dtype)
