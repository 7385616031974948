"""The memory indexer's scorer against its float64 twin, in every layout of keys, and how layers combine."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests import indexer_twin as twin
from vllm_lsa.errors import LsaError
from vllm_lsa.indexer import IndexerConfig, LayerIndexer, MemoryIndexer
from vllm_lsa.indexer.hadamard import hadamard_matrix, hadamard_transform
from vllm_lsa.indexer.packed_keys import keys_of_pages, keys_to_pages, pack_keys, unpack_keys
from vllm_lsa.indexer.rotary import RopeConfig, inverse_frequencies, rotate

ROOT = Path(__file__).parents[1]


def difference(got: torch.Tensor, want: np.ndarray) -> float:
    """The largest error, relative to the scale of the logits."""
    assert got.dtype == torch.float32 and got.shape == want.shape
    return float(np.abs(got.double().numpy() - want).max() / np.abs(want).max())


def published(layers: dict[int, dict[str, torch.Tensor]], folder: Path, exact: bool = True) -> MemoryIndexer:
    """The indexer in a joint file. exact: without the bf16 rounding, which no bound of fp32 survives."""
    save_file(twin.published_tensors(layers), folder / "joint.safetensors")
    indexer = MemoryIndexer.load(folder / "joint.safetensors")
    if not exact:
        return indexer
    return with_config(indexer, published_rounding=False)


def with_config(indexer: MemoryIndexer, **changes: object) -> MemoryIndexer:
    """The same indexer, its config changed."""
    config = IndexerConfig.model_validate({**indexer.config.model_dump(), **changes})
    for module in (indexer, *map(indexer.layer, indexer.layers)):
        module.config = config
    return indexer


def own(kv_heads: int, heads: int, dim: int, rope: RopeConfig, bias: bool = False, layers: int = 2) -> MemoryIndexer:
    config = IndexerConfig(
        kind="per_layer",
        backbone="test",
        layers=tuple(range(layers)),
        hidden_size=37,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        rank=19,
        rope=rope,
        bias=bias,
    )
    torch.manual_seed(0)
    indexer = MemoryIndexer(config, inverse_frequencies(rope.dims, 1e4))
    for layer in config.layers if bias else ():
        torch.nn.init.constant_(indexer.layer(layer).bias, 0.3 + layer)
    return indexer


@pytest.mark.parametrize(("heads", "rank"), [(64, 1024), (64, 2048), (128, 1024), (128, 2048)])
def test_published_sizes(heads: int, rank: int, tmp_path: Path) -> None:
    weights = twin.random_layer(heads, 128, rank, 4096)
    indexer = published({10: weights}, tmp_path)
    assert indexer.layers == (10,) and (indexer.config.heads, indexer.config.rank) == (heads, rank)
    torch.manual_seed(1)
    hidden, positions = torch.randn(2, 4096).bfloat16(), torch.tensor([3, 131_071])
    packed = pack_keys(torch.randn(2, 13, 128))
    exact = twin.decode_packed(packed)
    weights = {name: w.double() for name, w in weights.items()}  # once for all calls of the twin
    for rotated in (True, False):
        want = twin.logits(
            weights, hidden, exact[:, :, None], positions, twin.published_speeds(), "interleaved", 64, rotated
        )
        assert difference(indexer.logits(10, hidden, packed, positions, rotated), want) <= 1e-5
        assert difference(indexer.logits(10, hidden, torch.from_numpy(exact), positions, rotated), want) <= 1e-5
    shared = twin.logits(
        weights, hidden, exact[[0, 0], :, None], positions, twin.published_speeds(), "interleaved", 64, True
    )
    # Published keys are rotated unless the caller says otherwise.
    assert difference(indexer.logits(10, hidden, packed[0], positions), shared) <= 1e-5


def test_published_rounding(tmp_path: Path) -> None:
    """As published, queries are rounded to bf16 twice: 2⁻⁹ each of their size, less after summing."""
    weights = twin.random_layer(64, 128, 40, 96)
    as_published = published({10: weights}, tmp_path, exact=False)
    assert as_published.config.published_rounding
    torch.manual_seed(2)
    hidden, keys, positions = torch.randn(5, 96), torch.randn(50, 128), torch.arange(5) * 1000
    got = as_published.logits(10, hidden, keys, positions, False)
    q, _ = as_published.layer(10).query(hidden, positions, False)
    assert torch.equal(q, q.bfloat16().float())
    exact = published({10: weights}, tmp_path).logits(10, hidden, keys, positions, False)
    assert 1e-5 < (got - exact).abs().max() / exact.abs().max() < 2**-8


HALVES = RopeConfig(style="halves", dims=16)
ROPES = [
    HALVES,
    RopeConfig(style="halves", first_dim=2, dims=6),
    RopeConfig(style="interleaved", first_dim=8, dims=8),
    RopeConfig(style="interleaved", dims=0),
]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(("kv_heads", "heads"), [(1, 5), (3, 9), (4, 4)])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("rows", [1, 7])
def test_odd_sizes(rope: RopeConfig, kv_heads: int, heads: int, per_row: bool, rows: int) -> None:
    indexer = own(kv_heads, heads, 16, rope, bias=True)
    torch.manual_seed(3)
    hidden, positions = torch.randn(rows, 37), torch.randint(0, 100_000, (rows,))
    keys = torch.randn(rows if per_row else 1, 111, kv_heads, 16)
    speeds = [1e4 ** (-2 * i / rope.dims) for i in range(rope.dims // 2)]
    given = keys if per_row else keys[0]
    given = given.squeeze(-2) if kv_heads == 1 else given
    for layer in indexer.layers:
        state = indexer.layer(layer).state_dict()
        for rotated in (True, False):
            want = twin.logits(
                state, hidden, keys.expand(rows, -1, -1, -1).double().numpy(), positions, speeds, rope.style,
                rope.first_dim, rotated,
            )  # fmt: skip
            assert difference(indexer.logits(layer, hidden, given, positions, rotated), want) <= 1e-5
    # Keys of our own form are not rotated unless the caller says so.
    assert torch.equal(
        indexer.logits(1, hidden, given, positions), indexer.logits(1, hidden, given, positions, rotated=False)
    )


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("per_row", [False, True])
def test_blocks_of_keys_add_up(kv_heads: int, per_row: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks are scored some at a time; packed ones are unpacked some at a time."""
    indexer = own(kv_heads, 4, 16, HALVES)
    hidden, positions = torch.randn(3, 37), torch.tensor([5, 6, 7])
    keys = torch.randn(*([3] if per_row else []), 101, *([kv_heads] if kv_heads > 1 else []), 16)
    forms = [keys, keys.bfloat16(), *([pack_keys(keys)] if kv_heads == 1 else [])]
    whole = [indexer.logits(0, hidden, form, positions) for form in forms]
    monkeypatch.setattr("vllm_lsa.indexer.memory_indexer._AT_ONCE", 3 * 4 * 10)
    for form, want in zip(forms, whole, strict=True):
        assert torch.allclose(indexer.logits(0, hidden, form, positions), want, atol=1e-6)


