"""Demand by mean keys: a small index that misses single sharp keys."""

from vllm_lsa.indexer.mean_key import MeanKeyIndex
from vllm_lsa.residency.demand.base import IndexedDemand


class MeanKeyDemand(IndexedDemand):
    name = "mean_key"
    index_type = MeanKeyIndex
