"""The mean of a chunk's keys."""

import torch

from vllm_lsa.indexer.linear import LinearIndex


class MeanKeyIndex(LinearIndex):
    """Cell: the mean key, D values of `dtype`; logit: ``scale * q · mean``.

    By Jensen's inequality a lower bound of the chunk's log mass, less log C: it misses a single sharp key.
    """

    name = "mean_key"

    @property
    def cell_bytes(self) -> int:
        return self.head_dim * self.dtype.itemsize

    def mean_keys(self, cells: torch.Tensor, layer: int) -> torch.Tensor:
        return cells.view(self.dtype).float()

    def summary(self, keys: torch.Tensor) -> torch.Tensor:
        return keys.mean(2, dtype=torch.float32)

    def lift(self, query: torch.Tensor) -> torch.Tensor:
        return query
