"""LSA of DeepSeek-V4 on a CPU, without vLLM: which c4 pages are resident, and from where attention reads them.

A request's resident set is one for all c4 layers, as in the paper: the layers' votes are combined (`mode`) and pages
are chosen by their best entry (`selection`), so a page is in the pool in every c4 layer or in none. The native indexer
scores only what is resident: it is given the table of resident blocks in place of the request's, so its top-k cannot
leave the set, and what it returns are positions in that table, which the slots of the same table turn into pages of the
pool.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from vllm_lsa.attention import logger_once
from vllm_lsa.config import LsaConfig
from vllm_lsa.memory.transfers import Transfers
from vllm_lsa.metrics import MetricsWriter
from vllm_lsa.models.deepseek_v4.geometry import EntryGeometry
from vllm_lsa.models.deepseek_v4.native import LastQueries
from vllm_lsa.models.deepseek_v4.selection import least_budget, page_count, resident_entries, select_pages
from vllm_lsa.residency.lookahead import LookaheadScheduler
from vllm_lsa.residency.plan import Row
from vllm_lsa.residency.policies import make_policy
from vllm_lsa.residency.policies.base import ScoreInput
from vllm_lsa.residency.requests import Request
from vllm_lsa.residency.usage import Usage
from vllm_lsa.tiers import TieredEngine


@dataclass
class EntryPlan:
    """One step of R rows, t tokens, L c4 layers.

    rows: in the order of the batch. table: int32 [R, W], blocks whose entries each row chooses from, in order, 0
    behind: the resident ones for a row that decodes, all of its own for the others. entries: int32 [R], entries there.
    slots: int64 [L, R, W], where the pages of decoding rows are in the pool; -1 for none.
    pool_rows, host_rows: rows that read the pool, and the store: prompts, and rows that decode with kept pages that got
    no slot. token_row: int64 [t].
    written_pages: int64 [n], pages (of the first layer) that this step adds entries to, and that have a slot in the
    pool; written_slots: int64 [L, n]. last_token, last_row: int64 [R], last token of each row and its row in buffers.
    """

    rows: list[Row]
    table: torch.Tensor
    entries: torch.Tensor
    slots: torch.Tensor
    pool_rows: list[int]
    host_rows: list[int]
    token_row: torch.Tensor
    written_pages: np.ndarray
    written_slots: np.ndarray
    last_token: torch.Tensor
    last_row: torch.Tensor


@dataclass
class Read:
    """Tokens that read one memory. tokens: int64 [n]. rows: int64 [n], each token's row of `table` int64 [R, W], which
    has the page of `pages` uint8 [M, page bytes] (in any stride) for each place of the plan's table."""

    tokens: torch.Tensor
    rows: torch.Tensor
    table: torch.Tensor
    pages: torch.Tensor


