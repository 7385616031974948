"""On a CUDA device: with everything kept, LSA gives a stock backend's tokens, eager and with CUDA graphs; and in sparse
mode poison changes nothing. `python -m pytest tests/test_exactness_gpu.py` on a machine with a GPU."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import prompts
from tests.paths import run_module

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TOKENS = 48
BATCH = [5, 40, 200, 333, 500, 640, 777, 900]
SHARED = 600


def engine(eager: bool, lsa: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    # fp32: FlashAttention does not take it.
    backend = {"attention_backend": "TRITON_ATTN"}
    if lsa is not None:
        backend = {"attention_backend": "LSA", "additional_config": {"lsa": {"check": "assert", **lsa}}}
    return {**backend, "enforce_eager": eager, **more}


def scenarios() -> list[dict[str, Any]]:
    text = prompts.document()
    shared = [text[:SHARED] + text[SHARED + 50 * i : SHARED + 50 * i + 30] for i in range(4)]
    # Found in blocks that are filled in the same step.
    at_once = [text[3000 : 3000 + SHARED] + text[4000 + 50 * i : 4030 + 50 * i] for i in range(4)]
    batch = [prompts.of_length(n) for n in BATCH]

    def scenario(name: str, tokens: list[list[int]], together: bool) -> dict[str, Any]:
        return {"name": name, "prompts": tokens, "max_tokens": TOKENS, "together": together}

    return [
        scenario("lengths", [prompts.of_length(n) for n in (1, 15, 16, 17, 300, 2000)], False),
        scenario("sharing", shared, False),
        scenario("sharing at once", at_once, True),
        scenario("together", batch, True),
    ]


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> dict[str, Any]:
    spec = {"llm": engine(True), "scenarios": scenarios()}
    return run_module("tests.generate", spec, tmp_path_factory.mktemp("stock"), 600)


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{"budget": 1.0, "device_pool_fraction": 1.0}, {"budget": 1.0, "device_pool_fraction": 0.02, "check": "poison"}],
    ids=["resident", "tiny-pool"],
)
def test_with_everything_kept_the_tokens_are_those_of_a_stock_backend(stock, tmp_path, settings, eager):
    llm = engine(eager, settings, max_num_batched_tokens=512)
    got = run_module("tests.generate", {"llm": llm, "scenarios": scenarios()}, tmp_path, 900)
    for name in ("lengths", "sharing", "sharing at once", "together"):
        assert got[name] == stock[name], name
    counts = got["counts"]
    assert counts["pinned"] == counts["live"] == counts["cycles"] == 0
    assert (counts["missed"] > 0) == (settings["device_pool_fraction"] < 1)


@pytest.mark.parametrize("demand", ["off", "mean_key"])
def test_graphs_and_poison_change_nothing_in_sparse_mode(tmp_path, demand):
    """The same tokens, whether kernels are launched or replayed and whatever lies in unused memory."""
    tokens = [prompts.of_length(n) for n in (700, 1500)]
    outputs = []
    for eager, check in ((True, "off"), (True, "poison"), (False, "off"), (False, "poison")):
        lsa = {"budget": 0.15, "demand": demand, "check": check, "device_pool_gib": 0.03, "period": 16}
        spec = {
            "llm": engine(eager, lsa),
            "scenarios": [{"name": "x", "prompts": tokens, "max_tokens": 96, "together": True}],
        }
        outputs.append(run_module("tests.generate", spec, tmp_path / f"{eager}{check}", 600))
    for output in outputs[1:]:
        assert output["x"] == outputs[0]["x"]
    assert outputs[0]["counts"]["cycles"] > 0
    assert (outputs[0]["counts"]["demanded"] > 0) == (demand != "off")


def likelihoods(folder: Path, lsa: dict[str, Any] | None, cache: str, eager: bool = True) -> tuple[np.ndarray, Any]:
    """Log-probabilities [8, 64] of texts' last tokens, forced in decode steps; and the counts of LSA.

    The first two texts have a prefix in common, and come in one step.
    """
    from tests import forced_logprobs  # needs vLLM

    text = prompts.document()
    texts = [text[:364], text[:60] + text[400:704], *(text[800 * i : 800 * i + 364] for i in range(1, 7))]
    llm = engine(eager, lsa, kv_cache_dtype=cache)
    spec = {"llm": llm, "texts": texts, "prompt": 300, "whole_queries": lsa is None}
    # Without it a stock backend's products are TF32's, and what is close to half way is rounded to another byte.
    env = {**forced_logprobs.ENVIRONMENT, "TRITON_F32_DEFAULT": "ieee"}
    got = run_module("tests.forced_logprobs", spec, folder, 900, env)
    return np.array(got["logprobs"]), got.get("counts")


def test_fp8_is_what_it_is_in_a_stock_backend(tmp_path):
    """What rounding to e4m3 does to the texts' likelihood is the same in both, with stock's queries left as they are.

    It is not equal: where results differ in the last bit, some keys and values are rounded the other way, more with
    every layer. How far apart that brings two runs that round alike, LSA with graphs and without says: 0.061 a token on
    an H200, where the rounding makes 0.098 and stock and LSA differ by 0.069 and 0.072, correlated by 0.70. What
    another computation with e4m3 does (vLLM's CPU backend) is not correlated with it (-0.4), and differs by more than
    its size.
    """
    resident = {"budget": 1.0, "demand": "off", "device_pool_fraction": 1.0}
    tiny = {**resident, "device_pool_fraction": 0.02, "check": "poison"}
    runs: dict[str, Any] = {
        "exact": (None, "auto"), "stock": (None, "fp8"), "eager": (resident, "fp8"), "graphs": (resident, "fp8", False),
        "tiny": (tiny, "fp8"),
    }  # fmt: skip
    with ThreadPoolExecutor(len(runs)) as pool:  # each is a process of its own
        found = dict(zip(runs, pool.map(lambda name: likelihoods(tmp_path / name, *runs[name]), runs), strict=True))
    exact, stock, eager, graphs, streamed = (found[name][0] for name in runs)
    assert found["eager"][1]["missed"] == found["eager"][1]["cycles"] == 0 < found["tiny"][1]["missed"]
    rounding, apart = np.abs(stock - exact).mean(), np.abs(eager - graphs).mean()
    for mine in (eager, graphs):
        assert np.corrcoef((mine - exact).ravel(), (stock - exact).ravel())[0, 1] > 0.5
        assert 0.8 * rounding < np.abs(mine - exact).mean() < 1.25 * rounding
        assert np.abs(mine - stock).mean() < 1.4 * apart < 1.4 * rounding
        assert abs((mine - stock).mean()) < 0.05
    # The same arithmetic over the same bytes, wherever they are read from.
    np.testing.assert_allclose(streamed, eager, atol=1e-5)


@pytest.mark.parametrize("eager", [True, False])
def test_poison_changes_nothing_in_sparse_mode_with_fp8(tmp_path, eager):
    spec = {"scenarios": [{"name": "x", "prompts": [prompts.of_length(n) for n in (700, 1500)], "max_tokens": 96}]}
    spec["scenarios"][0]["together"] = True
    outputs = []
    for check in ("off", "poison"):
        lsa = {"budget": 0.15, "demand": "mean_key", "check": check, "device_pool_gib": 0.0075, "period": 16}
        llm = engine(eager, lsa, kv_cache_dtype="fp8")
        outputs.append(run_module("tests.generate", {**spec, "llm": llm}, tmp_path / check, 600))
    assert outputs[0]["x"] == outputs[1]["x"]
    assert outputs[0]["counts"]["cycles"] > 0 and outputs[0]["counts"]["demanded"] > 0
