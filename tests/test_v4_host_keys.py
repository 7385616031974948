"""DeepSeek-V4 whose index keys are on the host too, but for the layers that are scored. See tests/v4/README.md."""

from pathlib import Path

import pytest

from tests.v4_runs import BATCHES, KEEP_ALL, LAYERS, LONG, MIXED, PAGE, TOKENS, batch, run, scorers

KEYS = 8640
HOST = {"index_keys": "host", "check": "poison"}


@pytest.mark.vllm
def test_with_everything_kept_tokens_and_choices_are_those_of_stock_vllm(v4_path, tmp_path):
    batches = [BATCHES[2], BATCHES[4]]
    stock = run(tmp_path / "stock", v4_path, batches)
    lsa = run(tmp_path / "lsa", v4_path, batches, {**KEEP_ALL, **HOST})
    assert lsa["tokens"] == stock["tokens"] and lsa["chosen"] == stock["chosen"]
    # From the pool alone, keys included.
    assert lsa["reads"] == LAYERS * 2 * (TOKENS - 1)
    assert lsa["oracle"] == LAYERS * 5 * (TOKENS - 1)
    assert lsa["pinned"] == 0


@pytest.mark.vllm
def test_sparse_decode_scores_the_keys_of_its_set(v4_path: Path, tmp_path):
    # One layer is scored, which is not the first: the others' keys have left.
    settings = {
        "indexer": str(scorers(tmp_path / "indexer.safetensors", layers=[1])),
        "budget": 0.75,
        "period": 16,
        "recency_tokens": 1792,
        "device_pool_gib": 38 * LAYERS * (PAGE + KEYS) / 2**30,
        **HOST,
    }
    lsa = run(tmp_path, v4_path, [batch(LONG, LONG[:3830], LONG[:600], LONG[:3500], max_tokens=40)], settings)
    assert lsa["oracle"] == LAYERS * 39 * 4 and lsa["reads"] == LAYERS * 39
    assert lsa["selected"] == lsa["counts"]["cycles"] >= 3
    assert any(held < whole for held, whole in lsa["held"])
    assert lsa["counts"]["chunks_missed"] == lsa["pinned"] == 0


@pytest.mark.vllm
def test_chunks_and_cached_prefixes_change_nothing(v4_path, tmp_path):
    batches = [batch(MIXED[0], MIXED[2]), batch(MIXED[2])]
    stock = run(tmp_path / "stock", v4_path, batches[:1], fallbacks=True)
    lsa = run(tmp_path / "lsa", v4_path, batches, {**KEEP_ALL, **HOST}, chunk=500, fallbacks=True)
    told = stock["tokens"][0]
    assert lsa["tokens"] == [told, [told[1]]]
    assert set(lsa["chosen"]) <= set(stock["chosen"])
    assert lsa["pinned"] == 0
