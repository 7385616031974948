"""The device engine under the random scheduler of `test_engine`: its kernels run on the GPU, or in the interpreter."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import random_checkpoint
from tests.kernels import DEVICE, load
from tests.test_engine import (
    CHUNK,
    DIM,
    HKV,
    HQ,
    LAYERS,
    SCALE,
    Simulation,
    config,
    copy_a_block,
    run,
    share_a_prefix,
    share_a_prefix_in_one_step,
)
from vllm_lsa.device.engine import DeviceEngine
from vllm_lsa.device.state import PAGE
from vllm_lsa.engine import LsaEngine
from vllm_lsa.errors import LsaError
from vllm_lsa.ops.e4m3 import KVScales, quantise, unscaled
from vllm_lsa.ops.native import gather_cells

for _name in ("write", "demand", "pages", "renew", "encode", "score", "paged_decode"):
    load(_name)


def drive(simulation: "DeviceSimulation", steps: int = 20) -> None:
    """Prompts cut into pieces, a shared prefix, mixed batches, a preemption, an abort; at random as well on a GPU,
    since the interpreter takes seconds for what the GPU does in milliseconds."""
    long = simulation.add(200, 250)
    simulation.step({long: 120})
    simulation.step({long: 80})
    simulation.shared = simulation.live[long]["blocks"][:2]
    middle, short = simulation.add(107, 140), simulation.add(9, 40)
    simulation.step({long: 1, middle: 43, short: 9})
    for number in range(steps):
        names = [n for n in (long, middle, short) if n in simulation.live]
        again = {middle: 90} if number == 7 else {}
        preempt = [middle] if number == 6 else []
        abort = [short] if number == 9 else []
        simulation.step({n: 1 for n in names if n not in preempt + abort} | again, preempt, abort)
    if DEVICE.type == "cuda":
        run(simulation, 150)


class DeviceSimulation(Simulation):
    device = DEVICE

    def make_engine(self, geometry, slots):
        return DeviceEngine(self.config, geometry, SCALE, slots, 32, self.device, max_model_len=400)

    def watch(self):
        self.engine.tracer = self.trace_sets

    def caps(self, plan):
        control, sets = self.engine.control, self.engine.sets
        rows = {name: control.set_row(self.engine.mirror.requests[name]) for name in plan.requests}
        beside = 0 if self.config.demand == "off" else 1 + self.config.demand_chunks  # before others leave
        return {name: sets.caps[row].cpu().numpy() + beside for name, row in rows.items() if row >= 0}

    def trace_sets(self, layer, plan):
        sets, lanes = self.engine.sets, self.engine.geometry.layer_lanes
        for name in plan.requests:
            request = self.engine.mirror.requests[name]
            row = self.engine.control.set_row(request)
            if row < 0:
                continue
            pages = sets.pages[row].cpu().numpy()
            for lane in range(layer * lanes, (layer + 1) * lanes):
                entries = np.arange(int(sets.counts[row, lane]))
                chunks = sets.chunk.cpu().numpy()[pages[entries // PAGE], lane, entries % PAGE]
                assert chunks[-1] == request.num_computed // CHUNK
                if plan.demands:  # the last step left as many as may be
                    assert len(chunks) <= int(sets.caps[row, lane]) + (request.num_computed % CHUNK == 0)
                    picked = self.engine._wanted.picked[plan.requests.index(name), lane].cpu().numpy()
                    chunks = np.append(chunks, picked[picked >= 0])
                held = sets.held.cpu().numpy()
                full = np.arange(request.num_computed // CHUNK + 1)
                assert (held[pages[full // PAGE], lane, full % PAGE] == np.isin(full, chunks)).all()
                self.trace(lane, request, chunks)

    def check_rows(self):
        control, sets = self.engine.control, self.engine.sets
        assert len(control._free_rows) == 32 == len(control._free_sets)
        assert sorted(control._free_pages) == list(range(len(sets.chunk)))


class QuantisedSimulation(DeviceSimulation):
    """Pages of e4m3, for a model in fp32. The larger keys of the middle layer saturate."""

    scales = (KVScales(), KVScales(1 / 150, 0.01), KVScales(0.3, 1.9))

    def geometry(self):
        return replace(super().geometry(), dtype=torch.uint8, model_dtype=torch.float32)

    def make_engine(self, geometry, slots):
        engine = super().make_engine(geometry, slots)
        engine.kv_scales = list(self.scales)
        return engine

    def stored(self, layer, k, v):
        return tuple(
            unscaled(quantise(x, scale), torch.float32) * scale
            for x, scale in zip((k, v), self.scales[layer], strict=True)
        )


def cases(*every: tuple, interpreted: int) -> list[tuple]:
    """All of them on a GPU, the first few in the interpreter."""
    return list(every) if DEVICE.type == "cuda" else list(every[:interpreted])


@pytest.mark.parametrize(
    "indexer, demand",
    cases(
        ("mean_key", "mean_key"), ("random", "off"), ("keep_all", "mean_key"), ("usage", "mean_key"),
        ("mean_key", "off"), ("recency", "off"), ("recency", "mean_key"), ("random", "mean_key"), interpreted=3,
    ),
)  # fmt: skip
def test_attention_equals_plain_attention_over_the_same_sets(indexer, demand):
    simulation = DeviceSimulation(config(indexer=indexer, demand=demand, budget=0.2), slots=LAYERS * HKV * 40)
    drive(simulation)
    assert simulation.decodes > 100 and (indexer == "keep_all" or simulation.sparse_decodes > 30)
    simulation.leak_check()


@pytest.mark.parametrize(
    "indexer, demand",
    cases(("mean_key", "mean_key"), ("usage", "mean_key"), ("recency", "off"), ("keep_all", "off"), interpreted=1),
)
def test_pages_of_e4m3_are_attended_to_and_indexed_as_they_are_stored(indexer, demand):
    settings = config(indexer=indexer, demand=demand, budget=0.2)
    simulation = QuantisedSimulation(settings, slots=LAYERS * HKV * 40)
    drive(simulation)
    assert simulation.decodes > 100 and (indexer == "keep_all" or simulation.sparse_decodes > 30)
    simulation.step({})  # cells of what the last step completed are made before the next
    engine, g = simulation.engine, simulation.engine.geometry
    assert g.page_bytes == 2 * CHUNK * DIM and engine.store.pages.nbytes == 60 * g.block_bytes
    for name, state in simulation.live.items():
        # Cells are of the keys that are stored, whether a prompt filled the chunk, in one step or two, or decoding did.
        for layer, cells in enumerate(engine._cells if "mean_key" in (indexer, demand) else ()):
            positions = np.arange(state["computed"] // CHUNK * CHUNK)
            keys = simulation.stored(layer, *simulation.kv(layer, positions, name))[0]
            got = gather_cells(cells.cpu(), torch.tensor(state["blocks"]), len(positions) // CHUNK)
            means = got[..., : 4 * DIM].contiguous().view(torch.float32)
            torch.testing.assert_close(means, keys.unflatten(0, (-1, CHUNK)).mean(1), rtol=1e-5, atol=1e-6)
    simulation.leak_check()


@pytest.mark.parametrize(
    "demand, lookahead, sets, kind",
    cases(
        ("product", "indexer", "per_head", DeviceSimulation), ("product", "usage", "per_layer", QuantisedSimulation),
        ("off", "indexer", "shared", DeviceSimulation), ("product", "usage", "per_layer", DeviceSimulation),
        ("product", "usage", "per_head", DeviceSimulation), ("product", "indexer", "per_layer", DeviceSimulation),
        ("product", "indexer", "shared", DeviceSimulation), ("off", "indexer", "per_head", DeviceSimulation),
        ("off", "indexer", "per_layer", DeviceSimulation), ("product", "indexer", "per_head", QuantisedSimulation),
        interpreted=3,
    ),
)  # fmt: skip
def test_a_trained_checkpoint_serves(tmp_path, sets, demand, lookahead, kind):
    folder = random_checkpoint.write(tmp_path, LAYERS, HQ, HKV, DIM, CHUNK, scorers=(0, 2), weights=(0.4, 1.6, 1.0))
    settings = config(indexer=str(folder), demand=demand, lookahead=lookahead, sets=sets, budget=0.3, demand_chunks=2)
    simulation = kind(settings, slots=LAYERS * 45 * settings.layer_lanes(HKV), seed=5)
    drive(simulation)
    assert simulation.sparse_decodes > 30
    assert (int(simulation.engine._wanted.demanded) > 0) == (demand != "off")
    simulation.leak_check()


def test_scores_by_kernel_are_the_policys():
    simulation = DeviceSimulation(config(indexer="mean_key", demand="off", budget=0.2), slots=LAYERS * HKV * 40)
    engine, compared = simulation.engine, []

    def both(request, row, x):
        fast = DeviceEngine._score(engine, request, row, replace(x))
        slow = LsaEngine._score(engine, request, row, x)
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6)
        compared.append(request.id)
        return fast

    engine._score = both
    drive(simulation, steps=8)
    assert compared


def test_everything_stays_resident_while_it_fits():
    simulation = DeviceSimulation(config(budget=0.1, check="off"), slots=LAYERS * HKV * 400, seed=2)
    drive(simulation)
    counted = simulation.engine.counted()
    assert simulation.sparse_decodes == 0 and counted["cycles"] == 0
    assert counted["bytes_fetched"] == 0 and counted["bytes_streamed"] == 0
    simulation.leak_check()


@pytest.mark.parametrize("slots", [LAYERS * HKV * 7, 4][: 2 if DEVICE.type == "cuda" else 1])
@pytest.mark.parametrize("kind", [DeviceSimulation, QuantisedSimulation])
def test_a_pool_smaller_than_what_is_kept_reads_the_host_and_is_exact(slots, kind):
    simulation = kind(config(budget=1.0), slots=slots, seed=3)
    drive(simulation)
    assert simulation.engine.control.counts.chunks_missed > 0 and simulation.sparse_decodes == 0
    simulation.leak_check()


@pytest.mark.parametrize("demand", ["mean_key", "off"][: 2 if DEVICE.type == "cuda" else 1])
def test_more_requests_than_the_pool_has_room_for(demand):
    simulation = DeviceSimulation(config(budget=0.1, demand=demand), slots=LAYERS * HKV * 6, seed=4)
    drive(simulation)
    assert simulation.engine.control.counts.chunks_missed > 0
    simulation.leak_check()


@pytest.mark.parametrize("kind", [DeviceSimulation, QuantisedSimulation])
def test_prefix_sharing_shares_slots(kind):
    share_a_prefix(kind)


def test_prefix_that_another_request_writes_in_the_same_step():
    share_a_prefix_in_one_step(DeviceSimulation)


@pytest.mark.parametrize("kind", [DeviceSimulation, QuantisedSimulation])
def test_copied_blocks_are_copied_in_the_store_and_lose_their_slots(kind):
    copy_a_block(kind)


@pytest.mark.parametrize("settings", [{"indexer": "quest"}, {"demand": "four_bit"}, {"lead": 3}])
def test_settings_that_have_no_form_here_are_refused_in_one_line(settings):
    with pytest.raises(LsaError, match=r"lsa\.(indexer|demand)=.* has no CUDA kernels: use|lsa\.lead=3 is for a CPU"):
        DeviceSimulation(config(**settings), slots=100)
