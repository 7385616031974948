"""Lookahead policies: which chunks the next cycle will attend to."""

from pathlib import Path

import torch

from vllm_lsa.errors import LsaError
from vllm_lsa.residency.policies.base import LookaheadPolicy
from vllm_lsa.residency.policies.keep_all import KeepAllPolicy
from vllm_lsa.residency.policies.mean_key import MeanKeyPolicy
from vllm_lsa.residency.policies.quest import QuestPolicy
from vllm_lsa.residency.policies.random import RandomPolicy
from vllm_lsa.residency.policies.recency import RecencyPolicy

_POLICIES: dict[str, type[LookaheadPolicy]] = {
    policy.name: policy for policy in (MeanKeyPolicy, QuestPolicy, RecencyPolicy, RandomPolicy, KeepAllPolicy)
}


def make_policy(name: str, chunk_tokens: int, head_dim: int, dtype: torch.dtype) -> LookaheadPolicy:
    """The policy called `name`. Raises LsaError if there is none."""
    if name in _POLICIES:
        return _POLICIES[name](chunk_tokens, head_dim, dtype)
    what = "is a trained indexer, which this version does not support yet" if Path(name).exists() else "is not known"
    raise LsaError(f"lsa.indexer={name!r} {what}: use one of {', '.join(_POLICIES)}")
