"""Lookahead that keeps the newest chunks: the baseline that others must beat."""

import torch

from vllm_lsa.residency.policies.base import LookaheadPolicy, ScoreInput


class RecencyPolicy(LookaheadPolicy):
    """Score: ``(i + 1) / N``."""

    name = "recency"

    def score(self, x: ScoreInput) -> torch.Tensor:
        newest = torch.arange(1, x.num_chunks + 1, dtype=torch.float32, device=x.device) / x.num_chunks
        return newest.repeat(x.num_lanes, 1)
