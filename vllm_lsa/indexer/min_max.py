"""The box around a chunk's keys (Quest, arXiv 2406.10774)."""

import torch

from vllm_lsa.indexer.linear import LinearIndex


class MinMaxIndex(LinearIndex):
    """Cell: minima, then maxima of the keys per dimension, 2 D values of `dtype`.

    Logit: ``scale * sum_d max(q_d * min_d, q_d * max_d)``, an upper bound of every token's scaled q·k.
    """

    name = "quest"

    @property
    def cell_bytes(self) -> int:
        return 2 * self.head_dim * self.dtype.itemsize

    def summary(self, keys: torch.Tensor) -> torch.Tensor:
        return torch.cat([keys.amin(2), keys.amax(2)], dim=-1)

    def lift(self, query: torch.Tensor) -> torch.Tensor:
        # The larger product is the one with the minimum where q is negative, and with the maximum elsewhere.
        return torch.cat([query.clamp(max=0), query.clamp(min=0)], dim=-1)
