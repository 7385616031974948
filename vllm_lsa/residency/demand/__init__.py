"""Demand: what the query of a step asks for besides what is resident."""

import torch

from vllm_lsa.errors import LsaError
from vllm_lsa.indexer.trained import Trained
from vllm_lsa.residency.demand.base import Demand, IndexedDemand
from vllm_lsa.residency.demand.four_bit import FourBitDemand
from vllm_lsa.residency.demand.mean_key import MeanKeyDemand
from vllm_lsa.residency.demand.off import NoDemand
from vllm_lsa.residency.demand.product import ProductDemand

_UNTRAINED: dict[str, type[IndexedDemand]] = {kind.name: kind for kind in (MeanKeyDemand, FourBitDemand)}


def make_demand(
    name: str, chunk_tokens: int, head_dim: int, dtype: torch.dtype, trained: Trained | None = None
) -> Demand:
    """The demand called `name`. trained: the checkpoint that `product` needs. Raises LsaError if it cannot be made."""
    if name == NoDemand.name:
        return NoDemand()
    if name in _UNTRAINED:
        return _UNTRAINED[name](chunk_tokens, head_dim, dtype)
    if name != ProductDemand.name:
        names = ", ".join([NoDemand.name, *_UNTRAINED, ProductDemand.name])
        raise LsaError(f"lsa.demand={name!r} is not known: use one of {names}")
    if trained is None or trained.tables is None:
        raise LsaError("lsa.demand='product' needs a trained index: set lsa.indexer to a checkpoint that holds one")
    return ProductDemand(chunk_tokens, head_dim, dtype, trained.tables)
