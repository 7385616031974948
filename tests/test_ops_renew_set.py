"""The kernel that renews a request's set against the composition of torch operations that it stands for."""

import copy

import numpy as np
import pytest
import torch

from tests import kernels
from tests.device_state import State
from tests.kernels import DEVICE
from vllm_lsa.device.state import NEXT, DeviceRefresh
from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.ops.renew_set import renew_set, renew_set_naive

kernels.load("renew")
LENGTHS = [8 * 150 + 3, 90, 8 * 64 + 1, 9] + [8 * 150, 8 * 63 + 5] * (DEVICE.type == "cuda")


def geometry(lanes: int) -> KVGeometry:
    return KVGeometry(2, 2 * lanes, lanes, 16, torch.float32, 16, 8, lanes)


class Case:
    def __init__(self, lanes: int, seed: int) -> None:
        self.g = geometry(lanes)
        self.state = State(self.g, LENGTHS, [True] * len(LENGTHS), seed=seed, spare=9, host_read=0.1)
        self.refresh = DeviceRefresh.empty(len(LENGTHS) + 2, len(self.state.sets.chunk), self.g, DEVICE)
        self.refresh.target.fill_(77)
        self.refresh.chunk.fill_(5)
        self.incoming = torch.full((1,), 3, dtype=torch.int64, device=DEVICE)

    def row(self, i: int) -> int:
        return int(self.state.rows.state[i])


def keeps(case: Case, i: int, full: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(chunks that each lane may keep, slots of each): now and then more than it holds, or fewer."""
    owned = np.array([len(x) for x in case.state.owned[i]], np.int64)
    return np.minimum(rng.integers(0, full + 2, len(owned)), owned - 1), owned


def scores(kind: str, lanes: int, full: int, rng: np.random.Generator) -> torch.Tensor:
    x = rng.random((lanes, full), np.float32)
    if kind == "ties":
        x = np.round(x * 4) / 4
    elif kind == "tiny":  # as usage has it: nearly all in a narrow range
        x = np.where(x > 0.9, x, 1e-9 * (np.arange(full) + 1) / max(full, 1)).astype(np.float32)
    elif kind == "equal":
        x[:] = 0.5
    elif kind == "signs":
        x = (np.round(x * 4) - 2) * np.float32(0.5)
        x[rng.random(x.shape) < 0.1] = -0.0
        x[rng.random(x.shape) < 0.1] = np.nan
    return torch.from_numpy(x).to(DEVICE)


def run(case: Case, run_renew, i: int, x: torch.Tensor, keep, owned, **options):
    s = case.state
    return run_renew(
        x, s.sets, case.refresh, case.row(i), s.rows.block_table, i, keep, owned, case.g, incoming=case.incoming,
        **options,
    )  # fmt: skip


def contents(case: Case, i: int, full: int, first: bool, page: torch.Tensor, slot: torch.Tensor):
    """All that the two have to agree on."""
    s, row = case.state, case.row(i)
    lanes = [
        (chunks.tolist(), slots.tolist(), owned.tolist())
        for chunks, slots, owned in (s.read_lane(i, lane) for lane in range(case.g.num_lanes))
    ]
    held = s.sets.by_chunk(row, s.sets.held, full + 1).tolist()
    target = None if first else s.sets.by_chunk(row, case.refresh.target, full).tolist()
    copies = [[(int(p), int(t)) for p, t in zip(*lane, strict=True) if t >= 0] for lane in zip(page, slot, strict=True)]
    where = (slot >= 0).tolist()
    way = case.refresh.chunk[row].tolist(), int(case.refresh.selected[row])
    return lanes, held, target, copies, where, way, s.sets.counts[row].tolist(), int(case.incoming)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", ["random", "ties", "tiny", "equal", "signs", "shared"])
@pytest.mark.parametrize("lanes", [1, 3])
def test_equals_the_composition(lanes, kind, first):
    for seed, tile in enumerate((64, 256, 64) if DEVICE.type == "cuda" else (64 if kind == "ties" else 512,)):
        case = Case(lanes, seed)
        twin = copy.deepcopy(case)
        rng = np.random.default_rng(100 * lanes + seed)
        for i, length in enumerate(LENGTHS):
            full = (length - 1) // 8
            x = scores(kind, 1 if kind == "shared" else 2 * lanes, full, rng)
            keep, owned = keeps(case, i, full, rng)
            sink, recency = int(rng.integers(0, 3)), int(rng.integers(0, 5))
            if min(owned) <= min(sink + recency, full) + 1:
                sink = recency = 0
            options = dict(
                threshold=float(rng.choice([0.0, 0.25])), sink=sink, recency=recency, first=first,
                copy_tail=first and bool(i % 2),
            )  # fmt: skip
            got = run(case, renew_set, i, x, keep, owned, tile=tile, **options)
            expected = run(twin, renew_set_naive, i, x, keep, owned, **options)
            a, b = contents(case, i, full, first, *got), contents(twin, i, full, first, *expected)
            for mine, other in zip(a, b, strict=True):
                assert mine == other, (seed, i)
            # And once more from there, as the next cycle does.
            x = scores("ties", 2 * lanes, full, rng)
            options |= {"first": False, "copy_tail": False}
            got = run(case, renew_set, i, x, keep, owned, tile=tile, **options)
            expected = run(twin, renew_set_naive, i, x, keep, owned, **options)
            assert contents(case, i, full, False, *got) == contents(twin, i, full, False, *expected), (seed, i)
    untouched = [r for r in range(len(LENGTHS) + 2) if r not in case.state.rows.state.tolist()]
    assert (case.refresh.chunk[untouched] == 5).all()


def test_without_a_full_chunk_the_tail_is_all():
    case = Case(1, 0)
    case.state = State(case.g, [3], [True], spare=4)
    case.refresh = DeviceRefresh.empty(3, len(case.state.sets.chunk), case.g, DEVICE)
    owned = np.array([len(x) for x in case.state.owned[0]], np.int64)
    page, slot = run(
        case, renew_set, 0, torch.zeros(2, 0, device=DEVICE), owned * 0, owned,
        threshold=0.0, sink=1, recency=2, first=True, copy_tail=True, tile=64,
    )  # fmt: skip
    for lane in range(2):
        chunks, slots, _ = case.state.read_lane(0, lane)
        assert chunks.tolist() == [0]
        assert slot[lane, 0] == slots[0] and page[lane, 0] == case.state.page(0, np.array([0]), lane)[0]
        assert (slot[lane, 1:] == -1).all()
    assert (case.refresh.chunk[case.row(0)] == -1).all() and case.refresh.chunk.shape[2] == NEXT


def test_bad_operands_are_refused():
    case = Case(1, 0)
    owned = np.full(2, 5)
    options = dict(threshold=0.0, sink=1, recency=2, first=True, copy_tail=True)
    with pytest.raises(ValueError, match="scores: expected torch.float32"):
        run(case, renew_set, 0, torch.zeros(3, 9, device=DEVICE), owned, owned, **options)
    with pytest.raises(ValueError, match="keep and owned must be of 2 lanes"):
        run(case, renew_set, 0, torch.zeros(2, 9, device=DEVICE), owned[:1], owned, **options)
