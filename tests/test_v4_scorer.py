"""The memory indexer over vLLM's paged index keys of DeepSeek-V4, against the formula in float64."""

import functools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.v4.attention import fp8_paged_mqa_logits_cpu
from tests.v4.oracle import E4M3
from tests.v4.pages import write_index_keys
from tests.v4.scorer_twin import Weights, frequencies, reference
from vllm_lsa.errors import LsaError
from vllm_lsa.indexer import IndexerConfig, MemoryIndexer
from vllm_lsa.indexer.rotary import RopeConfig, inverse_frequencies
from vllm_lsa.models.deepseek_v4 import scorer as v4
from vllm_lsa.models.deepseek_v4.memory_indexer import key_speeds
from vllm_lsa.models.deepseek_v4.scorer import PagedScorer
from vllm_lsa.models.deepseek_v4.selection import select_pages

HIDDEN = 4096
LAYERS = (10, 12, 20)
POSITIONS = (0, 1, 65_535, 262_143, 1_048_575)
LENGTHS = (200, 1, 64, 137, 256)
ENTRIES = 256
BLOCK_BYTES = 1728  # a stride between blocks that is not a page's


@functools.cache
def weights_of(heads: int, rank: int, layer: int = 10) -> Weights:
    """Random, with activations of order 1; weights_proj so that logits deviate by about 2, as those of a sigmoid do."""
    g = torch.Generator().manual_seed(layer)

    def randn(*shape: int, inputs: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=g).mul_(gain * inputs**-0.5)

    return {
        "wq_a.weight": randn(rank, HIDDEN, inputs=HIDDEN),
        "wq_b.weight": randn(heads * 128, rank, inputs=rank),
        "q_norm_weight": 1 + 0.1 * torch.randn(rank, generator=g),
        "weights_proj.weight": randn(heads, HIDDEN, inputs=HIDDEN, gain=3.0),
    }


def joint(heads: int, rank: int, layers: tuple[int, ...] = LAYERS) -> Weights:
    return {f"retrievers.l{i}.{name}": x for i in layers for name, x in weights_of(heads, rank, i).items()}


class Past(NamedTuple):
    cache: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor


