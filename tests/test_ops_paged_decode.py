import pytest
import torch

from tests.test_ops_closeness import assert_close
from vllm_lsa.ops.paged_decode import paged_decode_attention, paged_decode_attention_naive

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(counts, group, kv_heads, chunk, dim, dtype, spread=1.0):
    """Operands with NaN in every place that must not be read, and rows of q and table that are strided."""
    n, entries = len(counts), max(sum(counts), 1)
    slots, width = entries + 3, max(counts, default=0) + 2
    nan = float("nan")
    q = torch.full((n, 2 * group * kv_heads, dim), nan, dtype=dtype)[:, : group * kv_heads]
    q.copy_(torch.randn(q.shape) * spread)
    pool = torch.full((slots, 2, kv_heads, chunk, dim), nan, dtype=dtype)
    table = torch.full((n, width + 5), 2**30, dtype=torch.int32)[:, :width]
    first_len = torch.randint(1, chunk + 1, (n,), dtype=torch.int32)
    free = iter(torch.randperm(slots)[:entries].tolist())
    for row, count in enumerate(counts):
        for entry in range(count):
            slot = next(free)
            table[row, entry] = slot
            length = chunk if entry else int(first_len[row])
            pool[slot, :, :, :length] = torch.randn(2, kv_heads, length, dim).to(dtype)
    return q, pool, table, torch.tensor(counts, dtype=torch.int32), first_len


def check(q, pool, table, counts, first_len):
    scale = q.shape[-1] ** -0.5
    out = torch.full((q.shape[0], 2, *q.shape[1:]), float("nan"), dtype=q.dtype)[:, 1]
    got, lse = paged_decode_attention(q, pool, table, counts, first_len, scale, out)
    assert got is out
    want, want_lse = paged_decode_attention_naive(q.double(), pool.double(), table, counts, first_len, scale)
    assert_close(got, want)
    assert_close(lse, want_lse, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("chunk,dim", [(16, 64), (8, 80), (32, 128), (5, 16)])
def test_matches_naive(dtype, group, chunk, dim):
    torch.manual_seed(group)
    check(*make([0, 1, 2, 33, 0, 5, 1], group, 2, chunk, dim, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[517], [517, 1, 0], [33] * 7, [0], []])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_splits_rows_over_threads(dtype, counts, threads):
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(*make(counts, 3, 3, 16, 64, dtype))
    finally:
        torch.set_num_threads(before)


def test_rising_and_far_apart_scores():
    q, pool, table, counts, first_len = make([40], 3, 1, 16, 64, torch.float32, spread=30.0)
    pool[table[0, :40].long(), 0] *= torch.linspace(0.1, 4, 40).view(-1, 1, 1, 1)
    check(q, pool, table, counts, first_len)


def test_nan_in_a_valid_key_is_not_hidden():
    q, pool, table, counts, first_len = make([3], 1, 1, 16, 64, torch.float32)
    pool[table[0, 2], 0, 0, 5, 3] = float("nan")
    out, lse = paged_decode_attention(q, pool, table, counts, first_len, 1.0)
    assert out.isnan().all() and lse.isnan().all()


def test_refuses_bad_input():
    def refused(match, **change):
        names = ["q", "pool", "table", "counts", "first_len"]
        operands = dict(zip(names, make([3, 2], 3, 2, 16, 64, torch.float32), strict=True)) | change
        with pytest.raises(ValueError, match=match):
            paged_decode_attention(**operands, scale=1.0)

    def ints(*x):
        return torch.tensor(x, dtype=torch.int32)

    refused("row 1: counts", counts=ints(3, 6))
    refused("row 0: counts", counts=ints(-1, 2))
    refused("row 1: first_len", first_len=ints(1, 17))
    refused("row 0: first_len", first_len=ints(0, 1))
    refused("row 0: table", table=torch.full((2, 5), 99, dtype=torch.int32))
    refused("row 0: table", table=torch.full((2, 5), -1, dtype=torch.int32))
    refused("table: expected torch.int32", table=torch.zeros(2, 5, dtype=torch.int64))
    refused("pool: expected torch.float32", pool=torch.zeros(9, 2, 2, 16, 64, dtype=torch.bfloat16))
    refused("pool: all but the first", pool=torch.zeros(9, 2, 2, 64, 16).transpose(3, 4))
    refused("counts: expected", counts=ints(1, 2, 3))
    refused("counts must be contiguous", counts=ints(1, 9, 1, 9)[::2])
    refused("do not divide", q=torch.zeros(2, 5, 64))
    refused("multiple of 16", q=torch.zeros(2, 6, 24), pool=torch.zeros(9, 2, 2, 16, 24))
    refused("none of float32", q=torch.zeros(2, 6, 64).double(), pool=torch.zeros(9, 2, 2, 16, 64).double())
