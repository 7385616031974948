"""The contract of demand, and the rule that every index follows."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from vllm_lsa.indexer.base import ChunkIndex


class Demand(ABC):
    """Estimates, for the query of one decode step, what each chunk is worth to each lane of a layer.

    What a lane then takes in is `residency.replacement`'s to decide.
    """

    name: ClassVar[str]
    index: ChunkIndex | None

    @abstractmethod
    def mass(
        self, query: torch.Tensor, cells: torch.Tensor, blocks: torch.Tensor, num_chunks: int, scale: float, layer: int,
        lanes: int,
    ) -> torch.Tensor:  # fmt: skip
        """Shares of attention mass fp32 [lanes, num_chunks], each row adding up to 1: the mean of the lane's heads.

        query: [Hq, D], this step's, RoPE applied. cells: uint8 [num_blocks, Hkv, chunks_per_block, b], cells of
        `index`; blocks: int64 [>= those of num_chunks], the request's. scale: of q·k in the softmax. lanes: of a layer.
        """


class IndexedDemand(Demand):
    """Each head's shares are a softmax of what the index estimates for the request's full chunks."""

    index_type: ClassVar[type[ChunkIndex]]
    index: ChunkIndex

    def __init__(self, chunk_tokens: int, head_dim: int, dtype: torch.dtype) -> None:
        self.index = self.index_type(chunk_tokens, head_dim, dtype)

    def mass(
        self, query: torch.Tensor, cells: torch.Tensor, blocks: torch.Tensor, num_chunks: int, scale: float, layer: int,
        lanes: int,
    ) -> torch.Tensor:  # fmt: skip
        logits = self.index.paged_logits(query, cells, blocks, num_chunks, scale, layer)
        return logits.softmax(-1).unflatten(0, (lanes, -1)).mean(1)
