"""What every engine has: host store, device pool and the mirror of the scheduler's requests, step by step."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from vllm_lsa.config import LsaConfig
from vllm_lsa.memory.geometry import PageGeometry
from vllm_lsa.memory.host_store import HostStore
from vllm_lsa.memory.slot_pool import SlotPool
from vllm_lsa.metrics import PER_GROUP, MetricsWriter
from vllm_lsa.residency.peers import Peers
from vllm_lsa.residency.plan import Row
from vllm_lsa.residency.requests import Request, RequestMirror, StepUpdate

P = TypeVar("P")
G = TypeVar("G", bound=PageGeometry)


class TieredEngine(ABC, Generic[P, G]):
    """The two tiers of one rank and the requests that live in them, whatever a page holds.

    P: the plan of a step. G: the geometry.

    The device pool is there from the start, the host store once `attach` says how many blocks there are.

    A step is `open_step` (what the scheduler decided), `plan` (the rows of the batch), the attention of each layer, and
    `close_step`.
    """

    def __init__(
        self,
        config: LsaConfig,
        geometry: G,
        num_slots: int,
        staging: int,
        max_requests: int,
        device: torch.device,
        metrics: MetricsWriter | None = None,
    ) -> None:
        """staging: pages beside the pool's slots, for what passes through."""
        self.config = config
        self.geometry = geometry
        # The plugin says before `attach` who they are.
        self.peers = Peers()
        self.mirror = RequestMirror(geometry.block_tokens)
        self._device = device
        self._metrics = metrics
        self._prompts: dict[str, int] = {}
        self._max_requests = max_requests
        self._poison = config.check == "poison"
        self.pool = SlotPool(geometry, num_slots, staging, device, self._poison)
        self.store: HostStore | None = None

    @abstractmethod
    def attach(self, num_blocks: int, cells: Sequence[Any]) -> None:
        """Allocate the host store for `num_blocks` blocks and take over the index cells of every layer.

        cells: one tensor a layer, uint8 [num_blocks, …], in memory that vLLM allocates and pages.
        """

    def _attach_store(self, num_blocks: int) -> None:
        self.store = HostStore(self.geometry, num_blocks, pin=self._device.type == "cuda")
        if self._poison:
            self.store.pages.fill_(self.geometry.poison)
        self.pool.bind(self.store.num_pages)

    def open_step(self, update: StepUpdate) -> None:
        """Apply what the scheduler decided, before any work of the step."""
        assert self.store is not None
        for request in self.mirror.leave(update):
            self._leave(request)
        for name in update.finished:
            self._prompts.pop(name, None)
        self._prompts.update((new.id, new.num_prompt) for new in update.new)
        fresh = self.mirror.enter(update, self._prompts)
        targets = np.array([target for _, target in update.block_copies], np.int32)
        changed = np.union1d(fresh, targets)
        self.pool.invalidate(self.store.block_pages(changed))
        if (self._poison and len(changed)) or update.block_copies:
            self._quiesce()
        if self._poison and len(changed):
            self.store.poison(changed)
        for source, target in update.block_copies:
            self.store.copy_block(source, target)

    @abstractmethod
    def _leave(self, request: Request) -> None:
        """Give back what a request holds, once nothing is on its way to it."""

    @abstractmethod
    def _quiesce(self) -> None:
        """Wait until nothing writes to the host store but the host."""

    @abstractmethod
    def plan(self, rows: Sequence[tuple[str, int]]) -> P:
        """Decide the resident sets of a step and lay it out. rows: (request id, tokens) in the order of the batch."""

    def _placed(self, rows: Sequence[tuple[str, int]]) -> list[Row]:
        """Rows of the batch with their requests and where their tokens begin. rows: see `plan`."""
        start, placed = 0, []
        for name, length in rows:
            placed.append(Row(self.mirror.requests[name], start, length))
            start += length
        return placed

    def footprint(self) -> tuple[int, int, int]:
        """Bytes of live requests in whole chunks: all pages, those in resident sets, and the index beside them."""
        geometry = self.geometry
        chunks = sum(geometry.chunks(request.length) for request in self.mirror.requests.values())
        return (
            chunks * geometry.num_lanes * geometry.page_bytes,
            self._num_resident() * geometry.page_bytes,
            chunks * self._index_bytes,
        )

    @property
    @abstractmethod
    def _index_bytes(self) -> int:
        """Bytes of a chunk's index in all layers."""

    @abstractmethod
    def _num_resident(self) -> int:
        """Pages in resident sets."""

    def close_step(self) -> None:
        """Publish the metrics."""
        if self._metrics is None or self.store is None:
            return
        total, resident, index = self.footprint()
        values = {
            "kv_bytes_total": total,
            "kv_bytes_resident": resident,
            "index_bytes": index,
            "pool_slots": self.pool.num_slots,
            "slots_used": self.pool.num_pinned,
            "slots_cached": self.pool.num_cached,
            "live_requests": len(self.mirror.requests),
            "host_blocks": self.store.num_blocks,
            "evictions": self.pool.evictions,
            **self.counted(),
        }
        if self.geometry.rank:
            values |= dict.fromkeys(PER_GROUP, 0)
        for name, value in values.items():
            self._metrics.set(name, value)

    @abstractmethod
    def counted(self) -> dict[str, float]:
        """Metrics that only grow, less the pool's."""

    @abstractmethod
    def close(self) -> None:
        """End what runs beside the steps and withdraw the metrics."""
