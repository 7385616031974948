"""Attention of one layer in one step on a CPU: write-through, demand, resident decode, streamed history."""

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
from vllm_lsa.residency.peers import Peers
from vllm_lsa.residency.plan import DecodeRow, Row, StepPlan
from vllm_lsa.residency.replacement import Replacement
from vllm_lsa.residency.requests import Request
from vllm_lsa.residency.take_in import take_in

logger = logging.getLogger("vllm_lsa")

Tracer = Callable[[int, Request, np.ndarray], None]  # lane, request, chunks


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
        replacement: Replacement,
        queries: torch.Tensor,
        peers: Peers | None = None,
    ) -> None:
        """peers: the ranks that hold heads of the same sets."""
        self._geometry = geometry
        self._scale = scale
        self._pool = pool
        self._transfers = transfers
        self._layout = layout
        self._demand = demand
        self._replacement = replacement
        self._peers = peers or Peers()
        self._half = 0
        self.queries = queries
        self.cells: list[torch.Tensor] = []
        self.chunks_demanded = 0
        self.chunks_missed = 0
        # Called with the chunks that this step's token attends to in a lane: lets a test replay the sets.
        self.tracer: Tracer | None = None

    def run(
        self, plan: StepPlan, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Attention of one layer. q: [t, Hq, D], k, v: [t, Hkv, D] with RoPE applied; writes out [t, Hq, D]."""
        g = self._geometry
        page = plan.token_page + layer * g.layer_lanes * g.chunks_per_block
        by_lane = (plan.num_tokens * g.layer_lanes, g.lane_heads, g.head_dim)
        keys, values = (x[: plan.num_tokens].reshape(by_lane) for x in (k, v))
        self._transfers.write(keys, values, plan.token_offset, plan.token_slot[layer], page)
        self._index(plan, layer, k)
        if plan.decodes:
            self._decode(plan, layer, q, out)
        for row in plan.prefills:
            self._prefill(layer, row, q, k, v, out)
        self.queries[plan.last_row, layer] = q[plan.last_token]

    def _index(self, plan: StepPlan, layer: int, k: torch.Tensor) -> None:
        """Write the cells of the chunks that this step completes."""
        if not len(plan.complete_block):
            return
        keys = k[plan.complete_token].transpose(1, 2)
        if len(plan.complete_page):
            keys = torch.cat([keys, self._gather(plan.complete_page, layer)[:, 0]])
        self.cells[layer][plan.complete_block, :, plan.complete_chunk] = self._layout.encode(keys, layer)

    # -- decode -----------------------------------------------------------------------------------------------------

    def _decode(self, plan: StepPlan, layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
        queries = q[plan.decode_token]
        group = self._geometry.layer_lanes
        lanes = range(layer * group, (layer + 1) * group)
        for i, row in enumerate(plan.decodes):
            if row.usage is not None:
                self._take_in(plan, layer, i, row, queries[i])
            if self.tracer:
                for lane in lanes:
                    self.tracer(lane, row.request, row.resident.lane(lane)[0].copy())
        table, counts, first_len = plan.table[layer], plan.counts[layer], plan.first_len[layer]
        by_lane = queries.view(len(queries) * group, -1, self._geometry.head_dim)
        result, lse = paged_decode_attention(by_lane, self._pool.pages, table, counts, first_len, self._scale)
        for i, row in enumerate(plan.decodes):
            if row.resident.missing:
                for n, lane in enumerate(lanes, i * group):
                    self._stream_missing(lane, row, by_lane[n : n + 1], result[n : n + 1], lse[n : n + 1])
        out[plan.decode_token] = result.view_as(queries)

    def _take_in(self, plan: StepPlan, layer: int, i: int, row: DecodeRow, query: torch.Tensor) -> None:
        """Make the chunks resident that this step's own query asks for, in the place of the least used."""
        g = self._geometry
        full = row.request.num_computed // g.chunk_tokens
        if not full:
            return
        assert self._demand.index is not None and row.blocks is not None
        assert row.usage is not None and row.caps is not None
        group = g.layer_lanes
        first = layer * group
        cells = self._layout.part(self.cells[layer], self._demand.index)
        shares = self._demand.mass(query, cells, row.blocks, full, self._scale, layer, group)
        mass = self._peers.combine(shares, "mean").numpy()
        usage = row.usage.note(slice(first, first + group), mass)
        resident = row.resident
        chosen = [
            (lane, *self._replacement.choose(resident.lane(lane)[0], mass[n], usage[n], int(row.caps[lane])))
            for n, lane in enumerate(range(first, first + group))
        ]
        chosen = [(lane, entries, picked) for lane, entries, picked in chosen if len(entries) or len(picked)]
        if not chosen:
            return
        self.chunks_demanded += take_in(self._pool, self._transfers, row.request, resident, chosen)
        for lane, _, _ in chosen:
            row_slots = resident.lane(lane)[1]
            row_slots = row_slots[row_slots >= 0]
            place = i * group + lane - first
            plan.table[layer, place, : len(row_slots)] = torch.from_numpy(row_slots)
            plan.counts[layer, place] = len(row_slots)

    def _stream_missing(
        self, lane: int, row: DecodeRow, query: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> None:
        """Attend to a lane's kept chunks that have no slot, through staging; merges into out [1, H, D], lse [1, H]."""
        chunks, slots = row.resident.lane(lane)
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
        pages = self._transfers.store.page_ids(row.request.blocks, missing, lane)
        # The tail is entry 0, so it is first here too when it is among the missing.
        first = row.request.length - row.resident.tail * size if missing[0] == row.resident.tail else size
        for begin in range(0, len(pages), self._tile):
            part = pages[begin : begin + self._tile]
            staged = self._staging(len(part))
            self._transfers.stream(part, staged)
            table = torch.from_numpy(staged.astype(np.int32))[None]
            counts = torch.full((1,), len(part), dtype=torch.int32)
            lens = torch.full((1,), first if begin == 0 else size, dtype=torch.int32)
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
        tile = self._tile // self._geometry.layer_lanes
        for begin in range(0, len(pages), tile):
            kv = self._gather(pages[begin : begin + tile], layer)
            # [T, 2, Hkv, C, D] -> [2, T * C, Hkv, D], without the tokens of this step
            kv = kv.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : past - begin * size]
            more, more_lse = attend_with_lse(query, kv[0], kv[1], self._scale, causal=False)
            result, lse = merge_states(result, lse, more, more_lse)
        out[here] = result

    def _gather(self, pages: np.ndarray, layer: int) -> torch.Tensor:
        """K and V [n, 2, Hkv, C, D] of chunks in one layer, from their slots or through staging.

        pages: int64 [n], the chunks' pages in lane 0.
        """
        g = self._geometry
        lanes = self._transfers.store.lane_offset[layer * g.layer_lanes : (layer + 1) * g.layer_lanes]
        every = (pages[:, None] + lanes).reshape(-1)
        parts = []
        for begin in range(0, len(every), self._tile):
            part = every[begin : begin + self._tile]
            slots = self._pool.lookup(part)
            absent = np.flatnonzero(slots < 0)
            if len(absent):
                slots[absent] = self._staging(len(absent))
                self._transfers.stream(part[absent], slots[absent])
            parts.append(self._pool.pages[torch.from_numpy(slots)])
        gathered = parts[0] if len(parts) == 1 else torch.cat(parts)
        # [n * lanes, 2, heads, C, D] -> [n, 2, lanes * heads, C, D]
        return gathered.unflatten(0, (len(pages), -1)).transpose(1, 2).flatten(2, 3)

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
