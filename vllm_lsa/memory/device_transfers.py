"""Copies between host store and slot pool of a CUDA device: in the order of its stream, or beside it if asked ahead."""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from vllm_lsa.device.stalls import StallClock
from vllm_lsa.memory.host_store import HostStore
from vllm_lsa.memory.slot_pool import SlotPool
from vllm_lsa.memory.transfers import TransferCounts
from vllm_lsa.ops.resident_rows import fetch

FEW, MANY = 16, 256
"""Programs of a copy: few leave the GPU to what runs beside it and still fill the link to the host."""


class DeviceTicket:
    """A copy under way into `slots`, over when `event` is; None: later work on the stream comes after it anyway."""

    def __init__(self, slots: np.ndarray, event: "torch.cuda.Event | None" = None) -> None:
        self.slots = slots
        self.event = event


class DeviceTransfers:
    """What `Transfers` does on a CPU. Nothing here waits on the host: pages are there for whatever the current stream
    is given next. The host store must be pinned.

    In Triton's interpreter there are no streams, and copies are over at once.
    """

    def __init__(self, store: HostStore, pool: SlotPool) -> None:
        self.store = store
        self.pool = pool
        self._counts = TransferCounts()
        self._device = pool.pages.device
        self._stalls = StallClock(self._device)
        self._side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._outstanding: list[DeviceTicket] = []
        # Pages are opaque: words of eight bytes copy as well, and in fewer loads.
        self._words = _as_words(pool.pages), _as_words(store.pages)
        # Another request may come upon a page that is still on its way.
        pool.settle = self.settle

    @property
    def counts(self) -> TransferCounts:
        self._counts.stall_seconds = self._stalls.seconds
        return self._counts

    def fetch(self, pages: np.ndarray, slots: np.ndarray, ahead: bool = False) -> DeviceTicket:
        """Copy host pages int64 [n] into slots int64 [n]: before the stream's next work, which waits for it and so
        counts it as a stall; or, with `ahead`, beside that work until `wait`."""
        self._counts.bytes_fetched += len(pages) * self.store.geometry.page_bytes
        if not len(pages):
            return DeviceTicket(slots)
        page, slot = self.upload(pages), self.upload(slots.astype(np.int32))
        if not ahead or self._side is None:
            self._stalls.start()
            fetch(*self._words, page, slot, MANY)
            self._stalls.stop()
            return DeviceTicket(slots)
        # What these slots held may still be read by work that the stream was given before.
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            fetch(*self._words, page, slot, FEW)
            event = torch.cuda.Event()
            event.record()
        for tensor in (page, slot):
            tensor.record_stream(self._side)
        self.pool.arriving[slots] = True
        ticket = DeviceTicket(slots, event)
        self._outstanding.append(ticket)
        return ticket

    def demand(self, pages: np.ndarray, slots: np.ndarray) -> None:
        """`fetch`, at once, what a step's own queries have asked for."""
        self._counts.bytes_demanded += len(pages) * self.store.geometry.page_bytes
        self.fetch(pages, slots)

    def wait(self, ticket: DeviceTicket) -> None:
        """The stream's next work comes after a copy; where that is not over yet, the wait counts as a stall."""
        if ticket in self._outstanding:
            self._outstanding.remove(ticket)
            self.pool.arriving[ticket.slots] = False
        if ticket.event is None or ticket.event.query():
            return
        self._stalls.start()
        torch.cuda.current_stream().wait_event(ticket.event)
        self._stalls.stop()

    def settle(self) -> None:
        """The stream's next work comes after everything under way."""
        for ticket in list(self._outstanding):
            self.wait(ticket)

    def write_pages(self, page: torch.Tensor, slot: torch.Tensor) -> None:
        """Write-through of host pages that the stream has just written: page int64 [n], slot int32 [n], -1 for none,
        on the device. Fit for a CUDA graph."""
        fetch(*self._words, page, slot)

    def upload(self, array: np.ndarray) -> torch.Tensor:
        """A copy on the device, in the order of the stream."""
        return self._pinned(array).to(self._device, non_blocking=True)

    def update(self, pairs: Iterable[tuple[torch.Tensor, np.ndarray]]) -> None:
        """Overwrite tensors on the device, each with an array of its shape and dtype, in the order of the stream."""
        for tensor, array in pairs:
            tensor.copy_(self._pinned(array), non_blocking=True)

    def download(self, tensor: torch.Tensor) -> Callable[[], np.ndarray]:
        """Start a copy to the host, in the order of the stream. Returns what waits until it is there, and gives it."""
        if self._side is None:
            copied = tensor.clone()
            return lambda: copied.numpy()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()

        def arrived() -> np.ndarray:
            event.synchronize()
            return host.numpy()

        return arrived

    def close(self) -> None:
        """Wait until nothing is under way."""
        if self._side is not None:
            self._side.synchronize()

    def _pinned(self, array: np.ndarray) -> torch.Tensor:
        # torch keeps pinned memory from being used again until the copy is over.
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor if self._side is None else tensor.pin_memory()


def _as_words(pages: torch.Tensor) -> torch.Tensor:
    return pages.view(len(pages), -1).view(torch.int64)
