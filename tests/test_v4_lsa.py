"""DeepSeek-V4 with its compressed keys and values in host memory, inside vLLM on a CPU. See tests/v4/README.md."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.amx import without_amx
from tests.v4 import install
from tests.v4_runs import BATCHES, FEW_BLOCKS, GROWING, KEEP_ALL, LAYERS, MIXED, PAGE, TOKENS, batch, run
from vllm_lsa.serving.client import read_metrics
from vllm_lsa.serving.server import Server


@pytest.fixture(scope="module")
def stock(v4_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("stock"), v4_path, BATCHES)


@pytest.fixture(scope="module")
def steady(v4_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Stock vLLM's, whatever is in a step."""
    batches = [batch(MIXED[0], MIXED[2]), GROWING]
    folder = tmp_path_factory.mktemp("steady")
    return run(folder, v4_path, batches, fallbacks=True, max_num_seqs=8, scheduling_policy="priority")


@pytest.mark.vllm
def test_with_everything_kept_tokens_and_choices_are_those_of_stock_vllm(stock, v4_path, tmp_path):
    lsa = run(tmp_path, v4_path, BATCHES, {**KEEP_ALL, "check": "poison"})
    assert lsa["tokens"] == stock["tokens"]
    assert lsa["chosen"] == stock["chosen"]
    assert [len(tokens) for tokens in lsa["tokens"][5]] == [5, TOKENS, 9, TOKENS]
    # Every decode step of every c4 layer read the pool alone.
    assert lsa["reads"] == LAYERS * sum(one["max_tokens"] - 1 for one in BATCHES)
    assert lsa["oracle"] == LAYERS * sum(len(tokens) - 1 for told in lsa["tokens"] for tokens in told)
    assert all(held == whole for held, whole in lsa["held"])
    assert lsa["counts"]["chunks_missed"] == lsa["counts"]["cycles"] == lsa["pinned"] == 0


@pytest.mark.vllm
@pytest.mark.parametrize("budget, lead", [(0.01, 0), (0.6, 0), (0.6, 3)])
def test_exact_gives_what_stock_vllm_gives_at_any_budget(stock, v4_path, tmp_path, budget, lead):
    # At 0.01 a request holds the sink, a page of recency, its tail and one of growth: 4 of 12 pages in each layer.
    settings = {
        "indexer": "exact",
        "budget": budget,
        "period": 8,
        "lead": lead,
        "sink_tokens": 256,
        "recency_tokens": 256,
        "device_pool_gib": (1 + LAYERS * (13 if budget < 0.5 else 20)) * PAGE / 2**30,
        "check": "poison",
    }
    lsa = run(tmp_path, v4_path, BATCHES[4:5], settings)
    assert lsa["tokens"] == stock["tokens"][4:5]
    assert set(lsa["chosen"]) <= set(stock["chosen"])
    # A choice for each token and layer.
    choices = {tuple(choice.rsplit(":", 1)) for choice in lsa["chosen"]}
    assert len({position for position, _ in choices}) == LAYERS * (max(map(len, MIXED)) + TOKENS - 1)
    assert any(held < whole for held, whole in lsa["held"])
    counts = lsa["counts"]
    assert not lead or 8 - lead in lsa["steps"]
    assert counts["chunks_demanded"] > 0 and counts["bytes_demanded"] > 0
    assert counts["bytes_demanded"] <= counts["bytes_fetched"]
    # What even the budget has no room for passes through.
    assert counts["chunks_missed"] > 0
    assert lsa["pinned"] == 0


@pytest.mark.vllm
def test_chunks_and_cached_prefixes_change_nothing(steady, v4_path, tmp_path):
    batches = [batch(MIXED[0], MIXED[2]), batch(MIXED[2])]
    lsa = run(tmp_path, v4_path, batches, {**KEEP_ALL, "check": "poison"}, chunk=500, fallbacks=True)
    told = steady["tokens"][0]
    assert lsa["tokens"] == [told, [told[1]]]
    assert set(lsa["chosen"]) <= set(steady["chosen"])
    assert lsa["pinned"] == 0


@pytest.mark.vllm
@without_amx
def test_a_preempted_request_comes_back_as_if_it_had_stayed(steady, v4_path, tmp_path):
    lsa = run(tmp_path, v4_path, [GROWING], {**KEEP_ALL, "check": "poison"}, fallbacks=True, **FEW_BLOCKS)
    assert lsa["preemptions"] > steady["preemptions"] == 0
    assert lsa["tokens"] == steady["tokens"][1:]
    assert set(lsa["chosen"]) <= set(steady["chosen"])
    assert lsa["oracle"] > 0 and lsa["pinned"] == 0


@pytest.mark.vllm
def test_a_pool_that_is_too_small_is_slow_and_not_wrong(stock, v4_path, tmp_path):
    settings = {**KEEP_ALL, "device_pool_fraction": None, "device_pool_gib": 10 * LAYERS * PAGE / 2**30}
    lsa = run(tmp_path, v4_path, [BATCHES[2]], {**settings, "check": "poison"})
    assert lsa["tokens"] == [stock["tokens"][2]]
    assert lsa["counts"]["chunks_missed"] > 0


@pytest.mark.vllm
def test_the_server_gives_the_same_tokens_and_shows_its_metrics(stock, v4_path, tmp_path):
    given = BATCHES[0]["prompts"][0]
    arguments = ["--skip-tokenizer-init", "--max-num-seqs", "4", "--kv-cache-memory-bytes", str(300 << 20)]
    env = {**install.environment(tmp_path / "plugin", plugins=("lsa",)), "OMP_NUM_THREADS": "1"}
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    body = {"prompt": given, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with Server(
        v4_path, "LSA", tmp_path / "log.txt", 4096, dtype="bfloat16", lsa=KEEP_ALL, arguments=arguments, environment=env
    ) as up:
        call = urllib.request.Request(
            f"{up.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(call, timeout=120) as answer:
            tokens = json.load(answer)["choices"][0]["token_ids"]
        shown = read_metrics(up.url)
    assert tokens == stock["tokens"][0][0]
    assert shown["vllm_lsa:pool_slots"] > 0
