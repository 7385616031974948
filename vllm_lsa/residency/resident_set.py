"""Which chunks of one request are resident, per layer, and in which slots: the rows that attention kernels read."""

import numpy as np

NO_SLOT = -1


class ResidentSet:
    """Per-layer lists of (chunk, slot).

    Entry 0 of every layer is the tail: the chunk that new tokens go to. The other entries are full chunks in no
    particular order (RoPE is in the keys, so attention does not ask for one). A slot of -1 says that the chunk is kept
    but the pool had no room: attention streams it from the host store.

    chunks, slots: int32 [layers, width]. counts: int32 [layers], entries in use.
    """

    def __init__(self, num_layers: int, width: int = 16) -> None:
        self.chunks = np.full((num_layers, width), -1, np.int32)
        self.slots = np.full((num_layers, width), NO_SLOT, np.int32)
        self.counts = np.zeros(num_layers, np.int32)
        self.tail = -1
        # Demanded chunks, oldest first, per layer.
        self.demanded: list[list[int]] = [[] for _ in range(num_layers)]
        # Kept chunks without a slot. When 0, attention need not look for them.
        self.missing = 0

    @property
    def num_resident(self) -> int:
        """Slots that this set pins, over all layers."""
        return int(self.counts.sum()) - self.missing

    def layer(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """(chunks, slots) in use in a layer, tail first."""
        count = self.counts[layer]
        return self.chunks[layer, :count], self.slots[layer, :count]

    def all_slots(self) -> np.ndarray:
        """Every slot the set pins (and -1 for what has none)."""
        return self.slots[np.arange(self.slots.shape[1]) < self.counts[:, None]].astype(np.int64)

    def extend(self, chunks: np.ndarray, slots: np.ndarray) -> None:
        """Add the newest chunks, ascending int [n], in slots int [layers, n]. The last one becomes the tail; the old
        tail, now full, stays in the set."""
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

    def append(self, layer: int, chunks: np.ndarray, slots: np.ndarray) -> None:
        """Add full chunks to a layer."""
        count, added = int(self.counts[layer]), len(chunks)
        self._reserve(count + added)
        self.chunks[layer, count : count + added] = chunks
        self.slots[layer, count : count + added] = slots
        self.counts[layer] = count + added
        self.missing += int((slots < 0).sum())

    def append_demanded(self, layer: int, chunks: np.ndarray, slots: np.ndarray) -> None:
        """Add chunks that leave again, oldest first, through `remove_demanded`."""
        self.append(layer, chunks, slots)
        self.demanded[layer].extend(chunks.tolist())

    def remove_demanded(self, layer: int) -> int:
        """Take out the chunk demanded longest ago; the layer's last entry closes the gap. Returns its slot."""
        chunk = self.demanded[layer].pop(0)
        last = int(self.counts[layer]) - 1
        entry = int(np.flatnonzero(self.chunks[layer, : last + 1] == chunk)[0])
        slot = int(self.slots[layer, entry])
        self.chunks[layer, entry] = self.chunks[layer, last]
        self.slots[layer, entry] = self.slots[layer, last]
        self.counts[layer] = last
        self.missing -= int(slot < 0)
        return slot

    def contains(self, layer: int, num_chunks: int) -> np.ndarray:
        """bool [num_chunks], True for the chunks in the layer's set."""
        mask = np.zeros(num_chunks, bool)
        chunks = self.chunks[layer, : self.counts[layer]]
        mask[chunks[chunks < num_chunks]] = True
        return mask

    def _reserve(self, width: int) -> None:
        have = self.chunks.shape[1]
        if width > have:
            more = ((0, 0), (0, max(width, 2 * have) - have))
            self.chunks = np.pad(self.chunks, more, constant_values=-1)
            self.slots = np.pad(self.slots, more, constant_values=NO_SLOT)