class DeepseekV4Engine(TieredEngine[EntryPlan, EntryGeometry]):
    """The c4 cache in two tiers."""

    def __init__(
        self,
        config: LsaConfig,
        geometry: EntryGeometry,
        num_slots: int,
        max_requests: int,
        metrics: MetricsWriter | None = None,
    ) -> None:
        super().__init__(config, geometry, num_slots, 0, max_requests, torch.device("cpu"), metrics)
        self.queries = LastQueries(max_requests, geometry.num_layers)
        # The native indexer's opinion needs no policy object: it is what the model says.
        self._policy = None if config.indexer == "native" else make_policy(config.indexer, 0, 0, geometry.dtype)
        self._keys: list[torch.Tensor] = []

    def attach(self, num_blocks: int, cells: Sequence[torch.Tensor]) -> None:
        """cells: index keys of each c4 layer, uint8 [num_blocks, entries, 132] in any stride between blocks."""
        self._attach_store(num_blocks)
        assert self.store is not None
        self._keys = list(cells)
        self.transfers = Transfers(self.store, self.pool)
        self.lookahead = LookaheadScheduler(
            self.config, self.geometry, self.pool, self.transfers, self._select, self._max_requests
        )
        self.close_step()  # pool and store have their sizes on /metrics before the first request

    def layer_pages(self, layer: int) -> torch.Tensor:
        """The store's pages of one layer, uint8 [num_blocks, page bytes], a view."""
        assert self.store is not None
        return self.store.pages.view(self.store.num_blocks, self.geometry.num_layers, -1)[:, layer]

    # -- a step -----------------------------------------------------------------------------------------------------

    def plan(self, rows: Sequence[tuple[str, int]]) -> EntryPlan:
        assert self.store is not None
        placed = self._placed(rows)
        self.lookahead.prepare(placed)
        held = [self._held(row) for row in placed]
        width = max((len(blocks) for blocks, _, _ in held), default=0)
        table = np.zeros((len(placed), width), np.int32)
        slots = np.full((self.geometry.num_layers, len(placed), width), -1, np.int64)
        pool_rows, host_rows = [], []
        for i, (blocks, found, _) in enumerate(held):
            table[i, : len(blocks)] = blocks
            if found is None:
                host_rows.append(i)
                continue
            slots[:, i, : len(blocks)] = found
            if (found < 0).any():
                logger_once(
                    "the device pool (%d slots) is smaller than what is kept: requests that lack slots read the host "
                    "store at every step, which is exact but slow; raise lsa.device_pool_gib or lower lsa.budget",
                    self.pool.num_slots,
                )
                host_rows.append(i)
            else:
                pool_rows.append(i)
        written_pages, written_slots = self._written(placed)
        return EntryPlan(
            rows=placed,
            table=torch.from_numpy(table),
            entries=torch.tensor([entries for _, _, entries in held], dtype=torch.int32),
            slots=torch.from_numpy(slots),
            pool_rows=pool_rows,
            host_rows=host_rows,
            token_row=torch.arange(len(placed)).repeat_interleave(torch.tensor([r.length for r in placed])),
            written_pages=written_pages,
            written_slots=written_slots,
            last_token=torch.tensor([row.start + row.length - 1 for row in placed]),
            last_row=torch.tensor([self.lookahead.row(row.request) for row in placed]),
        )

    def _held(self, row: Row) -> tuple[np.ndarray, np.ndarray | None, int]:
        """(blocks int32 [n] in order, their slots int64 [L, n], entries in them) of a row that decodes; slots None for
        one that reads its whole history."""
        request, g = row.request, self.geometry
        entries = g.num_entries(request.length)
        if not self.lookahead.is_decode(request):
            return request.blocks[: g.chunks(request.length)], None, entries
        resident = self.lookahead.resident(request)
        # One set for all layers, so that one order serves all.
        chunks = resident.lane(0)[0]
        if self.config.check != "off" and (resident.chunks[:, : len(chunks)] != chunks).any():
            raise RuntimeError(f"the c4 layers of {request.id} have different resident sets")
        order = chunks.argsort()
        slots = resident.slots[:, : len(chunks)][:, order].astype(np.int64)
        absent = resident.tail + 1 - len(chunks)
        return request.blocks[chunks[order]], slots, entries - absent * g.entries

    def _written(self, rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
        """Pages that this step adds entries to and that have slots, see `EntryPlan`. A page has one in all layers or in
        none, unless the pool is exhausted."""
        assert self.store is not None
        g = self.geometry
        pages = []
        for row in rows:
            first, end = (g.num_entries(tokens) for tokens in (row.request.num_computed, row.request.length))
            if end > first:
                chunks = np.arange(first // g.entries, (end - 1) // g.entries + 1)
                pages.append(self.store.page_ids(row.request.blocks, chunks))
        every = np.concatenate(pages) if pages else np.empty(0, np.int64)
        slots = self.pool.lookup(every[None, :] + self.store.lane_offset[:, None])
        some = (slots >= 0).any(0)
        return every[some], slots[:, some]

    def write_through(self, plan: EntryPlan, layer: int) -> None:
        """The layer's entries of this step are in the store: repeat them in the pool."""
        assert self.store is not None
        slots = plan.written_slots[layer]
        here = slots >= 0
        self.transfers.write_pages(plan.written_pages[here] + self.store.lane_offset[layer], slots[here])

    def note_queries(self, plan: EntryPlan, layer: int, q: torch.Tensor, w: torch.Tensor) -> None:
        """Keep the indexer's last queries. q: fp8 [t, h, 128]. w: fp32 [t, h]."""
        self.queries.note(plan.last_row, layer, q[plan.last_token], w[plan.last_token])

    def reads(self, plan: EntryPlan, layer: int) -> list[Read]:
        """From where the tokens of a layer read what the indexer chose out of the plan's table."""
        reads = []
        if plan.pool_rows:
            pool = self.pool.pages.view(len(self.pool.pages), -1)
            reads.append(self._read(plan, plan.pool_rows, plan.slots[layer], pool))
        if plan.host_rows:
            # In place, since it is memory of the same kind here; nothing of it stays.
            self.transfers.read_in_place(sum(-(-int(plan.entries[i]) // self.geometry.entries) for i in plan.host_rows))
            reads.append(self._read(plan, plan.host_rows, plan.table.long(), self.layer_pages(layer)))
        return reads

    def _read(self, plan: EntryPlan, rows: list[int], table: torch.Tensor, pages: torch.Tensor) -> Read:
        tokens = torch.isin(plan.token_row, torch.tensor(rows)).nonzero().squeeze(-1)
        return Read(tokens, plan.token_row[tokens], table, pages)

    # -- selection --------------------------------------------------------------------------------------------------

    def _select(
        self, request: Request, row: int, num_chunks: int, budget_chunks: np.ndarray, cycle: int, usage: Usage | None
    ) -> np.ndarray:
        config, g = self.config, self.geometry
        entries = g.num_entries(request.num_computed)
        scores = self._scores(request, row, entries, cycle)
        # The budget is that of full pages; `select_pages` counts the newest as well, which it keeps in any case.
        recency, sink = g.num_entries(config.recency_tokens), g.num_entries(config.sink_tokens)
        budget = max(int(budget_chunks[0]) + page_count(entries) - num_chunks, least_budget(recency, sink))
        pages = select_pages(
            scores.amax(0) if config.mode == "or" else scores.mean(0),
            budget,
            threshold=config.threshold,
            recency_entries=recency,
            sink_entries=sink,
        )
        return pages[:num_chunks].expand(g.num_layers, num_chunks).numpy()

    def _scores(self, request: Request, row: int, entries: int, cycle: int) -> torch.Tensor:
        """Scores in [0, 1] of the entries that a request has so far, fp32 [L, entries]."""
        g = self.geometry
        if self._policy is None:
            return self.queries.shares(row, self._keys, torch.from_numpy(request.blocks.astype(np.int64)), entries)
        of_pages = self._policy.score(
            ScoreInput(
                query=None,
                cells=None,
                usage=None,
                num_chunks=page_count(entries),
                num_layers=g.num_layers,
                layer_lanes=1,
                position=request.num_computed,
                scale=1.0,
                mode=self.config.mode,
                request_seed=request.seed,
                cycle=cycle,
                device=self._device,
            )
        )
        return resident_entries(of_pages, entries)

    # -- what the base class asks for ---------------------------------------------------------------------------------

    def _leave(self, request: Request) -> None:
        self.lookahead.leave(request)

    def _quiesce(self) -> None:
        pass  # the copy thread only reads the store

    @property
    def _index_bytes(self) -> int:
        return self.geometry.num_layers * self.geometry.index_bytes

    def _num_resident(self) -> int:
        return self.lookahead.num_resident

    def counted(self) -> dict[str, float]:
        return asdict(self.transfers.counts) | asdict(self.lookahead.counts)

    def close(self) -> None:
        if self.store is not None:
            self.transfers.close()
        if self._metrics is not None:
            self._metrics.close()
