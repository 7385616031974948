"""The contract of a chunk index."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from vllm_lsa.ops.native import gather_cells


class ChunkIndex(ABC):
    """Summarises the keys of a chunk in one *cell* per layer and kv head, and scores chunks by their cells.

    Cells are raw bytes, so that vLLM can allocate and page them like any other cache. Two indexes of one kind and
    geometry are equal: their cells are interchangeable.
    """

    name: ClassVar[str]

    def __init__(self, chunk_tokens: int, head_dim: int, dtype: torch.dtype) -> None:
        """chunk_tokens: C. head_dim: D. dtype: of the keys."""
        self.chunk_tokens = chunk_tokens
        self.head_dim = head_dim
        self.dtype = dtype

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChunkIndex) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[object, ...]:
        return (type(self), self.chunk_tokens, self.head_dim, self.dtype)

    @property
    @abstractmethod
    def cell_bytes(self) -> int:
        """Bytes of one cell, that is of one chunk and kv head."""

    @abstractmethod
    def encode(self, keys: torch.Tensor, layer: int = 0) -> torch.Tensor:
        """Cells uint8 [n, Hkv, cell_bytes], contiguous, of full chunks of keys [n, Hkv, C, D], RoPE applied.

        layer: the one that the keys belong to, since an index may have tables for each.
        """

    def chunk_logits(self, query: torch.Tensor, cells: torch.Tensor, scale: float, layer: int = 0) -> torch.Tensor:
        """Estimated log of the attention mass that each query head gives to each chunk.

        query: [Hq, D] or [L, Hq, D], any float dtype. cells: uint8 [N, Hkv, cell_bytes] or [L, N, Hkv, cell_bytes];
        only the last dimension must be contiguous, the strides of the others and the address a multiple of 16 bytes.
        scale: of q·k in the softmax. layer: the one of the cells, or the first of their L. Returns fp32 [Hq, N] or
        [L, Hq, N], unnormalised, up to a constant that all chunks share.
        """
        if query.dim() == 3:
            # One by one: what is decoded of the cells at a time is several times their size.
            layers = zip(query, cells, strict=True)
            return torch.stack([self._layer_logits(q, c, scale, layer + i) for i, (q, c) in enumerate(layers)])
        return self._layer_logits(query, cells, scale, layer)

    def paged_logits(
        self,
        query: torch.Tensor,
        cells: torch.Tensor,
        blocks: torch.Tensor,
        num_chunks: int,
        scale: float,
        layer: int = 0,
    ) -> torch.Tensor:
        """`chunk_logits` of a request's first `num_chunks` chunks in one layer, found through its block table.

        query: [Hq, D]. cells: uint8 [num_blocks, Hkv, per_block, cell_bytes], strided as `chunk_logits` says. blocks:
        int32 or int64 [nb] on the same device; chunk i is blocks[i // per_block], i % per_block. Returns fp32
        [Hq, num_chunks]. An index with a kernel for it reads the cells where they are; this gathers them first.
        """
        return self.chunk_logits(query, gather_cells(cells, blocks, num_chunks), scale, layer)

    @abstractmethod
    def _layer_logits(self, query: torch.Tensor, cells: torch.Tensor, scale: float, layer: int) -> torch.Tensor:
        """`chunk_logits` of one layer: query [Hq, D], cells [N, Hkv, cell_bytes], result [Hq, N]."""
