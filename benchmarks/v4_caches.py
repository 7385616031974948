"""The memory of `benchmarks.v4_stack`: DeepSeek-V4's c4 pages and index keys, stock on the device, and LSA's two tiers.

Both hold the same random, valid data, so that one can be checked against the other: stock has it in blocks as wide as
vLLM's, which no request shares with another; LSA has index keys in narrower blocks of the same numbers, c4 pages in a
host store by block, and pages of resident blocks, all c4 layers of a page side by side, in slots of a pool. What is not
written holds bytes that are NaN.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.v4_plan import C4_PAGE, C128_LAYERS, C128_PAGE, KEY_PAGE, SCORED
from vllm_lsa.memory.host_store import HostStore
from vllm_lsa.models.deepseek_v4.geometry import EntryGeometry
from vllm_lsa.models.deepseek_v4.specs import C4_TOKENS, PAGE_ENTRIES
from vllm_lsa.ops.index_logits import KEY, PAGE_BYTES

ENTRY_BYTES, DATA_BYTES, NOPE, ROPE = 584, 576, 448, 64
"""An entry of fp8_ds_mla: 448 e4m3 and 64 bf16, then, behind all entries of its page, 8 bytes of scales."""
POISON = 255  # NaN in e4m3, bf16 and fp32, and as a scale of 2^(byte - 127)


def _random_codes(shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """e4m3 of a normal distribution of deviation 64, as bytes; never NaN."""
    return (64 * torch.randn(*shape, device=device)).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


def fill_c4(pages: torch.Tensor) -> None:
    """Random entries, about normal, into pages uint8 [..., C4_PAGE] of any stride between pages."""
    data = pages[..., : PAGE_ENTRIES * DATA_BYTES].unflatten(-1, (PAGE_ENTRIES, DATA_BYTES))
    shape, device = data.shape[:-1], pages.device
    data[..., :NOPE] = _random_codes((*shape, NOPE), device)
    data[..., NOPE:] = torch.randn(*shape, ROPE, device=device).bfloat16().view(torch.uint8)
    scales = pages[..., PAGE_ENTRIES * DATA_BYTES : PAGE_ENTRIES * ENTRY_BYTES].unflatten(-1, (PAGE_ENTRIES, 8))
    # 2^-7 … 2^-5, where 2^-6 makes deviations of 1; the last byte is no scale.
    scales[..., :7] = torch.randint(120, 123, (*shape, 7), device=device, dtype=torch.uint8)
    scales[..., 7] = 0


def fill_keys(pages: torch.Tensor) -> None:
    """Random index keys into pages uint8 [..., PAGE_BYTES or more]."""
    shape = pages.shape[:-1]
    pages[..., : PAGE_ENTRIES * KEY] = _random_codes((*shape, PAGE_ENTRIES * KEY), pages.device)
    scales = 2.0**-6 * (0.5 + torch.rand(*shape, PAGE_ENTRIES, device=pages.device))
    pages[..., PAGE_ENTRIES * KEY : PAGE_BYTES] = scales.view(torch.uint8)


def entry_view(pages: torch.Tensor) -> torch.Tensor:
    """Pages uint8 [n, C4_PAGE] as [n, 64, 584], as vLLM binds a cache: the bytes are not in that order."""
    return pages[:, : PAGE_ENTRIES * ENTRY_BYTES].unflatten(1, (PAGE_ENTRIES, ENTRY_BYTES))


@dataclass
class Blocks:
    """Device memory in blocks of equal width, pages of several caches side by side in each: uint8 [num_blocks, width].

    c4: how many c4 layers have pages in it; 0 where they are elsewhere.
    """

    memory: torch.Tensor
    layers: int
    c4: int

    @classmethod
    def empty(cls, num_blocks: int, layers: int, c4: int, device: torch.device) -> "Blocks":
        width = c4 * C4_PAGE + layers * KEY_PAGE + C128_LAYERS * C128_PAGE
        return cls(torch.full((num_blocks, width), POISON, dtype=torch.uint8, device=device), layers, c4)

    @property
    def pages(self) -> torch.Tensor:
        """c4 pages of all blocks and layers, uint8 [num_blocks, c4, C4_PAGE], a view."""
        return self.memory[:, : self.c4 * C4_PAGE].unflatten(1, (self.c4, C4_PAGE))

    @property
    def keys(self) -> torch.Tensor:
        """Index-key pages of all blocks and layers, uint8 [num_blocks, layers, KEY_PAGE], a view."""
        first = self.c4 * C4_PAGE
        return self.memory[:, first : first + self.layers * KEY_PAGE].unflatten(1, (self.layers, KEY_PAGE))


class Tier:
    """Pages of some layers in a host store, by block, and in slots of a pool on the device."""

    def __init__(self, num_blocks: int, num_slots: int, layers: int, page_bytes: int, device: torch.device) -> None:
        geometry = EntryGeometry(layers, page_bytes, PAGE_ENTRIES, C4_TOKENS, KEY_PAGE)
        self.layers = layers
        self.store = HostStore(geometry, num_blocks, pin=device.type == "cuda")
        # A tensor of its own, since copies in the background want 16 bytes at a time.
        self.pool = torch.full((num_slots, layers, page_bytes), POISON, dtype=torch.uint8, device=device)
        # As int64, of which a program has four times as many bytes under way as of bf16.
        self._host = self.store.pages.view(-1, page_bytes).view(torch.int64)
        self._device = self.pool.view(-1, page_bytes).view(torch.int64)

    @property
    def blocks(self) -> torch.Tensor:
        """The store, uint8 [num_blocks, layers, page_bytes], a view."""
        return self.store.pages.view(self.store.num_blocks, self.layers, -1)

    @property
    def block_bytes(self) -> int:
        return self.pool[0].numel()

    def expand(self, blocks: np.ndarray, slots: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Host pages int64 and slots int32 of every layer, as `fetch` takes them; of blocks and slots [n], -1: none."""
        layer = np.arange(self.layers)
        page = np.maximum(blocks, 0).astype(np.int64)[..., None] * self.layers + layer
        slot = np.where(slots[..., None] < 0, -1, slots[..., None] * self.layers + layer).astype(np.int32)
        return torch.from_numpy(page), torch.from_numpy(slot)

    def fetch(self, page: torch.Tensor, slot: torch.Tensor, programs: int | None = None) -> None:
        """Copies pages into slots on the current stream, by LSA's kernel. page, slot: on the device, see `expand`."""
        from vllm_lsa.ops.resident_rows import fetch

        fetch(self._device, self._host, page, slot, programs)


