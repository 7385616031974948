"""Sizes of DeepSeek-V4's c4 cache: the compressed keys and values of the layers that have an indexer."""

from dataclasses import dataclass

import torch

from vllm_lsa.memory.geometry import PageGeometry


@dataclass(frozen=True)
class EntryGeometry(PageGeometry):
    """Pages of compressed entries, one in each block and c4 layer.

    An *entry* stands for `entry_tokens` tokens. A page is opaque bytes in the format of vLLM's cache (fp8_ds_mla keeps
    all data of a page before all of its scales), so it is only ever copied as a whole. A chunk is a page, a lane is a
    layer.

    num_layers: c4 layers. num_page_bytes: bytes of a page, padding included. entries: entries of a page.
    index_bytes: bytes of the index keys of a page, which vLLM keeps on the device.
    """

    num_layers: int
    num_page_bytes: int
    entries: int
    entry_tokens: int
    index_bytes: int

    # A page is one lane of a block, all ranks hold the same pages, and LSA runs on one.
    layer_lanes = 1
    rank = 0
    ranks = 1
    dtype = torch.uint8

    @property
    def block_tokens(self) -> int:  # type: ignore[override]
        """Tokens of a block, which is a page."""
        return self.entries * self.entry_tokens

    @property
    def chunk_tokens(self) -> int:  # type: ignore[override]
        """Tokens of a chunk, which is a page."""
        return self.block_tokens

    @property
    def page_shape(self) -> tuple[int, int, int, int]:
        """Four dimensions, as copies of pages have them."""
        return (1, 1, 1, self.num_page_bytes)

    def num_entries(self, tokens: int) -> int:
        """Entries that `tokens` tokens complete."""
        return tokens // self.entry_tokens
