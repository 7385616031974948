"""Lookahead by what was used: the chunks that the last steps attended to."""

import torch

from vllm_lsa.residency.policies.base import LookaheadPolicy, ScoreInput

_LEAST = 1e-9


class UsagePolicy(LookaheadPolicy):
    """Score: the usage that demand has noted; among chunks never used the newest first."""

    name = "usage"

    def score(self, x: ScoreInput) -> torch.Tensor:
        age = torch.arange(1, x.num_chunks + 1, dtype=torch.float32, device=x.device) / x.num_chunks
        newest = (_LEAST * age).repeat(x.num_lanes, 1)
        return newest if x.usage is None else torch.maximum(x.usage.clamp(max=1), newest)
