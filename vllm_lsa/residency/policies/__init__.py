"""Lookahead policies: which chunks the next cycle will attend to."""

import torch

from vllm_lsa.errors import LsaError
from vllm_lsa.indexer.trained import Trained, shipped
from vllm_lsa.residency.policies.base import LookaheadPolicy
from vllm_lsa.residency.policies.keep_all import KeepAllPolicy
from vllm_lsa.residency.policies.mean_key import MeanKeyPolicy
from vllm_lsa.residency.policies.quest import QuestPolicy
from vllm_lsa.residency.policies.random import RandomPolicy
from vllm_lsa.residency.policies.recency import RecencyPolicy
from vllm_lsa.residency.policies.trained import TrainedPolicy
from vllm_lsa.residency.policies.usage import UsagePolicy

_POLICIES: dict[str, type[LookaheadPolicy]] = {
    policy.name: policy
    for policy in (MeanKeyPolicy, QuestPolicy, UsagePolicy, RecencyPolicy, RandomPolicy, KeepAllPolicy)
}


def make_policy(
    name: str, chunk_tokens: int, head_dim: int, dtype: torch.dtype, trained: Trained | None = None
) -> LookaheadPolicy:
    """The policy called `name`, else that of the checkpoint `trained`. Raises LsaError if there is none."""
    if name in _POLICIES:
        return _POLICIES[name](chunk_tokens, head_dim, dtype)
    if trained is not None:
        return TrainedPolicy(chunk_tokens, head_dim, dtype, trained)
    raise LsaError(
        f"lsa.indexer={name!r} is no policy, checkpoint folder or shipped checkpoint: use one of "
        f"{', '.join([*_POLICIES, *shipped()])}, or the folder that 'vllm-lsa train' wrote"
    )
