"""Which chunks of one request are resident, per lane, and in which slots: the rows that attention kernels read."""

import itertools
from typing import Any

import numpy as np

NO_SLOT = -1

_versions = itertools.count(1)


class ResidentSet:
    """Per-lane lists of (chunk, slot).

    Entry 0 of every lane is the tail: the chunk that new tokens go to. The other entries are full chunks in no
    particular order (RoPE is in the keys, so attention does not ask for one). A slot of -1 says that the chunk is kept
    but the pool had no room: attention streams it from the host store.

    chunks, slots: int32 [lanes, width], changed by the methods here alone. counts: int32 [lanes], entries in use.
    version: another one after every change, which no other set has had: what was made of a set is good as long as the
    version is the same.
    """

    def __init__(self, num_lanes: int, width: int = 16) -> None:
        self.chunks = np.full((num_lanes, width), -1, np.int32)
        self.slots = np.full((num_lanes, width), NO_SLOT, np.int32)
        self.counts = np.zeros(num_lanes, np.int32)
        self.tail = -1
        # Kept chunks without a slot. When 0, attention need not look for them.
        self.missing = 0
        self.version = next(_versions)

    @property
    def num_resident(self) -> int:
        """Slots that this set pins, over all lanes."""
        return int(self.counts.sum()) - self.missing

    def lane(self, lane: int) -> tuple[np.ndarray, np.ndarray]:
        """(chunks, slots) in use in a lane, tail first."""
        count = self.counts[lane]
        return self.chunks[lane, :count], self.slots[lane, :count]

    def all_slots(self) -> np.ndarray:
        """Every slot the set pins (and -1 for what has none)."""
        return self.slots[np.arange(self.slots.shape[1]) < self.counts[:, None]].astype(np.int64)

    def extend(self, chunks: np.ndarray, slots: np.ndarray) -> None:
        """Add the newest chunks, ascending int [n], in slots int [lanes, n]. The last one becomes the tail; the old
        tail, now full, stays in the set."""
        self.version = next(_versions)
        older, older_slots = chunks[:-1], slots[:, :-1]
        if self.tail >= 0:
            older = np.concatenate([[self.tail], older])
            older_slots = np.concatenate([self.slots[:, :1], older_slots], axis=1)
        else:
            self.counts[:] = 1
        self._reserve(int(self.counts.max()) + len(older))
        rows = np.arange(len(self.counts))[:, None]
        columns = self.counts[:, None] + np.arange(len(older))
        self.chunks[rows, columns] = older
        self.slots[rows, columns] = older_slots
        self.counts += len(older)
        self.tail = int(chunks[-1])
        self.chunks[:, 0] = self.tail
        self.slots[:, 0] = slots[:, -1]
        self.missing += int((slots < 0).sum())

    def append(self, lane: int, chunks: np.ndarray, slots: np.ndarray) -> None:
        """Add full chunks to a lane."""
        self.version = next(_versions)
        count, added = int(self.counts[lane]), len(chunks)
        self._reserve(count + added)
        self.chunks[lane, count : count + added] = chunks
        self.slots[lane, count : count + added] = slots
        self.counts[lane] = count + added
        self.missing += int((slots < 0).sum())

    def swap(self, lane: int, entries: np.ndarray, chunks: np.ndarray, slots: np.ndarray) -> None:
        """Put full chunks in the place of entries int [e] of a lane (never the tail's); the numbers may differ."""
        self.version = next(_versions)
        self.missing -= int((self.slots[lane, entries] < 0).sum())
        both = min(len(entries), len(chunks))
        self.chunks[lane, entries[:both]] = chunks[:both]
        self.slots[lane, entries[:both]] = slots[:both]
        self.missing += int((slots[:both] < 0).sum())
        if both < len(entries):
            count = int(self.counts[lane])
            kept = np.delete(np.arange(count), entries[both:])
            self.chunks[lane, : len(kept)] = self.chunks[lane, kept]
            self.slots[lane, : len(kept)] = self.slots[lane, kept]
            self.counts[lane] = len(kept)
        elif both < len(chunks):
            self.append(lane, chunks[both:], slots[both:])

    def place(self, where: Any, slots: np.ndarray | int) -> None:
        """Give entries other slots, -1 for none. where: the entries, as an index of `slots`."""
        self.version = next(_versions)
        self.missing -= int((self.slots[where] < 0).sum())
        self.slots[where] = slots
        self.missing += int((self.slots[where] < 0).sum())

    def _reserve(self, width: int) -> None:
        have = self.chunks.shape[1]
        if width > have:
            more = ((0, 0), (0, max(width, 2 * have) - have))
            self.chunks = np.pad(self.chunks, more, constant_values=-1)
            self.slots = np.pad(self.slots, more, constant_values=NO_SLOT)
