"""LSA of DeepSeek-V4, without vLLM, here on a CPU: which c4 pages are resident, and from where attention reads them.

A request's resident set is one for all c4 layers, as in the paper: the layers' votes are combined (`mode`) and pages
are chosen by their best entry (`selection`), so a page is in the pool in every c4 layer or in none. The native indexer
scores only what is resident: it is given the table of resident blocks in place of the request's, so its top-k cannot
leave the set, and what it returns are positions in that table, which the slots of the same table turn into pages of the
pool. With indexer="exact" it is shown all blocks, and what it chose is brought into the pool (`exact`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import torch

from vllm_lsa.attention import logger_once
from vllm_lsa.config import LsaConfig
from vllm_lsa.memory.transfers import Transfers
from vllm_lsa.metrics import MetricsWriter
from vllm_lsa.models.deepseek_v4.exact import ExactReads, ExactSets
from vllm_lsa.models.deepseek_v4.geometry import EntryGeometry
from vllm_lsa.models.deepseek_v4.memory_indexer import threshold_of
from vllm_lsa.models.deepseek_v4.native import LastHidden, LastQueries
from vllm_lsa.models.deepseek_v4.page_tables import PageTable, PageTables
from vllm_lsa.models.deepseek_v4.scorer import PagedScorer
from vllm_lsa.models.deepseek_v4.selection import TOP_K, least_budget, page_count, resident_entries, select_pages
from vllm_lsa.residency.lookahead import LookaheadScheduler
from vllm_lsa.residency.plan import Row
from vllm_lsa.residency.policies import make_policy
from vllm_lsa.residency.policies.base import ScoreInput
from vllm_lsa.residency.requests import Request
from vllm_lsa.residency.usage import Usage
from vllm_lsa.tiers import TieredEngine

_CPU = torch.device("cpu")


@dataclass
class EntryPlan:
    """One step of R rows, t tokens, L c4 layers.

    rows: in the order of the batch. shown: the pages that each row chooses from: the resident ones for a row that
    decodes, all of its own for the others (on a CUDA device none). entries: int32 [R], entries there.
    pool_rows, host_rows: rows that read the pool, and the store: prompts, and rows that decode with kept pages that got
    no slot.
    written_pages: int64 [n], pages (of the first layer) that this step adds entries to, and that have a slot in the
    pool; written_slots: int64 [L, n]. last_token, last_row: int64 [R], last token of each row and its row in buffers.

    What a CUDA device does not need is laid out when it is asked for.
    """

    rows: list[Row]
    num_layers: int
    shown: list[PageTable]
    entries: torch.Tensor
    pool_rows: list[int]
    host_rows: list[int]
    written_pages: np.ndarray
    written_slots: np.ndarray
    last_token: torch.Tensor
    last_row: torch.Tensor

    @cached_property
    def table(self) -> torch.Tensor:
        """Blocks of `shown`, int32 [R, W], 0 behind."""
        table = np.zeros((len(self.shown), self._width), np.int32)
        for i, shown in enumerate(self.shown):
            table[i, : len(shown.blocks)] = shown.blocks
        return torch.from_numpy(table)

    @cached_property
    def slots(self) -> torch.Tensor:
        """Slots of `shown`, int64 [L, R, W]; -1 for none, and for rows without. Exact: on a CPU each layer changes
        it."""
        slots = np.full((self.num_layers, len(self.shown), self._width), -1, np.int64)
        for i, shown in enumerate(self.shown):
            if shown.slots is not None:
                slots[:, i, : len(shown.blocks)] = shown.slots
        return torch.from_numpy(slots)

    @cached_property
    def token_row(self) -> torch.Tensor:
        """Row of each token, int64 [t]."""
        return torch.arange(len(self.rows)).repeat_interleave(torch.tensor([row.length for row in self.rows]))

    @property
    def _width(self) -> int:
        return max((len(shown.blocks) for shown in self.shown), default=0)


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
        scorer: PagedScorer | None = None,
        device: torch.device = _CPU,
    ) -> None:
        """scorer: the memory indexer, on `device`, if `config.indexer` names one."""
        self.exact: ExactSets | None = None
        staging = self.staging_pages(max_requests) if config.indexer == "exact" else 0
        super().__init__(config, geometry, num_slots, staging, max_requests, device, metrics)
        # One row more: rows of a CUDA graph that no request has note there.
        self.queries = LastQueries(max_requests + 1, geometry.num_layers, device)
        self.scorer = scorer
        layers, width = ((), 0) if scorer is None else (scorer.layers, scorer.indexer.config.hidden_size)
        self.hidden = LastHidden(max_requests + 1, layers, width, device)
        self._threshold = threshold_of(config, scorer)
        # The native indexer's opinion needs no policy object: it is what the model says.
        by_model = scorer is not None or config.indexer in ("native", "exact")
        self._policy = None if by_model else make_policy(config.indexer, 0, 0, geometry.dtype)
        self._keys: list[torch.Tensor] = []
        self._tables = PageTables(self._resident_pages, check=config.check != "off")

    @staticmethod
    def staging_pages(max_requests: int) -> int:
        """Pages beside the pool's slots for what passes through: one row reads from at most so many."""
        return TOP_K

    def attach(self, num_blocks: int, cells: Sequence[torch.Tensor | None]) -> None:
        """cells: index keys of each c4 layer, uint8 [num_blocks, entries, 132] in any stride between blocks, or None
        where they are in the pages of the store."""
        self._attach_store(num_blocks)
        self._keys = [self.store_keys(layer) if keys is None else keys for layer, keys in enumerate(cells)]
        self._attach_lookahead()
        self.close_step()  # pool and store have their sizes on /metrics before the first request

    def _attach_lookahead(self) -> None:
        assert self.store is not None
        self.transfers = Transfers(self.store, self.pool)
        exact = self.config.indexer == "exact"
        self.lookahead = LookaheadScheduler(
            self.config, self.geometry, self.pool, self.transfers, self._select, self._max_requests, demands=exact
        )
        if exact:
            self.exact = ExactReads(self.config, self.geometry, self.pool, self.transfers, self.lookahead)

    def store_keys(self, layer: int) -> torch.Tensor:
        """Index keys of a layer in the store's pages, uint8 [num_blocks, entries, 132], a view."""
        return self.geometry.key_pages(self.layer_pages(layer))

    def layer_pages(self, layer: int) -> torch.Tensor:
        """The store's pages of one layer, uint8 [num_blocks, page bytes], a view."""
        assert self.store is not None
        return self.store.pages.view(self.store.num_blocks, self.geometry.num_layers, -1)[:, layer]

    def pool_pages(self) -> torch.Tensor:
        """The pool's pages, uint8 [slots, page bytes], a view."""
        return self.pool.pages.view(len(self.pool.pages), -1)

    # -- a step -----------------------------------------------------------------------------------------------------

    def plan(self, rows: Sequence[tuple[str, int]]) -> EntryPlan:
        assert self.store is not None
        placed = self._placed(rows)
        self.lookahead.prepare(placed)
        shown = [self._shown(row.request) for row in placed]
        from_pool = [self._reads_pool(table) for table in shown]
        written_pages, written_slots = self._written(placed)
        entries = [table.entries(self.geometry, row.request.length) for table, row in zip(shown, placed, strict=True)]
        return EntryPlan(
            rows=placed,
            num_layers=self.geometry.num_layers,
            shown=shown,
            entries=torch.tensor(entries, dtype=torch.int32),
            pool_rows=[i for i, pool in enumerate(from_pool) if pool],
            host_rows=[i for i, pool in enumerate(from_pool) if not pool],
            written_pages=written_pages,
            written_slots=written_slots,
            last_token=torch.tensor([row.start + row.length - 1 for row in placed]),
            last_row=torch.tensor([self.lookahead.row(row.request) for row in placed]),
        )

    def _shown(self, request: Request) -> PageTable:
        """What a row of the request chooses from in this step."""
        if self.lookahead.is_decode(request):
            return self._tables.of(request, self.lookahead.resident(request).version)
        return self._history(request)

    def _history(self, request: Request) -> PageTable:
        """All pages of a request that reads the store."""
        pages = self.geometry.chunks(request.length)
        return PageTable(request.blocks[:pages], None, full=pages - 1, tail=pages - 1)

    def _reads_pool(self, table: PageTable) -> bool:
        """Whether a row reads what it chooses in the pool."""
        if table.slots is None:
            return False
        if self.exact is None and not table.complete:
            logger_once(
                "the device pool (%d slots) is smaller than what is kept: requests that lack slots read the host "
                "store at every step, which is exact but slow; raise lsa.device_pool_gib or lower lsa.budget",
                self.pool.num_slots,
            )
            return False
        return True

    def _resident_pages(self, request: Request) -> PageTable:
        """The table of a request's resident set; exact: all of its pages, those that are resident with slots."""
        resident = self.lookahead.resident(request)
        if self.exact is not None:
            slots = self.exact.every_slot(request)
            chunks = np.arange(slots.shape[1])
        else:
            # One set for all layers, so that one order serves all.
            chunks = resident.lane(0)[0]
            if self.config.check != "off" and (resident.chunks[:, : len(chunks)] != chunks).any():
                raise RuntimeError(f"the c4 layers of {request.id} have different resident sets")
            order = chunks.argsort()
            chunks, slots = chunks[order], resident.slots[:, : len(chunks)][:, order]
        return PageTable(
            request.blocks[chunks],
            slots,
            full=len(chunks) - 1,
            tail=resident.tail,
            version=resident.version,
            complete=bool((slots >= 0).all()),
        )

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

    def note_hidden(self, plan: EntryPlan, layer: int, hidden: torch.Tensor) -> None:
        """Keep what the memory indexer reads of a layer. hidden: [t, hidden_size], the attention module's input."""
        self.hidden.note(plan.last_row, layer, hidden[plan.last_token])

    def reads(self, plan: EntryPlan, layer: int, chosen: torch.Tensor) -> Iterator[Read]:
        """From where the tokens of a layer read what the indexer chose out of the plan's table, one after the other.

        chosen: int32 [t or more, 512], places in the table, -1 for none.
        """
        pool, exact = self.geometry.entry_pages(self.pool_pages()), self.exact
        lacking: dict[int, np.ndarray] = {}
        if isinstance(exact, ExactReads):
            lacking = {i: self._bring(exact, plan, layer, i, chosen) for i in plan.pool_rows}
        rows = [i for i in plan.pool_rows if not len(lacking.get(i, ()))]
        if rows:
            yield self._read(plan, rows, plan.slots[layer], pool)
        for i, pages in lacking.items():
            if isinstance(exact, ExactReads) and len(pages):
                table = plan.slots[layer].clone()
                staged = exact.pass_through(plan.rows[i].request, layer, pages)
                table[i, torch.from_numpy(pages)] = torch.from_numpy(staged)
                yield self._read(plan, [i], table, pool)
        if plan.host_rows:
            # In place, since it is memory of the same kind here; nothing of it stays.
            self.transfers.read_in_place(sum(-(-int(plan.entries[i]) // self.geometry.entries) for i in plan.host_rows))
            store = self.geometry.entry_pages(self.layer_pages(layer))
            yield self._read(plan, plan.host_rows, plan.table.long(), store)

    def _bring(self, exact: ExactReads, plan: EntryPlan, layer: int, i: int, chosen: torch.Tensor) -> np.ndarray:
        """Bring what a row chose into the pool. Returns the places int64 [m] of the table that still have no slot."""
        row = plan.rows[i]
        slots, lacking = exact.bring(row.request, layer, chosen[row.start].numpy())
        plan.slots[layer, i, : len(slots)] = torch.from_numpy(slots)
        return lacking

    def _read(self, plan: EntryPlan, rows: list[int], table: torch.Tensor, pages: torch.Tensor) -> Read:
        tokens = torch.isin(plan.token_row, torch.tensor(rows)).nonzero().squeeze(-1)
        return Read(tokens, plan.token_row[tokens], table, pages)

    # -- selection --------------------------------------------------------------------------------------------------

    def _select(
        self, request: Request, row: int, num_chunks: int, budget_chunks: np.ndarray, cycle: int, usage: Usage | None
    ) -> np.ndarray:
        return self._mask(self._chosen(request, row, num_chunks, budget_chunks, cycle).cpu().numpy(), num_chunks)

    def _mask(self, chosen: np.ndarray, num_chunks: int) -> np.ndarray:
        """What a `Selector` returns, of what `_chosen` did. Raises ValueError if scores were NaN."""
        if chosen[-1]:
            raise ValueError("scores of a selection were NaN")
        layers = self.geometry.num_layers
        pages = chosen[:-1].reshape(1 if self.exact is None else layers, num_chunks)
        return np.broadcast_to(pages, (layers, num_chunks))

    def _chosen(
        self, request: Request, row: int, num_chunks: int, budget_chunks: np.ndarray, cycle: int
    ) -> torch.Tensor:
        """Pages for the next cycle, on the device and without waiting for it: bool [L * num_chunks + 1], or
        [num_chunks + 1] where they are the same in all layers. The last says whether a score was NaN."""
        config, g = self.config, self.geometry
        entries = g.num_entries(request.num_computed)
        scores = self._scores(request, row, entries, cycle)
        if self.exact is not None:
            chosen = self.exact.select(scores, num_chunks, budget_chunks)
        else:
            # The budget is that of full pages; `select_pages` counts the newest as well, which it keeps in any case.
            recency, sink = g.num_entries(config.recency_tokens), g.num_entries(config.sink_tokens)
            budget = max(int(budget_chunks[0]) + page_count(entries) - num_chunks, least_budget(recency, sink))
            chosen = select_pages(
                scores.amax(0) if config.mode == "or" else scores.mean(0),
                budget,
                threshold=self._threshold,
                recency_entries=recency,
                sink_entries=sink,
                check=False,
            )[:num_chunks]
        return torch.cat([chosen.flatten(), scores.isnan().any()[None]])

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        """A copy of an array where scores are computed."""
        return torch.from_numpy(array)

    def _scores(self, request: Request, row: int, entries: int, cycle: int) -> torch.Tensor:
        """Scores in [0, 1] of the entries that a request has so far, fp32 [L, entries]; [1, entries] of an ensemble."""
        g = self.geometry
        if self._policy is None:
            blocks = self._on_device(request.blocks.astype(np.int64))
            if self.scorer is None:
                return self.queries.shares(row, self._keys, blocks, entries)
            return self.scorer.scores(
                self.hidden.of(row),
                torch.full((1,), request.num_computed - 1, device=self._device),
                dict(enumerate(self._keys)),
                blocks[None],
                torch.full((1,), entries, device=self._device),
                entries,
                self.config.mode,
            )
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
        if request in self.lookahead:
            row = self.lookahead.row(request)
            self.queries.forget(row)
            self.hidden.forget(row)
        self._tables.forget(request)
        self.lookahead.leave(request)

    def _quiesce(self) -> None:
        pass  # the copy thread only reads the store

    @property
    def _index_bytes(self) -> int:
        return self.geometry.device_index_bytes

    def _num_resident(self) -> int:
        return self.lookahead.num_resident

    def counted(self) -> dict[str, float]:
        counts = asdict(self.transfers.counts) | asdict(self.lookahead.counts)
        if isinstance(self.exact, ExactReads):
            counts["chunks_demanded"] = self.exact.chunks_demanded
            counts["chunks_missed"] += self.exact.chunks_missed
        return counts

    def close(self) -> None:
        if self.store is not None:
            self.transfers.close()
        if self._metrics is not None:
            self._metrics.close()
