"""Entries that are read from the host store because no slot holds them, beside the twin."""

import pytest
import torch

from tests.kernels import DEVICE, load
from vllm_lsa.memory.device_counts import DeviceCounts
from vllm_lsa.ops.missing_entries import DATA_BYTES, PER_PAGE, SCALE_BYTES, read_missing, read_missing_naive

load("missing_entries")
TOP_K, PAGES = 512, 8


class Case:
    """R rows of up to W pages in L layers. Pages have `spare` bytes behind the entries; all that nobody may read is
    0xFF, which is NaN in every format."""

    def __init__(self, lengths: list[int], width: int, layers: int, spare: int, resident: float, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        rows, more = len(lengths), 2  # rows that nobody asks for
        page = PER_PAGE * (DATA_BYTES + SCALE_BYTES) + spare
        blocks, slots = rows * width + 3, rows * width * layers
        self.lengths, self.width, self.rows = lengths, width, rows
        self.store = torch.full((blocks, layers, page), 0xFF, dtype=torch.uint8)
        self.pool = torch.full((slots + PAGES * (rows + more), page), 0xFF, dtype=torch.uint8)
        self.table = torch.randperm(blocks, generator=g)[: rows * width].view(rows, width).int()
        self.table = torch.cat([self.table, torch.full((more, width), -(1 << 30), dtype=torch.int32)])
        self.slots = torch.full((layers, rows + more, width + PAGES), -1, dtype=torch.int32)
        self.slots[:, :, width:] = slots + torch.arange(PAGES * (rows + more)).view(rows + more, PAGES).int()
        where = torch.randperm(slots, generator=g).view(layers, rows, width).int()
        here = torch.rand(layers, rows, width, generator=g) < resident
        self.slots[:, :rows, :width] = torch.where(here, where, -1)
        self.entries = torch.full((rows + more,), 1 << 30, dtype=torch.int32)
        self.entries[:rows] = torch.tensor(lengths)
        for row, length in enumerate(lengths):
            for chunk in range(-(-length // PER_PAGE)):
                held = min(PER_PAGE, length - chunk * PER_PAGE)
                for layer in range(layers):
                    bytes_of = self.store[self.table[row, chunk], layer]
                    data, scales = DATA_BYTES * held, SCALE_BYTES * held
                    bytes_of[:data] = torch.randint(256, (data,), generator=g)
                    bytes_of[PER_PAGE * DATA_BYTES :][:scales] = torch.randint(256, (scales,), generator=g)
                    if here[layer, row, chunk]:
                        self.pool[where[layer, row, chunk]] = bytes_of
        # In any order, with places of none in between and behind, in a buffer of wider rows.
        self.chosen = torch.full((rows + more, TOP_K + 64), 1 << 29, dtype=torch.int32)[:rows, :TOP_K]
        for row, length in enumerate(lengths):
            some = torch.randperm(max(1, length), generator=g)[: min(length, TOP_K)].int()
            self.chosen[row] = torch.cat([some, torch.full((TOP_K - len(some),), -1)])
            if length > 4:
                self.chosen[row, 3] = -1

    def to(self, device: torch.device) -> None:
        for name in ("store", "pool", "table", "slots", "entries"):
            setattr(self, name, getattr(self, name).to(device))
        wide = torch.full((self.rows, TOP_K + 64), 1 << 29, dtype=torch.int32, device=device)
        wide[:, :TOP_K] = self.chosen
        self.chosen = wide[:, :TOP_K]

    def run(self, read, layer: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        pool, counts = self.pool.clone(), DeviceCounts(2, self.pool.device)
        places = torch.full((self.rows, TOP_K), -(1 << 30), dtype=torch.int32, device=pool.device)
        given = self.chosen, self.entries, self.table, self.slots, layer, pool, self.store, places, counts.on_device
        read(*given)
        if pool.is_cuda:
            counts.read()
            torch.cuda.synchronize()
        return pool, places, counts.read()


CASES = {
    "some": ([700, 3, 0, 64 * 11, 513], 11, 3, 64, 0.5),
    "host keys behind": ([900, 65], 15, 2, 64 + 8640, 0.3),
    "nothing resident": ([64 * 9 + 1], 10, 1, 0, 0.0),
    "all resident": ([1000, 20], 17, 2, 64, 1.0),
    "nobody": ([], 4, 1, 64, 0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_kernel_and_twin(name: str) -> None:
    case = Case(*CASES[name])
    for layer in range(len(case.slots)):
        case.to(DEVICE)
        got = case.run(read_missing, layer)
        case.to(torch.device("cpu"))
        pool, places, counts = case.run(read_missing_naive, layer)
        assert torch.equal(got[0].cpu(), pool) and torch.equal(got[1].cpu(), places) and got[2] == counts
        check(case, layer, pool, places, counts)


def check(case: Case, layer: int, pool: torch.Tensor, places: torch.Tensor, counts: list[int]) -> None:
    """Everything chosen is where it is said to be, bit for bit, and nothing else was touched."""
    case.to(torch.device("cpu"))
    written = torch.zeros(pool.shape, dtype=torch.bool)
    missing: list[tuple[int, int]] = []
    for row, names in enumerate(case.chosen.tolist()):
        for i, entry in enumerate(names):
            at = int(places[row, i])
            if not 0 <= entry < case.lengths[row]:
                assert at == -1
                continue
            page = int(case.slots[layer, row, at // PER_PAGE])
            source = case.store[int(case.table[row, entry // PER_PAGE]), layer]
            for size, begin in ((DATA_BYTES, 0), (SCALE_BYTES, PER_PAGE * DATA_BYTES)):
                there, here = begin + at % PER_PAGE * size, begin + entry % PER_PAGE * size
                assert torch.equal(pool[page, there : there + size], source[here : here + size])
                if int(case.slots[layer, row, entry // PER_PAGE]) < 0:
                    assert at == case.width * PER_PAGE + i
                    written[page, there : there + size] = True
                else:
                    assert at == entry
            if at >= case.width * PER_PAGE:
                missing.append((row, entry // PER_PAGE))
    assert torch.equal(pool[~written], case.pool[~written])
    assert counts == [len(missing), len(set(missing))]


def test_what_does_not_fit_is_refused() -> None:
    case = Case(*CASES["host keys behind"])
    case.to(DEVICE)
    places = torch.empty(case.rows, TOP_K, dtype=torch.int32, device=DEVICE)
    given = {
        "chosen": case.chosen, "entries": case.entries, "table": case.table, "slots": case.slots, "layer": 1,
        "pool": case.pool, "store": case.store, "places": places,
        "counts": torch.zeros(2, dtype=torch.int64, device=DEVICE),
    }  # fmt: skip
    read_missing(**given)
    for wrong, named in [
        ({"chosen": case.chosen[:, :500]}, "a multiple of 64"),
        ({"chosen": case.chosen[:, :192]}, "a power of two"),
        ({"chosen": case.chosen.long()}, "chosen"),
        ({"slots": case.slots[:, :, :-1].contiguous()}, "slots"),
        ({"layer": 2}, "layer 2 is not of 2"),
        ({"entries": case.entries[:1]}, "entries"),
        ({"places": places[:, ::2]}, "places"),
        ({"store": case.store[:, :, :-8]}, "store"),
        ({"pool": case.pool[:, :-4], "store": case.store[:, :, :-4]}, "contiguous"),
    ]:
        with pytest.raises(ValueError, match=named):
            read_missing(**{**given, **wrong})
