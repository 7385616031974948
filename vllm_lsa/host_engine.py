"""LSA of one rank on a CPU: the host decides, lays a step out and moves pages before attention reads them."""

from collections.abc import Sequence

import numpy as np
import torch

from vllm_lsa.attention import LayerAttention
from vllm_lsa.engine import LsaEngine
from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.memory.transfers import Transfers
from vllm_lsa.residency.lookahead import LookaheadScheduler
from vllm_lsa.residency.plan import StepPlan
from vllm_lsa.residency.planner import plan_step
from vllm_lsa.residency.replacement import Replacement
from vllm_lsa.residency.requests import Request
from vllm_lsa.residency.usage import Usage

# Tokens of one layer in the staging area; its halves take turns, so a tile of streamed history is half of it.
STAGING_TOKENS = 8192


class HostEngine(LsaEngine[StepPlan]):
    """Both tiers are in host memory, and so is all state. (A CUDA device has `device.engine`.)"""

    @staticmethod
    def _staging_pages(geometry: KVGeometry) -> int:
        return STAGING_TOKENS // geometry.chunk_tokens * geometry.layer_lanes

    def attach(self, num_blocks: int, cells: Sequence[torch.Tensor]) -> None:
        self._attach_store(num_blocks)
        assert self.store is not None
        self.transfers = Transfers(self.store, self.pool)
        self.attention = LayerAttention(
            self.geometry,
            self._scale,
            self.pool,
            self.transfers,
            self.layout,
            self._demand,
            Replacement(
                self.config.demand_chunks,
                self.config.demand_threshold,
                self.config.sink_chunks,
                self.config.recency_chunks,
            ),
            self._queries,
            self._set_peers,
        )
        self._cells = self.attention.cells = list(cells)
        self.lookahead = LookaheadScheduler(
            self.config,
            self.geometry,
            self.pool,
            self.transfers,
            self._select,
            self._max_requests,
            self._layer_weights,
            self.peers.agree,
        )
        self.close_step()  # pool and store have their sizes on /metrics before the first request

    def _leave(self, request: Request) -> None:
        self.lookahead.leave(request)

    def _quiesce(self) -> None:
        pass  # the copy thread only reads it

    def plan(self, rows: Sequence[tuple[str, int]]) -> StepPlan:
        assert self.store is not None
        placed = self._placed(rows)
        self.lookahead.prepare(placed)
        return plan_step(placed, self.lookahead, self.geometry, self.store, self.pool, self.config.demand_chunks)

    def attend(
        self, plan: StepPlan, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        self.attention.run(plan, layer, q, k, v, out)

    def _num_resident(self) -> int:
        return self.lookahead.num_resident

    def counted(self) -> dict[str, float]:
        counts, transfers = self.lookahead.counts, self.transfers.counts
        return {
            "chunks_selected": counts.chunks_selected,
            "chunks_demanded": self.attention.chunks_demanded,
            "chunks_missed": counts.chunks_missed + self.attention.chunks_missed,
            "bytes_fetched": transfers.bytes_fetched,
            "bytes_demanded": transfers.bytes_demanded,
            "bytes_written_back": transfers.bytes_written_back,
            "bytes_streamed": transfers.bytes_streamed,
            "fetch_seconds": transfers.fetch_seconds,
            "stall_seconds": transfers.stall_seconds,
            "cycles": counts.cycles,
        }

    def close(self) -> None:
        if self.store is not None:
            self.transfers.close()
        if self._metrics is not None:
            self._metrics.close()

    def _select(
        self, request: Request, row: int, num_chunks: int, budget_chunks: np.ndarray, cycle: int, usage: Usage | None
    ) -> np.ndarray:
        noted = None if usage is None else torch.from_numpy(usage.of(num_chunks))
        return self._choose(request, row, num_chunks, budget_chunks, cycle, noted).numpy()
