"""On a CUDA device: with everything kept, LSA gives a stock backend's tokens, eager and with CUDA graphs; and in sparse
mode poison changes nothing. `python -m pytest tests/test_exactness_gpu.py` on a machine with a GPU."""

from typing import Any

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
    batch = [prompts.of_length(n) for n in BATCH]

    def scenario(name: str, tokens: list[list[int]], together: bool) -> dict[str, Any]:
        return {"name": name, "prompts": tokens, "max_tokens": TOKENS, "together": together}

    return [
        scenario("lengths", [prompts.of_length(n) for n in (1, 15, 16, 17, 300, 2000)], False),
        scenario("sharing", shared, False),
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
    for name in ("lengths", "sharing", "together"):
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
