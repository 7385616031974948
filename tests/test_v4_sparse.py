"""DeepSeek-V4 with sparse sets inside vLLM on a CPU. See tests/v4/README.md."""

import pytest

from tests.v4_runs import FEW_BLOCKS, GROWING, LAYERS, LONG, batch, run, sparse


@pytest.mark.vllm
@pytest.mark.parametrize("indexer, lead", [("native", 0), ("recency", 0), ("memory", 0), ("memory", 5), ("random", 5)])
def test_sparse_decode_reads_the_set_in_the_pool_and_nothing_else(v4_path, v4_checkpoint, tmp_path, indexer, lead):
    # In each layer 38 pages of the 16 + 16 + 14 + 3 that there are: long requests go on a budget, 12 + 12 + 10 + 3. Two
    # of each are for what comes in between, where a set that was chosen ahead has room beside the old one.
    settings = sparse(str(v4_checkpoint) if indexer == "memory" else indexer, 38, lead=lead)
    # The second begins a page on the way, the last is aborted.
    prompts = [LONG, LONG[:3830], LONG[:600], LONG[:3500]]
    lsa = run(tmp_path, v4_path, [batch(*prompts, max_tokens=40, abort={3: 35})], settings)
    assert [len(tokens) for tokens in lsa["tokens"][0]] == [40, 40, 40, 35]
    assert all(len(set(tokens)) > 20 for tokens in lsa["tokens"][0][:2])
    assert lsa["reads"] == LAYERS * 39
    assert lsa["oracle"] == LAYERS * (39 * 3 + 34)
    assert lsa["counts"]["cycles"] == len(lsa["steps"]) >= 3
    assert not lead or 16 - lead in lsa["steps"]
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
    settings = sparse("native", 14)
    lsa = run(tmp_path, v4_path, [GROWING], settings, **FEW_BLOCKS)
    assert lsa["preemptions"] > 0
    assert all(len(tokens) == GROWING["max_tokens"] for tokens in lsa["tokens"][0])
    assert any(held < whole for held, whole in lsa["held"])
    assert lsa["oracle"] > 0 and lsa["counts"]["cycles"] > 0
    assert lsa["pinned"] == 0
