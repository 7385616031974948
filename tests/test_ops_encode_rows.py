"""Index cells of chunks that a step completes: the Triton kernels against their twins."""

import numpy as np
import pytest
import torch

from tests.device_state import State
from tests.kernels import DEVICE, load
from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.ops.e4m3 import quantise, unscaled
from vllm_lsa.ops.encode_rows import (
    LayerCells,
    ProductCodec,
    encode_chunks,
    encode_chunks_naive,
    encode_decoded,
    encode_decoded_naive,
    encode_pages,
    encode_pages_naive,
    of_layer,
)

load("encode")
NONSENSE = 2**30
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEY_SCALE = 0.37
E4M3 = pytest.mark.parametrize("e4m3", [False, True], ids=["", "e4m3"])


def ints(values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def make_codec(kv_heads, dim, subspaces):
    if not subspaces:
        return None
    return ProductCodec(
        torch.linalg.qr(torch.randn(kv_heads, dim, dim)).Q.contiguous().to(DEVICE),
        torch.randn(kv_heads, dim).to(DEVICE),
        torch.randn(kv_heads, subspaces, 256, dim // subspaces).to(DEVICE),
    )


def make_codecs(layers, kv_heads, dim, subspaces):
    """Of so many layers in one."""
    if not subspaces:
        return None
    every = [make_codec(kv_heads, dim, subspaces) for _ in range(layers)]
    return ProductCodec(*(torch.stack(tables) for tables in zip(*every, strict=True)))


def make_cells(num_blocks, kv_heads, per_block, chunk, dim, dtype, subspaces):
    """Cells within larger ones of noise."""
    size = subspaces * chunk if subspaces else dim * dtype.itemsize
    wide = torch.randint(0, 256, (num_blocks, kv_heads, per_block, 32 + -(-size // 16) * 16), dtype=torch.uint8)
    return wide.to(DEVICE), slice(16, 16 + size)


def assert_same(wide, want_wide, part, keys_of, dtype, codec, chunk):
    """Equal but for codes of centroids equally near; keys_of: (block, place) to keys [Hkv, C, D] of what is written."""
    got, want = wide[..., part], want_wide[..., part]
    rest = wide.clone()
    rest[..., part] = want_wide[..., part]
    assert rest.equal(want_wide)
    if codec is None:
        for block, place in keys_of:
            torch.testing.assert_close(
                got[block, :, place].view(dtype), want[block, :, place].view(dtype),
                rtol=1e-5 if dtype == torch.float32 else 0.01, atol=1e-5,
            )  # fmt: skip
            want[block, :, place] = got[block, :, place]
        assert got.equal(want)
        return
    for (block, place), keys in keys_of.items():
        y = (keys.to(DEVICE).double() - codec.mean.double()[:, None]) @ codec.to_code.double()
        y = y.unflatten(-1, (codec.centroids.shape[1], -1)).transpose(1, 2)  # [Hkv, M, C, D / M]
        every = (y.unsqueeze(-2) - codec.centroids.double().unsqueeze(2)).square().sum(-1)
        codes = got[block, :, place].long().unflatten(-1, (-1, chunk))
        chosen = every.gather(-1, codes.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(chosen, every.amin(-1), rtol=1e-4, atol=1e-5)
    assert (got == want).float().mean() > 0.99
    for block, place in keys_of:
        want[block, :, place] = got[block, :, place]
    assert got.equal(want)


# KV heads, D, M (0: mean key), C, chunks per block
SHAPES = [(2, 16, 4, 16, 2), (1, 24, 3, 8, 3), (3, 64, 8, 16, 1), (1, 20, 1, 24, 2), (2, 32, 32, 32, 2),
          (1, 12, 2, 64, 1), (2, 64, 0, 16, 2), (1, 40, 0, 24, 3), (3, 8, 0, 8, 1)]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("key_scale", [1.0, KEY_SCALE])
def test_chunks_of_a_prompt(shape, key_scale):
    kv_heads, dim, subspaces, chunk, per_block = shape
    torch.manual_seed(0)
    dtype = DTYPES[sum(shape) % 3]
    codec = make_codec(kv_heads, dim, subspaces)
    k = torch.full((5 * chunk + 3, 2 * kv_heads + 1, dim), float("nan"), dtype=dtype, device=DEVICE)[:, 1::2]
    first, blocks = [chunk + 3, -1, 3 * chunk, 0, 4 * chunk + 1], [4, NONSENSE, 0, 2, 3]
    places = [0, 7, per_block - 1, 0, 0]
    for f in filter(lambda f: f >= 0, first):
        k[f : f + chunk] = torch.randn(chunk, kv_heads, dim).to(dtype)
    keys_of = {
        (block, place): k[f : f + chunk].transpose(0, 1).float()
        * key_scale  # after all was written: two of them overlap
        for f, block, place in zip(first, blocks, places, strict=True)
        if f >= 0
    }
    wide, part = make_cells(5, kv_heads, per_block, chunk, dim, dtype, subspaces)
    want = wide.clone()
    lists = ints(first), ints(blocks), ints(places)
    encode_chunks(k, *lists, wide[..., part], chunk, codec, key_scale)
    encode_chunks_naive(k, *lists, want[..., part], chunk, codec, key_scale)
    assert_same(wide, want, part, keys_of, dtype, codec, chunk)


def make_geometry(shape, layer_lanes, dtype, e4m3=False):
    kv_heads, dim, _, chunk, per_block = shape
    pages = torch.uint8 if e4m3 else dtype
    return KVGeometry(3, 2 * kv_heads, kv_heads, dim, pages, chunk * per_block, chunk, layer_lanes, model_dtype=dtype)


def make_store(geometry, num_blocks):
    shape = (num_blocks * geometry.num_lanes * geometry.chunks_per_block, *geometry.page_shape)
    pages = torch.full(shape, geometry.poison, dtype=geometry.dtype)
    return pages.pin_memory() if DEVICE.type == "cuda" else pages


def put_keys(page, geometry, key_scale=KEY_SCALE):
    """Random keys [heads, C, D] in a page; returns what they are read as."""
    keys = torch.randn(page.shape[1:])
    if not geometry.quantised:
        page[0] = keys.to(page.dtype)
        return page[0]
    page[0] = quantise(keys, key_scale)
    return unscaled(page[0], torch.float32) * key_scale


def fill(pages, geometry, layer, block, place):
    """Random keys in a chunk's pages of a layer; returns them, [Hkv, C, D]."""
    g, keys = geometry, []
    for lane in range(layer * g.layer_lanes, (layer + 1) * g.layer_lanes):
        page = pages[(block * g.num_lanes + lane) * g.chunks_per_block + place]
        keys.append(put_keys(page, g))
    return torch.cat(keys)


def fill_tail(state, i, geometry, layer, pool, host, key_scale):
    """Random keys in the chunk that row i completes, only where they are to be read from; ((block, place), keys)."""
    g, keys, c = geometry, [], state.lengths[i] // geometry.chunk_tokens - 1
    for lane in range(layer * g.layer_lanes, (layer + 1) * g.layer_lanes):
        page = int(state.page(i, np.array([c]), lane)[0])
        slot = int(state.entries[i][lane][1][-1]) if state.budget[i] else int(state.slot_of[page])
        of = pool[slot] if slot >= 0 else host[page]
        keys.append(put_keys(of, g, key_scale).to(DEVICE))
    return (int(state.table[i, c // g.chunks_per_block]), c % g.chunks_per_block), torch.cat(keys)


def decoded_case(shape, layer_lanes, dtype, lengths, budget, host_read, e4m3=False):
    kv_heads, dim, subspaces, chunk, per_block = shape
    g = make_geometry(shape, layer_lanes, dtype, e4m3)
    state = State(g, lengths, budget, seed=sum(shape), host_read=host_read)
    every = [
        make_cells(state.num_blocks, kv_heads, per_block, chunk, dim, dtype, subspaces) for _ in range(g.num_layers)
    ]
    codecs = make_codecs(g.num_layers, kv_heads, dim, subspaces)
    return g, state, *state.pools(g.dtype), codecs, [wide for wide, _ in every], every[0][1]


@pytest.mark.parametrize("host_read", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@E4M3
def test_chunks_that_decoding_completes(shape, per_head, host_read, e4m3):
    kv_heads, chunk = shape[0], shape[3]
    torch.manual_seed(1)
    dtype = DTYPES[(sum(shape) + 1) % 3]
    lengths = [0, chunk, chunk + 1, 0, 3 * chunk, 2 * chunk - 1, 2 * chunk, 130 * chunk]
    budget = [False, True, True, False, False, True, False, True]
    g, state, pool, host, codec, wide, part = decoded_case(
        shape, kv_heads if per_head else 1, dtype, lengths, budget, host_read, e4m3
    )
    scales = [KEY_SCALE * (1 + layer) if e4m3 else 1.0 for layer in range(g.num_layers)]
    full = [i for i, x in enumerate(lengths) if x and x % chunk == 0]
    keys_of = [
        dict(fill_tail(state, i, g, layer, pool, host, scale) for i in full) for layer, scale in enumerate(scales)
    ]
    want = [x.clone() for x in wide]
    operands = pool, host, state.rows, state.slot_of, state.sets
    key_scales = torch.tensor(scales, device=DEVICE)
    encode_decoded(*operands, LayerCells([x[..., part] for x in wide]), g, codec, key_scales)
    encode_decoded_naive(*operands, LayerCells([x[..., part] for x in want]), g, codec, key_scales)
    assert len(full) == 4
    for layer in range(g.num_layers):
        assert_same(wide[layer], want[layer], part, keys_of[layer], dtype, of_layer(codec, layer), chunk)


@pytest.mark.parametrize("shape", SHAPES[2:7:4])
@E4M3
def test_chunks_begun_in_an_earlier_step(shape, e4m3):
    kv_heads, dim, subspaces, chunk, per_block = shape
    torch.manual_seed(2)
    dtype, layer, key_scale = torch.bfloat16, 2, KEY_SCALE if e4m3 else 1.0
    geometry = make_geometry(shape, kv_heads, dtype, e4m3)
    pages = make_store(geometry, 4)
    codec = make_codec(kv_heads, dim, subspaces)
    blocks, places = [3, 1, 0], [0, 0, per_block - 1]
    keys_of = {(b, p): fill(pages, geometry, layer, b, p) for b, p in zip(blocks, places, strict=True)}
    first = [b * geometry.num_lanes * per_block + p for b, p in zip(blocks, places, strict=True)]
    lists = ints([first[0], -1, *first[1:]], torch.int64), ints([3, NONSENSE, 1, 0]), ints([0, 9, *places[1:]])
    wide, part = make_cells(4, kv_heads, per_block, chunk, dim, dtype, subspaces)
    want = wide.clone()
    encode_pages(pages, *lists, wide[..., part], layer, geometry, codec, key_scale)
    encode_pages_naive(pages, *lists, want[..., part], layer, geometry, codec, key_scale)
    assert_same(wide, want, part, keys_of, dtype, codec, chunk)


def test_refusals():
    shape = (1, 16, 4, 16, 2)
    geometry = make_geometry(shape, 1, torch.float32)
    pages = make_store(geometry, 2)
    codec = make_codec(1, 16, 4)
    wide, part = make_cells(2, 1, 2, 16, 16, torch.float32, 4)
    lists = ints([0], torch.int64), ints([0]), ints([0])
    with pytest.raises(ValueError, match="layer 3"):
        encode_pages(pages, *lists, wide[..., part], 3, geometry, codec)
    with pytest.raises(ValueError, match="cells must be uint8"):
        encode_pages(pages, *lists, wide, 0, geometry, codec)
    with pytest.raises(ValueError, match="page: expected torch.int64"):
        encode_pages(pages, ints([0]), *lists[1:], wide[..., part], 0, geometry, codec)
    with pytest.raises(ValueError, match="cells of layers differ"):
        LayerCells([wide[..., part], wide[:1, ..., part]])
    with pytest.raises(ValueError, match="mean: expected"):
        encode_pages(pages, *lists, wide[..., part], 0, geometry, codec._replace(mean=codec.mean.double()))
