"""Device engines as ranks that hold some heads each: they attend to the sets that one with all heads attends to.

Without vLLM. Ranks are threads that take turns, since Triton's interpreter is not made for several at a time.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests import random_checkpoint
from tests.divided import Comparison, Divided, Sets
from tests.held_chunks import held_chunks
from tests.test_device_engine import DeviceSimulation, cases, drive
from tests.test_engine import CHUNK, DIM, HKV, HQ, LAYERS, SCALE, config
from vllm_lsa.config import LsaConfig
from vllm_lsa.device.engine import DeviceEngine
from vllm_lsa.device.plan import DevicePlan


class DividedDevice(Divided):
    """Stands for a device engine, see `Divided`."""

    def __init__(self, *args) -> None:
        self._lock = threading.Lock()
        super().__init__(*args)

    @staticmethod
    def make(config, geometry, slots, device):
        return DeviceEngine(config, geometry, SCALE, slots, 32, device, max_model_len=400)

    @staticmethod
    def watch(part: DeviceEngine, sets: Sets) -> None:
        def trace(layer: int, plan: DevicePlan) -> None:
            for lane, request, chunks in held_chunks(part, layer, plan):
                sets[lane, request.id] = set(chunks.tolist())

        part.tracer = trace

    def turn(self) -> threading.Lock:
        return self._lock

    @contextmanager
    def aside(self) -> Iterator[None]:
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()


class DeviceComparison(Comparison, DeviceSimulation):
    def make_engine(self, geometry, slots):
        return DividedDevice(self, geometry, slots)

    def watch(self):
        self.engine.whole.tracer = self.trace_sets


def compare(settings: LsaConfig, seed: int = 1) -> DeviceComparison:
    """Every step and layer is compared, see `Divided`."""
    slots = LAYERS * 45 * settings.layer_lanes(HKV)
    simulation = DeviceComparison(settings, slots=slots, seed=seed)
    drive(simulation)
    assert simulation.sparse_decodes > 30
    simulation.leak_check()
    return simulation


@pytest.mark.parametrize(
    "sets, mode, demand",
    cases(
        ("per_layer", "or", "off"), ("shared", "mean", "off"), ("per_head", "or", "mean_key"), interpreted=2,
    ),
)  # fmt: skip
def test_ranks_have_the_sets_of_one(sets, mode, demand):
    simulation = compare(config(sets=sets, mode=mode, demand=demand, budget=0.25))
    assert (simulation.engine.gathers > 0) == (sets != "per_head")


def test_a_checkpoint_is_divided(tmp_path):
    folder = random_checkpoint.write(tmp_path, LAYERS, HQ, HKV, DIM, CHUNK, scorers=(0, 2), weights=(0.4, 1.6, 1.0))
    simulation = compare(config(indexer=str(folder), demand="product", budget=0.3, demand_chunks=2), seed=5)
    assert simulation.engine.gathers > 0
