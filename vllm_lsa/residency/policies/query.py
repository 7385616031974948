"""Policies that look at the request's last query."""

import torch

from vllm_lsa.residency.policies.base import LookaheadPolicy, ScoreInput

_LEAST = torch.finfo(torch.float32).tiny


class QueryPolicy(LookaheadPolicy):
    """Score: the share of attention mass that the index estimates for the last query, as if it asked again.

    Each head's shares are a softmax over the chunks; heads combine by maximum ("or") or mean. A share that underflows
    counts as the least positive one, so that threshold 0 fills the budget.
    """

    needs_query = True

    def score(self, x: ScoreInput) -> torch.Tensor:
        assert self.index is not None and x.query is not None and x.cells is not None
        return self.combine(self.index.chunk_logits(x.query, x.cells[:, : x.num_chunks], x.scale), x)

    @staticmethod
    def combine(logits: torch.Tensor, x: ScoreInput) -> torch.Tensor:
        """Scores [lanes, N] of each head's log mass fp32 [L, Hq, N]."""
        # [L, Hq, N] -> [lanes, heads of a lane, N]
        heads = logits.softmax(-1).unflatten(1, (x.layer_lanes, -1)).flatten(0, 1)
        return (heads.amax(1) if x.mode == "or" else heads.mean(1)).clamp(min=_LEAST)
