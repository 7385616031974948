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
    index_bytes: bytes of the index keys of a page. key_layers: layers whose keys vLLM keeps on the device; None for
    all. key_offset: where the keys of the others are in a page, behind the compressed entries; None if there are none.
    """

    num_layers: int
    num_page_bytes: int
    entries: int
    entry_tokens: int
    index_bytes: int
    key_layers: int | None = None
    key_offset: int | None = None

    # A page is one lane of a block, and all ranks hold the same pages: keys and values have one head.
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

    @property
    def entry_bytes(self) -> int:
        """Bytes of a page up to the index keys behind it, if it has any."""
        return self.num_page_bytes if self.key_offset is None else self.key_offset

    @property
    def device_index_bytes(self) -> int:
        """Bytes that vLLM keeps on the device for the index keys of a page's entries, in all layers together."""
        return self.index_bytes * (self.num_layers if self.key_layers is None else self.key_layers)

    def entry_pages(self, pages: torch.Tensor) -> torch.Tensor:
        """The compressed entries of pages uint8 [n, page bytes], a view [n, entry bytes]."""
        return pages[:, : self.entry_bytes]

    def key_pages(self, pages: torch.Tensor) -> torch.Tensor:
        """The index keys in pages uint8 [n, page bytes], a view [n, entries, index bytes of an entry] as vLLM binds
        its own."""
        assert self.key_offset is not None
        keys = pages[:, self.key_offset : self.key_offset + self.index_bytes]
        return keys.unflatten(1, (self.entries, -1))

    def num_entries(self, tokens: int) -> int:
        """Entries that `tokens` tokens complete."""
        return tokens // self.entry_tokens
