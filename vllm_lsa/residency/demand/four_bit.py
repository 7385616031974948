"""Demand by 4-bit keys: close to exact attention mass, at an eighth of the memory of 16-bit K and V."""

from vllm_lsa.indexer.four_bit import FourBitIndex
from vllm_lsa.residency.demand.base import IndexedDemand


class FourBitDemand(IndexedDemand):
    name = "four_bit"
    index_type = FourBitIndex
