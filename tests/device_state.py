"""Random rows and resident sets for tests of the device kernels, with nonsense wherever nothing may be read."""

import numpy as np
import torch

from tests.kernels import DEVICE
from vllm_lsa.device.state import PAGE, DeviceRows, DeviceSets
from vllm_lsa.memory.geometry import KVGeometry

NONSENSE = 2**30


class State:
    """n rows of the given lengths (0 = padding), each whole or on a budget, over pools with NaN where nothing was put.

    `entries` [row][lane]: (chunks, slots) of the rows on a budget, tail last; `owned` [row][lane]: all of their slots.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        lengths: list[int],
        budget: list[bool],
        seed: int = 0,
        share: float = 0.4,
        spare: int = 3,
        host_read: float = 0.0,
    ) -> None:
        g, rng = geometry, np.random.default_rng(seed)
        self.geometry, self.rng, n = g, rng, len(lengths)
        chunks = [g.chunks(length) for length in lengths]
        per_row = max(-(-c // g.chunks_per_block) for c in chunks) + 1
        self.num_blocks = sum(-(-c // g.chunks_per_block) for c in chunks) + 3
        free_blocks = rng.permutation(self.num_blocks)
        table = np.full((n, per_row), NONSENSE, np.int32)
        taken = 0
        for i, count in enumerate(chunks):
            blocks = -(-count // g.chunks_per_block)
            table[i, :blocks] = free_blocks[taken : taken + blocks]
            taken += blocks
        self.table = table
        self.num_pages = self.num_blocks * g.num_lanes * g.chunks_per_block
        self.num_slots = sum(chunks) * g.num_lanes + n * g.num_lanes * (spare + 1) + 5
        free_slots = list(rng.permutation(self.num_slots))
        slot_of = np.full(self.num_pages, -1, np.int32)
        state = np.full(n, -1, np.int32)
        set_rows = rng.permutation(n + 2)
        row_pages = max(-(-(c + spare + 1) // PAGE) for c in chunks) + 1
        pages = np.full((n + 2, row_pages), NONSENSE, np.int32)
        num_state_pages = sum(-(-(c + spare + 1) // PAGE) for c in chunks) + 2
        free_pages = list(rng.permutation(num_state_pages))
        shape = (num_state_pages, g.num_lanes, PAGE)
        chunk = np.full(shape, NONSENSE, np.int32)
        slot = np.full(shape, NONSENSE, np.int32)
        held = np.full(shape, 77, np.uint8)
        usage = np.full(shape, np.nan, np.float32)
        counts = np.full((n + 2, g.num_lanes), NONSENSE, np.int32)
        caps = np.full((n + 2, g.num_lanes), NONSENSE, np.int32)
        room = np.full((n + 2, g.num_lanes), NONSENSE, np.int32)
        self.entries: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in lengths]
        self.owned: list[list[np.ndarray]] = [[] for _ in lengths]
        for i, count in enumerate(chunks):
            if not count:
                continue
            if not budget[i]:
                for lane in range(g.num_lanes):
                    here = rng.random(count) >= host_read
                    where = self.page(i, np.arange(count), lane)[here]
                    slot_of[where] = [free_slots.pop() for _ in range(here.sum())]
                continue
            row = state[i] = set_rows[i]
            for p in range(-(-(count + spare + 1) // PAGE)):
                pages[row, p] = free_pages.pop()
            for lane in range(g.num_lanes):
                kept = np.flatnonzero(rng.random(count - 1) < share)
                rng.shuffle(kept)
                kept = np.append(kept, count - 1).astype(np.int32)
                owned = np.array([free_slots.pop() for _ in range(len(kept) + spare)], np.int32)
                owned[rng.random(len(owned)) < host_read] = -1
                self.entries[i].append((kept, owned[: len(kept)]))
                self.owned[i].append(owned)
                counts[row, lane] = len(kept)
                caps[row, lane] = len(kept) + rng.integers(0, 2)
                room[row, lane] = spare
                e = np.arange(len(owned))
                slot[pages[row, e // PAGE], lane, e % PAGE] = owned
                e = np.arange(len(kept))
                chunk[pages[row, e // PAGE], lane, e % PAGE] = kept
                c = np.arange(count)
                held[pages[row, c // PAGE], lane, c % PAGE] = np.isin(c, kept)
                usage[pages[row, c // PAGE], lane, c % PAGE] = rng.random(count) * 0.1
        self.lengths, self.chunks, self.budget = lengths, chunks, budget
        self.rows = DeviceRows(
            token=self.put(rng.permutation(n).astype(np.int32)),
            length=self.put(np.array(lengths, np.int32)),
            state=self.put(state),
            query_row=self.put(rng.permutation(n).astype(np.int32)),
            block_table=self.put(table),
        )
        self.sets = DeviceSets(*map(self.put, (pages, counts, caps, room, chunk, slot, held, usage)))
        self.slot_of = self.put(slot_of)

    @staticmethod
    def put(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)

    def page(self, row: int, chunks: np.ndarray, lane: int) -> np.ndarray:
        g = self.geometry
        block = self.table[row, chunks // g.chunks_per_block].astype(np.int64)
        return (block * g.num_lanes + lane) * g.chunks_per_block + chunks % g.chunks_per_block

    def pools(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Pool and host store, all NaN, which is 0xFF in e4m3 bytes."""
        shape = self.geometry.page_shape
        nan = float("nan") if dtype.is_floating_point else 0xFF
        pool = torch.full((self.num_slots, *shape), nan, dtype=dtype, device=DEVICE)
        host = torch.full((self.num_pages, *shape), nan, dtype=dtype)
        return pool, host.pin_memory() if DEVICE.type == "cuda" else host

    def read_lane(self, row: int, lane: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(chunks, slots in use, all owned slots) of a row on a budget, as the buffers say."""
        s = self.sets
        state = int(self.rows.state[row])
        count = int(s.counts[state, lane])
        pages = s.pages[state].cpu().numpy()
        e = np.arange(len(self.owned[row][lane]))
        slots = s.slot.cpu().numpy()[pages[e // PAGE], lane, e % PAGE]
        chunks = s.chunk.cpu().numpy()[pages[e // PAGE], lane, e % PAGE]
        return chunks[:count], slots[:count], slots

    def by_chunk(self, buffer: torch.Tensor, row: int, lane: int, count: int) -> np.ndarray:
        pages = self.sets.pages[int(self.rows.state[row])].cpu().numpy()
        c = np.arange(count)
        return buffer.cpu().numpy()[pages[c // PAGE], lane, c % PAGE]
