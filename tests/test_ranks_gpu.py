"""Two ranks on two GPUs, in vLLM: `python -m pytest -x tests/test_ranks_gpu.py` on a machine with two.

Each test starts its engines side by side, and tests may run so as well, each by `-k` (everything_kept, per_head,
checkpoint, per_layer, v4_keep_all, v4_sparse) in a process of its own. Multicast over NVLink is off throughout
(`benchmarks.ranks`). The dense model is that of `tests.test_tensor_parallel`, in fp32.

Two ranks round otherwise than one does, so a chunk whose score is at the edge of a set may be in one's and not in the
other's; ranks that choose together choose from the same numbers, and have the same sets.
"""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ranks
from tests import tiny_models
from tests.paths import run_module
from tests.test_tensor_parallel import (
    GPU,
    HEAD,
    KV_HEADS,
    LAYERS_SERVED,
    LENGTHS,
    Q_HEADS,
    TOKENS,
    check_ranks,
    checkpoint,
    generate,
    tokens,
)
from tests.v4 import install
from tests.v4 import model as v4_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
]

DENSE = {**ranks.ENVIRONMENT, **GPU}
LIMIT = 180
"""Seconds of an engine, start included."""
BLOCK = 16
KEEP_ALL = {"budget": 1.0, "check": "assert"}
SPARSE = {"budget": 0.3, "period": 8, "recency_tokens": 32, "device_pool_fraction": 0.16, "check": "assert"}
# All of a batch end in the same step, and the next one takes their places.
BATCHES = {
    "together": [tokens(n, n) for n in LENGTHS],
    "next": [tokens(n, n) for n in (650, 1200, 90, 950)],
    "alone": [tokens(1500, 2)],
}

