"""Lookahead by mean keys."""

from vllm_lsa.indexer.mean_key import MeanKeyIndex
from vllm_lsa.residency.policies.query import QueryPolicy


class MeanKeyPolicy(QueryPolicy):
    name = "mean_key"
    index_type = MeanKeyIndex
