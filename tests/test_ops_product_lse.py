import pytest
import torch

from tests.test_ops_closeness import assert_close
from vllm_lsa.ops.product_lse import (
    encode_product,
    encode_product_naive,
    product_chunk_logits,
    product_chunk_logits_naive,
    product_chunk_logits_paged,
    product_chunk_logits_paged_naive,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (KV heads, query heads per KV head, tokens per chunk, D, M)
SHAPES = [(3, 3, 8, 64, 8), (1, 1, 16, 64, 4), (2, 2, 8, 128, 16), (2, 4, 24, 128, 8), (1, 3, 8, 64, 16),
          (2, 5, 8, 80, 4), (1, 8, 40, 6, 2), (1, 2, 8, 5, 1)]  # fmt: skip


def fenced(x):
    """x between NaN."""
    around = torch.full((3, *x.shape), float("nan"))
    around[1] = x
    return around[1]


def make_tables(kv_heads, dim, subspaces):
    """to_code, to_query, mean, centroids"""
    to_code = torch.linalg.qr(torch.randn(kv_heads, dim, dim)).Q * torch.linspace(0.5, 2, dim)
    centroids = torch.randn(kv_heads, subspaces, 256, dim // subspaces)
    return [fenced(x) for x in (to_code, to_code.inverse(), torch.randn(kv_heads, dim), centroids)]


def make_query(q_heads, dim, dtype):
    q = torch.full((2 * q_heads + 1, dim), float("nan"), dtype=dtype)[1::2]
    return q.copy_(torch.randn(q_heads, dim))


def in_noise(x):
    """The same bytes in two wider places that differ all around, so that who reads outside is told by the result."""
    for seed in (1, 2):
        noise = torch.Generator().manual_seed(seed)
        wide = torch.randint(0, 256, (*(n + 2 for n in x.shape),), dtype=torch.uint8, generator=noise)
        yield wide[tuple(slice(1, n + 1) for n in x.shape)].copy_(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 63])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_the_nearest(dtype, n, shape):
    torch.manual_seed(n)
    kv_heads, _, chunk, dim, subspaces = shape
    to_code, _, mean, centroids = make_tables(kv_heads, dim, subspaces)
    keys = torch.full((n, chunk, 2 * kv_heads, dim), float("nan"), dtype=dtype)[:, :, ::2].transpose(1, 2)
    keys.copy_(torch.randn(keys.shape) + mean.unsqueeze(1))
    got = encode_product(keys, to_code, mean, centroids)
    assert got.shape == (n, kv_heads, subspaces * chunk) and got.dtype == torch.uint8 and got.is_contiguous()

    want = encode_product_naive(keys, to_code.double(), mean.double(), centroids.double())
    y = (keys.double() - mean.double().unsqueeze(1)) @ to_code.double()
    y = y.unflatten(-1, (subspaces, -1)).transpose(2, 3)

    def distances(cells):
        codes = cells.long().unflatten(-1, (subspaces, chunk))
        head, m = torch.arange(kv_heads).view(-1, 1, 1), torch.arange(subspaces).view(-1, 1)
        return (y - centroids.double()[head, m, codes]).square().sum(-1)

    # Where two centroids are equally near to the precision of fp32 either may be it.
    torch.testing.assert_close(distances(got), distances(want), atol=1e-5, rtol=1e-5)
    assert not n or (got == want).float().mean() > 0.999


def test_equally_near_codes_are_the_first():
    mean, centroids = torch.zeros(1, 8), torch.zeros(1, 2, 256, 4)
    centroids[0, :, :7] = 5
    got = encode_product(torch.zeros(1, 1, 8, 8), torch.eye(8)[None], mean, centroids)
    assert (got == 7).all()


def test_cell_layout():
    """Byte m * C + t: token t is at t in subspace 0 and at 100 + t in subspace 1."""
    centroids = torch.arange(256.0).view(1, 1, 256, 1).repeat(1, 2, 1, 1)
    keys = torch.stack([torch.arange(16.0), torch.arange(100.0, 116.0)], -1).view(1, 1, 16, 2)
    got = encode_product(keys + 7, torch.eye(2)[None], torch.full((1, 2), 7.0), centroids)
    assert got.flatten().tolist() == [*range(16), *range(100, 116)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 63, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_match_naive(dtype, n, shape):
    torch.manual_seed(n)
    kv_heads, group, chunk, dim, subspaces = shape
    _, to_query, _, centroids = make_tables(kv_heads, dim, subspaces)
    q, scale = make_query(kv_heads * group, dim, dtype), dim**-0.5
    cells = torch.randint(0, 256, (n, kv_heads, subspaces * chunk), dtype=torch.uint8)
    got = product_chunk_logits(q, cells, to_query, centroids, chunk, scale)
    assert got.shape == (kv_heads * group, n)
    for strided in in_noise(cells):
        assert torch.equal(product_chunk_logits(q, strided, to_query, centroids, chunk, scale), got)
    swapped = cells.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(product_chunk_logits(q, swapped, to_query, centroids, chunk, scale), got)
    want = product_chunk_logits_naive(q.double(), cells, to_query, centroids, chunk, scale)
    assert want.dtype == torch.float64
    assert_close(got, want)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("per_block", [1, 2, 5])
@pytest.mark.parametrize("n", [0, 1, 63, 1000])
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_paged_logits_match_naive(ids, per_block, n, shape):
    torch.manual_seed(n)
    kv_heads, group, chunk, dim, subspaces = shape
    _, to_query, _, centroids = make_tables(kv_heads, dim, subspaces)
    q, scale = make_query(kv_heads * group, dim, torch.bfloat16), dim**-0.5
    count = -(-n // per_block)
    cells = torch.randint(0, 256, (count + 9, kv_heads, per_block, subspaces * chunk), dtype=torch.uint8)
    # Entries past the request's are not read, and the table is strided.
    blocks = torch.full((count + 3, 2), -1, dtype=ids)[:, 0]
    blocks[:count] = torch.randperm(count + 9)[:count]
    operands = (blocks, n, to_query, centroids, chunk, scale)
    got = product_chunk_logits_paged(q, cells, *operands)
    for strided in in_noise(cells):
        assert torch.equal(product_chunk_logits_paged(q, strided, *operands), got)
    gathered = cells[blocks[:count].long()].transpose(1, 2).flatten(0, 1)[:n]
    assert torch.equal(product_chunk_logits(q, gathered, to_query, centroids, chunk, scale), got)
    assert_close(got, product_chunk_logits_paged_naive(q.double(), cells, *operands))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_agree(threads):
    torch.manual_seed(0)
    to_code, to_query, mean, centroids = make_tables(3, 64, 8)
    keys, q = torch.randn(101, 3, 16, 64), torch.randn(9, 64)
    want = encode_product(keys, to_code, mean, centroids)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cells = encode_product(keys, to_code, mean, centroids)
        got = product_chunk_logits(q, cells, to_query, centroids, 16, 0.125)
    finally:
        torch.set_num_threads(before)
    assert (cells == want).float().mean() > 0.999
    assert_close(got, product_chunk_logits_naive(q.double(), cells, to_query, centroids, 16, 0.125))


def test_far_apart_logits():
    """Logits of hundreds: the sum is taken relative to the largest, also when that comes late or first."""
    torch.manual_seed(0)
    _, to_query, _, centroids = make_tables(1, 64, 8)
    cells = torch.randint(0, 256, (50, 1, 8 * 64), dtype=torch.uint8)
    q = 300 * torch.randn(3, 64)
    got = product_chunk_logits(q, cells, to_query, centroids, 64, 1.0)
    assert got.isfinite().all()
    want = product_chunk_logits_naive(q.double(), cells, to_query, centroids, 64, 1.0)
    torch.testing.assert_close(got.double(), want, atol=0.01, rtol=1e-5)


def test_nan_in_the_query_is_not_hidden():
    torch.manual_seed(0)
    _, to_query, _, centroids = make_tables(2, 64, 8)
    cells = torch.randint(0, 256, (9, 2, 64), dtype=torch.uint8)
    q = torch.randn(6, 64)
    q[4, 3] = float("nan")
    got = product_chunk_logits(q, cells, to_query, centroids, 8, 1.0)
    assert got.isnan().any(1).tolist() == got.isnan().all(1).tolist() == [h == 4 for h in range(6)]


def test_refuse_bad_input():
    to_code, to_query, mean, centroids = make_tables(2, 64, 8)
    q, cells = torch.zeros(6, 64), torch.zeros(5, 2, 1, 128, dtype=torch.uint8)
    blocks = torch.tensor([4, 0, 2])

    def refused(match, **change):
        names = ["q", "cells", "blocks", "num_chunks", "to_query", "centroids", "chunk"]
        values = [q, cells, blocks, 3, to_query, centroids, 16]
        with pytest.raises(ValueError, match=match):
            product_chunk_logits_paged(**dict(zip(names, values, strict=True)) | change, scale=1.0)

    refused("q must be", q=q[0])
    refused("q must be", q=q.int())
    refused("do not divide", q=q[:5])
    refused("centroids must be", q=q[:, :40])
    refused("cells must be", cells=cells[0])
    refused("cells must be", cells=cells[..., :-1])
    refused("cells must be", cells=cells.int())
    refused("bytes of a cell", cells=torch.zeros(5, 2, 1, 256, dtype=torch.uint8)[..., ::2])
    refused("multiple of 8", chunk=12)
    refused("multiple of 8", chunk=0)
    refused("cells must be", chunk=8)
    refused("to_query must be", to_query=to_query[:1])
    refused("to_query must be", to_query=to_query.double())
    refused("centroids must be float32", centroids=centroids.double())
    refused("centroids must be", centroids=centroids[:, :7])
    refused("centroids must be", centroids=centroids[:, :, :255])
    refused("centroids must be contiguous", centroids=centroids.transpose(0, 1).contiguous().transpose(0, 1))
    refused("blocks must be", blocks=blocks.float())
    refused("blocks must be", blocks=blocks[None])
    refused("4 chunks are not in 3 blocks of 1", num_chunks=4)
    refused("-1 chunks", num_chunks=-1)
    refused(r"blocks\[1\] is not one of 5", blocks=torch.tensor([0, 5, 9]))
    refused(r"blocks\[2\] is not one of 5", blocks=torch.tensor([0, 4, -1]))
    with pytest.raises(ValueError, match="cells must be"):
        product_chunk_logits(q, cells, to_query, centroids, 16, 1.0)

    keys = torch.zeros(3, 2, 8, 64)
    for match, *operands in [
        ("keys must be", keys[0], to_code, mean, centroids),
        ("keys must be", keys.int(), to_code, mean, centroids),
        ("multiple of 8", keys[:, :, :4], to_code, mean, centroids),
        ("to_code must be", keys, to_code[0], mean, centroids),
        ("mean must be", keys, to_code, mean[0], centroids),
        ("centroids must be", keys[:, :1], to_code, mean, centroids),
    ]:
        with pytest.raises(ValueError, match=match):
            encode_product(*operands)
