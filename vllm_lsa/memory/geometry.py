"""Sizes of the KV cache: one place for the arithmetic of blocks, chunks and pages.

A *block* is vLLM's unit of allocation (``block_tokens`` tokens, all layers); a *chunk* is ``chunk_tokens`` tokens. A
*lane* is what has a resident set of its own: a layer, or one KV head of a layer. A *page* is the memory of one chunk in
one lane, ``[2, lane_heads, chunk_tokens, head_dim]`` with K at index 0 and V at index 1; a cache of another kind has a
`PageGeometry` of its own. Pages look the same in both tiers, so moving one is a plain copy.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


class PageGeometry(ABC):
    """What the tiers need to know of a cache: blocks, chunks and lanes, and a page as a shape and a dtype.

    A subclass is a dataclass with these fields. num_layers: layers on this rank. dtype: of a page's elements.
    block_tokens: tokens in a vLLM block. chunk_tokens: tokens in a chunk; divides block_tokens. layer_lanes: lanes of
    each layer; lane i of layer l is number ``l * layer_lanes + i``. rank, ranks: place in the tensor-parallel group,
    and its size.
    """

    num_layers: int
    dtype: torch.dtype
    block_tokens: int
    chunk_tokens: int
    layer_lanes: int
    rank: int
    ranks: int

    @property
    @abstractmethod
    def page_shape(self) -> tuple[int, int, int, int]:
        """Shape of one page."""

    @property
    def poison(self) -> float | int:
        """What memory that is not in use is filled with in check mode: an element that makes NaN of what reads it."""
        return float("nan") if self.dtype.is_floating_point else 0xFF

    @property
    def num_lanes(self) -> int:
        return self.num_layers * self.layer_lanes

    @property
    def chunks_per_block(self) -> int:
        return self.block_tokens // self.chunk_tokens

    @property
    def page_bytes(self) -> int:
        """Bytes of one chunk in one lane."""
        return math.prod(self.page_shape) * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in the host store, all layers."""
        return self.num_lanes * self.chunks_per_block * self.page_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token, all layers."""
        return self.block_bytes // self.block_tokens

    def chunks(self, tokens: int) -> int:
        """Chunks that `tokens` tokens touch."""
        return -(-tokens // self.chunk_tokens)

    def blocks(self, tokens: int) -> int:
        """Blocks that `tokens` tokens touch."""
        return -(-tokens // self.block_tokens)


@dataclass(frozen=True)
class KVGeometry(PageGeometry):
    """Shape of the KV cache of one rank, K and V of grouped-query attention.

    num_layers, num_kv_heads, num_q_heads: counts on this rank. head_dim: elements of one head. dtype: of K and V in
    pages; uint8 is e4m3 as bytes, see `ops.e4m3`. block_tokens: tokens in a vLLM block. chunk_tokens: tokens in a
    chunk; divides block_tokens. layer_lanes: lanes of each layer, 1 or num_kv_heads; lane i of layer l is number
    ``l * layer_lanes + i``. rank, ranks: place in the tensor-parallel group, and its size. model_dtype: of queries and
    of a step's own keys and values; has to be given where pages are e4m3, and is else dtype. Raises ValueError on sizes
    that do not divide and dtypes that do not go together.
    """

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    block_tokens: int
    chunk_tokens: int
    layer_lanes: int = 1
    rank: int = 0
    ranks: int = 1
    model_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.block_tokens % self.chunk_tokens:
            raise ValueError(f"chunk_tokens={self.chunk_tokens} does not divide block_tokens={self.block_tokens}")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} does not divide num_q_heads={self.num_q_heads}")

        if self.layer_lanes not in (1, self.num_kv_heads):
            raise ValueError(f"layer_lanes={self.layer_lanes} is neither 1 nor num_kv_heads={self.num_kv_heads}")
        if not self.compute_dtype.is_floating_point or self.dtype not in (self.compute_dtype, torch.uint8):
            raise ValueError(f"pages of {self.dtype} do not go with a model of {self.compute_dtype}")

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of queries, of a step's own keys and values, and of mean keys."""
        return self.dtype if self.model_dtype is None else self.model_dtype

    @property
    def quantised(self) -> bool:
        """Whether pages are e4m3 bytes."""
        return self.dtype == torch.uint8

    @property
    def lane_heads(self) -> int:
        """KV heads of a lane."""
        return self.num_kv_heads // self.layer_lanes

    @property
    def page_shape(self) -> tuple[int, int, int, int]:
        """Shape of one page: ``(2, lane_heads, chunk_tokens, head_dim)``."""
        return (2, self.lane_heads, self.chunk_tokens, self.head_dim)
