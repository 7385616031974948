"""What vLLM's own planner makes of DeepSeek-V4-Flash's caches, stock and with c4 on the host; no GPU, no weights.

43 layers (2 plain, 21 c4, 20 c128), fp8_ds_mla. MiB of one decoding request, in blocks that vLLM's manager gives:

| | block B, groups | 256K | 512K | 1M | block tables a request at 1M |
|-|-|-|-|-|-|
| stock | 1,002,240, 5 | 999.8 | 1978.5 | 3936.0 | 1.6 |
| c4 on the host | 216,000, 19 | 230.1 | 441.0 | 862.9 | 7.6 |
| index keys too, but for three layers | 60,480, 88 | 85.4 | 144.5 | 262.6 | 36.7 |

To be added: the pool of resident pages, at 1M and 12 % 368.9 MiB, or 441.9 with the index keys of those pages. And
while a prompt is read, states of every token in flight: 3.1 GiB for chunks of 8,192, in stock vLLM as well.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.v4 import model
from vllm_lsa.config import LsaConfig
from vllm_lsa.errors import LsaError
from vllm_lsa.models.deepseek_v4 import specs as v4
from vllm_lsa.models.deepseek_v4.settings import for_deepseek_v4
from vllm_lsa.models.deepseek_v4.specs import Cache

pytest.importorskip("vllm")
from vllm.config import VllmConfig  # noqa: E402
from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.utils.hashing import sha256  # noqa: E402
from vllm.v1 import kv_cache_spec_registry  # noqa: E402
from vllm.v1.core import kv_cache_utils  # noqa: E402
from vllm.v1.core.kv_cache_manager import KVCacheManager  # noqa: E402
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, register_all_kvcache_specs  # noqa: E402
from vllm.v1.kv_cache_interface import KVCacheConfig, MLAAttentionSpec  # noqa: E402
from vllm.v1.request import Request  # noqa: E402

from tests.v4 import planned  # noqa: E402
from tests.v4.planned import Specs  # noqa: E402
from vllm_lsa.models.deepseek_v4 import runtime as runtime_of_v4  # noqa: E402
from vllm_lsa.models.deepseek_v4.runtime import DeepseekV4Runtime  # noqa: E402

RATIOS = [0, 0, *[4 if layer % 2 == 0 else 128 for layer in range(2, 43)]]
MIB, GIB = 1 << 20, 1 << 30
K256, K512, M1 = 1 << 18, 1 << 19, 1 << 20
BUDGET = 60 * GIB
CHUNK = 8192


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    """V4-Flash's as the engine would have it on a GPU, at a million tokens."""
    flash = {
        **model.CONFIG, "num_hidden_layers": len(RATIOS), "compress_ratios": RATIOS, "hidden_size": 4096,
        "index_n_heads": 64, "max_position_embeddings": M1,
    }  # fmt: skip
    made: VllmConfig = planned.gpu_config(tmp_path_factory.mktemp("v4"), flash, M1, CHUNK)
    return made


@pytest.fixture(scope="module")
def stock(config: VllmConfig) -> Specs:
    return planned.stock_specs(config)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged, by vLLM's loggers, which keep it from others'."""
    logger = logging.getLogger("vllm.lsa")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def plan(config: VllmConfig, specs: Specs, memory: int = BUDGET) -> KVCacheConfig:
    return planned.plan(config, specs, memory)


def width(made: KVCacheConfig) -> int:
    """Bytes of a block: all tensors have the same, side by side in it."""
    (size,) = {tensor.size for tensor in made.kv_cache_tensors}
    return size // made.num_blocks


def held(config: VllmConfig, made: KVCacheConfig, tokens: int) -> tuple[int, int]:
    """Blocks that vLLM's own manager gives a request of `tokens` tokens: at most while prefilling, and in decoding."""
    scheduler = kv_cache_utils.generate_scheduler_kv_cache_config([made])
    manager = KVCacheManager(
        scheduler, max_model_len=M1, scheduler_block_size=256, hash_block_size=256, max_in_flight_tokens=CHUNK,
        enable_caching=False,
    )  # fmt: skip
    pool = manager.block_pool
    free = pool.get_num_free_blocks()
    request = Request("one", [0] * (tokens - 64), SamplingParams(max_tokens=64), None)
    peak = 0
    for begin in range(0, tokens - 64, CHUNK):
        count = min(CHUNK, tokens - 64 - begin)
        assert manager.allocate_slots(request, count) is not None
        request.num_computed_tokens = begin + count
        peak = max(peak, free - pool.get_num_free_blocks())
    for _ in range(64):
        request.append_output_token_ids(0)
        assert manager.allocate_slots(request, 1) is not None
        request.num_computed_tokens += 1
    return peak, free - pool.get_num_free_blocks()


