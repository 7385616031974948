"""CUDA graphs of both kinds of steps, in vLLM: `python -m pytest tests/test_step_graphs_gpu.py` where there is a GPU.

Without inductor and with a graph of each size, what is replayed is what runs eagerly, so tokens are the same to the
last bit, whether a step has demand or not.
"""

from typing import Any

import pytest
import torch

from tests import tiny_models
from tests.test_tensor_parallel import (
    GPU,
    HEAD,
    KV_HEADS,
    LAYERS_SERVED,
    LENGTHS,
    Q_HEADS,
    TOKENS,
    checkpoint,
    generate,
    tokens,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SPARSE = {"budget": 0.3, "period": 8, "recency_tokens": 32, "device_pool_fraction": 0.16}
# Small ones fit as a whole, the batch does not; then small ones again, in slots that others have had.
PROMPTS = {
    "small": [tokens(n, n) for n in (90, 17, 250)],
    "together": [tokens(n, n) for n in LENGTHS],
    "after": [tokens(n, n + 1) for n in (64, 130)],
}
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": list(range(1, 9))}


@pytest.mark.parametrize("demand", ["product", "mean_key"])
def test_graphs_give_what_eager_steps_give_with_demand_and_without(tmp_path, demand):
    model = tiny_models.write_random(tmp_path / "model", LAYERS_SERVED, Q_HEADS, KV_HEADS, HEAD)
    settings: dict[str, Any] = {**SPARSE, "demand": demand}
    if demand == "product":
        settings |= {"indexer": checkpoint(tmp_path / "indexer"), "lookahead": "usage"}

    def run(name: str, check: str, **more: Any) -> dict[str, Any]:
        return generate(tmp_path / name, model, 1, PROMPTS, {**settings, "check": check}, GPU, 240, **more)

    eager = run("eager", "poison", enforce_eager=True)
    graphs = run("graphs", "off", enforce_eager=False, compilation_config=GRAPHS)
    for name, prompts in PROMPTS.items():
        assert [len(each) for each in graphs[name]] == [TOKENS] * len(prompts)
        assert graphs[name] == eager[name], name
    for got in (eager, graphs):
        assert got["counts"]["cycles"] > 4 and got["counts"]["demanded"] > 0 and got["counts"]["missed"] == 0
    assert "captured once more" in (tmp_path / "graphs" / "log.txt").read_text()
