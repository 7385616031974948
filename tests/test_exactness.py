"""With everything kept, LSA gives the stock CPU backend's tokens, in fp32, greedy, token for token."""

import hashlib
import json
from typing import Any

import pytest

from tests import prompts
from tests.paths import run_module
from vllm_lsa.plugin import compat

# The engines' own limits are below; the fixture that asks the stock backend counts into the first test's time.
pytestmark = pytest.mark.timeout(1800)
TOKENS = 16
BATCH = [5, 40, 200, 333, 500, 640, 777, 900]
SHARED = 600
# Two blocks each, and a third within the first TOKENS tokens: all eight do not fit a store of 17 blocks.
CROWDED = range(246, 254)


def lsa(**settings: Any) -> dict[str, Any]:
    return {"attention_backend": "LSA", "additional_config": {"lsa": {"budget": 1.0, "check": "assert", **settings}}}


def scenario(name: str, tokens: list[list[int]], together: bool = False, **more: Any) -> dict[str, Any]:
    return {"name": name, "prompts": tokens, "max_tokens": TOKENS, "together": together, **more}


@pytest.fixture(scope="module")
def lengths() -> list[list[int]]:
    return [prompts.of_length(n) for n in prompts.LENGTHS]


@pytest.fixture(scope="module")
def batch() -> list[list[int]]:
    return [prompts.of_length(n) for n in BATCH]


@pytest.fixture(scope="module")
def sharing() -> list[list[int]]:
    """Prompts with a common prefix of several blocks."""
    text = prompts.document()
    return [text[:SHARED] + text[SHARED + 50 * i : SHARED + 50 * i + 30] for i in range(4)]


@pytest.fixture(scope="module")
def stock(request, tmp_path_factory, lengths, batch, sharing) -> dict[str, Any]:
    """What CPU_ATTN answers; kept in pytest's cache, since it depends on nothing but vLLM, model and prompts."""
    scenarios = [scenario("lengths", lengths), scenario("batch", batch), scenario("sharing", sharing)]
    scenarios.append(scenario("crowded", [prompts.of_length(n) for n in CROWDED]))
    spec = {"llm": {}, "scenarios": scenarios}
    key = "lsa/stock-" + hashlib.sha256(json.dumps([spec, compat.vllm_version()]).encode()).hexdigest()[:16]
    found = request.config.cache.get(key, None)
    if found is None:
        found = run_module("tests.generate", spec, tmp_path_factory.mktemp("stock"), 900)
        request.config.cache.set(key, found)
    return found


def test_every_length_alone_and_again_after_a_prefix_hit(stock, tmp_path, lengths, batch, sharing):
    """A pool that holds everything: nothing is selected, fetched or streamed, and the whole pool is given back."""
    scenarios = [
        scenario("lengths", lengths),
        scenario("again", lengths[-3:]),
        scenario("sharing", sharing),
        scenario("together", batch, together=True),
        scenario("aborts", batch, together=True, abort={1: 5, 3: 1, 6: 12}),
        scenario("after", batch[:2]),
    ]
    spec = {"llm": lsa(device_pool_fraction=1.0), "scenarios": scenarios}
    got = run_module("tests.generate", spec, tmp_path, 900)
    assert got["lengths"] == stock["lengths"]
    assert got["again"] == stock["lengths"][-3:]
    assert got["sharing"] == stock["sharing"]
    assert got["together"] == stock["batch"]
    for index, tokens in enumerate(got["aborts"]):
        assert tokens == stock["batch"][index][: len(tokens)]
        assert len(tokens) == {1: 5, 3: 1, 6: 12}.get(index, TOKENS)
    assert got["after"] == stock["batch"][:2]
    counts = got["counts"]
    assert counts["pinned"] == counts["live"] == counts["cycles"] == counts["streamed"] == 0


def test_chunked_prefill_and_preemption(stock, tmp_path, batch):
    """256 tokens a step, and a host store so small that requests are preempted and resumed."""
    crowded = [prompts.of_length(n) for n in CROWDED]
    scenarios = [scenario("together", batch, together=True), scenario("crowded", crowded, together=True)]
    llm = {**lsa(device_pool_fraction=1.0, host_memory_gib=0.1), "max_num_batched_tokens": 256, "max_model_len": 1024}
    got = run_module("tests.generate", {"llm": llm, "scenarios": scenarios}, tmp_path, 600)
    assert got["preemptions"] > 0
    assert got["together"] == stock["batch"]
    assert got["crowded"] == stock["crowded"]
    assert got["counts"]["pinned"] == got["counts"]["live"] == 0


def test_pool_smaller_than_the_history_streams_and_is_exact_with_poison(stock, tmp_path, batch, sharing):
    """Budget 1.0 with room for a fraction of the chunks; whatever is not resident is NaN."""
    scenarios = [scenario("together", batch, together=True), scenario("sharing", sharing)]
    llm = {**lsa(device_pool_fraction=0.02, check="poison"), "max_num_batched_tokens": 256}
    got = run_module("tests.generate", {"llm": llm, "scenarios": scenarios}, tmp_path, 600)
    assert got["counts"]["streamed"] > 0
    assert got["together"] == stock["batch"]
    assert got["sharing"] == stock["sharing"]
    assert got["counts"]["pinned"] == got["counts"]["live"] == 0


def test_poison_changes_nothing_in_sparse_mode(tmp_path):
    """With every slot and block that is not in use filled with NaN the same tokens come out."""
    tokens = [prompts.of_length(n) for n in (700, 1500)]
    outputs = []
    for check in ("off", "poison"):
        settings = lsa(budget=0.1, demand="four_bit", check=check, device_pool_gib=0.02, period=8, lead=3)
        spec = {"llm": settings, "scenarios": [scenario("x", tokens, together=True)]}
        outputs.append(run_module("tests.generate", spec, tmp_path / check, 600))
    assert outputs[0]["x"] == outputs[1]["x"]
    assert outputs[0]["counts"]["cycles"] > 0 and outputs[0]["counts"]["demanded"] > 0