@pytest.mark.parametrize(("rows", "chunks"), [(0, 4), (2, 0), (0, 0)])
def test_nothing_to_score(rows: int, chunks: int) -> None:
    indexer = own(1, 4, 16, HALVES)
    hidden, positions = torch.randn(rows, 37), torch.zeros(rows, dtype=torch.int64)
    assert indexer.logits(0, hidden, torch.randn(chunks, 16), positions).shape == (rows, chunks)
    packed = torch.zeros(rows, chunks, 20, dtype=torch.uint8)
    assert indexer.logits(0, hidden, packed, positions).shape == (rows, chunks)


@pytest.mark.parametrize("kv_heads", [1, 3])
def test_it_trains(kv_heads: int) -> None:
    """Gradients reach every weight; the indexer that serves has none."""
    indexer = own(kv_heads, 6, 16, HALVES, bias=True)
    scorer: LayerIndexer = indexer.layer(1)
    hidden, positions = torch.randn(40, 37), torch.arange(40)
    keys = torch.randn(20, 16) if kv_heads == 1 else torch.randn(20, kv_heads, 16)
    labels = (torch.rand(40, 20) < 0.3).float()
    optimizer = torch.optim.Adam(scorer.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(scorer(hidden, keys, positions), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in scorer.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert not indexer.logits(1, hidden, keys, positions).requires_grad
    assert "inv_freq" not in dict(scorer.named_parameters())


def test_layers_may_turn_differently() -> None:
    """Speeds of 0 are a layer without RoPE."""
    plain = own(1, 4, 16, HALVES)
    speeds = torch.stack([inverse_frequencies(16, 1e4), torch.zeros(8, dtype=torch.float64)])
    indexer = MemoryIndexer(plain.config, speeds)
    x, keys = torch.randn(1, 37), torch.randn(9, 16)
    here, there = torch.tensor([3]), torch.tensor([3000])
    assert torch.equal(indexer.logits(1, x, keys, here), indexer.logits(1, x, keys, there))
    assert not torch.equal(indexer.logits(0, x, keys, here), indexer.logits(0, x, keys, there))


@pytest.mark.parametrize("offset", [0.0, 5.5])
def test_ensemble(offset: float) -> None:
    indexer = with_config(own(1, 4, 16, HALVES, layers=3), logit_offset=offset)
    logits = {layer: 8 * torch.randn(3, 50) for layer in (0, 2)}
    scores = 1 / (1 + np.exp(-(np.stack([x.double().numpy() for x in logits.values()]) + offset)))
    assert np.allclose(indexer.ensemble(logits, mode="or").numpy(), scores.max(0), atol=1e-6)
    assert np.allclose(indexer.ensemble(logits, mode="mean").numpy(), scores.mean(0), atol=1e-6)
    assert torch.equal(indexer.ensemble(logits), indexer.ensemble(logits, "or"))
    extreme = indexer.ensemble({1: torch.tensor([[-1e30, 1e30]])})
    assert extreme.tolist() == [[0, 1]]
    averaging = with_config(indexer, ensemble="mean")
    assert torch.equal(averaging.ensemble(logits), averaging.ensemble(logits, "mean"))


def test_refusals() -> None:
    indexer, grouped = own(1, 4, 16, HALVES), own(2, 4, 16, HALVES)
    x, keys, at = torch.randn(3, 37), torch.randn(5, 16), torch.arange(3)
    with pytest.raises(LsaError, match="layer 7 has no scorer .* use one of 0, 1"):
        indexer.logits(7, x, keys, at)
    with pytest.raises(LsaError, match="layer 7"):
        indexer.ensemble({7: x})
    with pytest.raises(LsaError, match="mode='max'"):
        indexer.ensemble({0: x}, mode="max")  # type: ignore[arg-type]
    with pytest.raises(LsaError, match="no logits"):
        indexer.ensemble({})
    for bad in (keys[:, :15], keys.int(), torch.randn(2, 5, 16), torch.zeros(5, 16, dtype=torch.uint8), keys[0]):
        with pytest.raises(ValueError, match="keys must be"):
            indexer.logits(0, x, bad, at)
    for bad in (keys, torch.randn(5, 3, 16), torch.zeros(5, 2, 20, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="keys must be"):
            grouped.logits(0, x, bad, at)
    with pytest.raises(ValueError, match="hidden must be"):
        indexer.logits(0, x[:, 1:], keys, at)
    for positions in (at[:2], at.float()):
        with pytest.raises(ValueError, match="positions must be"):
            indexer.logits(0, x, keys, positions)
    with pytest.raises(LsaError, match="12 dimensions"):
        own(1, 4, 12, RopeConfig(style="halves", dims=12)).logits(0, x, torch.randn(5, 12), at, rotated=True)
    with pytest.raises(ValueError, match="inv_freq"):
        MemoryIndexer(indexer.config, torch.zeros(7))


@pytest.mark.parametrize("dim", [1, 2, 16, 64, 128])
def test_hadamard(dim: int) -> None:
    matrix = hadamard_matrix(dim)
    assert np.allclose(matrix.numpy(), twin.hadamard(dim), atol=1e-7)
    x = torch.randn(3, 5, dim)
    assert torch.allclose(hadamard_transform(x), x @ matrix, atol=1e-5)
    assert torch.allclose(hadamard_transform(hadamard_transform(x)), x, atol=1e-5)
    with pytest.raises(LsaError, match="power of two"):
        hadamard_matrix(3 * dim)


@pytest.mark.parametrize("style", ["halves", "interleaved"])
def test_rotation_can_be_undone(style: str) -> None:
    rope = RopeConfig.model_validate({"style": style, "first_dim": 2, "dims": 10})
    x, at = torch.randn(4, 3, 16), torch.tensor([0, 1, 8191, 1_000_000])
    speeds = inverse_frequencies(10, 5e5)
    turned = rotate(x, at, speeds, rope)
    assert torch.equal(turned[0], x[0]) and not torch.allclose(turned[1], x[1], atol=1e-2)
    assert torch.allclose(rotate(turned, at, speeds, rope, inverse=True), x, atol=1e-6)
    assert torch.equal(turned[..., :2], x[..., :2]) and torch.equal(turned[..., 12:], x[..., 12:])
    assert rotate(x.bfloat16(), at, speeds, rope).dtype == torch.bfloat16


@pytest.mark.parametrize("n", [0, 1, 63, 64, 111])
@pytest.mark.parametrize("dim", [128, 40])
def test_packed_keys(n: int, dim: int) -> None:
    keys = torch.randn(n, dim) * torch.logspace(-30, 30, n)[:, None] if n else torch.randn(n, dim)
    packed = pack_keys(keys)
    assert packed.shape == (n, dim + 4) and packed.dtype == torch.uint8
    decoded = unpack_keys(packed)
    assert np.allclose(decoded.double().numpy(), twin.decode_packed(packed), rtol=1e-6, atol=0)
    # e4m3 has three bits after the point, and 2⁻¹⁰ is half of its smallest step.
    largest = keys.abs().amax(-1, keepdim=True)
    assert ((decoded - keys).abs() <= keys.abs() / 16 * 1.001 + largest / 448 * 2**-10 * 1.001).all()
    pages = keys_to_pages(packed)
    assert pages.shape == (-(-n // 64), 64 * (dim + 4))
    if dim == 128 and n:
        assert pages.shape[1] == 8448
        chunk = min(n, 64) - 1
        assert torch.equal(pages[0, 128 * chunk : 128 * chunk + 128], packed[chunk, :128])
        assert torch.equal(pages[0, 8192 + 4 * chunk : 8192 + 4 * chunk + 4], packed[chunk, 128:])
    assert torch.equal(keys_of_pages(pages)[:n], packed)
    assert not keys_of_pages(pages)[n:].any()


def test_packed_keys_of_nothing_and_elsewhere() -> None:
    assert torch.equal(unpack_keys(pack_keys(torch.zeros(2, 128))), torch.zeros(2, 128))
    packed = pack_keys(torch.randn(3, 4, 128))
    wide = torch.zeros(3, 9, 140, dtype=torch.uint8)
    wide[:, 1::2, 5:137] = packed
    assert torch.equal(unpack_keys(wide[:, 1::2, 5:137]), unpack_keys(packed))
    with pytest.raises(ValueError, match="packed keys"):
        unpack_keys(torch.randn(3, 132))
    with pytest.raises(ValueError, match="pages"):
        keys_of_pages(torch.zeros(3, 8449, dtype=torch.uint8))


def test_it_needs_no_vllm() -> None:
    code = "import sys; sys.modules['vllm'] = None; from vllm_lsa.indexer import MemoryIndexer"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=100)
