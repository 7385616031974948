"""LSA of one rank on a CUDA device: the sets live there, and a decode step is a fixed sequence of kernels."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vllm_lsa.config import LsaConfig
from vllm_lsa.device.control import DeviceControl, Selection, state_pages
from vllm_lsa.device.history import FEW, TILE_TOKENS, History, HistoryReader
from vllm_lsa.device.plan import DevicePlan, PrefillPlan
from vllm_lsa.device.prefill import PrefillAttention, TorchPrefill
from vllm_lsa.device.side import SideStream
from vllm_lsa.device.stalls import StallClock
from vllm_lsa.device.state import PAGE, DeviceRefresh, DeviceRows, DeviceSets, DeviceTails
from vllm_lsa.device.support import require_supported
from vllm_lsa.engine import LsaEngine
from vllm_lsa.indexer.base import ChunkIndex
from vllm_lsa.indexer.mean_key import MeanKeyIndex
from vllm_lsa.indexer.product import ProductIndex
from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.metrics import MetricsWriter
from vllm_lsa.ops import resident_rows as ops
from vllm_lsa.ops.e4m3 import UNSCALED
from vllm_lsa.ops.encode_rows import LayerCells, ProductCodec, encode_chunks, encode_decoded, encode_pages, of_layer
from vllm_lsa.ops.native import power_of_two
from vllm_lsa.ops.renew_set import MAX_TILE, renew_set
from vllm_lsa.ops.resident_decode import Arrivals, DecodeScratch, leaves_room, resident_decode
from vllm_lsa.ops.score_rows import score_layers, score_rows, score_scratch
from vllm_lsa.residency.plan import Row
from vllm_lsa.residency.policies.base import ScoreInput
from vllm_lsa.residency.policies.query import QueryPolicy
from vllm_lsa.residency.requests import NewRequest, Request, StepUpdate
from vllm_lsa.residency.selection import shared_scores
from vllm_lsa.residency.usage import DECAY

Tracer = Callable[[int, DevicePlan], None]
MANY_COPIES = 1024
"""Programs of a copy that the step has to wait for."""


class DeviceEngine(LsaEngine[DevicePlan]):
    """For a CUDA device. `attend` of a step without prompts can be captured in a CUDA graph."""

    def __init__(
        self,
        config: LsaConfig,
        geometry: KVGeometry,
        scale: float,
        num_slots: int,
        max_requests: int,
        device: torch.device,
        metrics: MetricsWriter | None = None,
        max_model_len: int = 8192,
        prefill: PrefillAttention | None = None,
    ) -> None:
        """max_model_len: most tokens of a request. Raises LsaError for settings that have no form here."""
        require_supported(config)
        super().__init__(config, geometry, scale, num_slots, max_requests, device, metrics)
        self._max_model_len = max_model_len
        self._places: dict[Request, int] = {}
        self._prefill = prefill or TorchPrefill()
        # Of each layer, where pages are e4m3. The plugin says before `attach` what they are.
        self.kv_scales = [UNSCALED] * geometry.num_layers
        self.tracer: Tracer | None = None

    @staticmethod
    def _staging_pages(geometry: KVGeometry) -> int:
        return 0

    def attach(self, num_blocks: int, cells: Sequence[torch.Tensor]) -> None:
        self._attach_store(num_blocks)
        assert self.store is not None
        g, config, device, rows = self.geometry, self.config, self._device, self._max_requests
        self.pool.track()
        self._cells = list(cells)
        chunks = g.chunks(self._max_model_len)
        row_pages = state_pages(config, chunks)
        host_chunks = self.store.num_blocks * g.chunks_per_block
        # Live requests share blocks only by common prefixes: twice their chunks is room for many of those.
        num_pages = min(rows * row_pages, 2 * host_chunks // PAGE + 2 * rows)
        self.sets = DeviceSets.empty(rows, row_pages, num_pages, g, device)
        self.refresh = DeviceRefresh.empty(rows, num_pages, g, device)
        self._tails = DeviceTails.empty(rows, g, device)
        self._beside = SideStream(device)
        self._copying = SideStream(device)
        self._stalls = StallClock(device)
        # Rows of 16 bytes: Triton compiles a kernel anew for a pointer that lies differently.
        self._row_data = torch.zeros(5, -(-rows // 4) * 4, dtype=torch.int32, device=device)
        table = torch.zeros(rows, g.blocks(self._max_model_len), dtype=torch.int32, device=device)
        token, length, state, query_row, refreshed = self._row_data[:, :rows]
        self._rows = DeviceRows(token, length, state, query_row, table)
        # The same rows, where those whose sets need no refresh have none.
        self._refreshed = DeviceRows(token, length, refreshed, query_row, table)
        self._slot_of = torch.full((self.store.num_pages,), -1, dtype=torch.int32, device=device)
        # Long tiles for long lists: measured at 16K and 128K chunks.
        self._tile = min(power_of_two(chunks), 1024 if chunks <= 1 << 15 else MAX_TILE)
        self._scratch = DecodeScratch.empty(rows, g, self._max_model_len, device)
        self._wanted = ops.DemandScratch.empty(
            rows, config.demand_chunks, num_pages if self._demand.index is not None else 1, g, device, chunks
        )
        index = self._demand.index
        self._tables = (
            score_scratch(rows, g.num_q_heads, g.num_kv_heads, index.tables.subspaces, device)
            if isinstance(index, ProductIndex)
            else None
        )
        self._layer_cells = {
            index: LayerCells([self.layout.part(cells, index) for cells in self._cells])
            for index in (self._policy.index, self._demand.index)
            if index is not None
        }
        self._parts = [(of_layers, _codec(index)) for index, of_layers in self._layer_cells.items()]
        self._key_scales = torch.tensor([scales.k for scales in self.kv_scales], device=device)
        # Of the last step, if one of its rows completed a chunk, whose cells are made before the next.
        self._completed: DeviceRows | None = None
        tile = min(TILE_TOKENS, -(-self._max_model_len // g.chunk_tokens) * g.chunk_tokens)
        self._history = HistoryReader(g, self.pool.pages, self.store.pages, self._slot_of, tile)
        self._fetched = 0
        self._incoming = torch.zeros(1, dtype=torch.int64, device=device)
        pinned = device.type == "cuda"
        self._counters = torch.zeros(3, dtype=torch.int64, pin_memory=pinned)
        self.control = DeviceControl(
            config, g, self.pool, self.store, self.sets, self.refresh, rows, self._fetch, self._layer_weights
        )
        if device.type == "cuda":
            self._warm_up()
        self.close_step()

    def _warm_up(self) -> None:
        """Compile what no CUDA graph holds, on rows and tokens that are none, so that no request waits for it."""
        assert self.store is not None
        g, pool, host, layer = self.geometry, self.pool.pages, self.store.pages, 0
        self.plan_capture(1)
        rows = self._rows.first(1)
        ops.advance(rows, self.sets, self._slot_of, self._tails, g)
        self._refresh_rows(self._refreshed.first(1))
        self._await_copies()
        ops.fetch(pool, host, self.refresh.copy_page[:1], self.refresh.copy_slot[:1], MANY_COPIES)
        request = Request(NewRequest("", [0], g.chunk_tokens, 1))
        self._places = {request: 0}
        nothing = np.zeros(g.num_lanes, np.int64)
        self._renew(Selection(request, 0, 0, 0, False), nothing, nothing + 1)
        none = torch.full((1,), -1, dtype=torch.int64, device=self._device)
        zero = torch.zeros(1, dtype=torch.int32, device=self._device)
        # In the middle of a row of q, k and v, as the model hands them on.
        shape = (16, g.num_q_heads + 2 * g.num_kv_heads, g.head_dim)
        heads = torch.zeros(shape, dtype=g.compute_dtype, device=self._device)
        q, k, v = heads.split([g.num_q_heads, g.num_kv_heads, g.num_kv_heads], 1)
        k, v = ops.write_tokens(k, v, pool, host, none, zero, self._slot_of, layer, g)
        self._completed = rows
        self._encode_completed()
        for cells, codec in self._parts:
            of_this, part = of_layer(codec, layer), cells.parts[layer]
            encode_chunks(k, none.int(), zero, zero, part, g.chunk_tokens, of_this)
            encode_pages(host, none, zero, zero, part, layer, g, of_this)
        self._history.begin([history := History(none + 1, g.chunk_tokens, False)])
        keys, values = self._history.take(layer, history)
        state = self._prefill.attend(q, k, v, self._scale, causal=True)
        self._prefill.merge(state, self._prefill.attend(q, keys, values, self._scale, causal=False))
        self._history.bytes_streamed = 0

    def open_step(self, update: StepUpdate) -> None:
        # Before anyone leaves, and slots and blocks get other owners.
        self._encode_completed()
        super().open_step(update)

    def _leave(self, request: Request) -> None:
        # What is still on its way must not come into a slot that has got another owner.
        self._await_copies()
        self.control.leave(request)

    def _quiesce(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    # -- planning ---------------------------------------------------------------------------------------------------

    @property
    def demands(self) -> bool:
        """Whether rows on a budget ask for chunks in every step."""
        return self._demand.index is not None

    def plan_capture(self, num_rows: int, demands: bool = True) -> DevicePlan:
        """A step of padding alone: what a CUDA graph is captured with. demands: see `DevicePlan`."""
        self._row_data.zero_()
        self._rows.state.fill_(-1)
        return DevicePlan(self._rows.first(num_rows), demands=demands)

    def plan(
        self,
        rows: Sequence[tuple[str, int]],
        block_table: torch.Tensor | None = None,
        padded: int = 0,
    ) -> DevicePlan:
        """block_table: int32 [rows, >= blocks] on the device, the engine's own; by default made from the mirror's.
        padded: decode rows of the CUDA graph that is to run the step, or 0."""
        assert self.store is not None
        placed = self._placed(rows)
        self._await_copies()
        selections = self.control.prepare(placed)
        pages, slots = self.pool.changes()
        if len(pages):
            self._slot_of[self._upload(pages)] = self._upload(slots)
        # A prompt's single token is one as well: it has no set, so it attends to all of its history, slots or not.
        decodes = [i for i, row in enumerate(placed) if row.length == 1]
        prefills = [row for row in placed if row.length > 1]
        self._fill_rows([placed[i] for i in decodes], decodes, block_table, len(rows))
        count = max(padded, len(decodes))
        step = DevicePlan(
            self._rows.first(count),
            requests=[placed[i].request.id for i in decodes],
            demands=any(self.control.set_row(placed[i].request) >= 0 for i in decodes),
        )
        self._places = {placed[i].request: place for place, i in enumerate(decodes)}
        real = self._rows.first(len(decodes))
        if any(placed[i].request.length % self.geometry.chunk_tokens == 0 for i in decodes):
            self._completed = real
        ops.advance(real, self.sets, self._slot_of, self._tails, self.geometry)
        for selection in selections:
            request = selection.request
            self._renew(selection, self.control.selectable(request), self.control.owned(request))
        self._continue_refresh([placed[i].request for i in decodes])
        if prefills:
            step.prefill = self._plan_prefill(prefills, placed)
            self._history.begin([h for h in step.prefill.histories if h.tokens])
        return step

    def _encode_completed(self) -> None:
        """Make the cells of chunks that the last step's rows have completed, which nothing has read so far: one launch
        for all layers, now and then, in place of one for each layer in each step.
        """
        assert self.store is not None
        rows, self._completed = self._completed, None
        if rows is None:
            return
        pool, host, g = self.pool.pages, self.store.pages, self.geometry
        for cells, codec in self._parts:
            encode_decoded(pool, host, rows, self._slot_of, self.sets, cells, g, codec, self._key_scales)

    def _fill_rows(
        self, decodes: list[Row], places: list[int], block_table: torch.Tensor | None, num_rows: int
    ) -> None:
        data = np.zeros(self._row_data.shape, np.int32)
        data[2] = data[4] = -1
        for i, row in enumerate(decodes):
            request = row.request
            set_row = self.control.set_row(request)
            refreshed = set_row if self.control.refreshes(request) else -1
            data[:, i] = (row.start, request.length, set_row, self.control.row(request), refreshed)
        self._row_data.copy_(torch.from_numpy(data), non_blocking=True)
        n, table = len(decodes), self._rows.block_table
        if not n:
            return
        if block_table is None:
            own = np.zeros((n, table.shape[1]), np.int32)
            for i, row in enumerate(decodes):
                own[i, : len(row.request.blocks)] = row.request.blocks
            table[:n] = self._upload(own)
            return
        width = min(table.shape[1], block_table.shape[1])
        if n == num_rows:
            table[:n, :width] = block_table[:n, :width]
        else:
            table[:n, :width] = block_table[self._upload(np.array(places)), :width]

    def _plan_prefill(self, rows: list[Row], placed: list[Row]) -> PrefillPlan:
        """rows: those of `placed`, all of the batch, that have several tokens."""
        assert self.store is not None
        g, size = self.geometry, self.geometry.chunk_tokens
        num_tokens = sum(row.length for row in placed)
        written = np.concatenate([self._written(row.request) for row in placed])
        page0 = np.full(num_tokens, -1, np.int64)
        offset = np.zeros(num_tokens, np.int32)
        whole: list[np.ndarray] = []
        begun: list[np.ndarray] = []
        histories = []
        for row in rows:
            request = row.request
            positions = np.arange(request.num_computed, request.length)
            here = slice(row.start, row.start + row.length)
            chunks = positions // size
            page0[here] = self.store.page_ids(request.blocks, chunks)
            offset[here] = positions % size
            done = np.arange(request.num_computed // size, request.length // size)
            block = request.blocks[done // g.chunks_per_block].astype(np.int64)
            place = done % g.chunks_per_block
            first = row.start + done * size - request.num_computed
            partial = done * size < request.num_computed
            whole.append(np.stack([first, block, place])[:, ~partial])
            begun.append(np.stack([self.store.page_ids(request.blocks, done), block, place])[:, partial])
            others = np.setdiff1d(written, self._written(request))
            histories.append(
                History(
                    blocks=self._upload(request.blocks.astype(np.int64)),
                    tokens=request.num_computed,
                    resident=self.control.is_whole(request),
                    fresh=bool(np.isin(request.blocks[: g.blocks(request.num_computed)], others).any()),
                )
            )
        filled, rest = np.concatenate(whole, 1), np.concatenate(begun, 1)
        small = [self._upload(x.astype(np.int32)) for x in (*filled, *rest[1:])]
        return PrefillPlan(
            rows=rows,
            histories=histories,
            page0=self._upload(page0),
            offset=self._upload(offset),
            whole=(small[0], small[1], small[2]),
            begun=(self._upload(rest[0]), small[3], small[4]),
            last_token=self._upload(np.array([r.start + r.length - 1 for r in rows], np.int64)),
            query_row=self._upload(np.array([self.control.row(r.request) for r in rows], np.int64)),
        )

    def _written(self, request: Request) -> np.ndarray:
        """Blocks that the step writes tokens of a request to."""
        size = self.geometry.block_tokens
        return request.blocks[request.num_computed // size : self.geometry.blocks(request.length)]

    def _renew(self, selection: Selection, keep: np.ndarray, owned: np.ndarray) -> None:
        """Choose a request's set and copy what it lacks, before the step's attention reads it. keep, owned: int64
        [lanes], most full chunks of each, and slots."""
        assert self.store is not None
        config, request, row = self.config, selection.request, selection.set_row
        full, begun = divmod(request.num_computed, self.geometry.chunk_tokens)
        usage = None
        if self._demand.index is not None:
            usage = self.sets.by_chunk(row, self.sets.usage, full).contiguous()
        scores = self._scores(request, selection.row, full, selection.cycle, usage)
        if config.sets == "shared":
            scores, keep = shared_scores(scores, config.mode), np.repeat(keep[:1], len(keep))
        page, slot = renew_set(
            scores, self.sets, self.refresh, row, self._rows.block_table, self._places[request], keep, owned,
            self.geometry, threshold=config.threshold, sink=config.sink_chunks, recency=config.recency_chunks,
            first=selection.first, copy_tail=selection.first and begun > 0, incoming=self._incoming, tile=self._tile,
        )  # fmt: skip
        self._stalls.start()
        ops.fetch(self.pool.pages, self.store.pages, page, slot, MANY_COPIES)
        self._stalls.stop()

    def _score(self, request: Request, row: int, x: ScoreInput) -> torch.Tensor:
        policy = self._policy
        if not isinstance(policy, QueryPolicy) or not isinstance(policy.index, MeanKeyIndex):
            return super()._score(request, row, x)
        # The cells are read where they are, by the kernel that scores them for demand.
        g, place = self.geometry, self._places[request]
        pages = -(-x.num_chunks // PAGE)
        logits = torch.empty(g.num_layers, pages, g.num_q_heads, PAGE, device=self._device)
        own = replace(self.sets, pages=torch.arange(pages, dtype=torch.int32, device=self._device)[None])
        here = slice(place, place + 1)
        rows = DeviceRows(
            token=self._rows.query_row[here],
            length=self._rows.length[here],
            state=torch.zeros(1, dtype=torch.int32, device=self._device),
            query_row=self._rows.query_row[here],
            block_table=self._rows.block_table[here],
        )
        score_layers(self._queries, self._layer_cells[policy.index], rows, own, g.chunk_tokens, x.scale, logits)
        return policy.combine(logits.transpose(1, 2).flatten(2)[..., : x.num_chunks], x)

    def _continue_refresh(self, requests: list[Request]) -> None:
        """Put what was copied beside the last step into its sets, and copy the next chunks beside this one."""
        if any(self.control.refreshes(request) for request in requests):
            self._refresh_rows(self._refreshed.first(len(requests)))

    def _refresh_rows(self, rows: DeviceRows) -> None:
        assert self.store is not None
        config, state = self.config, self.refresh
        demands = self._demand.index is not None
        ops.refresh(
            rows, self.sets, state, self.geometry,
            sink=config.sink_chunks, recency=config.recency_chunks,
            most_used=config.demand_threshold if demands else float("inf"),
        )  # fmt: skip
        n = len(rows.length)
        with self._copying.fork():
            ops.fetch(self.pool.pages, self.store.pages, state.copy_page[:n], state.copy_slot[:n], FEW)

    def _await_copies(self) -> None:
        """Work submitted from here on comes after the copies beside the last step; a wait for them is a stall."""
        late = self._copying.busy
        if late:
            self._stalls.start()
        self._copying.join()
        if late:
            self._stalls.stop()

    def _fetch(self, pages: np.ndarray, slots: np.ndarray) -> None:
        assert self.store is not None
        self._fetched += len(pages)
        ops.fetch(
            self.pool.pages, self.store.pages, self._upload(pages), self._upload(slots.astype(np.int32)), MANY_COPIES
        )

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        # From pageable memory, which is read before the call returns, and without waiting for the device.
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)

    # -- attention --------------------------------------------------------------------------------------------------

    def attend(
        self, plan: DevicePlan, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Attention of one layer. q, out: [t, Hq, D]; k, v: [t, Hkv, D], RoPE applied. Writes out."""
        assert self.store is not None
        # What is written comes before what is read: a row's prefix may be in blocks that others fill in this very step.
        if len(plan.rows.length):
            ops.write_rows(
                q, k, v, self.pool.pages, self.store.pages, plan.rows, self._tails, layer, self.geometry,
                self._queries, self.kv_scales[layer],
            )  # fmt: skip
        if plan.prefill is not None:
            self._attend_prompts(plan.prefill, layer, q, k, v, out)
        if len(plan.rows.length):
            self._decode(plan, layer, q, out)

    def _decode(self, plan: DevicePlan, layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
        assert self.store is not None
        g, config, rows, sets = self.geometry, self.config, plan.rows, self.sets
        pool, host, scales = self.pool.pages, self.store.pages, self.kv_scales[layer]
        wanted, n = self._wanted, len(rows.length)
        index = self._demand.index if plan.demands else None
        arrivals = None
        if index is not None:
            cells = self.layout.part(self._cells[layer], index)
            tables: dict[str, Any] = {}
            if isinstance(index, ProductIndex):
                t = index.tables
                tables = {"to_query": t.to_query[layer], "centroids": t.centroids[layer], "scratch": self._tables}
            # Beside attention over the set as it was; what comes is attended to when both are done.
            with self._beside.fork():
                score_rows(
                    q, cells, rows, sets, g.chunk_tokens, self._scale, wanted.logits, **tables,
                    per_sm=1 if leaves_room(g, n) else 0,
                )  # fmt: skip
                ops.pick(rows, sets, wanted, layer, g, pool, host, threshold=config.demand_threshold, decay=DECAY)
            arrivals = Arrivals(wanted.page[:n], wanted.slot[:n])
        if self.tracer is not None:
            self._beside.join()
            self.tracer(layer, plan)
        resident_decode(
            q, pool, host, rows, self._slot_of, sets, layer, g, self._scale, out, self._scratch, scales=scales,
            arrivals=arrivals, join=self._beside.join,
        )  # fmt: skip
        if arrivals is not None and layer == g.num_layers - 1:
            ops.settle(rows, sets, wanted, g, sink=config.sink_chunks, recency=config.recency_chunks)

    def _attend_prompts(
        self, plan: PrefillPlan, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        assert self.store is not None
        g, pool, host = self.geometry, self.pool.pages, self.store.pages
        scales = self.kv_scales[layer]
        # From here on as they are read later: what a token attends to and a cell's content must not depend on how the
        # prompt was cut into steps, or on which of its blocks were cached.
        k, v = ops.write_tokens(k, v, pool, host, plan.page0, plan.offset, self._slot_of, layer, g, scales)
        scale = self._scale * scales.k
        for cells, codec in self._parts:
            of_this, part = of_layer(codec, layer), cells.parts[layer]
            if len(plan.whole[0]):
                encode_chunks(k, *plan.whole, part, g.chunk_tokens, of_this, scales.k)
            if len(plan.begun[0]):
                encode_pages(host, *plan.begun, part, layer, g, of_this, scales.k)
        self._queries[plan.query_row, layer] = q[plan.last_token]
        for row, history in zip(plan.rows, plan.histories, strict=True):
            here = slice(row.start, row.start + row.length)
            state = self._prefill.attend(q[here], k[here], v[here], scale, causal=True)
            for _ in self._history.tiles(history):
                keys, values = self._history.take(layer, history)
                state = self._prefill.merge(state, self._prefill.attend(q[here], keys, values, scale, causal=False))
            torch.mul(state[0], scales.v, out=out[here])

    # -- metrics ----------------------------------------------------------------------------------------------------

    def close_step(self) -> None:
        # Counts of the step before, or of one before that: nobody waits for them.
        if self.store is not None:
            self._counters[:1].copy_(self._wanted.demanded, non_blocking=True)
            self._counters[1:2].copy_(self._incoming, non_blocking=True)
            self._counters[2:].copy_(self.refresh.brought, non_blocking=True)
        super().close_step()

    def counted(self) -> dict[str, float]:
        demanded, selected, refreshed = self._counters.tolist()
        moved = (demanded + selected + refreshed + self._fetched) * self.geometry.page_bytes
        return {
            "chunks_selected": selected + refreshed,
            "chunks_demanded": demanded,
            "chunks_missed": self.control.counts.chunks_missed,
            "bytes_fetched": moved,
            "bytes_demanded": demanded * self.geometry.page_bytes,
            "bytes_streamed": self._history.bytes_streamed,
            "stall_seconds": self._stalls.seconds,
            "cycles": self.control.counts.cycles,
        }

    def _num_resident(self) -> int:
        return self.control.num_resident

    def close(self) -> None:
        if self.store is not None:
            self._quiesce()
        if self._metrics is not None:
            self._metrics.close()


def _codec(index: ChunkIndex) -> ProductCodec | None:
    """Of all layers; None for mean keys."""
    if not isinstance(index, ProductIndex):
        return None
    t = index.tables
    return ProductCodec(t.to_code, t.mean, t.centroids)
