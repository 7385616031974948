"""Attention of one layer in one step: write-through, demand, resident decode, streamed history."""

import logging
from collections.abc import Callable

import numpy as np
import torch

from vllm_lsa.indexer.layout import IndexLayout
from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.memory.slot_pool import SlotPool
from vllm_lsa.memory.transfers import Transfers
from vllm_lsa.ops.dense import attend_with_lse
from vllm_lsa.ops.merge_states import merge_states
from vllm_lsa.ops.paged_decode import paged_decode_attention
from vllm_lsa.residency.demand.base import Demand
from vllm_lsa.residency.plan import DecodeRow, Row, StepPlan
from vllm_lsa.residency.requests import Request

logger = logging.getLogger("vllm_lsa")

Tracer = Callable[[int, Request, np.ndarray], None]


class LayerAttention:
    """Runs a `StepPlan` layer by layer.

    `cells` are the index cells of each layer, uint8 ``[num_blocks, Hkv, chunks_per_block, cell_bytes]``, in memory that
    vLLM allocates and pages; `queries` ``[rows, layers, Hq, D]`` keeps each request's last query for its next set.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        scale: float,
        pool: SlotPool,
        transfers: Transfers,
        layout: IndexLayout,
        demand: Demand,
        ring: int,
        queries: torch.Tensor,
    ) -> None:
        self._geometry = geometry
        self._scale = scale
        self._pool = pool
        self._transfers = transfers
        self._layout = layout
        self._demand = demand
        self._ring = ring
        self._half = 0
        self.queries = queries
        self.cells: list[torch.Tensor] = []
        self.chunks_demanded = 0
        self.chunks_missed = 0
        # Called with (layer, request, chunks attended to by this step's token): lets a test replay the sets.
        self.tracer: Tracer | None = None

    def run(
        self, plan: StepPlan, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Attention of one layer. q: [t, Hq, D], k, v: [t, Hkv, D] with RoPE applied; writes out [t, Hq, D]."""
        tokens = plan.num_tokens
        page = plan.token_page + layer * self._geometry.chunks_per_block
        self._transfers.write(k[:tokens], v[:tokens], plan.token_offset, plan.token_slot[layer], page)
        self._index(plan, layer, k)
        if plan.decodes:
            self._decode(plan, layer, q, out)
        for row in plan.prefills:
            self._prefill(layer, row, q, k, v, out)
        self.queries[plan.last_row, layer] = q[plan.last_token]

    def request_cells(self, request: Request, layer: int, num_chunks: int) -> torch.Tensor:
        """Index cells of a request's first chunks in one layer, uint8 [num_chunks, Hkv, cell_bytes]."""
        count = -(-num_chunks // self._geometry.chunks_per_block)
        blocks = torch.from_numpy(request.blocks[:count].astype(np.int64)).to(self.queries.device)
        return self.cells[layer][blocks].transpose(1, 2).flatten(0, 1)[:num_chunks]

    def _index(self, plan: StepPlan, layer: int, k: torch.Tensor) -> None:
        """Write the cells of the chunks that this step completes."""
        if not len(plan.complete_block):
            return
        keys = k[plan.complete_token].transpose(1, 2)
        if len(plan.complete_page):
            keys = torch.cat([keys, self._gather(plan.complete_page, layer)[:, 0]])
        self.cells[layer][plan.complete_block, :, plan.complete_chunk] = self._layout.encode(keys)

    # -- decode -----------------------------------------------------------------------------------------------------

    def _decode(self, plan: StepPlan, layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
        queries = q[plan.decode_token]
        for i, row in enumerate(plan.decodes):
            if row.sparse and self._demand.chunks:
                self._demand_chunks(plan, layer, i, row, queries[i])
            if self.tracer:
                self.tracer(layer, row.request, row.resident.layer(layer)[0].copy())
        table, counts, first_len = plan.table[layer], plan.counts[layer], plan.first_len[layer]
        result, lse = paged_decode_attention(queries, self._pool.pages, table, counts, first_len, self._scale)
        for i, row in enumerate(plan.decodes):
            if row.resident.missing:
                self._stream_missing(layer, row, queries[i : i + 1], result[i : i + 1], lse[i : i + 1])
        out[plan.decode_token] = result

    def _demand_chunks(self, plan: StepPlan, layer: int, i: int, row: DecodeRow, query: torch.Tensor) -> None:
        """Read the chunks this step's own query asks for and make them resident."""
        full = row.request.num_computed // self._geometry.chunk_tokens
        held = row.resident.contains(layer, full)
        if held.all():
            return
        assert self._demand.index is not None
        cells = self._layout.part(self.request_cells(row.request, layer, full), self._demand.index)
        picked = self._demand.pick(query, cells, torch.from_numpy(~held).to(query.device), self._scale).cpu().numpy()
        self.chunks_demanded += len(picked)
        pages = self._transfers.store.page_ids(row.request.blocks, picked, layer)
        entries = row.resident.demanded[layer]
        for _ in range(max(0, len(entries) + len(picked) - self._ring)):
            # The ring is full: its oldest chunk leaves, and the last entry of the layer closes the gap.
            self._pool.release(np.array([row.resident.remove_demanded(layer)], np.int64))
        slots, fresh = self._pool.acquire(pages)
        self._transfers.fetch(pages[fresh], slots[fresh])
        row.resident.append_demanded(layer, picked, slots)
        row_slots = row.resident.layer(layer)[1]
        row_slots = row_slots[row_slots >= 0]
        plan.table[layer, i, : len(row_slots)] = torch.from_numpy(row_slots)
        plan.counts[layer, i] = len(row_slots)

    def _stream_missing(
        self, layer: int, row: DecodeRow, query: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> None:
        """Attend to kept chunks that have no slot, through staging; merges into out [1, Hq, D] and lse [1, Hq]."""
        chunks, slots = row.resident.layer(layer)
        missing = chunks[slots < 0]
        if not len(missing):
            return
        logger_once(
            "the device pool (%d slots) is smaller than what is kept: the rest is read from the host store at every "
            "step, which is exact but slow; raise lsa.device_pool_gib or lower lsa.budget",
            self._pool.num_slots,
        )
        self.chunks_missed += len(missing)
        size = self._geometry.chunk_tokens
        pages = self._transfers.store.page_ids(row.request.blocks, missing, layer)
        # The tail is entry 0, so it is first here too when it is among the missing.
        first = row.request.length - row.resident.tail * size if missing[0] == row.resident.tail else size
        for begin in range(0, len(pages), self._tile):
            part = pages[begin : begin + self._tile]
            staged = self._staging(len(part))
            self._transfers.stream(part, staged)
            table = torch.from_numpy(staged.astype(np.int32)).to(query.device)[None]
            counts = torch.full((1,), len(part), dtype=torch.int32, device=query.device)
            lens = torch.full((1,), first if begin == 0 else size, dtype=torch.int32, device=query.device)
            more, more_lse = paged_decode_attention(query, self._pool.pages, table, counts, lens, self._scale)
            merged, merged_lse = merge_states(out, lse, more, more_lse)
            out.copy_(merged)
            lse.copy_(merged_lse)

    # -- prefill ----------------------------------------------------------------------------------------------------

    def _prefill(
        self, layer: int, row: Row, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Exact attention of a row to its whole history and to itself."""
        here = slice(row.start, row.start + row.length)
        query = q[here]
        result, lse = attend_with_lse(query, k[here], v[here], self._scale, causal=True)
        past = row.request.num_computed
        size = self._geometry.chunk_tokens
        chunks = np.arange(self._geometry.chunks(past))
        pages = self._transfers.store.page_ids(row.request.blocks, chunks)
        for begin in range(0, len(pages), self._tile):
            kv = self._gather(pages[begin : begin + self._tile], layer)
            # [T, 2, Hkv, C, D] -> [2, T * C, Hkv, D], without the tokens of this step
            kv = kv.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : past - begin * size]
            more, more_lse = attend_with_lse(query, kv[0], kv[1], self._scale, causal=False)
            result, lse = merge_states(result, lse, more, more_lse)
        out[here] = result

    def _gather(self, pages: np.ndarray, layer: int) -> torch.Tensor:
        """Pages [n, 2, Hkv, C, D] of one layer, from their slots or through staging; pages: int64 [n] of layer 0."""
        pages = pages + self._transfers.store.layer_offset[layer]
        parts = []
        for begin in range(0, len(pages), self._tile):
            part = pages[begin : begin + self._tile]
            slots = self._pool.lookup(part)
            absent = np.flatnonzero(slots < 0)
            if len(absent):
                slots[absent] = self._staging(len(absent))
                self._transfers.stream(part[absent], slots[absent])
            parts.append(self._pool.pages[torch.from_numpy(slots).to(self._pool.pages.device)])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def _tile(self) -> int:
        """Pages that one half of the staging area holds; the halves take turns."""
        return len(self._pool.staging) // 2

    def _staging(self, count: int) -> np.ndarray:
        self._half ^= 1
        return self._pool.staging[self._half * self._tile :][:count]


_said: set[str] = set()


def logger_once(message: str, *values: object) -> None:
    """Log a warning the first time it comes up in this process."""
    if message not in _said:
        _said.add(message)
        logger.warning(message, *values)
