"""Indexes whose logit is one dot product of the cell with a vector made of the query."""

from abc import abstractmethod

import torch

from vllm_lsa.indexer.base import ChunkIndex


class LinearIndex(ChunkIndex):
    """The cell is a vector of `dtype`; the logit is ``scale * lift(query) · cell``, summed in fp32."""

    @abstractmethod
    def summary(self, keys: torch.Tensor) -> torch.Tensor:
        """Vectors [n, Hkv, width] of keys [n, Hkv, C, D]."""

    @abstractmethod
    def lift(self, query: torch.Tensor) -> torch.Tensor:
        """Vectors [Hq, width] of a query [Hq, D] in fp32."""

    def encode(self, keys: torch.Tensor, layer: int = 0) -> torch.Tensor:
        return self.summary(keys).to(self.dtype).contiguous().view(torch.uint8)

    def _layer_logits(self, query: torch.Tensor, cells: torch.Tensor, scale: float, layer: int) -> torch.Tensor:
        vectors = cells.view(self.dtype).float()
        lifted = self.lift(query.float()) * scale
        grouped = lifted.unflatten(0, (vectors.shape[1], -1))
        return (grouped @ vectors.permute(1, 2, 0)).flatten(0, 1)
