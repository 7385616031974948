"""LSA of DeepSeek-V4 on a CUDA device, without vLLM: the pool is device memory, the host store pinned.

Sets are planned on the host as on a CPU. What differs: copies go by streams, what kernels read lies in buffers of a
fixed address (`DeviceTables`), so that a CUDA graph can hold a step, and rows of one token all read the pool: a page
that gets no slot there is left out of its row's table. Prompts read the store through the device's view of it.

With indexer="exact" such rows choose from all of their pages, and a kernel reads the entries that they chose on pages
without a slot from the store into staging pages of the row. It is the same staging in all layers. A set is chosen for a
cycle and stays: misses do not change it, so that what is chosen again is read again. At 584 bytes an entry even 512 of
them in each of 21 layers are 6.3 MB for a row and step, 0.12 ms of a link of 50 GB/s.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from vllm_lsa.attention import logger_once
from vllm_lsa.config import LsaConfig
from vllm_lsa.memory.device_counts import DeviceCounts
from vllm_lsa.memory.device_transfers import DeviceTransfers
from vllm_lsa.metrics import MetricsWriter
from vllm_lsa.models.deepseek_v4.device_tables import DeviceTables
from vllm_lsa.models.deepseek_v4.engine import DeepseekV4Engine, EntryPlan
from vllm_lsa.models.deepseek_v4.exact import ExactSets
from vllm_lsa.models.deepseek_v4.geometry import EntryGeometry
from vllm_lsa.models.deepseek_v4.page_tables import PageTable
from vllm_lsa.models.deepseek_v4.scorer import PagedScorer
from vllm_lsa.models.deepseek_v4.selection import FULL_PAGES, TOP_K
from vllm_lsa.ops.missing_entries import ENTRY_BYTES, read_missing
from vllm_lsa.residency.lookahead import LookaheadScheduler
from vllm_lsa.residency.requests import Request
from vllm_lsa.residency.usage import Usage


class DeepseekV4DeviceEngine(DeepseekV4Engine):
    """The c4 cache in pinned host memory and a pool on the device."""

    transfers: DeviceTransfers  # type: ignore[assignment]

    def __init__(
        self,
        config: LsaConfig,
        geometry: EntryGeometry,
        num_slots: int,
        max_requests: int,
        max_tokens: int,
        max_length: int,
        heads: int,
        device: torch.device,
        metrics: MetricsWriter | None = None,
        scorer: PagedScorer | None = None,
    ) -> None:
        """max_tokens: of a step. max_length: tokens of a request. heads: of the native indexer."""
        super().__init__(config, geometry, num_slots, max_requests, metrics, scorer, device)
        self.queries.allocate(heads)
        width, exact = geometry.chunks(max_length), config.indexer == "exact"
        staging = self.pool.staging if exact else None
        self.tables = DeviceTables(geometry, max_requests, width, max_tokens, device, staging)
        self._places = torch.full((max_requests if exact else 0, TOP_K), -1, dtype=torch.int32, device=device)
        # Entries read from the store because they had no slot, and pages that they are on.
        self._missing = DeviceCounts(2, device)

    @staticmethod
    def staging_pages(max_requests: int) -> int:
        """Pages beside the pool's slots for what passes through: all that the rows of a step choose in one layer."""
        return max_requests * FULL_PAGES

    def _attach_lookahead(self) -> None:
        assert self.store is not None
        self.transfers = DeviceTransfers(self.store, self.pool)
        self.lookahead = LookaheadScheduler(
            self.config, self.geometry, self.pool, self.transfers, self._select, self._max_requests, demands=False,
            single_prompt_tokens=True, begin=self._begin,
        )  # fmt: skip
        if self.config.indexer == "exact":
            self.exact = ExactSets(self.config, self.geometry, self.lookahead)

    def attach(
        self,
        num_blocks: int,
        cells: Sequence[torch.Tensor | None],
        view: Callable[[torch.Tensor], torch.Tensor] = lambda pages: pages,
    ) -> None:
        """view: makes of a pinned tensor what the device sees of it; the default is for Triton's interpreter."""
        self._view = view
        super().attach(num_blocks, cells)

    def store_keys(self, layer: int) -> torch.Tensor:
        return self.geometry.key_pages(self.store_view(layer))

    def store_view(self, layer: int) -> torch.Tensor:
        """The store's pages of a layer as kernels reach them, uint8 [num_blocks, page bytes]."""
        return self._view(self.layer_pages(layer))

    def pool_entries(self) -> torch.Tensor:
        """The pool as attention reads it, uint8 [slots, entries, 584], pages a whole page apart."""
        return entry_view(self.pool_pages(), self.geometry.entries)

    def plan(self, rows: Sequence[tuple[str, int]]) -> EntryPlan:
        assert self.store is not None
        plan = super().plan(rows)
        self.tables.send(plan, self.store.lane_offset, self.transfers)
        return plan

    def _history(self, request: Request) -> PageTable:
        # A prompt needs no table: it reads the store by vLLM's own.
        return replace(super()._history(request), blocks=request.blocks[:0])

    def _resident_pages(self, request: Request) -> PageTable:
        table = super()._resident_pages(request)
        if self.exact is not None or table.complete:
            return table
        logger_once(
            "the device pool (%d slots) is smaller than what is kept: pages without a slot are left out of their "
            "request's set; raise lsa.device_pool_gib or lower lsa.budget",
            self.pool.num_slots,
        )
        assert table.slots is not None
        here = np.all(table.slots >= 0, axis=0)
        return replace(
            table,
            blocks=table.blocks[here],
            slots=table.slots[:, here],
            full=int(here[:-1].sum()),
            tail=table.tail if here[-1] else None,
            complete=True,
        )

    def _begin(
        self, request: Request, row: int, num_chunks: int, budget_chunks: np.ndarray, cycle: int, usage: Usage | None
    ) -> Callable[[], np.ndarray]:
        """See `Beginner`."""
        arrived = self.transfers.download(self._chosen(request, row, num_chunks, budget_chunks, cycle))
        return lambda: self._mask(arrived(), num_chunks)

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        return self.transfers.upload(array)

    def write_through_on_device(self, layer: int, pages: int) -> None:
        """Repeat in the pool the first `pages` pages that the step has written. Fit for a CUDA graph."""
        tables = self.tables
        self.transfers.write_pages(tables.written_page[layer, :pages], tables.written_slot[layer, :pages])

    def read_missing(self, layer: int, chosen: torch.Tensor) -> torch.Tensor:
        """With indexer="exact": make all that rows chose readable in the pool. Fit for a CUDA graph.

        chosen: int32 [n, 512], entries of each row's history, -1 for none. Returns where they are in the rows of
        `tables.slots`, int32 [n, 512], a buffer that the next call overwrites, as it does the staging pages.
        """
        assert self.store is not None
        places, tables = self._places[: len(chosen)], self.tables
        store = self.store.pages.view(self.store.num_blocks, self.geometry.num_layers, -1)
        read_missing(
            chosen, tables.entries.squeeze(1), tables.table, tables.slots, layer, self.pool_pages(), store, places,
            self._missing.on_device,
        )  # fmt: skip
        return places

    def decode_keys(self, layer: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the first `rows` rows, of one token each, find the index keys of a layer whose keys are in our pages:
        the keys uint8 [n, entries, 132] and a table int32 [rows, W] of them. Resident pages have them in the pool; what
        is exact is shown all pages, whose keys it reads from the store."""
        if self.exact is not None:
            return self.store_keys(layer), self.tables.table[:rows]
        return self.geometry.key_pages(self.pool_pages()), self.tables.slots[layer, :rows]

    def counted(self) -> dict[str, float]:
        """As in the base class; what passes through is known a step or two later."""
        counts = super().counted()
        if self.exact is not None:
            entries, pages = self._missing.read()
            counts["bytes_streamed"] += entries * ENTRY_BYTES
            counts["chunks_missed"] += pages
        return counts

    def note_on_device(
        self, layer: int, rows: int, hidden: torch.Tensor, q: torch.Tensor | None, w: torch.Tensor | None
    ) -> None:
        """Keep what the next selection reads of `rows` rows of the batch: hidden [t, hidden_size]; q fp8 [t, h, 128]
        and w fp32 [t, h], if the indexer made them. Fit for a CUDA graph."""
        token, row = self.tables.last_token[:rows], self.tables.last_row[:rows]
        if self.scorer is not None:
            self.hidden.note(row, layer, hidden[token])
        elif q is not None and w is not None:
            self.queries.note(row, layer, q[token], w[token])

    def _quiesce(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def entry_view(pages: torch.Tensor, entries: int) -> torch.Tensor:
    """Pages uint8 [n, page bytes], in any stride, as [n, entries, 584]."""
    return pages[:, : entries * ENTRY_BYTES].unflatten(1, (entries, ENTRY_BYTES))