@functools.cache
def past(layer: int = 10) -> Past:
    """Index keys as vLLM writes them, in scattered blocks that are longer than a page; what is not written is NaN."""
    g = torch.Generator().manual_seed(100 + layer)
    rows, pages = len(LENGTHS), ENTRIES // 64
    storage = torch.full((rows * pages + 3, 8448 + BLOCK_BYTES), 255, dtype=torch.uint8)
    # Block tables are the same in all layers.
    table = (1 + torch.randperm(rows * pages + 2, generator=torch.Generator().manual_seed(0)))[: rows * pages]
    table = table.view(rows, pages).int()
    for row, length in enumerate(LENGTHS):
        entries = torch.arange(length)
        slots = table[row].long()[entries // 64] * 64 + entries % 64
        write_index_keys(storage, 64, slots, torch.randn(length, 128, generator=g).bfloat16())
        table[row, -(-length // 64) :] = 10_000  # not a block: must not be read
    cache = storage.as_strided((len(storage), 64, 132), (storage.stride(0), 132, 1))
    return Past(cache, table, torch.tensor(LENGTHS))


@functools.cache
def inputs(layer: int = 10) -> torch.Tensor:
    g = torch.Generator().manual_seed(200 + layer)
    return torch.randn(len(POSITIONS), HIDDEN, generator=g).bfloat16()


def keys_of(kv: Past, row: int) -> np.ndarray:
    """float64 [length, 128]."""
    raw, out = kv.cache.flatten(1).numpy(), []
    for n in range(LENGTHS[row]):
        page = raw[int(kv.table[row, n // 64])]
        i = n % 64
        scale = np.frombuffer(page[8192 + 4 * i : 8196 + 4 * i].tobytes(), "<f4")[0]
        out.append(E4M3[page[128 * i : 128 * (i + 1)]] * float(scale))
    return np.array(out)


@functools.cache
def expected(heads: int, rank: int, layer: int = 10) -> list[np.ndarray]:
    """Of each row."""
    kv, x = past(layer), inputs(layer)
    return [
        reference(weights_of(heads, rank, layer), x[i].double().numpy(), at, keys_of(kv, i))
        for i, at in enumerate(POSITIONS)
    ]


def errors(got: torch.Tensor, want: list[np.ndarray]) -> tuple[float, float]:
    """The largest absolute error, and the deviation of the logits. Nothing may be scored behind a row's length."""
    assert got.dtype == torch.float32 and got.shape == (len(LENGTHS), ENTRIES)
    for row, length in zip(got, LENGTHS, strict=True):
        assert row[length:].eq(-torch.inf).all()
    worst = max(np.abs(g[: len(w)].double().numpy() - w).max() for g, w in zip(got, want, strict=True))
    return float(worst), float(np.concatenate(want).std())


def scorer_of(heads: int, rank: int, precision: str, folder: Path, layers: tuple[int, ...] = (10,)) -> PagedScorer:
    save_file(joint(heads, rank, layers), folder / "joint.safetensors")
    return PagedScorer.load(folder / "joint.safetensors", precision)  # type: ignore[arg-type]


SIZES = [(64, 1024), (64, 2048), (128, 1024), (128, 2048)]


@pytest.mark.parametrize(("heads", "rank"), SIZES)
def test_formula(heads: int, rank: int, tmp_path: Path) -> None:
    """Absolute errors where logits deviate by 2 and reach 8: 1e-5 in fp32, 0.05 in bf16, 0.3 with queries in fp8."""
    want, kv = expected(heads, rank), past()
    for precision, limit in (("fp32", 1e-5), ("bf16", 0.05), ("fp8", 0.3)):
        scorer = scorer_of(heads, rank, precision, tmp_path)
        worst, deviation = errors(scorer.logits(10, inputs(), torch.tensor(POSITIONS), *kv, ENTRIES), want)
        print(f"heads {heads} rank {rank} {precision}: error {worst:.2g}, deviation {deviation:.2f}")
        assert 1.9 < deviation < 2.3
        assert worst <= limit


@pytest.mark.parametrize("mode", ["or", "mean", None])
def test_layers_combine(mode: str | None, tmp_path: Path) -> None:
    """Sigmoids of three layers, each with its own input and keys; the published default is their maximum."""
    scorer = scorer_of(64, 1024, "fp32", tmp_path, LAYERS)
    assert scorer.layers == LAYERS
    positions, (_, table, lengths) = torch.tensor(POSITIONS), past()
    hidden, caches = {i: inputs(i) for i in LAYERS}, {i: past(i).cache for i in LAYERS}
    got = scorer.scores(hidden, positions, caches, table, lengths, ENTRIES, mode)  # type: ignore[arg-type]
    assert got.dtype == torch.float32 and got.shape == (5, ENTRIES)
    for row, length in enumerate(LENGTHS):
        by_layer = 1 / (1 + np.exp(-np.stack([expected(64, 1024, layer)[row] for layer in LAYERS])))
        want = by_layer.mean(0) if mode == "mean" else by_layer.max(0)
        assert np.abs(got[row, :length].double().numpy() - want).max() <= 1e-5
        assert got[row, length:].eq(0).all()
    pages = select_pages(got, 9, recency_entries=64, lengths=lengths)
    assert pages.sum(1).tolist() == [-(-n // 64) for n in LENGTHS]  # all, since top-k needs 512


def test_files_say_the_same(tmp_path: Path) -> None:
    """.pt, wrapped .pt and .safetensors, complex freqs_cis left out; in bf16 as well."""
    plain = joint(64, 1024, (10, 12))
    extra = plain | {f"retrievers.l{i}.freqs_cis": torch.randn(8, 32, dtype=torch.complex64) for i in (10, 12)}
    torch.save(plain, tmp_path / "plain.pt")
    torch.save(extra, tmp_path / "extra.pt")
    torch.save({"model_state": extra, "epoch": 3}, tmp_path / "wrapped.pt")
    save_file(plain, tmp_path / "a.safetensors")
    save_file({name: x.bfloat16() for name, x in plain.items()}, tmp_path / "half.safetensors")
    args = (12, inputs(), torch.tensor(POSITIONS), *past(), ENTRIES)
    want = PagedScorer.load(tmp_path / "a.safetensors", "fp32").logits(*args)
    for name in ("plain.pt", "extra.pt", "wrapped.pt"):
        loaded = PagedScorer.load(tmp_path / name, "fp32")
        assert loaded.layers == (10, 12) and loaded.logits(*args).equal(want)
    # What is rounded to bf16 already loses nothing in the bf16 scorer.
    half = PagedScorer.load(tmp_path / "half.safetensors", "bf16").logits(*args)
    assert half.equal(PagedScorer.load(tmp_path / "a.safetensors", "bf16").logits(*args))


def test_as_the_native_indexer_scores(tmp_path: Path) -> None:
    """The fp8 path hands the native logits kernel what it takes: 64 heads at a time, the groups' logits added up."""
    scorer = scorer_of(128, 1024, "fp8", tmp_path)
    cache, table, lengths = past()
    q, weights = scorer.query(10, inputs(), torch.tensor(POSITIONS))
    assert q.dtype == torch.float8_e4m3fn and q.shape == (5, 128, 128)
    assert weights.dtype == torch.float32 and weights.shape == (5, 128)
    pages = v4.index_pages(cache)
    by_group = [
        fp8_paged_mqa_logits_cpu(
            q[:, part], pages, weights[:, part], lengths, table.clamp(max=len(cache) - 1), 64, ENTRIES
        )
        for part in (slice(0, 64), slice(64, 128))
    ]
    got = scorer.logits(10, inputs(), torch.tensor(POSITIONS), *past(), ENTRIES)
    assert torch.allclose(got, by_group[0] + by_group[1], atol=1e-5)
    # Without a checkpoint: the same code on what the native indexer gives, several layers together.
    other = past(12).cache
    queries, caches = {10: (q, weights), 12: (q, weights)}, {10: cache, 12: other}
    native = v4.native_scores(queries, caches, table, lengths, ENTRIES)
    second = v4.paged_logits(q, weights, other, table, lengths, ENTRIES)
    assert native.equal(torch.maximum(got, second))
    averaged = v4.native_scores(queries, caches, table, lengths, ENTRIES, "mean")
    assert torch.allclose(averaged, (got + second) / 2, atol=1e-6)
    chosen = select_pages(native, 9, threshold=-math.inf, recency_entries=64, lengths=lengths)
    assert chosen.sum(1).tolist() == [-(-n // 64) for n in LENGTHS]


def test_queries_in_fp8() -> None:
    """A power of two for each head, in the weights; a head of zeros stays one, and the largest value fits."""
    torch.manual_seed(0)
    q = torch.randn(7, 64, 128).bfloat16() * torch.logspace(-6, 6, 64)[:, None]
    q[0, 3], q[1, 4, 5] = 0, 448 * 2.0**-3
    weights = torch.randn(7, 64)
    codes, scaled = v4.quantize_query(q, weights)
    scale = scaled / weights
    mantissa, _ = torch.frexp(scale)
    assert codes.dtype == torch.float8_e4m3fn and (mantissa - 0.5).abs().max() < 1e-6
    back = codes.float() * scale.unsqueeze(-1)
    largest = q.float().abs().amax(-1, keepdim=True)
    assert ((back - q).abs() <= q.abs() / 16 * 1.001 + largest / 448 * 2**-8 + 1e-9).all()
    assert back[0, 3].eq(0).all() and back.isfinite().all()
    assert ((codes.float().abs().amax(-1) > 224 * 0.99) | (largest.squeeze(-1) < 2e-4)).all()  # no range is wasted


def test_parts_of_the_past_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pages are scored some at a time; how many makes no difference. Half a page can be asked for, or nothing."""
    torch.manual_seed(0)
    q, weights = torch.randn(5, 70, 128), torch.randn(5, 70)
    cache, table, lengths = past()
    whole = v4.paged_logits(q, weights, cache, table, lengths, ENTRIES)
    for entries in (0, 1, 33, 64, 200):
        got = v4.paged_logits(q, weights, cache, table.long(), lengths.int(), entries)
        assert torch.allclose(got, whole[:, :entries], atol=1e-5)
    monkeypatch.setattr("vllm_lsa.ops.index_logits._AT_ONCE", 1)
    assert torch.allclose(v4.paged_logits(q, weights, cache, table, lengths, ENTRIES), whole, atol=1e-5)
    flat = torch.zeros(len(cache), 8640, dtype=torch.uint8)
    flat[:, :8448] = v4.index_pages(cache)
    assert torch.allclose(v4.paged_logits(q, weights, flat, table, lengths, ENTRIES), whole, atol=1e-5)
    assert v4.index_pages(cache).data_ptr() == cache.data_ptr() and v4.index_pages(cache).stride(0) == cache.stride(0)


def test_rope_is_the_models() -> None:
    """Queries turn as fast as vLLM's V4 turns keys.

    vLLM multiplies position and speed in fp32, which is off by 0.024 radians at a million tokens (computed, as is what
    follows): logits of random queries and keys that deviate by 1.9 change by up to 0.04.
    """
    rope = pytest.importorskip("vllm.model_executor.layers.rotary_embedding.common")
    from vllm_lsa.indexer.published import inverse_frequencies as published

    slow = 1 - rope.yarn_linear_ramp_mask(*rope.yarn_find_correction_range(32, 1, 64, 160000, 65536), 32, torch.float32)
    plain = 160000 ** -(torch.arange(0, 64, 2, dtype=torch.float) / 64)
    theirs = plain / 16 * (1 - slow) + plain * slow
    assert torch.allclose(published().float(), theirs, rtol=1e-6)
    assert np.allclose(published().numpy(), frequencies(), rtol=1e-12)
    # What a joint file is served with: the model's.
    yarn = {"factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}
    small = yarn | {"factor": 4, "original_max_position_embeddings": 4096}
    for parameters in (yarn, {"main": {}, "compress": yarn}):
        flash = SimpleNamespace(
            rope_parameters=parameters, qk_rope_head_dim=64, compress_rope_theta=160000, max_position_embeddings=1 << 20
        )
        assert key_speeds(flash).equal(published())
    assert np.allclose(key_speeds(SimpleNamespace(**vars(flash) | {"rope_parameters": small})), frequencies(4, 4096))


def test_layers_of_the_model() -> None:
    flash = [0, 0, *[4 if layer % 2 == 0 else 128 for layer in range(2, 43)]]
    assert v4.model_layers(LAYERS, flash) == {10: 22, 12: 26, 20: 42}
    with pytest.raises(LsaError, match="scores c4 layer 20, and this model has 3: give a checkpoint"):
        v4.model_layers(LAYERS, [0, 0, 4, 128, 4, 4])


def test_refusals(tmp_path: Path) -> None:
    scorer = scorer_of(64, 1024, "bf16", tmp_path)
    kv, at = past(), torch.tensor(POSITIONS)
    q, weights = scorer.query(10, inputs(), at)
    assert q.dtype == torch.bfloat16
    with pytest.raises(LsaError, match="layer 12 has no scorer .* use one of 10"):
        scorer.query(12, inputs(), at)
    with pytest.raises(LsaError, match="layer 10 has a scorer and no input"):
        scorer.scores({}, at, {10: kv.cache}, kv.table, kv.lengths, ENTRIES)
    with pytest.raises(ValueError, match="hidden must be"):
        scorer.query(10, inputs()[:, 1:], at)
    for bad in (kv.cache.int(), kv.cache[:, :63], kv.cache[:, :, :131], kv.cache.flatten(1)[:, :8447], kv.cache[0, 0]):
        with pytest.raises(ValueError, match="index keys must be uint8"):
            v4.paged_logits(q, weights, bad, kv.table, kv.lengths, ENTRIES)
    with pytest.raises(ValueError, match="q must be"):
        v4.paged_logits(q[..., 1:], weights, *kv, ENTRIES)
    with pytest.raises(ValueError, match="weights must be"):
        v4.paged_logits(q, weights[:, 1:], *kv, ENTRIES)
    with pytest.raises(ValueError, match="block_table must be"):
        v4.paged_logits(q, weights, kv.cache, kv.table[1:], kv.lengths, ENTRIES)
    with pytest.raises(ValueError, match="lengths must be"):
        v4.paged_logits(q, weights, kv.cache, kv.table, kv.lengths.float(), ENTRIES)
    with pytest.raises(ValueError, match="257 entries are not in 4 pages"):
        v4.paged_logits(q, weights, *kv, 257)
    for mode, logits in (("max", [q]), ("or", [])):
        with pytest.raises(LsaError, match="mode='max'|no logits"):
            v4.combine_logits(logits, mode)  # type: ignore[arg-type]
    with pytest.raises(LsaError, match="precision='int8' is not one of fp32, bf16, fp8"):
        PagedScorer(scorer.indexer, "int8")  # type: ignore[arg-type]
    config = IndexerConfig(
        kind="per_layer", backbone="other", layers=(0,), hidden_size=8, heads=2, head_dim=16, rank=4,
        rope=RopeConfig(style="halves", dims=16),
    )  # fmt: skip
    with pytest.raises(LsaError, match="does not score index keys of DeepSeek-V4 .*head_dim=16"):
        PagedScorer(MemoryIndexer(config, inverse_frequencies(16, 1e4)))
