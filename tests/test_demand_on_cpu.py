"""The CUDA C++ kernels of demand on a CPU, see tests/cuda_on_cpu."""

import dataclasses

import pytest
import torch

from tests.cuda_on_cpu import ORDERS, library, set_device
from tests.device_state import NONSENSE
from tests.kernels import DEVICE
from tests.pick_case import Case
from tests.test_ops_resident_rows import BUDGET, LENGTHS, geometry
from vllm_lsa.ops.resident_rows import CUDA_HEADS, CUDA_MOST, CUDA_PAGES, demand_arguments, settle_arguments

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="the kernels themselves are tested where there is a GPU")
MULTIPROCESSORS = 132


def check(case: Case, order: int = 0, wide: bool = True) -> tuple[int, int]:
    """`Case.check` of the kernels. wide: whether the device has wide clusters, for long rows."""
    set_device(None, MULTIPROCESSORS, order, wide)

    def pick() -> None:
        assert not library().lsa_demand(*demand_arguments(*case.arguments(), **case.options()), None)

    def settle() -> None:
        arguments = settle_arguments(case.state.rows, case.state.sets, case.scratch, case.geometry, **case.forced())
        assert not library().lsa_settle(*arguments, None)

    return case.check(pick, settle)


def room_for(case: Case, pages: int) -> Case:
    """The same where rows may have so many state pages, which is what the width of clusters goes by."""
    sets = case.state.sets
    sets.pages = torch.nn.functional.pad(sets.pages, (0, max(0, pages - sets.pages.shape[1])), value=NONSENSE)
    return case


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("most", [1, 2, 4, 8])
@pytest.mark.parametrize("threshold", [0.0, 0.01])
@pytest.mark.parametrize("seed", [0, 1])
def test_demand_follows_the_rule(lanes, most, threshold, seed):
    case = Case(geometry(lanes), LENGTHS, BUDGET, most, threshold, seed)
    check(case, ORDERS[(most + seed) % len(ORDERS)])


# Of the layer's 3 KV heads.
@pytest.mark.parametrize("lanes, heads", [(3, 3), (3, 12), (3, 36), (1, 3), (1, 12)])
@pytest.mark.parametrize("order", ORDERS)
def test_heads_of_a_lane(lanes, heads, order):
    g = dataclasses.replace(geometry(lanes), num_q_heads=heads)
    assert all(check(Case(g, LENGTHS, BUDGET, 3, 0.0, heads), order))


# A row's chunks, or its entries, are more than threads hold at a time; clusters are wide from 16384 chunks on.
@pytest.mark.parametrize("length, wide", [(9000, False), (16383, True), (16500, True), (70000, True), (36000, False)])
@pytest.mark.parametrize("lanes", [1, 3])
def test_long_rows(length, wide, lanes):
    g = geometry(lanes, block=2, chunk=1, dim=8)
    case = Case(g, [length, 0, length // 3, 9], [True] * 4, 8, 0.0, 2 * lanes).with_caps(1 - lanes)
    came, gone = check(case, 2, wide)
    # One more leaves than may come: of 8 that came 7 stay in lanes that are 2 over their caps.
    assert came >= 2 * lanes * 8 and gone >= 2 * lanes * (8 if lanes == 1 else 9)


@pytest.mark.parametrize("spare", [-40, -9, -3, 0, 2, 9])
@pytest.mark.parametrize("threshold", [0.0, 2.0], ids=["", "nothing-wanted"])
@pytest.mark.parametrize("order", ORDERS)
def test_caps(spare, threshold, order):
    """Far over its cap a lane lets go of one more than may come; with nothing wanted too."""
    case = Case(geometry(3), LENGTHS, BUDGET, 4, threshold, 7, spare=10).with_caps(spare)
    came, gone = check(case, order)
    assert bool(came) == (threshold < 1) and bool(gone) == (spare < 0 or (threshold < 1 and spare < 4))


@pytest.mark.parametrize("rows, pages", [(70, 1), (20, 256)], ids=["", "wide-clusters"])
@pytest.mark.parametrize("order", ORDERS)
def test_more_rows_than_run_side_by_side(rows, pages, order):
    """With few entries each, so that some of those that come are moved at once to where others leave."""
    lengths = [(37 * i) % 200 for i in range(rows)]
    case = Case(geometry(1), lengths, [i % 5 != 2 for i in range(rows)], 3, 0.0).with_caps(-3, 3)
    assert all(check(room_for(case, pages), order))


@pytest.mark.parametrize("spare", [-4, -1, 0, 5])
@pytest.mark.parametrize("order", ORDERS)
def test_of_equals_the_lowest_entry_leaves_and_the_oldest_chunk_comes(spare, order):
    came, gone = check(Case(geometry(3), LENGTHS, BUDGET, 4, 0.0, spare=5).with_ties().with_caps(spare), order)
    assert came and bool(gone) == (spare < 5)


def test_most_that_the_kernel_takes():
    g = dataclasses.replace(geometry(1, heads=1, dim=8), num_q_heads=CUDA_HEADS)
    for wide in (False, True):
        case = Case(g, [3000, 50], [True, True], CUDA_MOST, 0.0, spare=40).with_caps(0)
        check(room_for(case, CUDA_PAGES), 0, wide)
