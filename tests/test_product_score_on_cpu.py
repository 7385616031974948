"""The CUDA C++ kernel of product scores on a CPU, see tests/cuda_on_cpu."""

import pytest
import torch

from tests.cuda_on_cpu import ORDERS, library, set_device
from tests.kernels import DEVICE
from tests.test_ops_score_rows import PRODUCT, assert_stepped, product_case
from vllm_lsa.device.state import PAGE
from vllm_lsa.ops.score_rows import product_arguments, score_rows_naive, score_scratch

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="the kernel itself is tested where there is a GPU")


def compare(args, options, multiprocessors, orders=(0,), per_sm=0):
    """The kernel on so many multiprocessors against the twin that rounds as it does, and against the exact one; in each
    order of its threads the same.
    """
    q, cells, rows, sets, num_pages = args
    heads, subspaces = q.shape[1], options["centroids"].shape[1]
    exact = torch.full((num_pages, heads, PAGE), float("nan"))
    score_rows_naive(q, cells, rows, sets, logits=exact, **options)
    assert not exact.isnan().all()
    results = []
    for order in orders:
        set_device(cells, multiprocessors, order)
        scratch = score_scratch(len(rows.length), heads, cells.shape[1], subspaces, DEVICE, "cuda").fill_(255)
        got = torch.full_like(exact, float("nan"))
        of_call = {**options, "logits": got, "scratch": scratch, "per_sm": per_sm}
        assert not library().lsa_product_score_rows(*product_arguments(q, cells, rows, sets, **of_call), None)
        results.append(got)
        torch.testing.assert_close(got, results[0], rtol=0, atol=0, equal_nan=True)
    # Where there is one subspace, its highest entry lies on the last step.
    assert_stepped(results[0], exact, args, options, 0.1 if subspaces > 1 else 0.25)


# With many blocks a row and head has several, with few a block has several rows.
@pytest.mark.parametrize(
    "shape, multiprocessors", [*((shape, 7) for shape in PRODUCT), (PRODUCT[2], 1), (PRODUCT[2], 40)]
)
def test_scores_are_the_twins(shape, multiprocessors):
    chunk = shape[4]
    lengths = [0, 37 * chunk + 1, 5 * chunk, 1, 0, 3 * chunk + 5, chunk, chunk + 1]
    budget = [False, True, True, True, True, False, True, True]
    dtype = [torch.float32, torch.bfloat16, torch.float16][sum(shape) % 3]
    compare(*product_case(shape, lengths, budget, dtype), multiprocessors, ORDERS)


# The forms for chunks of 16 tokens and one slab: with registers to spare up to 16 rows times KV heads, and unrolled.
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("subspaces", [4, 8, 16])
@pytest.mark.parametrize("per_sm", [0, 1])
def test_both_forms_for_whole_chunks(subspaces, rows, per_sm):
    lengths = [16 * 32 * 5 + 7, 16 * 33 + 1, 400, 17, 16 * 65][:rows]
    compare(*product_case((4, 4, 32, subspaces, 16, 1), lengths, [True] * rows, torch.bfloat16), 6, ORDERS, per_sm)


def test_nothing_is_read_or_written_where_no_row_is_on_a_budget():
    args, options = product_case((2, 4, 32, 16, 16, 1), [300, 0, 17], [False] * 3, torch.bfloat16)
    q, cells, rows, sets, num_pages = args
    # Copies are refused now, and so would be numbers that are read from where there are none.
    set_device(None, 4)
    got = torch.full((num_pages + 1, 8, PAGE), float("nan"))
    error = library().lsa_product_score_rows(
        None, 0, 0, 1, None, None, None, *cells.stride()[:3], 1, rows.token.data_ptr(), rows.length.data_ptr(),
        rows.state.data_ptr(), rows.block_table.data_ptr(), rows.block_table.stride(0), sets.pages.data_ptr(),
        sets.pages.stride(0), None, got.data_ptr(), 3, 2, 4, 16, 32, 16, 0, 1.0, None,
    )  # fmt: skip
    assert not error and got.isnan().all()
