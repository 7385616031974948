"""The contract of a chunk index."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch


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
    def encode(self, keys: torch.Tensor) -> torch.Tensor:
        """Cells uint8 [n, Hkv, cell_bytes], contiguous, of full chunks of keys [n, Hkv, C, D], RoPE applied."""

    def chunk_logits(self, query: torch.Tensor, cells: torch.Tensor, scale: float) -> torch.Tensor:
        """Estimated log of the attention mass that each query head gives to each chunk.

        query: [..., Hq, D], any float dtype. cells: uint8 [..., N, Hkv, cell_bytes]; only the last dimension must be
        contiguous, the strides of the others and the address a multiple of 16 bytes. scale: of q·k in the softmax.
        Returns fp32 [..., Hq, N], unnormalised, up to a constant that all chunks share. Leading dimensions (layers)
        are batched.
        """
        if query.dim() > 2:
            # One by one: what is decoded of the cells at a time is several times their size.
            return torch.stack([self.chunk_logits(q, c, scale) for q, c in zip(query, cells, strict=True)])
        return self._layer_logits(query, cells, scale)

    @abstractmethod
    def _layer_logits(self, query: torch.Tensor, cells: torch.Tensor, scale: float) -> torch.Tensor:
        """`chunk_logits` without leading dimensions: query [Hq, D], cells [N, Hkv, cell_bytes], result [Hq, N]."""
