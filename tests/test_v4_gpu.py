"""DeepSeek-V4 with LSA on a GPU, in stock vLLM: `python -m pytest tests/test_v4_gpu.py` on a machine with one.

A small model of random weights and real sizes of heads and caches. What a machine lacks beside FlashMLA is supplied by
tests/v4/cuda.py. Two runs of stock vLLM there do not give the same tokens to the end either: top-k leaves equal sets in
any order, attention sums in that order, and a random model makes much of a last bit. So layers are compared one by one,
on the same inputs, where LSA reads its pool and where the same kernel reads the host store.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.paths import run_module
from tests.v4 import install, model
from tests.v4_runs import scorers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LAYERS, PAGE, KEYS = 3, 37440, 8640
_random = random.Random(1)
KEEP_ALL = {"indexer": "keep_all", "budget": 1.0, "device_pool_fraction": 1.0}


def prompt(length: int) -> list[int]:
    return [_random.randrange(2, model.VOCABULARY) for _ in range(length)]


def batch(*prompts: list[int], max_tokens: int) -> dict[str, Any]:
    return {"prompts": list(prompts), "max_tokens": max_tokens, "abort": {}, "together": True}


SHORT, MIDDLE, LONG, LONGEST = (prompt(length) for length in (40, 700, 3000, 9000))
WHOLE = [batch(one, max_tokens=12) for one in (SHORT, MIDDLE, LONG, LONGEST)]
WHOLE += [batch(prompt(2300), MIDDLE, LONG, SHORT, max_tokens=24)]
SPARSE = [batch(LONGEST, max_tokens=90), batch(LONGEST, LONG, prompt(2300), max_tokens=50)]
# A long request decodes when ten shorter ones come: five fit beside it, and it is on a budget then; for their windows
# it has to leave, two cycles later and with a set chosen ahead. tests/test_v4_scheduled.py says so without a GPU.
# vLLM takes 216 blocks at the least for this length, with two steps of 64 tokens under way.
GROWING = batch(LONG, *(prompt(30) for _ in range(10)), max_tokens=110)
GROWING |= {"late": {index: 71 + index + 45 * (index > 6) for index in range(1, 11)}, "priorities": [1, *[0] * 10]}
# In each layer 16 pages: of the long request, beside five of one page each, 10 of 12.
AHEAD = {"indexer": "native", "budget": 0.75, "period": 16, "lead": 5, "recency_tokens": 1792}
AHEAD |= {"device_pool_gib": 16 * LAYERS * PAGE / 2**30}
FEW_BLOCKS = {"chunk": 64, "kv_cache_memory_bytes": 220 * PAGE, "max_model_len": 3200, "max_num_seqs": 12}
FEW_BLOCKS |= {"scheduling_policy": "priority"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.write(tmp_path_factory.mktemp("model"))


def run(
    folder: Path, path: Path, batches: list[dict[str, Any]], lsa: dict[str, Any] | None, graphs: bool,
    chunk: int = 9344, **arguments: Any,
) -> Any:  # fmt: skip
    """chunk: tokens of a step, prompts' included. arguments: of vLLM's `LLM`."""
    llm = {**model.ARGUMENTS, "model": str(path), "kv_cache_memory_bytes": 700 << 20, "enforce_eager": not graphs}
    llm |= {"max_num_batched_tokens": chunk, "gpu_memory_utilization": 0.12} | arguments
    # Warming up needs the modules that stand-ins replace.
    llm |= {"kernel_config": {"enable_jit_warmup": False}}
    if lsa is not None:
        llm |= {"attention_backend": "LSA", "additional_config": {"lsa": lsa}}
    env = install.environment(folder / "plugin", plugins=() if lsa is None else ("lsa",), device="cuda")
    spec = {"llm": llm, "batches": batches, "every": 7}
    return run_module("tests.v4_watched_gpu", spec, folder, 280, {**env, "OMP_NUM_THREADS": "2"})


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_with_everything_kept_every_layer_gives_what_it_gives_from_the_store(path, tmp_path, graphs):
    lsa = run(tmp_path, path, WHOLE, KEEP_ALL, graphs)
    assert [len(tokens) for told in lsa["tokens"] for tokens in told] == [12] * 4 + [24] * 4
    assert lsa["counts"]["chunks_missed"] == lsa["counts"]["cycles"] == lsa["pinned"] == 0
    if graphs:
        assert lsa["pages"] > LAYERS * 24 * 20
    else:
        assert lsa["from_store"] == LAYERS * (11 * 4 + 23 * 4)
        assert lsa["oracle"] > 50 and all(held == whole for held, whole in lsa["held"])


@pytest.mark.parametrize("keys", ["device", "host"])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_sparse_decode_reads_its_set(path, tmp_path, graphs, keys):
    # In each layer 34 pages: of the longest 36 alone, and of all three together about 11 each.
    page = PAGE + (KEYS if keys == "host" else 0)
    settings = {"indexer": "native", "budget": 0.3, "period": 16, "index_keys": keys}
    settings["device_pool_gib"] = 34 * LAYERS * page / 2**30
    lsa = run(tmp_path, path, SPARSE, settings, graphs)
    assert [len(tokens) for told in lsa["tokens"] for tokens in told] == [90, 50, 50, 50]
    assert lsa["counts"]["cycles"] >= 5 and lsa["counts"]["bytes_fetched"] > 0
    assert lsa["counts"]["chunks_missed"] == lsa["pinned"] == 0
    if graphs:
        assert lsa["pages"] > LAYERS * 89 * 11
    else:
        assert lsa["from_store"] == LAYERS * (89 + 3 * 49)
        assert lsa["oracle"] > 50 and any(held < whole for held, whole in lsa["held"])


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_a_memory_indexer_chooses_from_prompts_read_in_chunks(path, tmp_path, graphs):
    """A random checkpoint in the published layout, for all three c4 layers; 34 pages in each layer, as above."""
    settings = {"indexer": str(scorers(tmp_path / "joint.safetensors")), "budget": 0.36, "period": 16, "mode": "mean"}
    settings |= {"recency_tokens": 1792}  # leaves room for a choice
    settings["device_pool_gib"] = 34 * LAYERS * PAGE / 2**30
    lsa = run(tmp_path, path, SPARSE, settings, graphs, chunk=2048)
    assert [len(tokens) for told in lsa["tokens"] for tokens in told] == [90, 50, 50, 50]
    assert lsa["counts"]["bytes_fetched"] > 0 and lsa["counts"]["chunks_missed"] == lsa["pinned"] == 0
    # Every selection is what the rule makes of its scores, and those are what a float64 twin has.
    assert lsa["selected"] == len(lsa["steps"]) >= 5
    if graphs:
        assert lsa["pages"] > LAYERS * 89 * 9
    else:
        assert lsa["from_store"] >= LAYERS * (89 + 3 * 49)
        assert lsa["oracle"] > 50 and any(held < whole for held, whole in lsa["held"])


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_a_request_whose_sets_are_chosen_ahead_is_preempted_and_comes_back(path, tmp_path, graphs):
    lsa = run(tmp_path, path, [GROWING], AHEAD, graphs, **FEW_BLOCKS)
    assert lsa["preemptions"] > 0
    assert [len(tokens) for tokens in lsa["tokens"][0]] == [GROWING["max_tokens"]] * len(GROWING["prompts"])
    assert 16 - 5 in lsa["steps"] and lsa["pinned"] == 0
    if graphs:
        assert lsa["pages"] > LAYERS * 100 * 9
    else:
        assert lsa["oracle"] > 50 and any(held < whole for held, whole in lsa["held"])


@pytest.mark.parametrize(
    "graphs, keys",
    [(False, "device"), (True, "device"), (False, "host")],
    ids=["eager-device", "graphs-device", "eager-host"],
)
def test_exact_reads_what_it_chose_from_everything(path, tmp_path, graphs, keys):
    """In each layer 20 pages: of the longest 36 at most 10 are kept, and the model chooses from all of them."""
    page = PAGE + (KEYS if keys == "host" else 0)
    settings = {"indexer": "exact", "budget": 0.3, "period": 16, "index_keys": keys}
    settings |= {"sink_tokens": 256, "recency_tokens": 256, "device_pool_gib": 20 * LAYERS * page / 2**30}
    lsa = run(tmp_path, path, SPARSE, settings, graphs)
    assert [len(tokens) for told in lsa["tokens"] for tokens in told] == [90, 50, 50, 50]
    counts, (entries, pages, kept) = lsa["counts"], lsa["missing"]
    assert counts["cycles"] >= 5 and lsa["pinned"] == 0
    assert entries > pages > 0
    if graphs:
        assert lsa["pages"] > LAYERS * 89 * 4
        # What one layer read is at most what all did.
        assert 584 * entries <= counts["bytes_streamed"] and pages <= counts["chunks_missed"] - kept
        assert counts["bytes_streamed"] % 584 == 0
    else:
        assert lsa["from_store"] == LAYERS * (89 + 3 * 49)
        assert lsa["oracle"] > 50 and any(held < whole for held, whole in lsa["held"])
        assert counts["bytes_streamed"] == 584 * entries and counts["chunks_missed"] == pages + kept
