"""DeepSeek-V4 with tensor parallelism: every rank holds all pages and, from the same scores, the same sets."""

from pathlib import Path
from typing import Any

import pytest

from tests.paths import run_module
from tests.v4 import install, model
from tests.v4_runs import KEEP_ALL, LAYERS, LONG, MIXED, PAGE, Batch, batch


def run(folder: Path, path: Path, batches: list[Batch], lsa: dict[str, Any] | None) -> dict[str, Any]:
    llm = {**model.ARGUMENTS, "model": str(path), "tensor_parallel_size": 2, "kv_cache_memory_bytes": 300 << 20}
    llm |= {"max_model_len": 4352, "max_num_batched_tokens": 4352}
    if lsa is not None:
        llm |= {"attention_backend": "LSA", "additional_config": {"lsa": lsa}}
    env = install.environment(folder / "plugin", plugins=() if lsa is None else ("lsa",), everywhere=True)
    # vLLM gives every rank a NUMA node of its own and would refuse a machine with one; threads are for one core a rank.
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return run_module("tests.v4_ranks", {"llm": llm, "batches": batches}, folder, 500, env)


@pytest.mark.vllm
def test_two_ranks_give_what_two_ranks_of_stock_vllm_give(v4_path, tmp_path):
    batches = [batch(*MIXED[1:])]
    stock = run(tmp_path / "stock", v4_path, batches, None)
    lsa = run(tmp_path / "lsa", v4_path, batches, {**KEEP_ALL, "check": "poison"})
    assert lsa["tokens"] == stock["tokens"]
    assert len(lsa["ranks"]) == 2 and all(rank["pinned"] == 0 for rank in lsa["ranks"])


@pytest.mark.vllm
def test_two_ranks_choose_the_same_sets(v4_path, tmp_path):
    settings = {"indexer": "native", "budget": 0.75, "period": 16, "recency_tokens": 1792, "check": "poison"}
    settings["device_pool_gib"] = 26 * LAYERS * PAGE / 2**30
    lsa = run(tmp_path, v4_path, [batch(LONG, LONG[:3830], max_tokens=40)], settings)
    one, other = lsa["ranks"]
    assert one == other
    assert one["sparse"] > 40 and one["cycles"] > 3 and one["pinned"] == 0
