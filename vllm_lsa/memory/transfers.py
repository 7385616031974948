"""Copies between the tiers. One contract; on CPU a memcpy (in a thread when asked ahead), on CUDA a side stream."""

import time
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from vllm_lsa.memory.host_store import HostStore
from vllm_lsa.memory.slot_pool import SlotPool
from vllm_lsa.ops.copy_pages import copy_pages
from vllm_lsa.ops.write_tokens import write_tokens


class Ticket(ABC):
    """A copy under way into `slots`."""

    def __init__(self, slots: np.ndarray) -> None:
        self.slots = slots

    @abstractmethod
    def wait(self) -> None:
        """Return once work submitted from here on sees the copied pages."""


@dataclass
class TransferCounts:
    """Bytes and seconds since the start; the engine publishes them."""

    bytes_fetched: int = 0
    bytes_streamed: int = 0
    bytes_written_back: int = 0
    fetch_seconds: float = 0.0
    stall_seconds: float = 0.0


class Transfers(ABC):
    """Moves pages between host store and slot pool."""

    def __init__(self, store: HostStore, pool: SlotPool) -> None:
        self.store = store
        self.pool = pool
        self.counts = TransferCounts()
        self._outstanding: list[Ticket] = []
        # Another request may come upon a page that is still on its way.
        pool.settle = self.settle

    def fetch(self, pages: np.ndarray, slots: np.ndarray, ahead: bool = False) -> Ticket:
        """Copy host pages int64 [n] into slots int64 [n]. With `ahead`, the copy may overlap what follows; without,
        work submitted from here on sees the pages, and the time it takes is counted as a stall."""
        self.counts.bytes_fetched += self._bytes(len(pages))
        if ahead and len(pages):
            ticket = self._submit(pages, slots)
            self.pool.arriving[slots] = True
            self._outstanding.append(ticket)
            return ticket
        start = time.perf_counter()
        self._copy_now(pages, slots)
        self.counts.stall_seconds += time.perf_counter() - start
        return _Done(slots)

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

    @abstractmethod
    def _copy_now(self, pages: np.ndarray, slots: np.ndarray) -> None:
        """Copy, ordered before the work submitted next."""

    @abstractmethod
    def _submit(self, pages: np.ndarray, slots: np.ndarray) -> Ticket:
        """Start a copy beside the work submitted next."""

    @abstractmethod
    def stream(self, pages: np.ndarray, slots: np.ndarray) -> None:
        """Copy host pages through staging slots, for the work submitted next."""

    @abstractmethod
    def write(
        self, k: torch.Tensor, v: torch.Tensor, offset: torch.Tensor, slot: torch.Tensor, page: torch.Tensor
    ) -> None:
        """Write-through of new tokens: into their slots, where they have one, and into the host store.

        k, v: [t, Hkv, D] on the device. offset, slot: int32 [t], position in the chunk and slot or -1. page: int64 [t].
        """

    @abstractmethod
    def close(self) -> None:
        """Finish what is under way and end helper threads."""

    def _bytes(self, count: int) -> int:
        return count * self.store.geometry.page_bytes


class _Done(Ticket):
    def wait(self) -> None:
        return


class _FutureTicket(Ticket):
    def __init__(self, slots: np.ndarray, future: "Future[None]") -> None:
        super().__init__(slots)
        self._future = future

    def wait(self) -> None:
        self._future.result()


class CpuTransfers(Transfers):
    """Both tiers in host memory: plain copies, and a thread for those asked ahead (so that races show here too)."""

    def __init__(self, store: HostStore, pool: SlotPool) -> None:
        super().__init__(store, pool)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lsa-fetch")

    def _submit(self, pages: np.ndarray, slots: np.ndarray) -> Ticket:
        return _FutureTicket(slots, self._thread.submit(self._copy_now, pages, slots))

    def stream(self, pages: np.ndarray, slots: np.ndarray) -> None:
        self.counts.bytes_streamed += self._bytes(len(pages))
        copy_pages(self.pool.pages, torch.from_numpy(slots), self.store.pages, torch.from_numpy(pages))

    def write(
        self, k: torch.Tensor, v: torch.Tensor, offset: torch.Tensor, slot: torch.Tensor, page: torch.Tensor
    ) -> None:
        self.counts.bytes_written_back += 2 * k.numel() * k.element_size()
        write_tokens(k, v, offset, self.pool.pages, slot, self.store.pages, page)

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _copy_now(self, pages: np.ndarray, slots: np.ndarray) -> None:
        start = time.perf_counter()
        copy_pages(self.pool.pages, torch.from_numpy(slots), self.store.pages, torch.from_numpy(pages))
        self.counts.fetch_seconds += time.perf_counter() - start


class _EventTicket(Ticket):
    def __init__(self, slots: np.ndarray, event: torch.cuda.Event) -> None:
        super().__init__(slots)
        self._event = event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)


class CudaTransfers(Transfers):
    """Pinned host store; copies run on a side stream, ordered against the compute stream by events.

    A side-stream copy starts after everything that was submitted before it (the last readers of the slots it
    overwrites), and the compute stream waits for its event before it reads them.
    """

    def __init__(self, store: HostStore, pool: SlotPool) -> None:
        super().__init__(store, pool)
        self._stream = torch.cuda.Stream(pool.pages.device)

    def _copy_now(self, pages: np.ndarray, slots: np.ndarray) -> None:
        self._submit(pages, slots).wait()

    def stream(self, pages: np.ndarray, slots: np.ndarray) -> None:
        self.counts.bytes_streamed += self._bytes(len(pages))
        self._copy_now(pages, slots)

    def write(
        self, k: torch.Tensor, v: torch.Tensor, offset: torch.Tensor, slot: torch.Tensor, page: torch.Tensor
    ) -> None:
        self.counts.bytes_written_back += 2 * k.numel() * k.element_size()
        none = torch.full_like(slot, -1)
        write_tokens(k, v, offset, self.pool.pages, slot, self.pool.pages, none.long())
        # A synchronous copy: a later fetch on the side stream finds the tokens in the host store.
        write_tokens(k.cpu(), v.cpu(), offset.cpu(), self.store.pages, none.cpu(), self.store.pages, page)

    def _submit(self, pages: np.ndarray, slots: np.ndarray) -> Ticket:
        start = time.perf_counter()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for page, slot in zip(pages.tolist(), slots.tolist(), strict=True):
                self.pool.pages[slot].copy_(self.store.pages[page], non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.counts.fetch_seconds += time.perf_counter() - start
        return _EventTicket(slots, event)

    def close(self) -> None:
        self._stream.synchronize()


def make_transfers(store: HostStore, pool: SlotPool) -> Transfers:
    """The transfer engine for the pool's device."""
    return CudaTransfers(store, pool) if pool.pages.is_cuda else CpuTransfers(store, pool)
