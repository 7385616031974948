"""Chunk scores of decode rows: the Triton kernels in the interpreter, on a GPU those and the CUDA C++ kernel."""

import math
import shutil
import time

import numpy as np
import pytest
import torch

from tests.kernels import DEVICE, load
from vllm_lsa.device.state import PAGE, DeviceRows, DeviceSets
from vllm_lsa.errors import LsaError
from vllm_lsa.ops import build, cuda_native
from vllm_lsa.ops.encode_rows import LayerCells
from vllm_lsa.ops.score_rows import (
    product_form,
    score_layers,
    score_layers_naive,
    score_rows,
    score_rows_naive,
    score_scratch,
)

load("score")
NONSENSE = 2**30


def rows_and_sets(lengths, budget, chunk, per_block, seed):
    """Rows of given lengths (0 = padding), whole or on a budget, with nonsense wherever nothing may be read; and the
    numbers of blocks and of state pages."""
    rng = np.random.default_rng(seed)
    n, counts = len(lengths), [-(-length // chunk) for length in lengths]
    blocks = [-(-c // per_block) for c in counts]
    table = np.full((n, max(blocks) + 1), NONSENSE, np.int32)
    pages = np.full((n + 2, -(-max(counts) // PAGE) + 1), NONSENSE, np.int32)
    state = np.full(n, -1, np.int32)
    free_blocks, free_pages = rng.permutation(sum(blocks) + 2), rng.permutation(sum(c // PAGE + 1 for c in counts) + 1)
    num_blocks, num_pages = len(free_blocks), len(free_pages)
    for i, set_row in enumerate(rng.permutation(n + 2)[:n]):
        table[i, : blocks[i]], free_blocks = free_blocks[: blocks[i]], free_blocks[blocks[i] :]
        if budget[i]:
            state[i], used = set_row, counts[i] // PAGE + 1
            pages[set_row, :used], free_pages = free_pages[:used], free_pages[used:]

    def put(x):
        return torch.from_numpy(np.asarray(x, dtype=np.int32)).to(DEVICE)

    rows = DeviceRows(put(rng.permutation(n)), put(lengths), put(state), put(np.full(n, NONSENSE)), put(table))
    unused = torch.empty(0)
    return rows, DeviceSets(put(pages), *[unused] * 7), num_blocks, num_pages


def in_wider_cells(data, fill):
    """The cells as parts of larger ones, 16-byte aligned, that have `fill` around them."""
    *shape, size = data.shape
    wide = torch.full((*shape, 16 + -(-size // 16) * 16 + 32), fill, dtype=torch.uint8, device=DEVICE)
    wide[..., 16 : 16 + size] = data.to(DEVICE)
    return wide[..., 16 : 16 + size]


def strided(x):
    """x with NaN between its heads and tokens."""
    wide = torch.full((x.shape[0], 2 * x.shape[1] + 1, x.shape[2]), float("nan"), dtype=x.dtype, device=DEVICE)
    wide[:, 1::2] = x.to(DEVICE)
    return wide[:, 1::2]


def outcomes(q, cells, rows, sets, num_pages, **options):
    """What the twin and each form of `score_rows` write, by name; what they leave alone is NaN."""
    kv_heads, group = cells.shape[1], q.shape[1] // cells.shape[1]
    forms = ["triton"]
    if options.get("centroids") is not None and DEVICE.type == "cuda":
        assert product_form() == "cuda", "build the kernels first"
        forms.append("cuda")
    results = {}
    for form in ["naive", *forms]:
        logits = torch.full((num_pages, kv_heads * group, PAGE), float("nan"), device=DEVICE)
        if form == "naive":
            score_rows_naive(q, cells, rows, sets, logits=logits, **options)
        else:
            if options.get("centroids") is not None:
                options["scratch"] = score_scratch(
                    len(rows.length), q.shape[1], kv_heads, options["centroids"].shape[1], DEVICE, form
                ).fill_(255)
            score_rows(q, cells, rows, sets, logits=logits, form=form, **options)
            options.pop("scratch", None)
        results[form] = logits
    return results


def assert_same(results, within=1e-3):
    want = results.pop("naive")
    assert (~want.isnan()).any()
    for form, got in results.items():
        torch.testing.assert_close(got, want, atol=within, rtol=1e-5, equal_nan=True, msg=lambda m, f=form: f"{f}: {m}")


def stepped(q, cells, rows, sets, num_pages, chunk, scale, to_query, centroids):
    """Twin of the CUDA kernel's rounding: (logits, the step of each, NaN where nothing is written).

    Look-ups are rounded down to steps of which the ranges of four subspaces in a row have 255 together at most.
    """
    heads, subspaces = cells.shape[1], centroids.shape[1]
    logits, steps = torch.full((2, num_pages, q.shape[1], PAGE), float("nan"), device=DEVICE)
    for i in range(len(rows.length)):
        state, chunks = int(rows.state[i]), max(0, int(rows.length[i]) - 1) // chunk
        if state < 0 or not chunks:
            continue
        query = q[int(rows.token[i])].float().unflatten(0, (heads, -1))
        lifted = torch.einsum("hde,hge->hgd", to_query, query).unflatten(2, (subspaces, -1))
        table = scale * torch.einsum("hgmw,hmcw->hgmc", lifted, centroids)
        low = table.amin(3, keepdim=True)
        ranges = torch.nn.functional.pad(table.amax(3) - low[..., 0], (0, -subspaces % 4))
        step = ranges.unflatten(2, (-1, 4)).sum(3).amax(2)[..., None, None] / 255
        table = low + step * (((table - low) / step).floor() + 0.5)
        blocks = rows.block_table[i, : -(-chunks // cells.shape[2])].long()
        codes = cells[blocks].transpose(1, 2).flatten(0, 1)[:chunks].unflatten(2, (subspaces, chunk)).long()
        c = torch.arange(chunks, device=DEVICE)
        page = sets.pages[state, c // PAGE].long()
        at = codes.permute(1, 2, 0, 3).flatten(2)[:, None].expand(-1, table.shape[1], -1, -1)
        of_tokens = table.gather(3, at).sum(2).unflatten(2, (chunks, chunk))
        logits[page, :, c % PAGE] = of_tokens.logsumexp(3).flatten(0, 1).T
        steps[page, :, c % PAGE] = step.flatten().expand(chunks, -1)
    return logits, steps


def assert_stepped(got, exact, args, options, mean=0.1):
    """What the CUDA kernel gave is the twin's that rounds as it does, but for few steps, and not far from the exact."""
    want, steps = stepped(*args, **options)
    written = ~want.isnan()
    assert torch.equal(written, ~got.isnan())
    # An entry next to a step may fall on the other side of it: two in one token are rare.
    off = ((got - want).abs() / steps)[written]
    assert off.max() < 2.1 and off.mean() < mean, (off.max(), off.mean())
    rounded = ((got - exact).abs() / steps)[written]
    assert rounded.max() < options["centroids"].shape[1] / 2 + 0.1


def assert_product(args, options):
    """All forms: Triton as its twin, CUDA as the one that rounds as it does, and that not far from the exact one."""
    results = outcomes(*args, **options)
    if "cuda" in results:
        assert_stepped(results.pop("cuda"), results["naive"], args, options)
    assert_same(results)


# KV heads, query heads per KV head, D, M, C, chunks per block
PRODUCT = [(2, 1, 16, 4, 16, 2), (1, 2, 12, 3, 8, 3), (2, 3, 32, 16, 16, 1), (1, 4, 24, 24, 8, 4), (1, 8, 32, 8, 16, 2),
           (1, 5, 16, 2, 24, 3), (1, 4, 32, 32, 32, 2), (2, 2, 10, 1, 64, 1), (1, 9, 36, 12, 16, 5),
           (1, 2, 32, 32, 16, 3)]  # fmt: skip


def product_case(shape, lengths, budget, dtype, seed=0):
    kv_heads, group, dim, subspaces, chunk, per_block = shape
    torch.manual_seed(seed)
    rows, sets, num_blocks, num_pages = rows_and_sets(lengths, budget, chunk, per_block, seed)
    q = strided(torch.randn(len(lengths), kv_heads * group, dim).to(dtype))
    cells = in_wider_cells(torch.randint(0, 256, (num_blocks, kv_heads, per_block, subspaces * chunk)), 7)
    to_query = torch.linalg.qr(torch.randn(kv_heads, dim, dim)).Q
    tables = {
        "to_query": to_query.contiguous().to(DEVICE),
        "centroids": 2 * torch.randn(kv_heads, subspaces, 256, dim // subspaces, device=DEVICE),
    }
    return (q, cells, rows, sets, num_pages), {"chunk": chunk, "scale": 2 / math.sqrt(dim), **tables}


@pytest.mark.parametrize("shape", PRODUCT)
def test_product_scores_equal_the_twin(shape):
    chunk = shape[4]
    lengths = [0, 37 * chunk + 1, 5 * chunk, 1, 0, 3 * chunk + 5, chunk, chunk + 1]
    budget = [False, True, True, True, True, False, True, True]
    dtype = [torch.float32, torch.bfloat16, torch.float16][sum(shape) % 3]
    assert_product(*product_case(shape, lengths, budget, dtype))


def test_product_scores_over_several_state_pages():
    lengths = [8 * 201, 0, 8 * 64 + 3, 8 * 65 + 1]
    assert_product(*product_case((2, 4, 16, 16, 8, 4), lengths, [True] * 4, torch.bfloat16))


# KV heads, query heads per KV head, D, C, chunks per block
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 64, 16, 2), (1, 1, 40, 8, 3), (3, 8, 24, 24, 1), (1, 17, 16, 64, 5)])
def test_mean_key_scores_equal_the_twin(shape, dtype):
    kv_heads, group, dim, chunk, per_block = shape
    torch.manual_seed(1)
    lengths, budget = [0, 70 * chunk, 131 * chunk + 1, 9, chunk + 1, 6 * chunk], [False, True, True, True, True, False]
    rows, sets, num_blocks, num_pages = rows_and_sets(lengths, budget, chunk, per_block, 1)
    q = strided(torch.randn(len(lengths), kv_heads * group, dim).to(dtype))
    means = torch.randn(num_blocks, kv_heads, per_block, dim).to(dtype)
    cells = in_wider_cells(means.view(torch.uint8), 255)  # NaN in every dtype
    assert_same(outcomes(q, cells, rows, sets, num_pages, chunk=chunk, scale=0.3), 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_key_scores_of_all_layers_equal_those_of_each(dtype):
    heads, group, dim, chunk, per_block = 2, 3, 40, 16, 2
    lengths = [1000, 0, 16, 17, 400]
    rows, sets, num_blocks, num_pages = rows_and_sets(lengths, [True, True, True, True, False], chunk, per_block, 3)
    torch.manual_seed(4)
    # One allocation, as vLLM's, with the layers' cells in another order.
    means = torch.randn(3, num_blocks, heads, per_block, dim).to(dtype).view(torch.uint8)
    every = torch.stack([in_wider_cells(part, 255) for part in means])
    cells = LayerCells([every[layer] for layer in (1, 0, 2)])
    q = torch.randn(len(lengths), 3, heads * group, dim, device=DEVICE).to(dtype)
    got, want = torch.full((2, 3, num_pages, heads * group, PAGE), float("nan"), device=DEVICE)
    score_layers(q, cells, rows, sets, chunk, 0.3, got)
    score_layers_naive(q, cells, rows, sets, chunk, 0.3, want)
    assert (~want.isnan()).any()
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-5, equal_nan=True)
    with pytest.raises(ValueError, match="q must be"):
        score_layers(q[:, :2], cells, rows, sets, chunk, 0.3, got)


def test_nothing_on_a_budget_writes_nothing():
    args, options = product_case((1, 2, 8, 4, 8, 2), [0, 100, 8], [True, False, True], torch.float32)
    for logits in outcomes(*args, **options).values():
        assert logits.isnan().all()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("product", [True, False])
def test_captured_scores_follow_the_rows(product):
    shape, lengths = (2, 4, 64, 16, 16, 2), [16 * 150 + 1, 16 * 80, 0, 400]
    args, options = product_case(shape, lengths, [True, True, True, False], torch.bfloat16)
    q, cells, rows, sets, num_pages = args
    if not product:
        cells = torch.randn(*cells.shape[:3], 64, device=DEVICE).bfloat16().view(torch.uint8)
        options = {name: options[name] for name in ("chunk", "scale")}
    else:
        options["scratch"] = score_scratch(4, 8, 2, 16, DEVICE)
    logits = torch.empty(num_pages, 8, PAGE, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    score_rows(q, cells, rows, sets, logits=logits, **options)
    with torch.cuda.graph(graph):
        score_rows(q, cells, rows, sets, logits=logits, **options)
    rows.length.copy_(torch.tensor([16 * 90, 0, 0, 16], device=DEVICE))
    q.normal_()
    want = logits.fill_(float("nan")).clone()
    graph.replay()
    options.pop("scratch", None)
    score_rows_naive(q, cells, rows, sets, logits=want, **options)
    steps = stepped(q, cells, rows, sets, num_pages, **options)[1] if product else torch.zeros(1)
    assert_same({"cuda": logits, "naive": want}, within=max(1e-3, 4 * float(steps.nan_to_num().max())))


def test_refusals():
    (q, cells, rows, sets, num_pages), options = product_case((1, 2, 8, 4, 8, 2), [9], [True], torch.float32)
    logits = torch.empty(num_pages, 2, PAGE, device=DEVICE)
    with pytest.raises(ValueError, match="scratch"):
        score_rows(q, cells, rows, sets, logits=logits, **options)
    small = torch.empty(8, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match="8 bytes, 1 rows need"):
        score_rows(q, cells, rows, sets, logits=logits, scratch=small, **options)
    with pytest.raises(ValueError, match="cells must be uint8"):
        score_rows(q, cells[..., :-1], rows, sets, logits=logits, **options)
    odd = torch.zeros(*cells.shape[:3], cells.shape[3] + 8, dtype=torch.uint8, device=DEVICE)[..., :-8]
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        score_rows(q, odd, rows, sets, logits=logits, **options)


def test_without_nvcc_only_the_cpu_kernels_are_built(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "nvcc", lambda: None)
    monkeypatch.setattr(build, "build_cpu", lambda out: out / "_cpu.so")
    assert build.build_all(tmp_path) == [tmp_path / "_cpu.so"]
    assert "not built (no nvcc found" in capsys.readouterr().out
    with pytest.raises(LsaError, match="no nvcc found"):
        build.build_cuda(tmp_path)


def test_without_the_library_triton_serves_and_says_why(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cuda_native, "__file__", str(tmp_path / "cuda_native.py"))
    assert cuda_native.cuda_library.__wrapped__() is None
    (tmp_path / "_cuda.so").write_bytes(b"not a library")
    assert cuda_native.cuda_library.__wrapped__() is None
    missing, broken = [record.getMessage() for record in caplog.records]
    assert "is missing" in missing and "does not load" in broken
    assert "python -m vllm_lsa.ops.build" in missing and "\n" not in missing + broken


@pytest.mark.skipif(build.nvcc() is None, reason="needs nvcc")
def test_the_cuda_kernels_compile_and_load(tmp_path):
    begin = time.monotonic()
    library = cuda_native.load(build.build_cuda(tmp_path))
    assert library.lsa_cuda_error(0) == b"no error"
    assert library.lsa_product_score_rows(*[None] + [0] * 3 + [None] * 3 + [0] * 4 + [None] * 4 + [0] + [None, 0]
                                          + [None] * 2 + [0] * 7 + [0.0, None]) == 0  # fmt: skip
    assert time.monotonic() - begin < 120  # about 15 s on one core


def test_nvcc_is_found_on_the_path_first(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name if "cuda" in name else None)
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    assert build.nvcc() == "/opt/cuda/bin/nvcc"
