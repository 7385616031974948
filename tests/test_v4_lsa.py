"""DeepSeek-V4 with its compressed keys and values in host memory, inside vLLM on a CPU. See tests/v4/README.md."""

import json
import os
import random
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.paths import ROOT, run_module
from tests.v4 import install, model
from vllm_lsa.config import LsaConfig
from vllm_lsa.errors import LsaError
from vllm_lsa.indexer import IndexerConfig, MemoryIndexer
from vllm_lsa.indexer.checkpoint import fingerprint_of
from vllm_lsa.indexer.rotary import RopeConfig
from vllm_lsa.models.deepseek_v4.memory_indexer import threshold_of
from vllm_lsa.models.deepseek_v4.native import LastHidden, LastQueries
from vllm_lsa.models.deepseek_v4.scorer import PagedScorer
from vllm_lsa.models.deepseek_v4.settings import for_deepseek_v4
from vllm_lsa.serving.client import read_metrics
from vllm_lsa.serving.server import Server

TOKENS = 16
PAGE = 37440
LAYERS = 3
_random = random.Random(1)
KEEP_ALL = {"indexer": "keep_all", "budget": 1.0, "device_pool_fraction": 1.0}


def prompt(length: int) -> list[int]:
    return [_random.randrange(2, model.VOCABULARY) for _ in range(length)]


Batch = dict[str, Any]


def batch(*prompts: list[int], max_tokens: int = TOKENS, abort: dict[int, int] | None = None) -> Batch:
    """abort: after how many tokens which of the prompts is."""
    return {"prompts": list(prompts), "max_tokens": max_tokens, "abort": abort or {}, "together": True}


# 3,000 tokens are 750 entries and 12 pages: more than the 512 that the native indexer chooses.
BATCHES = [batch(prompt(40)), batch(prompt(700)), batch(prompt(3000)), batch(prompt(9000), max_tokens=4)]
MIXED = [prompt(2300), prompt(700), prompt(3000), prompt(40)]
BATCHES += [batch(*MIXED), batch(*MIXED, abort={0: 5, 2: 9})]
# A long request decodes when shorter ones come that go before it and grow until it has to leave.
GROWING = batch(MIXED[2], *(prompt(30) for _ in range(6)), max_tokens=110)
GROWING |= {"late": dict.fromkeys(range(1, 7), 60), "priorities": [1, *[0] * 6]}
FEW_BLOCKS = {"chunk": 64, "kv_cache_memory_bytes": 5120 << 10, "max_model_len": 3200, "max_num_seqs": 8}
FEW_BLOCKS |= {"scheduling_policy": "priority"}
LONG = prompt(4000)


