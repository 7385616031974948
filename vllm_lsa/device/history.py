"""The history of prompts, tile by tile, for attention over a whole prefix: gathered one tile ahead of its use."""

from dataclasses import dataclass

import torch

from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.ops.resident_rows import gather_history

TILE_TOKENS = 16384
"""Tokens of one layer that a tile holds; there are two tiles, and they take turns."""
FEW, MANY = 16, 256
"""Programs of a gather: few leave the GPU to the attention beside it and still fill the link to the host."""


@dataclass
class History:
    """A prompt's tokens that are not its row's. blocks: int64 on the device. resident: whether its chunks have slots.
    fresh: whether other rows of the same step write some of them, layer by layer, as where requests with a common
    prefix come together; if not, all are from earlier steps.
    """

    blocks: torch.Tensor
    tokens: int
    resident: bool
    fresh: bool = False


class HistoryReader:
    """Hands out keys and values of a step's histories in the order in which its layers ask: layer by layer, in each
    layer history by history, in each history from the first token on. Of e4m3 pages it is what their bytes say, without
    scales.

    On a GPU the gather of the next tile runs on a stream of its own, beside the attention over this one. Fresh
    histories are gathered when they are asked for: before that their layer may not have been written.
    """

    def __init__(
        self, geometry: KVGeometry, pool: torch.Tensor, host_pages: torch.Tensor, slot_of: torch.Tensor, tile: int
    ) -> None:
        """tile: tokens, a multiple of the chunk's."""
        self._geometry = geometry
        self._pool, self._host, self._slot_of = pool, host_pages, slot_of
        self._tile = tile
        shape = (2, 2, tile, geometry.num_kv_heads, geometry.head_dim)
        self._buffers = torch.empty(shape, dtype=geometry.compute_dtype, device=pool.device)
        self._stream = torch.cuda.Stream(pool.device) if pool.is_cuda else None
        self._ready: list[torch.cuda.Event | None] = [None, None]
        self._free: list[torch.cuda.Event | None] = [None, None]
        self._tiles: list[tuple[int, History, int]] = []
        self._next = 0
        self.bytes_streamed = 0

    def begin(self, histories: list[History]) -> None:
        """A step's histories, before its first layer. What they hold has been submitted by now, unless they are fresh:
        then it has been before they are taken."""
        self._tiles = [
            (layer, history, first)
            for layer in range(self._geometry.num_layers)
            for history in histories
            for first in range(0, history.tokens, self._tile)
        ]
        self._next = 0
        if self._tiles:
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream())
            self._gather_ahead(0)

    def tiles(self, history: History) -> range:
        """First tokens of a history's tiles; `take` hands them out in this order."""
        return range(0, history.tokens, self._tile)

    def take(self, layer: int, history: History) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [t, Hkv, D] of the next tile; they stay valid until the take after the next."""
        index = self._next
        self._next += 1
        here, mine, first = self._tiles[index]
        if here != layer or mine is not history:
            raise RuntimeError(f"histories were asked for out of order: layer {layer}, expected {here}")
        half = index % 2
        if self._stream is not None:
            current = torch.cuda.current_stream()
            if index:
                # What used the other half has been submitted by now.
                free = torch.cuda.Event()
                free.record(current)
                self._free[1 - half] = free
            if not history.fresh:
                ready = self._ready[half]
                assert ready is not None
                current.wait_event(ready)
        if history.fresh:
            self._gather(index)
        if index + 1 < len(self._tiles):
            self._gather_ahead(index + 1)
        tokens = min(self._tile, history.tokens - first)
        return self._buffers[half, 0, :tokens], self._buffers[half, 1, :tokens]

    def _gather_ahead(self, index: int) -> None:
        if self._tiles[index][1].fresh:
            return
        if self._stream is None:
            self._gather(index)
            return
        half = index % 2
        if (free := self._free[half]) is not None:
            self._stream.wait_event(free)
        with torch.cuda.stream(self._stream):
            self._gather(index)
            ready = torch.cuda.Event()
            ready.record(self._stream)
        self._ready[half] = ready

    def _gather(self, index: int) -> None:
        """On the current stream."""
        layer, history, first = self._tiles[index]
        g, half = self._geometry, index % 2
        chunks = g.chunks(min(self._tile, history.tokens - first))
        if not history.resident:
            self.bytes_streamed += chunks * g.layer_lanes * g.page_bytes
        gather_history(
            self._pool, self._host, history.blocks, self._slot_of, self._buffers[half, 0], self._buffers[half, 1],
            first // g.chunk_tokens, chunks, layer, g, MANY if history.resident else FEW,
        )  # fmt: skip