def test_pages(stock: Specs) -> None:
    """Page sizes and counts are those of the table; an index page is 8,448 B of data and 192 of padding."""
    count: dict[tuple[Cache, int, int], int] = {}
    for name, spec in stock.items():
        key = v4.cache_kind(name, spec), spec.block_size, spec.page_size_bytes
        count[key] = count.get(key, 0) + 1
    assert count == {
        (Cache.WINDOW, 64, 37440): 43,
        (Cache.C4, 256, 37440): 21,
        (Cache.C128, 256, 1728): 20,
        (Cache.INDEX_KEYS, 256, 8640): 21,
        (Cache.STATE, 4, 32832): 21,
        (Cache.STATE, 8, 32832): 20,
        (Cache.INDEX_STATE, 4, 8640): 21,
    }
    spec: Any = stock["model.layers.22.attn.indexer.k_cache"]
    assert spec.unpadded_page_size_bytes == 64 * 132 == 8448
    kinds = [v4.cache_kind(f"model.layers.{layer}.attn", stock[f"model.layers.{layer}.attn"]) for layer in range(2, 43)]
    assert [2 + i for i, kind in enumerate(kinds) if kind is Cache.C4][10:13:2] == [22, 26]
    assert v4.SCORER_LAYERS == tuple(2 + 2 * c4 for c4 in (10, 12, 20))


@pytest.mark.parametrize(
    ("form", "block", "groups"), [("stock", 1_002_240, 5), ("dropped", 870_912, 5), ("lsa", 216_000, 19)]
)
def test_blocks(config: VllmConfig, stock: Specs, form: str, block: int, groups: int) -> None:
    """60 GiB give 64,280 blocks in stock vLLM and 298,261 with LSA; dropping c4 alone gives 73,973 (the trap)."""
    specs = {
        "stock": stock,
        "dropped": {name: spec for name, spec in stock.items() if v4.cache_kind(name, spec) is not Cache.C4},
        "lsa": v4.lsa_specs(stock),
    }[form]
    made = plan(config, specs)
    assert (width(made), len(made.kv_cache_groups)) == (block, groups)
    assert made.num_blocks == BUDGET // block
    if form == "dropped":
        with pytest.raises(LsaError, match="blocks of 870912 bytes where LSA needs 216000.*: use vLLM 0.32"):
            v4.require_split(specs, made.kv_cache_groups)
    else:
        v4.require_split(specs, made.kv_cache_groups)
        assert v4.specs_of(made.kv_cache_groups) == specs
        assert v4.block_bytes(specs) == block


def test_a_worker_refuses_blocks_that_were_not_split(config: VllmConfig, stock: Specs) -> None:
    """With what vLLM has planned, before anything is allocated."""
    dropped = {name: spec for name, spec in stock.items() if v4.cache_kind(name, spec) is not Cache.C4}
    with pytest.raises(LsaError, match="blocks of 870912 bytes where LSA needs 216000"):
        DeepseekV4Runtime.__new__(DeepseekV4Runtime).attach(plan(config, dropped))
    # With few layers, such as those of tests/v4, the widest page is wider than all that grows together.
    few = {name: spec for name, spec in v4.lsa_specs(stock).items() if v4.layer_of(name) in (0, 1, 2, 3, 4, 6)}
    made = plan(config, few)
    assert v4.block_bytes(few) < width(made) == 37440
    v4.require_split(few, made.kv_cache_groups)