Chunks = dict[str, list[list[int]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return tiny_models.write_random(folder, LAYERS_SERVED, Q_HEADS, KV_HEADS, HEAD)


def dense(
    folder: Path, model: Path, count: int, lsa: dict[str, Any] | None, prompts: Any, graphs: bool = False
) -> dict[str, Any]:
    """What an engine of `count` ranks answers; of stock vLLM without settings for LSA. See `generate`."""
    backend = {"attention_backend": "TRITON_ATTN", "enforce_eager": not graphs, **ranks.ARGUMENTS}
    return generate(folder, model, count, prompts, lsa, DENSE, LIMIT, **backend)


def side_by_side(*jobs: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def test_dense_with_everything_kept_two_ranks_give_what_two_of_stock_vllm_give(model, tmp_path):
    """With CUDA graphs where all is resident, and where next to nothing is and the rest is read from the host."""
    alone = BATCHES["together"]
    prompts = {"together": alone, "again": [p + tokens(7, 1) for p in alone[-2:]], "alone": alone}
    blocks = 4 * 2048 // BLOCK
    gib = 2 * blocks * LAYERS_SERVED * (KV_HEADS // 2) * BLOCK * HEAD * 2 * 4 / 2**30  # divided over the ranks
    resident = {**KEEP_ALL, "device_pool_fraction": 1.0, "host_memory_gib": gib}
    tiny = {**KEEP_ALL, "device_pool_fraction": 0.05, "check": "poison"}
    stock, whole, least = side_by_side(
        lambda: dense(tmp_path / "stock", model, 2, None, prompts),
        lambda: dense(tmp_path / "resident", model, 2, resident, prompts, graphs=True),
        lambda: dense(tmp_path / "tiny", model, 2, tiny, prompts),
    )
    for got in (whole, least):
        check_ranks(got, KV_HEADS // 2)
        assert [rank["device"] for rank in got["ranks"]] == [0, 1]
        assert got["counts"]["cycles"] == 0
        assert got["prefix_hits"] >= sum(len(prompt) // BLOCK * BLOCK for prompt in alone[-2:])
        for name in prompts:
            assert got[name] == stock[name], name
    assert whole["ranks"][0]["host_blocks"] == blocks and 2 * whole["ranks"][0]["host_bytes"] == gib * 2**30
    assert whole["counts"]["missed"] == whole["counts"]["streamed"] == 0 < least["counts"]["missed"]


def common_tokens(one: list[int], other: list[int]) -> int:
    """How many there are before the first difference."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def common_share(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Of all tokens of BATCHES, those before a request's first difference."""
    pairs = [(a, b) for name in BATCHES for a, b in zip(one[name], other[name], strict=True)]
    return sum(common_tokens(a, b) for a, b in pairs) / (TOKENS * len(pairs))


def overlap(one: dict[str, Any], other: dict[str, Any], whole: Chunks, parts: Chunks) -> float:
    """Chunks that sets have in common, over those in either: mean over all lanes and steps before any difference."""
    shares = []
    for name, prompts in BATCHES.items():
        for i, prompt in enumerate(prompts):
            request = f"{name}-{i}-0" if name == "alone" else f"{name}-{i}"
            # A step reads the token before it.
            for step in range(common_tokens(one[name][i], other[name][i])):
                key = f"{request}:{len(prompt) + step}"
                assert (key in whole) == (key in parts), key
                for a, b in zip(map(set, whole.get(key, [])), map(set, parts.get(key, [])), strict=True):
                    shares.append(len(a & b) / len(a | b))
    assert len(shares) > 500
    return sum(shares) / len(shares)


def by_head(parts: list[Chunks]) -> Chunks:
    """The lists of all KV heads of a layer side by side, of the ranks' own."""
    own = KV_HEADS // 2
    return {
        key: [lane for layer in range(LAYERS_SERVED) for part in parts for lane in part[key][layer * own :][:own]]
        for key in parts[0]
    }


@pytest.mark.parametrize("case", ["per_head", "checkpoint", "per_layer"])
def test_sparse_two_ranks_attend_to_the_sets_of_one(model, tmp_path, case):
    """Sets of their own with demand; with the queries of all heads exchanged for a checkpoint's indexer; and common
    ones, chosen from exchanged scores, which CUDA graphs change nothing of."""
    settings: dict[str, Any] = dict(SPARSE)
    if case == "per_layer":
        settings |= {"sets": "per_layer", "demand": "off"}
    if case == "checkpoint":
        settings["indexer"] = checkpoint(tmp_path / "indexer")
    jobs = [
        lambda: dense(tmp_path / "one", model, 1, settings, BATCHES),
        lambda: dense(tmp_path / "two", model, 2, settings, BATCHES),
    ]
    if case == "per_layer":
        jobs.append(lambda: dense(tmp_path / "graphs", model, 2, settings, BATCHES, graphs=True))
    one, *others = side_by_side(*jobs)
    assert one["counts"]["cycles"] > 10 and one["counts"]["missed"] == 0
    for got in others:
        check_ranks(got, KV_HEADS // 2)
        for name in ("cycles", "live_requests", "host_blocks", "kv_bytes_total"):
            assert got["metrics"][name] == one["metrics"][name], name
        demanded = [rank["counts"]["demanded"] for rank in got["ranks"]]
        assert all((count > 0) == (case != "per_layer") for count in demanded)
        assert common_share(one, got) >= 0.75
    two = others[0]
    whole, parts = one["ranks"][0]["chunks"], [rank["chunks"] for rank in two["ranks"]]
    if case == "per_layer":
        assert parts[0] == parts[1]
        fetched = [rank["counts"]["fetched"] for rank in two["ranks"]]
        assert fetched[0] == fetched[1] > 0
        assert overlap(one, two, whole, parts[0]) >= 0.9
    else:
        assert parts[0] != parts[1]
        assert overlap(one, two, whole, by_head(parts)) >= 0.9


# -- DeepSeek-V4: every rank has all pages, and some of the heads -----------------------------------------------------

V4_LAYERS, V4_PAGE = 3, 37440


def v4_prompt(length: int) -> list[int]:
    values = random.Random(length)
    return [values.randrange(2, v4_model.VOCABULARY) for _ in range(length)]


@pytest.mark.parametrize("case", ["v4_keep_all", "v4_sparse"])
def test_deepseek_v4_both_ranks_have_the_same_sets(tmp_path, case):
    """Not compared with stock vLLM's tokens, see tests/test_v4_gpu.py."""
    lsa: dict[str, Any] = {"indexer": "keep_all", "budget": 1.0, "device_pool_fraction": 1.0}
    if case == "v4_sparse":
        # In each layer 34 pages: of the longest prompt 36 alone, and of all three together about 11 each.
        lsa = {"indexer": "native", "budget": 0.3, "period": 16, "device_pool_gib": 34 * V4_LAYERS * V4_PAGE / 2**30}
    llm = {**v4_model.ARGUMENTS, "model": str(v4_model.write(tmp_path / "model")), "tensor_parallel_size": 2}
    llm |= {"kv_cache_memory_bytes": 700 << 20, "max_num_batched_tokens": 9344, "gpu_memory_utilization": 0.12}
    # Warming up needs the modules that stand-ins replace.
    llm |= {"kernel_config": {"enable_jit_warmup": False}, **ranks.ARGUMENTS}
    llm |= {"attention_backend": "LSA", "additional_config": {"lsa": lsa}}
    env = install.environment(tmp_path / "plugin", plugins=("lsa",), device="cuda") | ranks.ENVIRONMENT
    prompts = [v4_prompt(length) for length in (9000, 3000, 2300)]
    batches = [
        {"prompts": each, "max_tokens": count, "abort": {}, "together": True}
        for each, count in ((prompts[:1], 60), (prompts, 40))
    ]
    got = run_module(
        "tests.v4_ranks", {"llm": llm, "batches": batches}, tmp_path, LIMIT, {**env, "OMP_NUM_THREADS": "2"}
    )
    assert [len(each) for told in got["tokens"] for each in told] == [60, 40, 40, 40]
    one, other = got["ranks"]
    assert one == other
    assert one["pinned"] == 0 and (one["cycles"] > 3) == (one["sparse"] > 60) == (case == "v4_sparse")
