"""Lookahead by Quest's bound."""

from vllm_lsa.indexer.min_max import MinMaxIndex
from vllm_lsa.residency.policies.query import QueryPolicy


class QuestPolicy(QueryPolicy):
    name = "quest"
    index_type = MinMaxIndex
