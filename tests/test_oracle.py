"""Sparse decoding equals an independent PyTorch forward that is given the same resident sets."""

import pytest

from tests import prompts
from tests.paths import run_module
from vllm_lsa.indexer.trained import SHIPPED

STEPS = 66
LENGTHS = [4000, 4100, 4210, 4333]
RUNS = [
    {"indexer": "quest", "demand": "off", "mode": "mean", "sets": "shared"},
    {"indexer": "recency", "demand": "four_bit", "sets": "per_head"},
    {"indexer": "random", "demand": "mean_key"},
    {"indexer": "keep_all", "demand": "off"},
    {"indexer": "mean_key", "demand": "mean_key", "lead": 5},
    {"indexer": "trained", "demand": "product"},
    {"indexer": "usage", "demand": "mean_key", "lead": 0},
]


@pytest.mark.timeout(1500)
def test_logits_equal_the_oracle_for_every_policy(tmp_path):
    """256 steps and more over four prompts of 4,000 tokens and more, four cycles each, poison on.

    The bound is 1e-4 for all but one in 200 of the 13 million logits, and 2e-4 for those. With everything kept, when
    only rounding in fp32 is left, machines and threads reach 1.1e-4 to 1.6e-4, and up to one in 400 is beyond 1e-4
    (docs/log.md); a wrong set shows at 1e-2.
    """
    text = prompts.document()
    # Each continues the one before, so that all but the first also come through the prefix cache.
    tokens = [text[:length] for length in LENGTHS]
    lsa = {"period": 16, "budget": 0.135, "check": "poison", "device_pool_fraction": 0.1, "demand": "four_bit"}
    shipped = str(SHIPPED / "smollm2-135m-instruct")
    spec = {"checkpoint": shipped, "prompts": tokens, "steps": STEPS, "runs": RUNS, "lsa": lsa}
    for run in run_module("tests.compare_with_oracle", spec, tmp_path, 1200):
        assert run["steps"] >= 256 and run["worst"] <= 2e-4 and run["beyond"] <= 5e-3, run
        if run["indexer"] != "keep_all":
            # A checkpoint gives some layers nearly twice the mean share.
            assert run["cycles"] >= 16 and run["widest"] < (0.27 if run["indexer"] == "trained" else 0.16), run
            assert (run["demanded"] > 0) == (run["demand"] != "off"), run
