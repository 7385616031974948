"""DeepSeek-V4 with sparse sets inside vLLM on a CPU. See tests/v4/README.md."""

from typing import Any

import pytest

from tests.v4_runs import FEW_BLOCKS, GROWING, LAYERS, LONG, PAGE, batch, run


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
def test_sparse_decode_reads_the_set_in_the_pool_and_nothing_else(v4_path, v4_checkpoint, tmp_path, indexer):
    settings = sparse(str(v4_checkpoint) if indexer == "memory" else indexer)
    # The second begins a page on the way, the last is aborted.
    prompts = [LONG, LONG[:3830], LONG[:600], LONG[:3500]]
    lsa = run(tmp_path, v4_path, [batch(*prompts, max_tokens=40, abort={3: 35})], settings)
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
def test_a_sparse_request_is_preempted_and_comes_back(v4_path, tmp_path):
    # In each layer 14 pages of 12 + 3 · 1.
    settings = sparse("native", device_pool_gib=14 * LAYERS * PAGE / 2**30)
    lsa = run(tmp_path, v4_path, [GROWING], settings, **FEW_BLOCKS)
    assert lsa["preemptions"] > 0
    assert all(len(tokens) == GROWING["max_tokens"] for tokens in lsa["tokens"][0])
    assert any(held < whole for held, whole in lsa["held"])
    assert lsa["oracle"] > 0 and lsa["counts"]["cycles"] > 0
    assert lsa["pinned"] == 0
