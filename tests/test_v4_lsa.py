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
from safetensors.torch import save_file

from tests.paths import ROOT, run_module
from tests.v4 import install, model
from vllm_lsa.config import LsaConfig
from vllm_lsa.errors import LsaError
from vllm_lsa.models.deepseek_v4.native import LastQueries
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
BATCHES += [batch(*MIXED)]
LONG = prompt(4000)


def run(
    folder: Path, path: Path, batches: list[Batch], lsa: dict[str, Any] | None = None, chunk: int | None = None,
    **arguments: Any,
) -> dict[str, Any]:  # fmt: skip
    """lsa: settings, None for stock vLLM. chunk: tokens of a prompt in a step, with prefix caching."""
    longest = max(len(given) for one in batches for given in one["prompts"])
    llm = {**model.ARGUMENTS, "model": str(path), "kv_cache_memory_bytes": (600 if longest > 4096 else 300) << 20}
    llm |= {"max_model_len": 9344 if longest > 4096 else 4352, "max_num_batched_tokens": chunk or 9344} | arguments
    if lsa is not None:
        llm |= {"attention_backend": "LSA", "additional_config": {"lsa": lsa}}
    spec = {"llm": llm, "batches": batches}
    env = install.environment(folder / "plugin", chunks=chunk is not None, plugins=() if lsa is None else ("lsa",))
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


@pytest.mark.vllm
def test_with_everything_kept_tokens_and_choices_are_those_of_stock_vllm(stock, path, tmp_path):
    lsa = run(tmp_path, path, BATCHES, {**KEEP_ALL, "check": "poison"})
    assert lsa["tokens"] == stock["tokens"]
    assert lsa["chosen"] == stock["chosen"]
    # Every decode step of every c4 layer read the pool alone.
    assert lsa["reads"] == LAYERS * sum(one["max_tokens"] - 1 for one in BATCHES)
    assert lsa["oracle"] == LAYERS * sum((one["max_tokens"] - 1) * len(one["prompts"]) for one in BATCHES)
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
    lsa = run(tmp_path, path, BATCHES[4:], settings)
    assert lsa["tokens"] == stock["tokens"][4:]
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
def test_chunks_and_cached_prefixes_change_nothing(stock, path, tmp_path):
    lsa = run(tmp_path, path, [batch(MIXED[0], MIXED[2]), batch(MIXED[2])], {**KEEP_ALL, "check": "poison"}, chunk=500)
    told = stock["tokens"][4]
    assert lsa["tokens"] == [[told[0], told[2]], [told[2]]]
    assert lsa["pinned"] == 0


def sparse(indexer: str, **settings: Any) -> dict[str, Any]:
    return {
        "indexer": indexer,
        "budget": 0.75,
        "period": 16,
        "recency_tokens": 1792,
        # In each layer 28 pages of the 16 + 16 + 3 that there are: both long requests go on a budget, 12 + 12 + 3.
        "device_pool_gib": 28 * LAYERS * PAGE / 2**30,
        "check": "poison",
        **settings,
    }


@pytest.mark.vllm
@pytest.mark.parametrize("indexer", ["native", "recency", "memory"])
def test_sparse_decode_reads_the_set_in_the_pool_and_nothing_else(path, checkpoint, tmp_path, indexer):
    settings = sparse(str(checkpoint) if indexer == "memory" else indexer)
    # The second begins a page on the way.
    lsa = run(tmp_path, path, [batch(LONG, LONG[:3830], LONG[:600], max_tokens=40)], settings)
    assert [len(set(tokens)) > 20 for tokens in lsa["tokens"][0][:2]] == [True, True]
    assert lsa["reads"] == LAYERS * 39
    assert lsa["oracle"] == LAYERS * 39 * 3
    assert lsa["counts"]["cycles"] >= 3
    assert lsa["counts"]["chunks_missed"] == lsa["pinned"] == 0
    assert any(held < whole for held, whole in lsa["held"])
    # Eight full pages at least, wherever there are as many: what the native top-k needs.
    assert all(held > min(8, whole - 1) for held, whole in lsa["held"])
    assert (len(lsa["sets"]) > 1) == (indexer != "recency")
    # Every selection by the memory indexer was what its float64 twin makes of the same hidden states and index keys.
    assert lsa["selected"] == (lsa["counts"]["cycles"] if indexer == "memory" else 0)


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


@pytest.mark.vllm
def test_what_cannot_work_is_refused_in_one_line(path, tmp_path):
    env = {**install.environment(tmp_path / "plugin", plugins=("lsa",)), "OMP_NUM_THREADS": "1"}
    code = (
        "import sys\nfrom vllm.engine.arg_utils import EngineArgs\n"
        f"EngineArgs(model={str(path)!r}, skip_tokenizer_init=True, attention_backend='LSA', **eval(sys.argv[1]))"
        ".create_engine_config()"
    )

    def error(**arguments: Any) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, repr(arguments)], cwd=ROOT, env={**os.environ, **env}, text=True,
            capture_output=True, timeout=200,
        )  # fmt: skip
        assert done.returncode
        return done.stderr.strip().splitlines()[-1]

    assert "tensor and pipeline parallelism" in error(tensor_parallel_size=2, max_model_len=4096)
    assert "lsa.demand='mean_key'" in error(additional_config={"lsa": {"demand": "mean_key"}})


def test_settings_take_defaults_of_v4_and_refuse_what_has_no_meaning():
    config = for_deepseek_v4(LsaConfig())
    assert (config.indexer, config.sets, config.demand, config.chunk_tokens) == ("native", "shared", "off", 256)
    assert config.sink_chunks + config.recency_chunks == 9
    for wrong, named in [
        ({"indexer": "quest"}, "lsa.indexer='quest'"),
        ({"sets": "per_head"}, "lsa.sets='per_head'"),
        ({"chunk_tokens": 16}, "lsa.chunk_tokens=16"),
        ({"demand_chunks": 4}, "lsa.demand_chunks=4"),
        ({"recency_tokens": 1024}, "lsa.recency_tokens=1024"),
        ({"recency_tokens": 2064}, "lsa.recency_tokens=2064"),
    ]:
        with pytest.raises(LsaError, match=named) as raised:
            for_deepseek_v4(LsaConfig(**wrong))
        assert "\n" not in str(raised.value)


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
