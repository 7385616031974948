"""The CUDA C++ kernel of product scores on a CPU, as tests/cuda_on_cpu/device.h runs it: its arithmetic and indices,
what it reads and writes, and that its threads meet. That they run one after the other hides their races."""

import ctypes
import math
import subprocess
from pathlib import Path

import pytest
import torch

from tests.kernels import DEVICE
from tests.test_ops_score_rows import PRODUCT, product_case, stepped
from vllm_lsa.device.state import PAGE
from vllm_lsa.ops import build, cuda_native
from vllm_lsa.ops.native import DTYPES
from vllm_lsa.ops.score_rows import score_rows_naive, score_scratch

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="the kernel itself is tested where there is a GPU")
DEVICE_H = Path(__file__).parent / "cuda_on_cpu" / "device.h"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("cuda") / "product_score.so"
    flags = ["-std=c++17", "-O1", "-w", "-ffp-contract=off", "-fPIC", "-shared", "-x", "c++", "-include", str(DEVICE_H)]
    command = [*build._compiler(), *flags, str(build.CUDA_SOURCES / "product_score.cu"), "-o", str(target)]
    subprocess.run(command, check=True, timeout=120)
    return cuda_native.load(target)


def compare(library, args, options, multiprocessors):
    """The kernel on so many multiprocessors against the twin that rounds as it does, and against the exact one."""
    q, cells, rows, sets, num_pages = args
    kv_heads, heads = cells.shape[1], q.shape[1]
    to_query, centroids = options["to_query"], options["centroids"]
    memory = cells.untyped_storage()
    library.cpu_set(
        ctypes.c_void_p(memory.data_ptr()), ctypes.c_void_p(memory.data_ptr() + memory.nbytes()), multiprocessors
    )
    subspaces, rows_of_batch = centroids.shape[1], len(rows.length)
    scratch = score_scratch(rows_of_batch, heads, kv_heads, subspaces, DEVICE, "cuda").fill_(255)
    exact, got = torch.full((2, num_pages, heads, PAGE), float("nan"))
    error = library.lsa_product_score_rows(
        q.data_ptr(), q.stride(0), q.stride(1), DTYPES[q.dtype], to_query.data_ptr(), centroids.data_ptr(),
        cells.data_ptr(), *cells.stride()[:3], cells.shape[2], rows.token.data_ptr(), rows.length.data_ptr(),
        rows.state.data_ptr(), rows.block_table.data_ptr(), rows.block_table.stride(0), sets.pages.data_ptr(),
        sets.pages.stride(0), scratch.data_ptr(), got.data_ptr(), rows_of_batch, kv_heads, heads // kv_heads, subspaces,
        q.shape[2], options["chunk"], options["scale"] * math.log2(math.e), None,
    )  # fmt: skip
    assert not error
    want, steps = stepped(*args, **options)
    written = ~want.isnan()
    assert written.any() and torch.equal(written, ~got.isnan())
    # An entry next to a step may fall on the other side of it: two in one token are rare. Where there is one subspace,
    # its highest entry lies on the last step.
    off = ((got - want).abs() / steps)[written]
    assert off.max() < 2.1 and off.mean() < (0.1 if subspaces > 1 else 0.25), (off.max(), off.mean())
    score_rows_naive(q, cells, rows, sets, logits=exact, **options)
    assert ((got - exact).abs() / steps)[written].max() < subspaces / 2 + 0.1


# With many blocks a row and head has several, with few a block has several rows.
@pytest.mark.parametrize(
    "shape, multiprocessors", [*((shape, 7) for shape in PRODUCT), (PRODUCT[2], 1), (PRODUCT[2], 40)]
)
def test_scores_are_the_twins(library, shape, multiprocessors):
    chunk = shape[4]
    lengths = [0, 37 * chunk + 1, 5 * chunk, 1, 0, 3 * chunk + 5, chunk, chunk + 1]
    budget = [False, True, True, True, True, False, True, True]
    dtype = [torch.float32, torch.bfloat16, torch.float16][sum(shape) % 3]
    compare(library, *product_case(shape, lengths, budget, dtype), multiprocessors)


# The forms for chunks of 16 tokens and one slab: with registers to spare up to 16 rows times KV heads, and unrolled.
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("subspaces", [4, 8, 16])
def test_both_forms_for_whole_chunks(library, subspaces, rows):
    lengths = [16 * 32 * 5 + 7, 16 * 33 + 1, 400, 17, 16 * 65][:rows]
    compare(library, *product_case((4, 4, 32, subspaces, 16, 1), lengths, [True] * rows, torch.bfloat16), 6)


def test_nothing_is_read_or_written_where_no_row_is_on_a_budget(library):
    args, options = product_case((2, 4, 32, 16, 16, 1), [300, 0, 17], [False] * 3, torch.bfloat16)
    q, cells, rows, sets, num_pages = args
    # Copies are refused now, and so would be numbers that are read from where there are none.
    library.cpu_set(None, None, 4)
    got = torch.full((num_pages + 1, 8, PAGE), float("nan"))
    error = library.lsa_product_score_rows(
        None, 0, 0, 1, None, None, None, *cells.stride()[:3], 1, rows.token.data_ptr(), rows.length.data_ptr(),
        rows.state.data_ptr(), rows.block_table.data_ptr(), rows.block_table.stride(0), sets.pages.data_ptr(),
        sets.pages.stride(0), None, got.data_ptr(), 3, 2, 4, 16, 32, 16, 1.0, None,
    )  # fmt: skip
    assert not error and got.isnan().all()