def gpu_runtime(config: VllmConfig, specs: Specs, monkeypatch: pytest.MonkeyPatch) -> DeepseekV4Runtime:
    """As it is when vLLM asks how much memory it may take, `specs` being what is left to it."""
    monkeypatch.setattr(runtime_of_v4, "get_kv_cache_spec", lambda vllm_config: specs)
    monkeypatch.setattr(DeepseekV4Runtime, "device", torch.device("cuda"))
    runtime = DeepseekV4Runtime.__new__(DeepseekV4Runtime)
    runtime.vllm_config = config
    ratios = config.model_config.hf_config.compress_ratios
    names = [f"model.layers.{layer}.attn" for layer, ratio in enumerate(ratios) if ratio == 4]
    kept = {v4.layer_of(name) for name in names if f"{name}.indexer.k_cache" in specs}
    runtime.__dict__["key_layers"] = None if len(kept) == len(names) else frozenset(kept)
    runtime._attentions = [
        SimpleNamespace(
            prefix=name,
            indexer=SimpleNamespace(k_cache=SimpleNamespace(prefix=f"{name}.indexer.k_cache")),
            c4_page_bytes=lambda tokens: 64 * 585,
        )
        for name in names
    ]
    return runtime


@pytest.mark.parametrize("under_way", [1, 2])
@pytest.mark.parametrize("chunk", [64, 2048, 8192, 32768])
@pytest.mark.parametrize(("length", "form"), [(9344, "small"), (9344, "lsa"), (M1, "lsa"), (M1, "index_keys_on_host")])
def test_a_request_of_the_longest_length_can_always_start(
    config: VllmConfig, stock: Specs, length: int, form: str, chunk: int, under_way: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """By default, however many tokens a step may have and however few requests may run: vLLM itself says so."""
    if form == "small":
        config = planned.gpu_config(tmp_path, model.CONFIG, length, chunk)
        stock, form = planned.stock_specs(config), "lsa"
    specs, scheduler = specs_of(form, stock), config.scheduler_config
    for name, value in (("max_num_batched_tokens", chunk), ("max_num_seqs", 1), ("async_scheduling", under_way == 2)):
        monkeypatch.setattr(scheduler, name, value)
    monkeypatch.setattr(config.model_config, "max_model_len", length)
    assert config.max_concurrent_batches == under_way
    runtime = gpu_runtime(config, specs, monkeypatch)
    runtime.config = for_deepseek_v4(LsaConfig(device_pool_gib=1))
    block = v4.block_width(specs)
    capped = runtime.cap_memory(1000 * GIB)
    made = plan(config, specs, capped)
    least = runtime._least_blocks(specs)
    assert made.num_blocks == capped // block >= least
    # That is the least for vLLM, and what the user has set to less is said to be too little.
    plan(config, specs, least * block)
    with pytest.raises(ValueError, match="To serve at least one request"):
        plan(config, specs, (least - 1) * block)
    page = runtime._page_bytes(specs) * len(runtime._attentions)
    runtime.config = for_deepseek_v4(LsaConfig(device_pool_gib=1, host_memory_gib=(least + 0.5) * page / GIB))
    assert runtime.cap_memory(1000 * GIB) == least * block and "host_memory_gib" not in said.text
    runtime.config = for_deepseek_v4(LsaConfig(device_pool_gib=1, host_memory_gib=(least - 0.5) * page / GIB))
    assert runtime.cap_memory(1000 * GIB) == (least - 1) * block
    assert f"one request of max_model_len needs {least}: raise it" in said.text


@pytest.mark.parametrize("form", ["lsa", "index_keys_on_host"])
def test_a_gpu_gets_as_many_blocks_as_store_and_pool_allow(
    config: VllmConfig, stock: Specs, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vLLM is told to take of 60 GiB, in blocks as wide as it then makes them."""
    on_host = form == "index_keys_on_host"
    specs = specs_of(form, stock)
    block, page = width(plan(config, specs)), 21 * (37440 + (8640 if on_host else 0))
    runtime = gpu_runtime(config, specs, monkeypatch)

    def blocks(available: int = BUDGET, **settings: Any) -> int:
        runtime.config = for_deepseek_v4(LsaConfig(**settings))
        return runtime.cap_memory(available) // block

    # The pool, a share of the store, has its room beside the blocks.
    found = blocks(host_memory_gib=4096, device_pool_fraction=0.12)
    assert found * (block + 0.12 * page) <= BUDGET < (found + 1) * (block + 0.12 * page) + 1
    assert blocks(host_memory_gib=4096, device_pool_gib=20) == (BUDGET - 20 * GIB) // block
    # What passes through with exact: eight pages of one layer for each request.
    staging = 8 * config.scheduler_config.max_num_seqs * page // 21
    exact = blocks(indexer="exact", host_memory_gib=4096, device_pool_gib=20)
    assert exact == (BUDGET - staging - 20 * GIB) // block
    assert blocks(host_memory_gib=10) == 10 * GIB // page
    # Four requests of a million tokens, and windows and states of those in a step, of 1.9 blocks a token and 9.2.
    seqs, reading = config.scheduler_config.max_num_seqs, {"lsa": 15599, "index_keys_on_host": 75678}[form]
    assert blocks(1000 * GIB) == 4 * 4096 + reading + 64 * seqs
    monkeypatch.setattr(config.cache_config, "kv_cache_memory_bytes", BUDGET)
    assert blocks(host_memory_gib=4096) == BUDGET // block


# MiB of one decoding request of 256K, 512K and 1M tokens; of what reading 8,192 tokens at once adds; of block tables.
PLANNED = {
    "stock": (999.8, 1978.5, 3936.0, 3156.1, 1.6),
    "lsa": (230.1, 441.0, 862.9, 3183.6, 7.6),
    "index_keys_on_host": (85.4, 144.5, 262.6, 4331.7, 36.7),
}


def specs_of(form: str, stock: Specs) -> Specs:
    return stock if form == "stock" else v4.lsa_specs(stock, v4.SCORER_LAYERS if form == "index_keys_on_host" else None)


@pytest.mark.parametrize("form", PLANNED)
def test_requests(config: VllmConfig, stock: Specs, form: str) -> None:
    """What a request holds in vLLM's own block manager is what `request_blocks` says."""
    specs = specs_of(form, stock)
    made = plan(config, specs)
    *sizes, reading, tables = PLANNED[form]
    entries = sum(group.kv_cache_spec.max_num_blocks_per_req(config, M1) for group in made.kv_cache_groups)
    assert round(4 * entries / MIB, 1) == tables
    for tokens, size in zip((K256, K512, M1), sizes, strict=True):
        blocks = v4.request_blocks(specs, made.kv_cache_groups, tokens)
        assert round(blocks * width(made) / MIB, 1) == size
        if tokens == K256 or form == "stock":  # many groups are slow to walk
            peak, decoding = held(config, made, tokens)
            assert decoding == blocks
            assert round((peak - blocks) * width(made) / MIB, 1) == reading
    assert form != "lsa" or size <= 867  # the memory table's promise


@pytest.mark.parametrize("form", ["stock", "lsa"])
def test_prefix_cache(config: VllmConfig, stock: Specs, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that was read before is found as far as in stock vLLM, up to its last whole block."""
    monkeypatch.setattr(config.cache_config, "enable_prefix_caching", True)
    kv_cache_utils.init_none_hash(sha256)
    scheduler = kv_cache_utils.generate_scheduler_kv_cache_config([plan(config, specs_of(form, stock))])
    block, unit = kv_cache_utils.resolve_kv_cache_block_sizes(scheduler, config)
    assert (block, unit) == (256, 4)
    manager = KVCacheManager(scheduler, M1, block, unit, max_in_flight_tokens=CHUNK)
    hasher = kv_cache_utils.get_request_block_hasher(unit, sha256)
    for tokens in (255, 4000, 5096):
        first, second = (
            Request(name, list(range(tokens)), SamplingParams(max_tokens=8), None, block_hasher=hasher)
            for name in ("one", "two")
        )
        assert manager.allocate_slots(first, tokens) is not None
        first.num_computed_tokens = tokens
        manager.free(first)
        assert manager.get_computed_blocks(second)[1] == (tokens - 1) // 256 * 256


def test_kinds(stock: Specs) -> None:
    """The memory table at 1M, from the pages alone."""
    mib = {kind: round(size / MIB) for kind, size in v4.request_bytes(stock, M1).items()}
    states = mib.pop(Cache.WINDOW) + mib.pop(Cache.STATE) + mib.pop(Cache.INDEX_STATE)
    assert mib == {Cache.C4: 3071, Cache.INDEX_KEYS: 709, Cache.C128: 135}
    assert states <= 18


def test_targets_at_a_million(config: VllmConfig, stock: Specs) -> None:
    """1.25 GiB is kept with a pool of 12 %. 0.55 GiB with index keys on the host is not: that takes a pool of 8 %."""
    sizes = {}
    for form in PLANNED:
        specs = specs_of(form, stock)
        made = plan(config, specs)
        sizes[form] = v4.request_blocks(specs, made.kv_cache_groups, M1) * width(made)
    lsa = sizes["lsa"] + v4.pool_bytes(stock, M1, 0.12)
    assert round(lsa / GIB, 2) == 1.20
    # Requests in 60 GiB, with room for one of them to be read.
    stock_fit, lsa_fit = (
        int((BUDGET / MIB - PLANNED[form][3]) / (size / MIB))
        for form, size in (("stock", sizes["stock"]), ("lsa", lsa))
    )
    assert (stock_fit, lsa_fit) == (14, 47)
    pools = {share: v4.pool_bytes(stock, M1, share, v4.SCORER_LAYERS) for share in (0.08, 0.12)}
    on_host = {share: sizes["index_keys_on_host"] + pool for share, pool in pools.items()}
    assert {share: round(size / GIB, 2) for share, size in on_host.items()} == {0.08: 0.54, 0.12: 0.69}


def test_what_changes(stock: Specs) -> None:
    """c4 goes, the indexer's states keep a token more, all else is as it was."""
    specs = v4.lsa_specs(stock)
    assert {name for name in stock if name not in specs} == {f"model.layers.{i}.attn" for i in range(2, 43, 2)}
    for name, spec in specs.items():
        same: Any = stock[name]
        if name.endswith(".indexer.compressor.state_cache"):
            assert spec.sliding_window == 9 and same.sliding_window == 8
        else:
            assert spec == same
    on_host = v4.lsa_specs(stock, key_layers=v4.SCORER_LAYERS)
    keys = [v4.layer_of(name) for name in on_host if name.endswith(".indexer.k_cache")]
    assert keys == [22, 26, 42] and len(on_host) == len(specs) - 18


def test_refusals(stock: Specs) -> None:
    spec = stock["model.layers.2.attn.swa_cache"]
    with pytest.raises(LsaError, match="model.layers.2.self_attn is no cache of DeepSeek-V4"):
        v4.lsa_spec("model.layers.2.self_attn", spec)
    with pytest.raises(LsaError, match="attn.indexer.k_cache names no layer"):
        v4.lsa_spec("attn.indexer.k_cache", spec, key_layers=v4.SCORER_LAYERS)


def test_registry_trap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spec of one's own keeps vLLM from registering its own, unless it registers those first; LSA has none."""

    class Own(MLAAttentionSpec):
        pass

    monkeypatch.setattr(kv_cache_spec_registry, "_REGISTRY_KVCACHESPEC_LIST", {})
    registry = kv_cache_spec_registry.KVCacheSpecRegistry
    registry.register(Own, FullAttentionManager)
    plain = MLAAttentionSpec(block_size=256, num_kv_heads=1, head_size=512, dtype=torch.uint8)
    assert registry.get_uniform_type_base_spec(plain) is None
    register_all_kvcache_specs(None)
    assert registry.get_uniform_type_base_spec(plain) is not None
