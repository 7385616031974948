"""The exact policy: the native indexer chooses from the whole history, whose index keys are on the device anyway.

What it chose and is not resident is read in the same step: on a CPU as pages, into the slot of the page that was chosen
least lately (`ExactReads`); on a CUDA device as entries, which pass through (`ops.missing_entries`), so that the host
decides nothing within a step. So the result is stock's whatever the budget, which makes it the upper bound of what a
memory indexer can reach.
"""

import numpy as np
import torch

from vllm_lsa.config import LsaConfig
from vllm_lsa.memory.slot_pool import SlotPool
from vllm_lsa.memory.transfers import Transfers
from vllm_lsa.models.deepseek_v4.geometry import EntryGeometry
from vllm_lsa.models.deepseek_v4.selection import TOP_K
from vllm_lsa.residency.lookahead import LookaheadScheduler
from vllm_lsa.residency.replacement import Replacement
from vllm_lsa.residency.requests import Request
from vllm_lsa.residency.selection import select
from vllm_lsa.residency.take_in import take_in


class ExactSets:
    """Sets of one layer each, as cycles begin with them."""

    def __init__(self, config: LsaConfig, geometry: EntryGeometry, lookahead: LookaheadScheduler) -> None:
        self._config = config
        self._geometry = geometry
        self._lookahead = lookahead

    def select(self, scores: torch.Tensor, num_chunks: int, budget_chunks: np.ndarray) -> torch.Tensor:
        """The full pages that a cycle begins with, bool [L, num_chunks], by layer. scores: fp32 [L, entries].
        budget_chunks: int64 [L]."""
        g = self._geometry
        return select(
            scores[:, : num_chunks * g.entries].reshape(g.num_layers, num_chunks, g.entries).amax(-1),
            budget_chunks=budget_chunks,
            threshold=self._config.threshold,
            sink_chunks=self._config.sink_chunks,
            recency_chunks=self._config.recency_chunks,
            shared=False,
            mode=self._config.mode,
        )

    def slots(self, request: Request, layer: int) -> np.ndarray:
        """Slot of each of a request's pages in a layer, int64 [chunks], -1 for what is not resident."""
        chunks, slots = self._lookahead.resident(request).lane(layer)
        found = np.full(self._geometry.chunks(request.length), -1, np.int64)
        found[chunks] = slots
        return found

    def every_slot(self, request: Request) -> np.ndarray:
        """`slots` of all layers, int32 [L, chunks]."""
        resident = self._lookahead.resident(request)
        found = np.full((len(resident.counts), self._geometry.chunks(request.length)), -1, np.int32)
        for layer, row in enumerate(found):
            chunks, slots = resident.lane(layer)
            row[chunks] = slots
        return found


class ExactReads(ExactSets):
    """Sets that a step's own choice changes. Usage of a page: its share of the entries chosen."""

    def __init__(
        self,
        config: LsaConfig,
        geometry: EntryGeometry,
        pool: SlotPool,
        transfers: Transfers,
        lookahead: LookaheadScheduler,
    ) -> None:
        super().__init__(config, geometry, lookahead)
        self._pool = pool
        self._transfers = transfers
        self._replacement = Replacement(TOP_K, 0.0, config.sink_chunks, config.recency_chunks)
        self.chunks_demanded = 0
        self.chunks_missed = 0

    def bring(self, request: Request, layer: int, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Make resident what a step reads, as far as the budget goes.

        chosen: int [n], entries that the indexer chose, -1 for none. Returns `slots` and the pages that were chosen and
        have no slot, int64 [m].
        """
        needed, counts = np.unique(chosen[chosen >= 0] // self._geometry.entries, return_counts=True)
        caps, usage = self._lookahead.caps(request), self._lookahead.usage(request)
        resident = self._lookahead.resident(request)
        if caps is not None and usage is not None and resident.tail > 0:
            mass = np.zeros(resident.tail, np.float32)
            full = needed < resident.tail
            mass[needed[full]] = counts[full] / TOP_K
            lately = usage.note(slice(layer, layer + 1), mass[None])[0]
            held = resident.lane(layer)[0]
            leaving, coming = self._replacement.choose(held, mass, lately, int(caps[layer]))
            # What this step reads stays, and the least wanted of the others waits.
            read = mass[held[leaving]] > 0
            leaving, coming = leaving[~read], coming[: len(coming) - int(read.sum())]
            if len(coming):
                change = (layer, leaving, coming)
                self.chunks_demanded += take_in(self._pool, self._transfers, request, resident, [change])
        slots = self.slots(request, layer)
        return slots, needed[slots[needed] < 0]

    def pass_through(self, request: Request, layer: int, chunks: np.ndarray) -> np.ndarray:
        """Read pages for which the budget or the pool has no slot. Returns where they are until the next call, [m]."""
        self.chunks_missed += len(chunks)
        staged = self._pool.staging[: len(chunks)]
        self._transfers.stream(self._transfers.store.page_ids(request.blocks, chunks, layer), staged)
        return staged