def run(
    folder: Path, path: Path, batches: list[Batch], lsa: dict[str, Any] | None = None, chunk: int | None = None,
    fallbacks: bool = False, **arguments: Any,
) -> dict[str, Any]:  # fmt: skip
    """lsa: settings, None for stock vLLM. chunk: tokens of a prompt in a step, with prefix caching. fallbacks: those of
    tests/v4 even where vLLM's library has operators, so that results do not depend on what is in a step."""
    longest = max(len(given) for one in batches for given in one["prompts"])
    llm = {**model.ARGUMENTS, "model": str(path), "kv_cache_memory_bytes": (600 if longest > 4096 else 300) << 20}
    llm |= {"max_model_len": 9344 if longest > 4096 else 4352, "max_num_batched_tokens": chunk or 9344} | arguments
    if lsa is not None:
        llm |= {"attention_backend": "LSA", "additional_config": {"lsa": lsa}}
    spec = {"llm": llm, "batches": batches}
    env = install.environment(
        folder / "plugin", chunks=chunk is not None, plugins=() if lsa is None else ("lsa",), everywhere=fallbacks
    )
    return run_module("tests.v4_watched", spec, folder, 500, {**env, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.write(tmp_path_factory.mktemp("v4") / "model")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory indexer of the published form for all three c4 layers, random."""
    return scorers(tmp_path_factory.mktemp("indexer") / "joint.safetensors")


def scorers(path: Path, layers: Sequence[int] = range(LAYERS), hidden: int = 256) -> Path:
    """weights_proj so that scores lie on both sides of 0.5."""
    generator = torch.Generator().manual_seed(5)
    heads, rank = 32, 64

    def randn(*shape: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * gain * shape[-1] ** -0.5

    tensors = {
        f"retrievers.l{layer}.{name}": x
        for layer in layers
        for name, x in {
            "wq_a.weight": randn(rank, hidden),
            "wq_b.weight": randn(heads * 128, rank),
            "q_norm_weight": torch.ones(rank),
            "weights_proj.weight": randn(heads, hidden, gain=3.0),
        }.items()
    }
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def stock(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("stock"), path, BATCHES)


@pytest.fixture(scope="module")
def steady(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Stock vLLM's, whatever is in a step."""
    batches = [batch(MIXED[0], MIXED[2]), GROWING]
    folder = tmp_path_factory.mktemp("steady")
    return run(folder, path, batches, fallbacks=True, max_num_seqs=8, scheduling_policy="priority")


@pytest.mark.vllm
def test_with_everything_kept_tokens_and_choices_are_those_of_stock_vllm(stock, path, tmp_path):
    lsa = run(tmp_path, path, BATCHES, {**KEEP_ALL, "check": "poison"})
    assert lsa["tokens"] == stock["tokens"]
    assert lsa["chosen"] == stock["chosen"]
    assert [len(tokens) for tokens in lsa["tokens"][5]] == [5, TOKENS, 9, TOKENS]
    # Every decode step of every c4 layer read the pool alone.
    assert lsa["reads"] == LAYERS * sum(one["max_tokens"] - 1 for one in BATCHES)
    assert lsa["oracle"] == LAYERS * sum(len(tokens) - 1 for told in lsa["tokens"] for tokens in told)
    assert all(held == whole for held, whole in lsa["held"])
    assert lsa["counts"]["chunks_missed"] == lsa["counts"]["cycles"] == lsa["pinned"] == 0


@pytest.mark.vllm
@pytest.mark.parametrize("budget", [0.01, 0.6])
def test_exact_gives_what_stock_vllm_gives_at_any_budget(stock, path, tmp_path, budget):
    # At 0.01 a request holds the sink, a page of recency, its tail and one of growth: 4 of 12 pages in each layer.
    settings = {
        "indexer": "exact",
        "budget": budget,
        "period": 8,
        "sink_tokens": 256,
        "recency_tokens": 256,
        "device_pool_gib": (1 + LAYERS * (13 if budget < 0.5 else 20)) * PAGE / 2**30,
        "check": "poison",
    }
    lsa = run(tmp_path, path, BATCHES[4:5], settings)
    assert lsa["tokens"] == stock["tokens"][4:5]
    assert set(lsa["chosen"]) <= set(stock["chosen"])
    # A choice for each token and layer.
    choices = {tuple(choice.rsplit(":", 1)) for choice in lsa["chosen"]}
    assert len({position for position, _ in choices}) == LAYERS * (max(map(len, MIXED)) + TOKENS - 1)
    assert any(held < whole for held, whole in lsa["held"])
    counts = lsa["counts"]
    assert counts["chunks_demanded"] > 0 and counts["bytes_demanded"] > 0
    assert counts["bytes_demanded"] <= counts["bytes_fetched"]
    # What even the budget has no room for passes through.
    assert counts["chunks_missed"] > 0
    assert lsa["pinned"] == 0


@pytest.mark.vllm
def test_chunks_and_cached_prefixes_change_nothing(steady, path, tmp_path):
    batches = [batch(MIXED[0], MIXED[2]), batch(MIXED[2])]
    lsa = run(tmp_path, path, batches, {**KEEP_ALL, "check": "poison"}, chunk=500, fallbacks=True)
    told = steady["tokens"][0]
    assert lsa["tokens"] == [told, [told[1]]]
    assert set(lsa["chosen"]) <= set(steady["chosen"])
    assert lsa["pinned"] == 0


@pytest.mark.vllm
def test_a_preempted_request_comes_back_as_if_it_had_stayed(steady, path, tmp_path):
    lsa = run(tmp_path, path, [GROWING], {**KEEP_ALL, "check": "poison"}, fallbacks=True, **FEW_BLOCKS)
    assert lsa["preemptions"] > steady["preemptions"] == 0
    assert lsa["tokens"] == steady["tokens"][1:]
    assert set(lsa["chosen"]) <= set(steady["chosen"])
    assert lsa["oracle"] > 0 and lsa["pinned"] == 0


def sparse(indexer: str, **settings: Any) -> dict[str, Any]:
    return {
        "indexer": indexer,
        "budget": 0.75,
        "period": 16,
        "recency_tokens": 1792,
        # In each layer 38 pages of the 16 + 16 + 14 + 3 that there are: long requests go on a budget, 12 + 12 + 10 + 3.
        "device_pool_gib": 38 * LAYERS * PAGE / 2**30,
        "check": "poison",
        **settings,
    }


@pytest.mark.vllm
@pytest.mark.parametrize("indexer", ["native", "recency", "memory"])
def test_sparse_decode_reads_the_set_in_the_pool_and_nothing_else(path, checkpoint, tmp_path, indexer):
    settings = sparse(str(checkpoint) if indexer == "memory" else indexer)
    # The second begins a page on the way, the last is aborted.
    prompts = [LONG, LONG[:3830], LONG[:600], LONG[:3500]]
    lsa = run(tmp_path, path, [batch(*prompts, max_tokens=40, abort={3: 35})], settings)
    assert [len(tokens) for tokens in lsa["tokens"][0]] == [40, 40, 40, 35]
    assert all(len(set(tokens)) > 20 for tokens in lsa["tokens"][0][:2])
    assert lsa["reads"] == LAYERS * 39
    assert lsa["oracle"] == LAYERS * (39 * 3 + 34)
    assert lsa["counts"]["cycles"] >= 3
    assert lsa["counts"]["chunks_missed"] == lsa["pinned"] == 0
    assert any(held < whole for held, whole in lsa["held"])
    # Eight full pages at least, wherever there are as many: what the native top-k needs.
    assert all(held > min(8, whole - 1) for held, whole in lsa["held"])
    # What others choose depends on a random model's last bits, and may stay the same.
    assert lsa["sets"] and (indexer != "recency" or len(lsa["sets"]) == 1)
    if indexer == "memory":
        assert (
            "memory indexer of layers 2 = c4 layer 0, 4 = c4 layer 1, 5 = c4 layer 2; mode or"
            in (tmp_path / "log.txt").read_text()
        )
    # Every selection by the memory indexer was what its float64 twin makes of the same hidden states and index keys.
    assert lsa["selected"] == (lsa["counts"]["cycles"] if indexer == "memory" else 0)


@pytest.mark.vllm
def test_a_sparse_request_is_preempted_and_comes_back(path, tmp_path):
    # In each layer 14 pages of 12 + 3 · 1.
    settings = sparse("native", device_pool_gib=14 * LAYERS * PAGE / 2**30)
    lsa = run(tmp_path, path, [GROWING], settings, **FEW_BLOCKS)
    assert lsa["preemptions"] > 0
    assert all(len(tokens) == GROWING["max_tokens"] for tokens in lsa["tokens"][0])
    assert any(held < whole for held, whole in lsa["held"])
    assert lsa["oracle"] > 0 and lsa["counts"]["cycles"] > 0
    assert lsa["pinned"] == 0


@pytest.mark.vllm
def test_a_pool_that_is_too_small_is_slow_and_not_wrong(stock, path, tmp_path):
    settings = {**KEEP_ALL, "device_pool_fraction": None, "device_pool_gib": 10 * LAYERS * PAGE / 2**30}
    lsa = run(tmp_path, path, [BATCHES[2]], {**settings, "check": "poison"})
    assert lsa["tokens"] == [stock["tokens"][2]]
    assert lsa["counts"]["chunks_missed"] > 0


@pytest.mark.vllm
def test_the_server_gives_the_same_tokens_and_shows_its_metrics(stock, path, tmp_path):
    given = BATCHES[0]["prompts"][0]
    arguments = ["--skip-tokenizer-init", "--max-num-seqs", "4", "--kv-cache-memory-bytes", str(300 << 20)]
    env = {**install.environment(tmp_path / "plugin", plugins=("lsa",)), "OMP_NUM_THREADS": "1"}
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    body = {"prompt": given, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with Server(
        path, "LSA", tmp_path / "log.txt", 4096, dtype="bfloat16", lsa=KEEP_ALL, arguments=arguments, environment=env
    ) as up:
        call = urllib.request.Request(
            f"{up.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(call, timeout=120) as answer:
            tokens = json.load(answer)["choices"][0]["token_ids"]
        shown = read_metrics(up.url)
    assert tokens == stock["tokens"][0][0]
    assert shown["vllm_lsa:pool_slots"] > 0


def folder_of(folder: Path, **fields: Any) -> Path:
    """A checkpoint folder as training writes it."""
    config = IndexerConfig(
        kind="shared", backbone="small", layers=(0, 2), hidden_size=256, heads=16, head_dim=128, rank=32, period=32,
        rope=RopeConfig(style="interleaved", first_dim=64, dims=64), keys="packed_e4m3", chunk_tokens=4,
        thresholds={"default": (0.25,), "0.5": (0.125,)}, **fields,
    )  # fmt: skip
    MemoryIndexer(config, torch.ones(32)).save(folder)
    return folder


_REFUSALS = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
from vllm_lsa.errors import LsaError
said = []
for arguments in json.load(open(sys.argv[1])):
    try:
        EngineArgs(skip_tokenizer_init=True, attention_backend="LSA", **arguments).create_engine_config()
        said.append(None)
    except LsaError as error:
        said.append(str(error))
json.dump(said, open(sys.argv[2], "w"))
"""


@pytest.mark.vllm
def test_what_cannot_work_is_refused_in_one_line(path, checkpoint, tmp_path):
    env = {**install.environment(tmp_path / "plugin", plugins=("lsa",)), "OMP_NUM_THREADS": "1"}
    weights = load_file(checkpoint)
    torch.save({"model_state": weights, "epoch": 1}, tmp_path / "wrapped.pt")
    (tmp_path / "damaged.safetensors").write_bytes(b"no tensors")
    save_file({name: x for name, x in weights.items() if "l1.wq_b" not in name}, tmp_path / "incomplete.safetensors")
    flash = scorers(tmp_path / "flash.safetensors", (10, 12, 20))
    wide = scorers(tmp_path / "wide.safetensors", hidden=128)
    ours, others = folder_of(tmp_path / "ours", backbone_fingerprint=fingerprint_of(path)), tmp_path / "others"
    folder_of(others, backbone_fingerprint="0123456789ab-0123456789ab")
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({"tensor_parallel_size": 2}, "tensor and pipeline parallelism"),
        ({"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}, "--speculative-config"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "--kv-transfer-config"),
    ]
    for lsa, named in [
        ({"demand": "mean_key"}, "lsa.demand='mean_key' does not work with DeepSeek-V4: use 'off'"),
        ({"indexer": "quest"}, "or a memory indexer's .pt, .safetensors or folder"),
        ({"indexer": str(flash)}, "scores c4 layer 20, and this model has 3: give a checkpoint that was trained for"),
        ({"indexer": str(wide)}, "reads hidden states of 128, this model's have 256: give a checkpoint that was"),
        ({"indexer": "/nowhere/joint.pt"}, "/nowhere/joint.pt does not exist: give"),
        ({"indexer": str(tmp_path / "damaged.safetensors")}, "damaged.safetensors is not a readable safetensors file"),
        ({"indexer": str(tmp_path / "incomplete.safetensors")}, "lacks retrievers.l1.wq_b.weight"),
        ({"indexer": str(others)}, "others was trained for small"),
        ({"indexer": "exact", "lookahead": "usage"}, "lsa.lookahead='usage' needs a checkpoint"),
        ({"indexer": str(ours), "lookahead": "usage"}, "lsa.lookahead='usage' does not work with DeepSeek-V4"),
        ({"indexer": str(tmp_path / "wrapped.pt")}, None),
        ({"indexer": str(ours)}, None),
    ]:
        cases.append(({"additional_config": {"lsa": lsa}}, named))
    given = [{"model": str(path), "max_model_len": 4096, **arguments} for arguments, _ in cases]
    (tmp_path / "in.json").write_text(json.dumps(given))
    subprocess.run(
        [sys.executable, "-c", _REFUSALS, str(tmp_path / "in.json"), str(tmp_path / "out.json")], cwd=ROOT,
        env={**os.environ, **env}, check=True, timeout=200,
    )  # fmt: skip
    for said, (arguments, named) in zip(json.loads((tmp_path / "out.json").read_text()), cases, strict=True):
        assert (said is None) == (named is None), (said, arguments)
        assert named is None or (named in said and "\n" not in said), (said, arguments)


def test_settings_take_defaults_of_v4_and_refuse_what_has_no_meaning():
    config = for_deepseek_v4(LsaConfig())
    assert (config.indexer, config.sets, config.demand, config.chunk_tokens) == ("native", "shared", "off", 256)
    assert config.sink_chunks + config.recency_chunks == 9
    for_deepseek_v4(LsaConfig(indexer="exact", recency_tokens=256, sink_tokens=0))
    for wrong, named in [
        ({"indexer": "quest"}, "lsa.indexer='quest'"),
        ({"sets": "per_head"}, "lsa.sets='per_head'"),
        ({"chunk_tokens": 16}, "lsa.chunk_tokens=16"),
        ({"chunk_tokens": 4}, "lsa.chunk_tokens=4"),
        ({"demand_chunks": 4}, "lsa.demand_chunks=4"),
        ({"recency_tokens": 1024}, "lsa.recency_tokens=1024"),
        ({"recency_tokens": 2064}, "lsa.recency_tokens=2064"),
    ]:
        with pytest.raises(LsaError, match=named) as raised:
            for_deepseek_v4(LsaConfig(**wrong))
        assert "\n" not in str(raised.value)


def test_a_memory_indexer_brings_its_defaults(checkpoint, tmp_path):
    """Its period and threshold, from a folder; pages move all the same, and what was set counts."""

    def parsed(**lsa: Any) -> LsaConfig:
        return for_deepseek_v4(LsaConfig.parse({"lsa": lsa}))

    folder = str(folder_of(tmp_path / "folder"))
    config, scorer = parsed(indexer=folder), PagedScorer.load(folder, "fp32")
    assert (config.period, config.chunk_tokens, config.sets, config.mode) == (32, 256, "shared", "or")
    assert threshold_of(config, scorer) == 0.25
    assert threshold_of(parsed(indexer=folder, budget=0.5), scorer) == 0.125
    assert threshold_of(parsed(indexer=folder, threshold=0.0), scorer) == 0.0
    published = parsed(indexer=str(checkpoint), mode="mean")
    assert (published.period, published.mode) == (64, "mean")
    assert threshold_of(published, PagedScorer.load(checkpoint, "fp32")) == 0.5
    assert threshold_of(parsed(), None) == 0.0


def test_what_is_kept_of_last_tokens_is_forgotten_with_the_request():
    """In and outside of inference mode, as vLLM's forward pass and scheduler are."""
    queries, hidden = LastQueries(3, 2), LastHidden(3, (1, 4), 8)
    with torch.inference_mode():
        for layer in (0, 1):
            queries.note(torch.tensor([2, 0]), layer, torch.ones(2, 4, 128).to(torch.float8_e4m3fn), torch.ones(2, 4))
        for layer in (0, 1, 4):
            hidden.note(torch.tensor([2, 0]), layer, torch.full((2, 8), layer).bfloat16())
    assert {layer: x.unique().tolist() for layer, x in hidden.of(2).items()} == {1: [1.0], 4: [4.0]}
    queries.forget(2)
    hidden.forget(2)
    assert queries.queries is not None and queries.weights is not None
    assert queries.weights[2].eq(0).all() and queries.queries.float()[2].eq(0).all()
    assert queries.weights[0].eq(1).all() and hidden.states[0].ne(0).all() and hidden.states[2].eq(0).all()


def test_native_shares_follow_their_formula():
    generator = torch.Generator().manual_seed(0)
    pages, entries, heads, count = 5, 64, 4, 150
    keys = torch.randn(pages, entries, 128, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(pages, entries, generator=generator)
    flat = torch.full((pages, entries * 140), 0xFF, dtype=torch.uint8)
    flat[:, : entries * 128] = keys.view(torch.uint8).flatten(1)
    flat[:, entries * 128 : entries * 132] = scales.view(torch.uint8)
    q = torch.randn(heads, 128, generator=generator).to(torch.float8_e4m3fn)
    w = torch.rand(heads, generator=generator)
    blocks = torch.tensor([3, 0, 4])
    logits = torch.einsum("h,bnh->bn", w, torch.einsum("bnd,hd->bnh", keys.float(), q.float()).relu()) * scales
    last = LastQueries(2, 1)
    assert last.shares(0, [flat], blocks, count).tolist() == [[0.0] * count]
    last.note(torch.tensor([1]), 0, q[None], w[None])
    expected = logits[blocks].flatten()[:count].softmax(0)
    assert torch.allclose(last.shares(1, [flat], blocks, count)[0], expected, rtol=1e-4, atol=1e-6)
