"""The contract of demand, and the rule that every index follows."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from vllm_lsa.indexer.base import ChunkIndex


class Demand(ABC):
    """Picks the chunks that a layer reads besides its resident set in one decode step."""

    name: ClassVar[str]
    index: ChunkIndex | None
    chunks: int
    """Most chunks picked per layer and step; 0 if this never picks any."""

    @abstractmethod
    def pick(self, query: torch.Tensor, cells: torch.Tensor, candidates: torch.Tensor, scale: float) -> torch.Tensor:
        """Chunk ids int64 [<= chunks], best first; fewer where there are fewer candidates.

        query: [Hq, D], this step's, RoPE applied. cells: uint8 [>= N, Hkv, b], cells of `index`; those past N are not
        read. candidates: bool [N], True for chunks that are not resident. scale: of q·k in the softmax.
        """


class IndexedDemand(Demand):
    """Ranks chunks by the attention mass they would get: summed over query heads, each a softmax over all N chunks."""

    index_type: ClassVar[type[ChunkIndex]]
    index: ChunkIndex

    def __init__(self, chunks: int, chunk_tokens: int, head_dim: int, dtype: torch.dtype) -> None:
        self.chunks = chunks
        self.index = self.index_type(chunk_tokens, head_dim, dtype)

    def pick(self, query: torch.Tensor, cells: torch.Tensor, candidates: torch.Tensor, scale: float) -> torch.Tensor:
        logits = self.index.chunk_logits(query, cells[: len(candidates)], scale)
        mass = logits.softmax(-1).sum(0).masked_fill(~candidates, -1)
        best = mass.topk(min(self.chunks, len(candidates)))
        return best.indices[best.values >= 0]
