"""Logits of DeepSeek-V4's paged index keys: the Triton kernel in the interpreter or on a GPU, against its twin."""

import sys

import pytest
import torch

from tests.kernels import DEVICE, load
from vllm_lsa.models.deepseek_v4.scorer import index_pages, paged_logits, quantize_query
from vllm_lsa.ops import index_logits as ops
from vllm_lsa.ops.index_logits import index_logits, index_logits_naive

KERNELS = load("index_logits")
NONSENSE = 2**30
LENGTHS = (0, 1, 63, 64, 65, 300)
PAGES = 5


def keys_and_tables(lengths, page_bytes, seed):
    """Scattered pages, page_bytes apart, of random keys, a view [num_blocks, 64, 132]; NaN in values and scales of
    what no row has written, nonsense in the table behind each row."""
    g = torch.Generator().manual_seed(seed)
    counts = [-(-length // 64) for length in lengths]
    free = torch.randperm(sum(counts) + 3, generator=g).tolist()
    storage = torch.full((len(free), page_bytes), 255, dtype=torch.uint8)
    table = torch.full((len(lengths), PAGES + 1), NONSENSE, dtype=torch.int32)
    for row, length in enumerate(lengths):
        for i in range(counts[row]):
            block, here = free.pop(), min(64, length - 64 * i)
            table[row, i] = block
            codes = (100 * torch.randn(here, 128, generator=g)).clamp(-448, 448)
            codes[:, ::7] *= 2.0**-14  # numbers below the least normal one, and zeros
            scales = torch.exp2(torch.randint(-12, 3, (here,), generator=g).float())
            storage[block, : here * 128] = codes.to(torch.float8_e4m3fn).view(torch.uint8).flatten()
            storage[block, 8192 : 8192 + 4 * here] = scales.view(torch.uint8)
    storage = storage.to(DEVICE)
    cache = storage.as_strided((len(storage), 64, 132), (page_bytes, 132, 1))
    return cache, table[:, :PAGES].to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def queries(rows, heads, dtype, seed):
    """Every second row of a tensor that is NaN between them, and weights."""
    g = torch.Generator().manual_seed(seed)
    q, weights = torch.randn(rows, heads, 128, generator=g), torch.randn(rows, heads, generator=g) * heads**-0.5
    if dtype == torch.float8_e4m3fn:
        q, weights = quantize_query(q, weights)
    wide = torch.full((2 * rows, heads, 128), torch.nan).to(dtype).to(DEVICE)
    # Indexed assignment has no fp8 form.
    wide[::2].view(torch.uint8).copy_(q.to(dtype).to(DEVICE).view(torch.uint8))
    return wide[::2], weights.to(DEVICE)


def assert_same(got, want, lengths, within):
    """within: relative to the largest logit of a row."""
    assert got.shape == want.shape and got.dtype == torch.float32
    for g, w, length in zip(got, want, lengths, strict=True):
        end = min(length, len(w))
        assert g[end:].eq(-torch.inf).all() and w[:end].isfinite().all()
        if end:
            assert (g[:end] - w[:end]).abs().max() <= within * w[:end].abs().max()


def check(lengths, heads, dtype, page_bytes, entries=64 * PAGES, fp8=None, integers=torch.int32):
    cache, table, rows = keys_and_tables(lengths, page_bytes, seed=heads + len(lengths))
    q, weights = queries(len(lengths), heads, dtype, seed=page_bytes)
    operands = q, weights, index_pages(cache), table.to(integers), rows.to(integers)
    wide = torch.full((2, len(lengths), entries + 5), torch.nan, device=DEVICE)
    got, want = wide[:, :, :entries]
    index_logits(*operands, got, fp8=fp8)
    index_logits_naive(*operands, want)
    assert wide[:, :, entries:].isnan().all()
    # Tensor cores sum products of e4m3 with fewer bits.
    in_fp8 = dtype == torch.float8_e4m3fn and fp8 is not False and DEVICE.type == "cuda"
    assert_same(got, want, lengths, 5e-3 if in_fp8 else 1e-4)


@pytest.fixture
def native(monkeypatch):
    """The interpreter as a device that knows e4m3."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(ops, "has_e4m3", lambda device: True)
    elif not ops.has_e4m3(DEVICE):
        pytest.skip("this GPU does not know e4m3")


@pytest.mark.parametrize("page_bytes", [8448, 8640])
@pytest.mark.parametrize("heads", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16], ids=["fp8", "bf16"])
def test_kernel_is_its_twin(dtype, heads, page_bytes):
    for lengths in (LENGTHS[:1], LENGTHS[1:3], LENGTHS[3:], LENGTHS[2:]):
        check(lengths, heads, dtype, page_bytes, fp8=False)


@pytest.mark.parametrize("heads", [16, 64, 128])
def test_products_in_fp8(native, heads):
    check(LENGTHS[2:], heads, torch.float8_e4m3fn, 8640)
    check(LENGTHS[:4], heads, torch.float8_e4m3fn, 8448, fp8=False)
    check(LENGTHS[1:3], heads, torch.bfloat16, 8640)


@pytest.mark.parametrize("heads", [3, 48, 80])
def test_any_number_of_heads(heads):
    check((65, 0, 300), heads, torch.float8_e4m3fn, 8448, fp8=False, integers=torch.int64)
    check((65, 1), heads, torch.float32, 8448)
    check((65, 1), heads, torch.float16, 8448)


@pytest.mark.parametrize("entries", [0, 1, 63, 65, 200])
def test_some_entries(entries):
    """Fewer than the table has pages for, and than rows have."""
    check((300, 64, 1), 16, torch.bfloat16, 8640, entries)


@pytest.mark.parametrize("programs", [9, 5, 1])
def test_several_tiles_of_a_program(monkeypatch, programs):
    """As long tables have them: rows that end within a part, and before it."""
    monkeypatch.setattr(KERNELS, "_PROGRAMS", programs)
    check(LENGTHS[2:], 64, torch.float8_e4m3fn, 8640, fp8=False)
    check(LENGTHS[2:], 128, torch.bfloat16, 8448, 5 * 64 - 1)
    check((0, 1, 64, 300), 64, torch.bfloat16, 8448, 130)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_captured():
    lengths = (300, 1, 64)
    cache, table, rows = keys_and_tables(lengths, 8640, 0)
    table = table.where(table != NONSENSE, 0)
    q, weights = queries(3, 64, torch.bfloat16, 0)
    out = torch.empty(3, 64 * PAGES, device=DEVICE)
    operands = q, weights, index_pages(cache), table, rows
    index_logits(*operands, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        index_logits(*operands, out)
    rows.copy_(torch.tensor([65, 0, 63]))
    want = out.fill_(torch.nan).clone()
    graph.replay()
    index_logits_naive(*operands, want)
    assert_same(out, want, (65, 0, 63), 1e-4)


def test_scorer_takes_the_kernel_on_a_gpu():
    """And the twin on the CPU, though the kernel is loaded."""
    cache, table, rows = keys_and_tables(LENGTHS[2:], 8640, 1)
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float32):
        q, weights = queries(4, 64, dtype, 1)
        want = torch.empty(4, 300, device=DEVICE)
        index_logits_naive(q, weights, index_pages(cache), table, rows, want)
        got = paged_logits(q, weights, cache, table, rows.short(), 300)
        assert got.equal(want) or DEVICE.type == "cuda"
        assert_same(got, want, LENGTHS[2:], 5e-3)


def test_without_kernels_the_cpu_takes_the_twin(monkeypatch):
    monkeypatch.delitem(sys.modules, "vllm_lsa.kernels.index_logits")
    cache, table, rows = (x.cpu() for x in keys_and_tables((65, 0), 8448, 2))
    q, weights = (x.cpu() for x in queries(2, 16, torch.bfloat16, 2))
    got, want = torch.full((2, 2, 100), torch.nan)
    index_logits(q, weights, index_pages(cache), table, rows, got)
    index_logits_naive(q, weights, index_pages(cache), table, rows, want)
    assert got.equal(want)


def test_refusals():
    cache, table, rows = keys_and_tables((65, 1), 8448, 0)
    q, weights = queries(2, 16, torch.bfloat16, 0)
    good = {
        "q": q, "weights": weights, "pages": index_pages(cache), "block_table": table, "lengths": rows,
        "out": torch.empty(2, 320, device=DEVICE),
    }  # fmt: skip
    odd = torch.zeros(3 * 8450, dtype=torch.uint8, device=DEVICE).view(3, 8450)[:, :8448]
    for name, bad, message in (
        ("q", q[:, :, 1:], "q must be e4m3"),
        ("q", q.double(), "q must be e4m3"),
        ("q", q.transpose(1, 2).contiguous().transpose(1, 2), "last dimension"),
        ("q", q[:, :0], "no heads"),
        ("weights", weights.bfloat16(), "weights: expected"),
        ("weights", weights[:, 1:], "weights: expected"),
        ("pages", index_pages(cache)[:, 1:], "pages: expected"),
        ("pages", odd, "multiples of 4 bytes"),
        ("block_table", table.short(), "block_table and lengths must be"),
        ("block_table", table[:1], "block_table: expected"),
        ("lengths", rows.float(), "block_table and lengths must be"),
        ("lengths", rows[:1], "lengths: expected"),
        ("out", good["out"].half(), "out: expected"),
        ("out", torch.empty(2, 321, device=DEVICE), "321 entries are not in 5 pages"),
    ):
        with pytest.raises(ValueError, match=message):
            index_logits(**{**good, name: bad})
    with pytest.raises(ValueError, match="fp8 products need"):
        index_logits(**good, fp8=True)
