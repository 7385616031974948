"""Copies between the tiers of a CPU: at once, or in a thread when asked ahead."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from vllm_lsa.memory.host_store import HostStore
from vllm_lsa.memory.slot_pool import SlotPool
from vllm_lsa.ops.copy_pages import copy_pages
from vllm_lsa.ops.write_tokens import write_tokens


@dataclass
class TransferCounts:
    """Bytes and seconds since the start; the engine publishes them."""

    bytes_fetched: int = 0
    bytes_demanded: int = 0
    bytes_streamed: int = 0
    bytes_written_back: int = 0
    fetch_seconds: float = 0.0
    stall_seconds: float = 0.0


class Ticket:
    """A copy under way into `slots`, or one that is done."""

    def __init__(self, slots: np.ndarray, future: "Future[None] | None" = None) -> None:
        self.slots = slots
        self._future = future

    def wait(self) -> None:
        """Return once the pages have come."""
        if self._future is not None:
            self._future.result()


class Transfers:
    """Moves pages between host store and slot pool. A thread does what is asked ahead, so that races show here too."""

    def __init__(self, store: HostStore, pool: SlotPool) -> None:
        self.store = store
        self.pool = pool
        self.counts = TransferCounts()
        self._outstanding: list[Ticket] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lsa-fetch")
        # Another request may come upon a page that is still on its way.
        pool.settle = self.settle

    def fetch(self, pages: np.ndarray, slots: np.ndarray, ahead: bool = False) -> Ticket:
        """Copy host pages int64 [n] into slots int64 [n]. With `ahead`, the copy may overlap what follows; without,
        it is done on return, and the time it takes is counted as a stall."""
        self.counts.bytes_fetched += self._bytes(len(pages))
        if ahead and len(pages):
            ticket = Ticket(slots, self._thread.submit(self._fetch, pages, slots))
            self.pool.arriving[slots] = True
            self._outstanding.append(ticket)
            return ticket
        start = time.perf_counter()
        self._fetch(pages, slots)
        self.counts.stall_seconds += time.perf_counter() - start
        return Ticket(slots)

    def demand(self, pages: np.ndarray, slots: np.ndarray) -> None:
        """`fetch`, at once, what a step's own queries have asked for."""
        self.counts.bytes_demanded += self._bytes(len(pages))
        self.fetch(pages, slots)

    def wait(self, ticket: Ticket) -> None:
        """Wait for a ticket; the time counts as a stall of decode."""
        start = time.perf_counter()
        ticket.wait()
        self.counts.stall_seconds += time.perf_counter() - start
        if ticket in self._outstanding:
            self._outstanding.remove(ticket)
            self.pool.arriving[ticket.slots] = False

    def settle(self) -> None:
        """Wait for everything under way."""
        for ticket in list(self._outstanding):
            self.wait(ticket)

    def stream(self, pages: np.ndarray, slots: np.ndarray) -> None:
        """Copy host pages into staging slots."""
        self.counts.bytes_streamed += self._bytes(len(pages))
        self._copy(pages, slots)

    def write(
        self, k: torch.Tensor, v: torch.Tensor, offset: torch.Tensor, slot: torch.Tensor, page: torch.Tensor
    ) -> None:
        """Write-through of new tokens: into their slots, where they have one, and into the host store.

        k, v: [t, Hkv, D]. offset, slot: int32 [t], position in the chunk and slot or -1. page: int64 [t].
        """
        self.counts.bytes_written_back += 2 * k.numel() * k.element_size()
        write_tokens(k, v, offset, self.pool.pages, slot, self.store.pages, page)

    def write_pages(self, pages: np.ndarray, slots: np.ndarray) -> None:
        """Write-through of host pages int64 [n] that the step has just written, into their slots int64 [n]."""
        self._copy(pages, slots)

    def read_in_place(self, count: int) -> None:
        """Count pages that attention reads from the host store itself."""
        self.counts.bytes_streamed += self._bytes(count)

    def close(self) -> None:
        """Finish the copy under way and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, pages: np.ndarray, slots: np.ndarray) -> None:
        start = time.perf_counter()
        self._copy(pages, slots)
        self.counts.fetch_seconds += time.perf_counter() - start

    def _copy(self, pages: np.ndarray, slots: np.ndarray) -> None:
        copy_pages(self.pool.pages, torch.from_numpy(slots), self.store.pages, torch.from_numpy(pages))

    def _bytes(self, count: int) -> int:
        return count * self.store.geometry.page_bytes