@dataclass
class Wave:
    """Pages that come into resident sets together: places int64 [B, K], blocks and slots int32 [B, K] to put there."""

    places: torch.Tensor
    blocks: torch.Tensor
    slots: torch.Tensor
    copies: list[tuple[torch.Tensor, torch.Tensor]]
    """What `Tier.fetch` takes, for each tier."""
    count: int
    """Pages, of all requests."""


class ResidentSets:
    """Which pages of B requests are resident: tables by place, on the device, and the same numbers on the host.

    table, slots: int32 [B, W + 1], block and slot of each place; the last place is for waves that are not full. A
    request owns W + spare slots, so that as many pages can be on their way while their predecessors are being read.
    """

    def __init__(
        self, block_table: np.ndarray, width: int, spare: int, recency: int, rng: np.random.Generator,
        device: torch.device,
    ) -> None:  # fmt: skip
        """block_table: int32 [B, P]. recency: pages that are always resident, the newest ones."""
        self.block_table, self.width, self.spare, self.recency, self._rng = block_table, width, spare, recency, rng
        rows, self.total = block_table.shape
        self.pages = np.stack([self.draw() for _ in range(rows)])  # int64 [B, W], page of each place
        own = (
            np.stack([rng.permutation(width + spare) for _ in range(rows)]) + (width + spare) * np.arange(rows)[:, None]
        )
        self._slots, self._free = own[:, :width].copy(), own[:, width:].copy()
        dummy = np.zeros((rows, 1), np.int64)
        self.table, self.slots = (
            torch.from_numpy(np.hstack([x, dummy]).astype(np.int32)).to(device)
            for x in (np.take_along_axis(block_table, self.pages, 1), self._slots)
        )
        self._device = device

    @property
    def num_slots(self) -> int:
        return self.pages.shape[0] * (self.width + self.spare)

    def draw(self) -> np.ndarray:
        """A random set, int64 [W], the newest pages last."""
        old = self._rng.permutation(self.total - self.recency)[: self.width - self.recency]
        return np.concatenate([np.sort(old), np.arange(self.total - self.recency, self.total)])

    def churned(self, share: float) -> np.ndarray:
        """Sets int64 [B, W] of the next cycle: `share` of the pages leave for random ones that are not resident.

        1: drawn anew, from all pages.
        """
        if share >= 1:
            return np.stack([self.draw() for _ in self.pages])
        new = self.pages.copy()
        count = round(share * self.width)
        for pages in new:
            others = np.setdiff1d(np.arange(self.total), pages)
            movable = np.flatnonzero(pages < self.total - self.recency)
            count = min(count, len(others), len(movable))
            pages[self._rng.choice(movable, count, replace=False)] = self._rng.choice(others, count, replace=False)
        return new

    def blocks_and_slots(self) -> tuple[np.ndarray, np.ndarray]:
        """Block and slot of every resident page, [B, W] each, as the host knows them."""
        return np.take_along_axis(self.block_table, self.pages, 1), self._slots.copy()

    def plan(self, wanted: np.ndarray, tiers: Sequence[Tier], steps: int = 1) -> list[Wave]:
        """Waves that make `wanted` [B, W] of the sets, in any order of places: of as few pages of a request as bring
        all in `steps` waves, and at most `spare`.

        Tables on the host are those after the last wave; `apply` the waves in turn. A slot of a wave was freed by the
        one before, at the latest: copy a wave once that one is applied.
        """
        rows = len(self.pages)
        coming = [np.setdiff1d(new, old) for old, new in zip(self.pages, wanted, strict=True)]
        leaving = [np.flatnonzero(~np.isin(old, new)) for old, new in zip(self.pages, wanted, strict=True)]
        most = max(map(len, coming), default=0)
        if not most:
            return []
        size = min(self.spare, -(-most // steps))
        count = -(-most // size)
        places = np.full((count, rows, size), self.width, np.int64)
        blocks, slots = np.zeros(places.shape, np.int32), np.full(places.shape, -1, np.int32)
        for wave in range(count):
            part = slice(wave * size, (wave + 1) * size)
            for row in range(rows):
                pages, at = coming[row][part], leaving[row][part]
                n = len(pages)
                places[wave, row, :n], blocks[wave, row, :n] = at, self.block_table[row, pages]
                slots[wave, row, :n] = self._free[row, :n]
                self._free[row, :n] = self._slots[row, at]
                self._slots[row, at], self.pages[row, at] = slots[wave, row, :n], pages
        tables = [torch.from_numpy(x).to(self._device) for x in (places, blocks, slots)]
        copies = [[x.to(self._device) for x in tier.expand(blocks, slots)] for tier in tiers]
        return [
            Wave(
                places=tables[0][i],
                blocks=tables[1][i],
                slots=tables[2][i],
                copies=[(page[i], slot[i]) for page, slot in copies],
                count=int((slots[i] >= 0).sum()),
            )
            for i in range(count)
        ]

    def apply(self, wave: Wave) -> None:
        """Put a wave's pages into the tables, on the current stream."""
        self.table.scatter_(1, wave.places, wave.blocks)
        self.slots.scatter_(1, wave.places, wave.slots)


class Memory:
    """All of it, filled once for every case: cases take blocks and slots of it."""

    def __init__(self, num_blocks: int, num_slots: int, layers: int, device: torch.device) -> None:
        self.layers, self.device = layers, device
        self.stock = Blocks.empty(num_blocks, layers, layers, device)
        self.narrow = Blocks.empty(num_blocks, layers, 0, device)
        self.scored = [layer for layer in SCORED if layer < layers] or [0]
        self.offloaded = [layer for layer in range(layers) if layer not in self.scored]
        """Layers whose index keys may be on the host."""
        self.c4 = Tier(num_blocks, num_slots, layers, C4_PAGE, device)
        self.keys = Tier(num_blocks, num_slots, len(self.offloaded), KEY_PAGE, device)

    @staticmethod
    def device_bytes(num_blocks: int, num_slots: int, layers: int) -> int:
        """About what it takes on the device."""
        shared = layers * KEY_PAGE + C128_LAYERS * C128_PAGE
        return num_blocks * (layers * C4_PAGE + 2 * shared) + num_slots * layers * (C4_PAGE + KEY_PAGE)

    def fill(self, first: int, end: int) -> None:
        """Random data for blocks first … end, the same in all places."""
        pages, keys = self.stock.pages[first:end], self.stock.keys[first:end]
        fill_c4(pages)
        fill_keys(keys)
        self.narrow.keys[first:end] = keys
        self.c4.blocks[first:end].copy_(pages)
        self.keys.blocks[first:end].copy_(keys[:, self.offloaded])
