import pytest
import torch

from vllm_lsa.ops.copy_pages import copy_pages, copy_pages_naive
from vllm_lsa.ops.write_tokens import write_tokens, write_tokens_naive

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")


def make_tokens(tokens, kv_heads, chunk, dim, dtype, slots, pages):
    """Tokens at distinct places, some without a slot or page, with rows that are strided."""
    qkv = torch.randn(tokens, 5 * kv_heads, dim).to(dtype)
    k, v = qkv[:, 3 * kv_heads : 4 * kv_heads], qkv[:, 4 * kv_heads :]
    offset = torch.arange(tokens, dtype=torch.int32) % chunk
    slot, page = (torch.randperm(m)[torch.arange(tokens) // chunk] for m in (slots, pages))
    slot[torch.rand(tokens) < 0.3] = -1
    page[torch.rand(tokens) < 0.3] = -1
    return k, v, offset, slot.int(), page


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 3, 7, 61, 517])
@pytest.mark.parametrize("kv_heads,chunk,dim", [(3, 16, 64), (1, 8, 80), (8, 32, 128)])
def test_write_tokens_matches_naive(dtype, tokens, kv_heads, chunk, dim):
    torch.manual_seed(tokens)
    slots, pages = 70, 81
    k, v, offset, slot, page = make_tokens(tokens, kv_heads, chunk, dim, dtype, slots, pages)
    pools = [torch.full((m, 2, kv_heads, chunk, dim), NAN, dtype=dtype) for m in (slots, pages)]
    twins = [x.clone() for x in pools]
    write_tokens(k, v, offset, pools[0], slot, pools[1], page)
    write_tokens_naive(k, v, offset, twins[0], slot, twins[1], page)
    for got, want in zip(pools, twins, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_write_tokens_refuses_bad_input_and_writes_nothing():
    torch.manual_seed(0)
    names = ["k", "v", "offset", "pool", "slot", "host_pages", "host_page"]
    k, v, offset, slot, page = make_tokens(5, 2, 16, 64, torch.float32, 4, 6)
    good = [k, v, offset, torch.zeros(4, 2, 2, 16, 64), slot, torch.zeros(6, 2, 2, 16, 64), page]

    def refused(match, **change):
        operands = dict(zip(names, good, strict=True)) | change
        with pytest.raises(ValueError, match=match):
            write_tokens(**operands)
        assert not good[3].any() and not good[5].any()

    def last(x, value):
        return torch.cat([x[:-1], x.new_tensor([value])])

    refused("token 4: offset", offset=last(offset, 16))
    refused("token 4: offset", offset=last(offset, -1))
    refused("token 4: slot", slot=last(slot, 4))
    refused("token 4: slot", slot=last(slot, -2))
    refused("token 4: host_page", host_page=last(page, 6))
    refused("host_page: expected torch.int64", host_page=page.int())
    refused("v: expected", v=v[:, :1])
    refused("k: all but the first", k=torch.zeros(5, 64, 2).transpose(1, 2))
    refused("pool: expected torch.float32", pool=torch.zeros(4, 2, 2, 16, 64, dtype=torch.float16))
    refused("slot must be contiguous", slot=torch.zeros(10, dtype=torch.int32)[::2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 3, 7, 33])
def test_copy_pages_matches_naive(dtype, n):
    torch.manual_seed(n)
    shape = (2, 3, 16, 80)
    src = torch.randn(50, 2, *shape).to(dtype)[:, 1]
    dst = torch.full((40, 3, *shape), NAN, dtype=dtype)[:, 2]
    twin = dst.clone()
    dst_index, src_index = torch.randperm(40)[:n], torch.randint(0, 50, (n,))
    copy_pages(dst, dst_index, src, src_index)
    copy_pages_naive(twin, dst_index, src, src_index)
    torch.testing.assert_close(dst, twin, rtol=0, atol=0, equal_nan=True)


def test_copy_pages_refuses_bad_input():
    dst, src, index = torch.zeros(4, 2, 1, 8, 16), torch.ones(5, 2, 1, 8, 16), torch.tensor

    def refused(match, *operands):
        with pytest.raises(ValueError, match=match):
            copy_pages(*operands)
        assert not dst.any()

    refused(r"dst_index\[1\] = 4", dst, index([0, 4]), src, index([0, 1]))
    refused(r"dst_index\[0\] = -1", dst, index([-1]), src, index([0]))
    refused(r"src_index\[0\] = 5", dst, index([0]), src, index([5]))
    refused("src_index: expected", dst, index([0]), src, index([0, 1]))
    refused("src_index: expected", dst, index([0]), src, index([0]).int())
    refused("src: expected", dst, index([0]), src.half(), index([0]))
    refused("src: all but the first", dst, index([0]), torch.ones(5, 2, 1, 16, 8).transpose(3, 4), index([0]))
    with pytest.raises(ValueError, match="repeats"):
        copy_pages_naive(dst, index([1, 1]), src, index([0, 1]))
