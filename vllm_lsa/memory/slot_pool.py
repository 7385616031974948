"""The device pool: a fixed number of slots, each holding the page of one (layer, chunk)."""

from collections.abc import Callable

import numpy as np
import torch

from vllm_lsa.memory.geometry import PageGeometry

FREE = -1
RESERVED = -2  # owned by a request whose chunks in it change on the device


class SlotPool:
    """Slots, who owns them, and which may be taken back.

    ``pages`` is the device memory, ``[slots + staging, *page_shape]``; the rows from ``num_slots`` on are staging for
    pages that pass through without becoming resident. A slot is owned by the host page it caches. Slots that some
    resident set refers to are pinned; the others stay cached and are taken back least recently used first.
    """

    def __init__(
        self, geometry: PageGeometry, num_slots: int, staging: int, device: torch.device, poison: bool = False
    ) -> None:
        self.num_slots = num_slots
        self.poison = poison
        self._poison_value = geometry.poison
        self.pages = torch.empty(num_slots + staging, *geometry.page_shape, dtype=geometry.dtype, device=device)
        if poison:
            self.pages.fill_(self._poison_value)
        self.staging = np.arange(num_slots, num_slots + staging, dtype=np.int64)
        self.owner = np.full(num_slots, FREE, np.int64)
        self.refs = np.zeros(num_slots, np.int32)
        self.last_used = np.zeros(num_slots, np.int64)
        # Slots whose page is still on its way; `settle` waits until all have come.
        self.arriving = np.zeros(num_slots, bool)
        self.settle: Callable[[], None] = lambda: None
        self.evictions = 0
        self.num_pinned = 0
        """Slots that some set refers to."""
        self._clock = 0
        self._free = np.arange(num_slots - 1, -1, -1, dtype=np.int64)
        self._num_free = num_slots
        self._slot_of = np.empty(0, np.int32)
        self._changed: list[np.ndarray] | None = None

    def bind(self, num_host_pages: int) -> None:
        """Tell the pool how many host pages exist. Before this nothing can be resident."""
        self._slot_of = np.full(num_host_pages, FREE, np.int32)

    def track(self) -> None:
        """From now on remember which host pages gained or lost a slot, for a table of them on the device."""
        self._changed = []

    def changes(self) -> tuple[np.ndarray, np.ndarray]:
        """(host pages int64 [n], their slots int32 [n], -1 for none) of all that changed since the last call."""
        assert self._changed is not None
        pages = np.unique(np.concatenate(self._changed)) if self._changed else np.empty(0, np.int64)
        self._changed.clear()
        return pages, self._slot_of[pages]

    @property
    def num_cached(self) -> int:
        """Slots that hold a page no resident set refers to."""
        return self.num_slots - self._num_free - self.num_pinned

    @property
    def num_available(self) -> int:
        """Slots that `acquire` can still give to pages that have none."""
        return self.num_slots - self.num_pinned

    def lookup(self, pages: np.ndarray) -> np.ndarray:
        """Slot of each host page, -1 where it is not resident. int64 [...] → int64 [...]."""
        slots = self._slot_of[pages].astype(np.int64)
        if self.arriving[slots[slots >= 0]].any():
            self.settle()
        return slots

    def retain(self, pages: np.ndarray) -> np.ndarray:
        """Pin those of n distinct host pages that are resident. Returns their slots int64 [n], -1 for the others."""
        slots = self.lookup(pages)
        here = slots[slots >= 0]
        self.num_pinned += int(np.count_nonzero(self.refs[here] == 0))
        self.refs[here] += 1
        return slots

    def acquire(self, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pin a slot for each of n distinct host pages.

        Returns (slots int64 [n], -1 where the pool is exhausted; fresh bool [n], True where the slot is new and the
        page has still to be written into it). Earlier pages are served first.
        """
        slots = self.retain(pages)
        missing = np.flatnonzero(slots < 0)
        given = self._take(len(missing))
        fresh = np.zeros(len(pages), bool)
        if len(given):
            where = missing[: len(given)]
            self.owner[given] = pages[where]
            self.refs[given] = 1
            self.num_pinned += len(given)
            self._slot_of[pages[where]] = given
            self._note(pages[where])
            slots[where] = given
            fresh[where] = True
        return slots, fresh

    def reserve(self, count: int) -> np.ndarray:
        """Slots for a request whose chunks change on the device, int64 [count]; -1 where the pool is exhausted."""
        slots = np.full(count, FREE, np.int64)
        given = self._take(count)
        slots[: len(given)] = given
        self.owner[given] = RESERVED
        self.refs[given] = 1
        self.num_pinned += len(given)
        return slots

    def give_back(self, slots: np.ndarray) -> None:
        """Return reserved slots (-1 entries are ignored). What they held is forgotten."""
        slots = slots[slots >= 0]
        if (self.owner[slots] != RESERVED).any():
            raise RuntimeError("a slot was given back that was not reserved")
        self.refs[slots] = 0
        self.num_pinned -= len(slots)
        self._drop(slots)

    def release(self, slots: np.ndarray) -> None:
        """Unpin slots (-1 entries are ignored); they stay cached until the pool needs them."""
        slots = slots[slots >= 0]
        if not len(slots):
            return
        np.subtract.at(self.refs, slots, 1)
        if (self.refs[slots] < 0).any():
            raise RuntimeError("a slot was released more often than it was acquired")
        idle = np.unique(slots[self.refs[slots] == 0])
        self.num_pinned -= len(idle)
        self._clock += 1
        self.last_used[slots] = self._clock
        if self.poison:
            self._drop(idle)

    def invalidate(self, pages: np.ndarray) -> None:
        """Forget host pages whose block got a new owner. None of them may be pinned."""
        slots = self.lookup(pages)
        slots = slots[slots >= 0]
        if self.refs[slots].any():
            raise RuntimeError("a block was given to a new owner while a resident set still refers to it")
        self._drop(slots)

    def _drop(self, slots: np.ndarray) -> None:
        if not len(slots):
            return
        pages = self.owner[slots]
        pages = pages[pages >= 0]
        self._slot_of[pages] = FREE
        self._note(pages)
        self.owner[slots] = FREE
        self._free[self._num_free : self._num_free + len(slots)] = slots
        self._num_free += len(slots)
        if self.poison:
            self.pages[torch.from_numpy(slots).to(self.pages.device)] = self._poison_value

    def _note(self, pages: np.ndarray) -> None:
        if self._changed is not None:
            self._changed.append(pages)

    def _take(self, count: int) -> np.ndarray:
        if count > self._num_free:
            idle = np.flatnonzero((self.refs == 0) & (self.owner >= 0))
            short = min(count - self._num_free, len(idle))
            if short:
                order = np.argpartition(self.last_used[idle], short - 1)[:short] if short < len(idle) else slice(None)
                self._drop(idle[order])
                self.evictions += short
        count = min(count, self._num_free)
        self._num_free -= count
        # A copy: `_drop` writes into the tail of this array.
        return self._free[self._num_free : self._num_free + count][::-1].copy()
