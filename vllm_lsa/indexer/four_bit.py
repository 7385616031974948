"""Every key of a chunk at 4 bits."""

import torch

from vllm_lsa.errors import LsaError
from vllm_lsa.indexer.base import ChunkIndex
from vllm_lsa.ops import chunk_lse


class FourBitIndex(ChunkIndex):
    """Cell: all keys at 4 bits; logit: logsumexp of the scaled q·k over the chunk's tokens, up to the rounding of keys.

    Raises LsaError if chunk_tokens or head_dim is not a multiple of 8.
    """

    name = "four_bit"

    def __init__(self, chunk_tokens: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__(chunk_tokens, head_dim, dtype)
        if chunk_tokens % 8:
            raise LsaError(f"lsa.chunk_tokens={chunk_tokens} does not suit four_bit: use a multiple of 8, or mean_key")
        if head_dim % 8:
            raise LsaError(f"four_bit does not suit this model's head_dim={head_dim}: use mean_key")

    @property
    def cell_bytes(self) -> int:
        return chunk_lse.cell_bytes(self.chunk_tokens, self.head_dim)

    def encode(self, keys: torch.Tensor, layer: int = 0) -> torch.Tensor:
        return chunk_lse.encode_keys4(keys)

    def paged_logits(
        self,
        query: torch.Tensor,
        cells: torch.Tensor,
        blocks: torch.Tensor,
        num_chunks: int,
        scale: float,
        layer: int = 0,
    ) -> torch.Tensor:
        return chunk_lse.keys4_chunk_logits_paged(query, cells, blocks, num_chunks, self.chunk_tokens, scale)

    def _layer_logits(self, query: torch.Tensor, cells: torch.Tensor, scale: float, layer: int) -> torch.Tensor:
        return chunk_lse.keys4_chunk_logits(query, cells, self.chunk_tokens, scale)
