import pytest
import torch

from tests.test_ops_closeness import assert_close
from vllm_lsa.ops.chunk_lse import (
    cell_bytes,
    decode_keys4,
    encode_keys4,
    keys4_chunk_logits,
    keys4_chunk_logits_naive,
    keys4_chunk_logits_paged,
    keys4_chunk_logits_paged_naive,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 300.0, 2e4])
@pytest.mark.parametrize("chunk,dim", [(8, 64), (16, 80), (1, 2)])
def test_codec_error_is_within_half_a_step(dtype, scale, chunk, dim):
    torch.manual_seed(0)
    k = (torch.randn(7, 3, chunk, dim) * scale + scale).clamp(-65504, 65504).to(dtype)
    k = k.clamp(-65504, 65504) if dtype != torch.bfloat16 else k.clamp(-65024, 65024)
    cells = encode_keys4(k)
    assert cells.shape == (7, 3, cell_bytes(chunk, dim)) and cells.dtype == torch.uint8
    step = cells[..., -2 * chunk :].contiguous().view(torch.float16).float()
    spread = k.float().amax(-1) - k.float().amin(-1)
    ulp = k.float().abs().amax(-1) * 2**-10 + 6e-8
    assert (step <= 1.002 * (spread + ulp) / 15 + 6e-8).all()
    error = (decode_keys4(cells, chunk, dim) - k.float()).abs()
    assert (error <= (step * 0.5001 + k.float().abs().amax(-1) * 1e-6).unsqueeze(-1)).all()


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -65504.0, 6e-8, 0.1, 1e-9, -1e-9])
def test_codec_of_equal_values(value):
    k = torch.full((1, 1, 8, 64), value)
    got = decode_keys4(encode_keys4(k), 8, 64)
    if torch.tensor(value).half().float() == torch.tensor(value):
        assert (got == k).all()
    assert ((got - k).abs() <= 1e-4 * abs(value) + 6e-8).all()


def test_codec_clamps_to_half():
    k = torch.tensor([-1e9, 1e9]).repeat(32).view(1, 1, 1, 64)
    got = decode_keys4(encode_keys4(k), 1, 64)
    assert got.isfinite().all() and (got.abs() - 65504).abs().max() < 4400


def test_codec_layout():
    k = torch.arange(16.0).view(1, 1, 1, 16) * 2 - 3
    cells = encode_keys4(k)
    assert cells[0, 0, :8].tolist() == [2 * j + 16 * (2 * j + 1) for j in range(8)]
    assert cells[0, 0, 8:].view(torch.float16).tolist() == [-3, 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 3, 7, 517])
@pytest.mark.parametrize("kv_heads,group,chunk,dim", [
    (3, 3, 16, 64), (1, 1, 8, 80), (2, 4, 32, 128), (2, 8, 16, 64), (1, 5, 8, 8), (1, 2, 8, 72)
])  # fmt: skip
def test_chunk_logits_match_naive(dtype, n, kv_heads, group, chunk, dim):
    torch.manual_seed(n)
    size = cell_bytes(chunk, dim)
    cells = torch.full((n, kv_heads + 1, size + 16), 0xFF, dtype=torch.uint8)[:, :kv_heads, :size]
    cells.copy_(encode_keys4(torch.randn(n, kv_heads, chunk, dim).to(dtype)))
    q = torch.randn(kv_heads * group, dim).to(dtype)
    got = keys4_chunk_logits(q, cells, chunk, dim**-0.5)
    want = keys4_chunk_logits_naive(q.double(), cells, chunk, dim**-0.5)
    assert got.shape == (kv_heads * group, n)
    assert_close(got, want)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("per_block", [1, 2, 5])
@pytest.mark.parametrize("n", [0, 1, 63, 517])
@pytest.mark.parametrize("kv_heads,group,chunk,dim", [(3, 3, 16, 64), (2, 4, 8, 72)])
def test_paged_logits_match_naive(ids, per_block, n, kv_heads, group, chunk, dim):
    torch.manual_seed(n)
    size, count = cell_bytes(chunk, dim), -(-n // per_block)
    # A cell inside a wider one, whose other bytes are NaN as minima and steps are.
    cells = torch.full((count + 9, kv_heads, per_block, size + 32), 0xFF, dtype=torch.uint8)[..., 16 : size + 16]
    # Entries past the request's are not read, and the table is strided.
    blocks = torch.full((count + 3, 2), -1, dtype=ids)[:, 0]
    blocks[:count] = torch.randperm(count + 9)[:count]
    keys = torch.randn(count, kv_heads, per_block, chunk, dim).flatten(1, 2)
    cells[blocks[:count].long()] = encode_keys4(keys).unflatten(1, (kv_heads, per_block))
    q = torch.randn(kv_heads * group, dim)
    got = keys4_chunk_logits_paged(q, cells, blocks, n, chunk, dim**-0.5)
    assert got.shape == (kv_heads * group, n)
    assert_close(got, keys4_chunk_logits_paged_naive(q.double(), cells, blocks, n, chunk, dim**-0.5))


def test_chunk_logits_refuse_bad_input():
    q, cells = torch.zeros(6, 64), torch.zeros(5, 2, cell_bytes(16, 64), dtype=torch.uint8)
    for match, bad_q, bad_cells, chunk in [
        ("cells must be", q, cells[..., :-1], 16),
        ("cells must be", q, cells.int(), 16),
        ("cells must be", q, cells, 8),
        ("multiples of 8", q, cells, 12),
        ("do not divide", q[:5], cells, 16),
        ("q must be", q[0], cells, 16),
        ("bytes of a cell", q, cells.repeat(1, 1, 2)[..., ::2], 16),
    ]:
        with pytest.raises(ValueError, match=match):
            keys4_chunk_logits(bad_q, bad_cells, chunk, 1.0)
    for match, bad_cells, blocks, n in [
        ("cells must be", cells, [0], 1),
        ("cells must be", cells[:, :, None, :-1], [0], 1),
        ("3 chunks are not in 2 blocks of 1", cells[:, :, None], [0, 1], 3),
        (r"blocks\[1\] is not one of 5", cells[:, :, None], [0, 5], 2),
        (r"blocks\[0\] is not one of 5", cells[:, :, None], [-1, 5], 2),
    ]:
        with pytest.raises(ValueError, match=match):
            keys4_chunk_logits_paged(q, bad_cells, torch.tensor(blocks), n, 16, 1.0)
    with pytest.raises(ValueError, match="k must be"):
        encode_keys4(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="floating point"):
        encode_keys4(torch.zeros(2, 3, 4, 6, dtype=torch.int32))
