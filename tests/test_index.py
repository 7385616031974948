from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_lsa.errors import LsaError
from vllm_lsa.indexer.base import ChunkIndex
from vllm_lsa.indexer.four_bit import FourBitIndex
from vllm_lsa.indexer.layout import IndexLayout
from vllm_lsa.indexer.mean_key import MeanKeyIndex
from vllm_lsa.indexer.min_max import MinMaxIndex
from vllm_lsa.indexer.product import ProductIndex, ProductTables
from vllm_lsa.ops.chunk_lse import decode_keys4

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYERS = 5


def random_tables(kv_heads: int, dim: int, subspaces: int = 4) -> ProductTables:
    to_code = torch.randn(LAYERS, kv_heads, dim, dim) / dim**0.5 + 2 * torch.eye(dim)
    centroids = 2 * torch.randn(LAYERS, kv_heads, subspaces, 256, dim // subspaces)
    return ProductTables(to_code, to_code.inverse(), torch.randn(LAYERS, kv_heads, dim), centroids)


@cache
def tables_of(kv_heads: int, dim: int) -> ProductTables:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return random_tables(kv_heads, dim)


def product(chunk: int, dim: int, dtype: torch.dtype, kv_heads: int = 2) -> ProductIndex:
    return ProductIndex(chunk, dim, dtype, tables_of(kv_heads, dim))


Kind = Callable[[int, int, torch.dtype], ChunkIndex]
LINEAR: list[Kind] = [MeanKeyIndex, MinMaxIndex]
KINDS: list[Kind] = [*LINEAR, FourBitIndex, product]
# (chunks, kv heads, query heads per kv head, chunk tokens, head dim)
SHAPES = [(1, 1, 1, 16, 64), (7, 3, 3, 16, 64), (63, 2, 1, 8, 128), (111, 1, 5, 24, 40)]
ODD = [(5, 3, 2, 7, 63), (17, 2, 3, 1, 5)]


def random_keys(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Keys [n, Hkv, C, D] with strides as attention has them, that is a transposed view of [n, C, Hkv, D]."""
    n, kv_heads, _, chunk, dim = shape
    return (torch.randn(n, chunk, kv_heads, dim) + torch.randn(kv_heads, dim)).to(dtype).transpose(1, 2)


def expected_logits(
    index: ChunkIndex, query: torch.Tensor, keys: torch.Tensor, cells: torch.Tensor, scale: float, layer: int
) -> torch.Tensor:
    """What the index promises, head by head and chunk by chunk in float64, from the values that cells can hold."""
    n, kv_heads, chunk, dim = keys.shape
    group = query.shape[0] // kv_heads
    if isinstance(index, FourBitIndex):
        keys = decode_keys4(cells, chunk, dim)
    if isinstance(index, ProductIndex):
        keys = decoded_product(index.tables, layer, cells)
    out = torch.empty(query.shape[0], n, dtype=torch.float64)
    for head in range(query.shape[0]):
        q = query[head].double()
        for i in range(n):
            k = keys[i, head // group].double()
            if isinstance(index, MeanKeyIndex):
                out[head, i] = scale * (q @ k.mean(0).to(index.dtype).double())
            elif isinstance(index, MinMaxIndex):
                out[head, i] = scale * torch.maximum(q * k.amin(0), q * k.amax(0)).sum()
            else:
                out[head, i] = torch.logsumexp(scale * (k @ q), 0)
    return out


def decoded_product(tables: ProductTables, layer: int, cells: torch.Tensor) -> torch.Tensor:
    """Keys [n, Hkv, C, D] in float64, less the mean, by the codes of cells [n, Hkv, M * C]."""
    codes = cells.long().unflatten(-1, (tables.subspaces, -1))
    n, kv_heads, subspaces, chunk = codes.shape
    y = torch.empty(n, kv_heads, chunk, tables.head_dim, dtype=torch.float64)
    for head in range(kv_heads):
        parts = [tables.centroids[layer, head, m][codes[:, head, m]] for m in range(subspaces)]
        y[:, head] = torch.cat(parts, dim=-1)
    return y @ tables.to_query[layer].double()


def test_mean_keys_are_those_of_the_codes() -> None:
    """What a trained lookahead scores, from an index that keeps no keys."""
    index = product(8, 64, torch.float32, 3)
    assert isinstance(index, ProductIndex)
    for layer in range(index.tables.layers):
        cells = index.encode(torch.randn(7, 3, 8, 64), layer)
        want = decoded_product(index.tables, layer, cells).mean(2) + index.tables.mean[layer].double()
        torch.testing.assert_close(index.mean_keys(cells, layer).double(), want, atol=1e-4, rtol=1e-4)


def make(kind: Kind, chunk: int, dim: int, dtype: torch.dtype, kv_heads: int) -> ChunkIndex:
    return product(chunk, dim, dtype, kv_heads) if kind is product else kind(chunk, dim, dtype)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> bool:
    # A mean on the edge between two values of `dtype` may round either way in fp32 and float64.
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    return got.dtype == torch.float32 and torch.allclose(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "shape"), [(k, s) for k in KINDS for s in SHAPES] + [(k, s) for k in LINEAR for s in ODD]
)
def test_chunk_logits(kind: Kind, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    n, kv_heads, group, chunk, dim = shape
    index, keys, layer = make(kind, chunk, dim, dtype, kv_heads), random_keys(shape, dtype), 3
    query = torch.randn(kv_heads * group, dim).to(dtype)
    cells = index.encode(keys, layer)
    assert cells.dtype == torch.uint8 and cells.shape == (n, kv_heads, index.cell_bytes) and cells.is_contiguous()
    scale = dim**-0.5
    got = index.chunk_logits(query, cells, scale, layer)
    assert close(got, expected_logits(index, query, keys, cells, scale, layer), dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_batched(kind: Kind) -> None:
    torch.manual_seed(1)
    index, first = kind(16, 64, torch.bfloat16), 2
    keys = [random_keys((9, 2, 2, 16, 64), torch.bfloat16) for _ in range(3)]
    cells = torch.stack([index.encode(k, first + i) for i, k in enumerate(keys)])
    query = torch.randn(3, 4, 64).bfloat16()
    got = index.chunk_logits(query, cells, 0.125, first)
    assert got.shape == (3, 4, 9)
    for i in range(3):
        assert torch.equal(got[i], index.chunk_logits(query[i], cells[i], 0.125, first + i))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quest_bounds_every_token(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    index, keys = MinMaxIndex(16, 64, dtype), random_keys((50, 1, 1, 16, 64), dtype)
    query = torch.randn(4, 64).to(dtype)
    exact = 0.125 * torch.einsum("hd,ntd->hnt", query.double(), keys[:, 0].double()).amax(-1)
    assert (index.chunk_logits(query, index.encode(keys), 0.125).double() >= exact - 1e-4).all()


def test_four_bit_estimates_the_mass() -> None:
    """A key is off by at most half a step per dimension, and the log of a mass by no more than its worst token."""
    torch.manual_seed(3)
    index, keys = FourBitIndex(16, 64, torch.float32), random_keys((80, 1, 1, 16, 64), torch.float32)
    query = 3 * torch.randn(4, 64)
    exact = torch.einsum("hd,ntd->hnt", 0.125 * query, keys[:, 0]).logsumexp(-1)
    error = (index.chunk_logits(query, index.encode(keys), 0.125) - exact).abs()
    step = (keys.amax(-1) - keys.amin(-1))[:, 0].amax(-1) / 15
    # 1 % for the rounding of steps and minima to fp16.
    assert (error <= 1.01 * 0.125 * query.abs().sum(-1, keepdim=True) * step / 2).all()
    # Independent roundings have standard deviation step / sqrt(12) a dimension; tokens can only average that out.
    typical = 0.125 * query.norm(dim=-1, keepdim=True) * step / 12**0.5
    assert error.square().mean() <= typical.square().mean()


@pytest.mark.parametrize(("chunk", "dim", "named"), [(4, 64, "chunk_tokens=4"), (16, 60, "head_dim=60")])
def test_four_bit_names_what_does_not_fit(chunk: int, dim: int, named: str) -> None:
    with pytest.raises(LsaError, match=named):
        FourBitIndex(chunk, dim, torch.float32)


def test_equality() -> None:
    assert MeanKeyIndex(16, 64, torch.float16) == MeanKeyIndex(16, 64, torch.float16)
    assert MeanKeyIndex(16, 64, torch.float16) != MeanKeyIndex(16, 64, torch.bfloat16)
    assert MeanKeyIndex(16, 64, torch.float16) != MinMaxIndex(16, 32, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [5, 63, 64])
def test_layout_matches_its_parts(dtype: torch.dtype, dim: int) -> None:
    torch.manual_seed(4)
    shape = (13, 3, 2, 8, dim)
    kinds = KINDS if dim == 64 else LINEAR
    indexes: list[ChunkIndex] = [make(kind, 8, dim, dtype, 3) for kind in kinds]
    # Each twice: lookahead and demand share it.
    layout = IndexLayout([*indexes, *(make(kind, 8, dim, dtype, 3) for kind in kinds)])
    assert layout.cell_bytes == sum(-(-index.cell_bytes // 16) * 16 for index in indexes)
    keys, query = random_keys(shape, dtype), torch.randn(6, dim).to(dtype)
    cells = layout.encode(keys, 4)
    assert cells.shape == (13, 3, layout.cell_bytes) and torch.equal(cells, layout.encode(keys, 4))
    for index in indexes:
        part, alone = layout.part(cells, index), index.encode(keys, 4)
        assert part.untyped_storage().data_ptr() == cells.untyped_storage().data_ptr()
        assert torch.equal(part, alone)
        got, want = index.chunk_logits(query, part, 0.2, 4), index.chunk_logits(query, alone, 0.2, 4)
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_block", [1, 2])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_layout_in_vllm_blocks(kind: Kind, per_block: int, ids: torch.dtype) -> None:
    """Cells that lie in blocks [num_blocks, Hkv, chunks_per_block, b], read through a block table."""
    torch.manual_seed(5)
    index = kind(8, 64, torch.bfloat16)
    layout = IndexLayout([MeanKeyIndex(8, 64, torch.float16), index])
    keys, query = random_keys((6, 2, 2, 8, 64), torch.bfloat16), torch.randn(4, 64)
    memory = torch.full((9, 2, per_block, layout.cell_bytes), 0xFF, dtype=torch.uint8)
    table = torch.tensor([7, 2, 5, 1, 8, 3][: 6 // per_block])
    chunk = torch.arange(6)
    memory[table[chunk // per_block], :, chunk % per_block] = layout.encode(keys, 1)
    want = index.chunk_logits(query, index.encode(keys, 1), 0.125, 1)
    cells = memory[table].transpose(1, 2).flatten(0, 1)
    got = index.chunk_logits(query, layout.part(cells, index), 0.125, 1)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)
    part = layout.part(memory, index)
    for count in (0, 1, 5, 6):
        got = index.paged_logits(query, part, table.to(ids), count, 0.125, 1)
        assert got.shape == (4, count) and torch.allclose(got, want[:, :count], rtol=1e-5, atol=1e-5)


def test_layout_of_one_index_adds_nothing() -> None:
    index, keys = MeanKeyIndex(16, 64, torch.float32), random_keys((4, 2, 1, 16, 64), torch.float32)
    layout = IndexLayout([index])
    assert layout.cell_bytes == index.cell_bytes
    assert torch.equal(layout.part(layout.encode(keys), index), index.encode(keys))


def test_empty_layout() -> None:
    layout, index = IndexLayout([]), MeanKeyIndex(16, 64, torch.float32)
    cells = layout.encode(random_keys((3, 2, 1, 16, 64), torch.float32))
    assert layout.cell_bytes == 16 and cells.shape == (3, 2, 16) and not cells.any()
    with pytest.raises(KeyError):
        layout.part(cells, index)


@pytest.mark.parametrize("kind", KINDS)
def test_no_chunks(kind: Kind) -> None:
    index = kind(16, 64, torch.float16)
    cells = IndexLayout([index]).encode(torch.empty(0, 2, 16, 64, dtype=torch.float16))
    assert cells.shape == (0, 2, index.cell_bytes)
    assert index.chunk_logits(torch.ones(4, 64), cells, 1.0).shape == (4, 0)


def test_product_equality_is_that_of_the_tables() -> None:
    tables = random_tables(2, 64)
    assert ProductIndex(8, 64, torch.float16, tables) == ProductIndex(8, 64, torch.float16, tables)
    assert ProductIndex(8, 64, torch.float16, tables) != ProductIndex(16, 64, torch.float16, tables)
    copy = ProductTables(tables.to_code, tables.to_query, tables.mean, tables.centroids)
    assert ProductIndex(8, 64, torch.float16, tables) != ProductIndex(8, 64, torch.float16, copy)
    assert tables.to("cpu") is tables


def test_product_estimates_keys_that_are_centroids() -> None:
    torch.manual_seed(6)
    tables, layer = random_tables(2, 64), 2
    index = ProductIndex(8, 64, torch.float32, tables)
    cells = torch.randint(0, 256, (21, 2, index.cell_bytes), dtype=torch.uint8)
    keys = decoded_product(tables, layer, cells) + tables.mean[layer].double().view(2, 1, 64)
    assert torch.equal(index.encode(keys.float(), layer), cells)
    query = torch.randn(6, 64, dtype=torch.float64)
    exact = 0.125 * torch.einsum("hgd,nhtd->hgnt", query.view(2, 3, 64), keys)
    # The index leaves out what all chunks share.
    share = 0.125 * (query.view(2, 3, 64) @ tables.mean[layer].double().unsqueeze(-1))
    got = index.chunk_logits(query.float(), cells, 0.125, layer)
    assert close(got, (exact.logsumexp(-1) - share).flatten(0, 1), torch.float32)


def test_product_tables_in_a_file(tmp_path: Path) -> None:
    tables, path = random_tables(3, 40), tmp_path / "new" / "tables.safetensors"
    tables.save(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert {x.dtype for x in load_file(path).values()} == {torch.float16}
    again = ProductTables.load(path)
    assert (again.layers, again.kv_heads, again.head_dim, again.subspaces) == (LAYERS, 3, 40, 4)
    for name in ("to_code", "to_query", "mean", "centroids"):
        assert torch.equal(getattr(again, name), getattr(tables, name).half().float())
    with pytest.raises(LsaError, match="tables.safetensors is for heads of 40 dims, this model's have 64: fit"):
        ProductIndex(8, 64, torch.float32, again)
    with pytest.raises(LsaError, match="chunk_tokens=12 .* multiple of 8"):
        ProductIndex(12, 40, torch.float32, again)


def test_product_tables_name_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "tables.safetensors"
    random_tables(3, 40).save(path)
    good = load_file(path)
    for match, change in [
        ("lacks mean", {"mean": None}),
        ("holds unknown other", {"other": good["mean"].clone()}),
        ("to_code has shape", {"to_code": good["to_code"][..., :-1].contiguous()}),
        ("to_query has shape", {"to_query": good["to_query"][:-1].contiguous()}),
        ("mean has shape", {"mean": good["mean"][:, :2].contiguous()}),
        ("centroids has shape", {"centroids": good["centroids"][..., :255, :].contiguous()}),
        ("centroids has shape", {"centroids": good["centroids"][:, :, :3].contiguous()}),
        ("centroids has shape", {"centroids": good["centroids"][0]}),
        ("mean is torch.int32, not floating", {"mean": good["mean"].int()}),
        ("not finite", {"mean": good["mean"] * torch.inf}),
    ]:
        save_file({name: x for name, x in {**good, **change}.items() if x is not None}, path)
        with pytest.raises(LsaError, match=match) as caught:
            ProductTables.load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.write_bytes(b"no tensors")
    for bad, match in [(path, "not a readable"), (tmp_path, "is not a .safetensors"), (path / "x", "is not a .safe")]:
        with pytest.raises(LsaError, match=match):
            ProductTables.load(bad)
    with pytest.raises(LsaError, match="mean .* not finite"):
        ProductTables(*(good[name].float() for name in ("to_code", "to_query")), good["mean"].float() * 1e9 + 1e9,
                      good["centroids"].float()).save(path)  # fmt: skip
    with pytest.raises(LsaError, match="the product tables: mean is torch.float16"):
        ProductTables(*(good[name].float() for name in ("to_code", "to_query")), good["mean"],
                      good["centroids"].float())  # fmt: skip
