"""The engine of a CPU without vLLM: a small random scheduler drives it, and every output is compared with plain
attention over the chunks that the engine says it attended to."""

import numpy as np
import pytest
import torch

from tests import random_checkpoint
from vllm_lsa.config import LsaConfig
from vllm_lsa.engine import LsaEngine
from vllm_lsa.host_engine import HostEngine
from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.residency.requests import NewRequest, RequestUpdate, StepUpdate

LAYERS, HQ, HKV, DIM, BLOCK, CHUNK = 3, 6, 2, 16, 32, 8
SCALE = DIM**-0.5


class Simulation:
    """Blocks, prefix sharing, chunked prefill, preemption, aborts: what vLLM's scheduler does, at random."""

    device = torch.device("cpu")

    def __init__(self, config: LsaConfig, slots: int, blocks: int = 60, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.config = config
        self.engine = self.make_engine(self.geometry(), slots)
        cell = self.engine.layout.cell_bytes
        # Content may be anything before it is written: vLLM does not clear index cells.
        cells = [torch.randint(0, 256, (blocks, HKV, BLOCK // CHUNK, cell), dtype=torch.uint8) for _ in range(LAYERS)]
        self.engine.attach(blocks, [cell.to(self.device) for cell in cells])
        self.watch()
        self.free = list(range(1, blocks))
        self.live: dict[str, dict] = {}
        self.waiting: dict[str, dict] = {}
        self.shared: list[int] = []
        self.traced: dict[tuple[int, str], np.ndarray] = {}
        self.table: dict[tuple[int, int], torch.Tensor] = {}
        self.names = 0
        self.sparse_decodes = 0
        self.decodes = 0

    def geometry(self) -> KVGeometry:
        return KVGeometry(LAYERS, HQ, HKV, DIM, torch.float32, BLOCK, CHUNK, self.config.layer_lanes(HKV))

    def stored(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What attention has to read of these."""
        return k, v

    def make_engine(self, geometry: KVGeometry, slots: int) -> LsaEngine:
        return HostEngine(self.config, geometry, SCALE, slots, 32, self.device)

    def watch(self) -> None:
        self.engine.attention.tracer = self.trace

    def caps(self, plan) -> dict[str, np.ndarray]:
        """Most chunks of each lane, for the rows on a budget."""
        return {d.request.id: d.caps for d in plan.decodes if d.caps is not None}

    def trace(self, lane, request, chunks):
        assert len(set(chunks.tolist())) == len(chunks)
        self.traced[lane, request.id] = chunks

    def add(self, prompt: int, total: int) -> str:
        name = f"r{self.names}"
        self.names += 1
        self.live[name] = {"prompt": prompt, "total": total, "computed": 0, "blocks": [], "started": False}
        return name

    def step(self, want: dict[str, int], preempt=(), abort=()) -> None:
        update = StepUpdate(preempted=list(preempt), finished=list(abort))
        for name in [*preempt, *abort]:
            state = self.live.pop(name)
            self.free = [b for b in state["blocks"] if b not in self.shared] + self.free
            if name in preempt:
                self.waiting[name] = state
        for name, tokens in want.items():
            if name in self.waiting:
                state = self.waiting.pop(name)
                self.live[name] = state
                state.update(computed=0, blocks=self.hits(state), resumed=True)
                state["computed"] = len(state["blocks"]) * BLOCK
            state = self.live[name]
            if not state["started"]:
                state["blocks"] = self.hits(state)
                state["computed"] = len(state["blocks"]) * BLOCK
            tokens = min(tokens, state["total"] - state["computed"])
            need = -(-(state["computed"] + tokens) // BLOCK) - len(state["blocks"])
            new = [self.free.pop() for _ in range(need)]
            state["blocks"] = state["blocks"] + new
            if not state["started"]:
                state["started"] = True
                update.new.append(NewRequest(name, list(state["blocks"]), state["computed"], state["prompt"]))
            else:
                again = state.pop("resumed", False)
                blocks = list(state["blocks"]) if again else new
                update.cached.append(RequestUpdate(name, blocks, state["computed"], again))
            update.num_scheduled[name] = tokens
        self.engine.open_step(update)
        if update.num_scheduled:
            self.forward(update.num_scheduled)
        self.engine.close_step()
        for name, tokens in update.num_scheduled.items():
            self.live[name]["computed"] += tokens

    def hits(self, state) -> list[int]:
        return self.shared[: max(0, (state["prompt"] - 1) // BLOCK)]

    def kv(self, layer: int, positions: np.ndarray, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [n, Hkv, D] of a request's tokens: the shared prefix is the same for all."""
        shared = self.tokens(0, layer)
        own = self.tokens(0 if name == "r0" else int(name[1:]), layer)
        from_prefix = torch.from_numpy(positions < len(self.shared) * BLOCK)[:, None, None, None]
        both = torch.where(from_prefix, shared[positions], own[positions])
        return both[:, 0], both[:, 1]

    def tokens(self, who: int, layer: int) -> torch.Tensor:
        if (who, layer) not in self.table:
            generator = torch.Generator().manual_seed(who * LAYERS + layer)
            self.table[who, layer] = torch.randn(400, 2, HKV, DIM, generator=generator)
        return self.table[who, layer]

    def forward(self, scheduled: dict[str, int]) -> None:
        order = list(scheduled)
        self.rng.shuffle(order)
        plan = self.engine.plan([(name, scheduled[name]) for name in order])
        sparse = self.caps(plan)
        for layer in range(LAYERS):
            self.traced.clear()
            q = torch.randn(sum(scheduled.values()), HQ, DIM)
            pairs = [
                self.kv(layer, np.arange(self.live[n]["computed"], self.live[n]["computed"] + scheduled[n]), n)
                for n in order
            ]
            k, v = torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])
            out = torch.full_like(q, float("nan"))
            on_device = [x.to(self.device) for x in (q, k, v, out)]
            self.engine.attend(plan, layer, *on_device)
            out = on_device[-1].cpu()
            start = 0
            for name in order:
                past, tokens = self.live[name]["computed"], scheduled[name]
                keys, values = self.stored(layer, *self.kv(layer, np.arange(past + tokens), name))
                allowed = torch.ones(HQ, past + tokens, dtype=torch.bool)
                if name in sparse:
                    lanes = self.engine.geometry.layer_lanes
                    for head in range(HQ):
                        lane = layer * lanes + head * lanes // HQ
                        chunks = self.traced[lane, name]
                        self.check_set(name, chunks, past, sparse[name][lane])
                        some = torch.zeros(past // CHUNK + 1, CHUNK, dtype=torch.bool)
                        some[torch.from_numpy(chunks).long()] = True
                        allowed[head] = some.flatten()[: past + tokens]
                    self.sparse_decodes += 1
                self.decodes += 1
                expected = attention(q[start : start + tokens], keys, values, allowed, past)
                torch.testing.assert_close(out[start : start + tokens], expected, atol=1e-5, rtol=1e-4)
                start += tokens

    def check_set(self, name: str, chunks: np.ndarray, past: int, cap: int) -> None:
        have, tail = set(chunks.tolist()), past // CHUNK
        assert tail in have and max(have) == tail
        assert set(range(min(self.config.sink_chunks, tail))) <= have
        assert set(range(max(0, tail - self.config.recency_chunks), tail)) <= have or self.live[name]["computed"] < 1
        assert len(have) <= cap

    def leak_check(self) -> None:
        self.step({}, abort=list(self.live))
        assert self.engine.pool.num_pinned == 0 and not self.engine.mirror.requests
        self.check_rows()

    def check_rows(self) -> None:
        assert len(self.engine.lookahead._free_rows) == 32


def attention(q, k, v, allowed, past):
    """Softmax attention in float64; query i is token past + i."""
    k, v = (x.double().repeat_interleave(HQ // HKV, 1) for x in (k, v))
    scores = torch.einsum("shd,thd->hst", q.double(), k) * SCALE
    causal = torch.arange(k.shape[0])[None] <= past + torch.arange(q.shape[0])[:, None]
    scores = scores.masked_fill(~(causal & allowed[:, None]), float("-inf"))
    return torch.einsum("hst,thd->shd", scores.softmax(-1), v).float()


def config(**settings) -> LsaConfig:
    base = dict(chunk_tokens=CHUNK, sink_tokens=8, recency_tokens=16, period=16, check="poison", demand_chunks=1)
    return LsaConfig(**{**base, **settings})


def run(simulation: Simulation, steps: int) -> None:
    rng = simulation.rng
    for number in range(steps):
        done = [n for n, s in simulation.live.items() if s["computed"] >= s["total"]]
        abort = done + [n for n in simulation.live if n not in done and rng.random() < 0.01]
        names = [n for n in simulation.live if n not in abort]
        preempt = [n for n in names if simulation.live[n]["started"] and rng.random() < 0.02]
        names = [n for n in names if n not in preempt]
        in_use = sum(len(s["blocks"]) for s in simulation.live.values())
        if len(names) < 4 and in_use < 35 and number < steps - 5:
            prompt = int(rng.integers(1, 260))
            names.append(simulation.add(prompt, prompt + int(rng.integers(1, 60))))
        names += [n for n in simulation.waiting if in_use < 30]
        want = {}
        for name in names:
            state = simulation.live.get(name) or simulation.waiting[name]
            decoding = name in simulation.live and state["computed"] >= state["prompt"]
            want[name] = 1 if decoding else int(rng.integers(1, 90))
            if not decoding and name in simulation.live:
                want[name] = min(want[name], max(1, state["prompt"] - state["computed"]))
        simulation.step(want, preempt, abort)


POLICIES = ["mean_key", "quest", "usage", "recency", "random", "keep_all"]


@pytest.mark.parametrize("indexer", POLICIES)
@pytest.mark.parametrize("demand", ["off", "mean_key", "four_bit"])
def test_attention_equals_plain_attention_over_the_same_sets(indexer, demand):
    simulation = Simulation(config(indexer=indexer, demand=demand, budget=0.2), slots=LAYERS * HKV * 40)
    run(simulation, 120)
    assert simulation.decodes > 300
    assert indexer == "keep_all" or simulation.sparse_decodes > 100
    simulation.leak_check()


@pytest.mark.parametrize(
    "sets, mode, lead",
    [
        ("shared", "or", 0),
        ("shared", "mean", 3),
        ("per_layer", "mean", 5),
        ("per_layer", "or", 1),
        ("per_head", "or", 4),
    ],
)
def test_shared_sets_modes_and_selections_ahead_of_their_cycle(sets, mode, lead):
    simulation = Simulation(
        config(sets=sets, mode=mode, lead=lead, budget=0.3),
        slots=LAYERS * 45 * (HKV if sets == "per_head" else 1),
        seed=1,
    )
    run(simulation, 150)
    assert simulation.sparse_decodes > 100
    simulation.leak_check()


@pytest.mark.parametrize("sets", ["per_head", "per_layer", "shared"])
@pytest.mark.parametrize(
    "demand, lookahead", [("product", "indexer"), ("off", "indexer"), ("product", "usage"), ("product", "recency")]
)
def test_a_trained_checkpoint_serves_scores_index_and_shares_of_the_budget(tmp_path, sets, demand, lookahead):
    weights = (0.4, 1.6, 1.0)
    folder = random_checkpoint.write(tmp_path, LAYERS, HQ, HKV, DIM, CHUNK, scorers=(0, 2), weights=weights)
    settings = config(indexer=str(folder), demand=demand, lookahead=lookahead, sets=sets, budget=0.3)
    simulation = Simulation(settings, slots=LAYERS * 45 * settings.layer_lanes(HKV), seed=5)
    assert simulation.engine._policy.name == ("trained" if lookahead == "indexer" else lookahead)
    run(simulation, 100)
    assert simulation.sparse_decodes > 100
    assert (simulation.engine.attention.chunks_demanded > 0) == (demand != "off")
    caps = simulation.engine.lookahead._shares.caps(400).reshape(LAYERS, -1)
    assert (caps[0] < caps[2]).all() and (caps[2] < caps[1]).all() and caps.mean() <= 0.3 * 400
    simulation.leak_check()


def test_unset_fields_take_the_values_that_a_checkpoint_was_made_for(tmp_path):
    folder = random_checkpoint.write(tmp_path, LAYERS, HQ, HKV, DIM, CHUNK)
    parsed = LsaConfig.parse({"lsa": {"indexer": str(folder)}})
    assert (parsed.chunk_tokens, parsed.demand, parsed.period) == (CHUNK, "product", 16)
    assert LsaConfig.parse({"lsa": {"indexer": str(folder), "demand": "off"}}).demand == "off"


def test_everything_stays_resident_and_is_copied_once_while_it_fits():
    simulation = Simulation(config(budget=0.1, check="off"), slots=LAYERS * HKV * 400, seed=2)
    run(simulation, 100)
    assert simulation.sparse_decodes == 0
    assert simulation.engine.lookahead.counts.cycles == 0
    assert simulation.engine.transfers.counts.bytes_fetched == 0
    assert simulation.engine.transfers.counts.bytes_streamed == 0
    simulation.leak_check()


@pytest.mark.parametrize("slots", [4, LAYERS * HKV * 7, LAYERS * HKV * 25])
def test_a_pool_smaller_than_what_is_kept_streams_the_rest_and_is_exact(slots):
    simulation = Simulation(config(budget=1.0), slots=slots, seed=3)
    run(simulation, 80)
    assert simulation.engine.transfers.counts.bytes_streamed > 0 and simulation.sparse_decodes == 0
    simulation.leak_check()


def test_more_requests_than_the_pool_has_room_for_degrade_to_streaming():
    simulation = Simulation(config(budget=0.1, demand="off"), slots=LAYERS * HKV * 6, seed=4)
    run(simulation, 100)
    assert simulation.engine.attention.chunks_missed > 0
    simulation.leak_check()


def test_prefix_sharing_shares_slots():
    share_a_prefix(Simulation)


def share_a_prefix(kind: type[Simulation]) -> None:
    simulation = kind(config(budget=1.0, check="off"), slots=LAYERS * HKV * 400)
    first = simulation.add(130, 140)
    simulation.step({first: 130})
    simulation.shared = simulation.live[first]["blocks"][:4]
    used = simulation.engine.pool.num_pinned
    second = simulation.add(150, 160)
    simulation.step({first: 1, second: 22})
    assert simulation.live[second]["computed"] == 150
    assert simulation.engine.pool.num_pinned == used + LAYERS * HKV * 3
    for _ in range(5):
        simulation.step({first: 1, second: 1})
    simulation.step({second: 1}, abort=[first])
    simulation.leak_check()


def test_prefix_that_another_request_writes_in_the_same_step():
    share_a_prefix_in_one_step(Simulation)


def share_a_prefix_in_one_step(kind: type[Simulation]) -> None:
    """vLLM finds a prefix in blocks that it has just planned to fill: by prompts, or by the last token of a decode."""
    simulation = kind(config(budget=1.0), slots=LAYERS * HKV * 400)
    first = simulation.add(95, 140)
    # Those that the first one gets.
    simulation.shared = simulation.free[:-5:-1]
    hits = simulation.hits
    simulation.hits = lambda state: [] if state is first_state else hits(state)
    first_state = simulation.live[first]
    second, third = simulation.add(90, 100), simulation.add(65, 70)
    simulation.step({first: 95, second: 26, third: 1})
    assert simulation.live[second]["computed"] == 90 and simulation.live[third]["computed"] == 65
    fourth = simulation.add(130, 140)
    simulation.shared = simulation.live[first]["blocks"][:3]  # its third block is full with the token of this step
    simulation.step({first: 1, second: 1, third: 1, fourth: 30})
    assert simulation.live[fourth]["computed"] == 3 * BLOCK + 30
    simulation.step({first: 1, second: 1, third: 1, fourth: 4})
    simulation.leak_check()


def test_copied_blocks_are_copied_in_the_store_and_lose_their_slots():
    copy_a_block(Simulation)


def copy_a_block(kind: type[Simulation]) -> None:
    simulation = kind(config(budget=1.0, check="off"), slots=LAYERS * HKV * 100)
    name = simulation.add(60, 80)
    simulation.step({name: 60})
    engine, source, target = simulation.engine, simulation.live[name]["blocks"][0], simulation.free.pop()
    engine.open_step(StepUpdate(block_copies=[(source, target)]))
    pages = engine.store.block_pages(np.array([source, target])).reshape(2, -1)
    assert torch.equal(engine.store.pages[pages[0]], engine.store.pages[pages[1]])
    assert (engine.pool.lookup(pages[1]) < 0).all()
