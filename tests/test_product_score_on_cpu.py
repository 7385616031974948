"""The CUDA C++ kernel of product scores on a CPU, as tests/cuda_on_cpu/device.h runs it: its arithmetic and indices,
what it reads and writes, and that its threads meet. That they run one after the other hides their races."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from tests.kernels import DEVICE
from tests.test_ops_score_rows import PRODUCT, assert_stepped, product_case
from vllm_lsa.device.state import PAGE
from vllm_lsa.ops import build, cuda_native
from vllm_lsa.ops.score_rows import product_arguments, score_rows_naive, score_scratch

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
    heads, subspaces = q.shape[1], options["centroids"].shape[1]
    memory = cells.untyped_storage()
    library.cpu_set(
        ctypes.c_void_p(memory.data_ptr()), ctypes.c_void_p(memory.data_ptr() + memory.nbytes()), multiprocessors
    )
    scratch = score_scratch(len(rows.length), heads, cells.shape[1], subspaces, DEVICE, "cuda").fill_(255)
    exact, got = torch.full((2, num_pages, heads, PAGE), float("nan"))
    of_call = {**options, "logits": got, "scratch": scratch}
    assert not library.lsa_product_score_rows(*product_arguments(q, cells, rows, sets, **of_call), None)
    score_rows_naive(q, cells, rows, sets, logits=exact, **options)
    assert not exact.isnan().all()
    # Where there is one subspace, its highest entry lies on the last step.
    assert_stepped(got, exact, args, options, 0.1 if subspaces > 1 else 0.25)


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
