"""Lookahead that keeps every chunk: dense attention on the LSA machinery."""

import torch

from vllm_lsa.residency.policies.base import LookaheadPolicy, ScoreInput


class KeepAllPolicy(LookaheadPolicy):
    """Score: 1."""

    name = "keep_all"

    def score(self, x: ScoreInput) -> torch.Tensor:
        return torch.ones(x.num_lanes, x.num_chunks, device=x.device)
