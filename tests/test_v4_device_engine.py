"""The V4 engine of a CUDA device beside that of a CPU, fed the same: kernels run on the GPU, or in the interpreter."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.kernels import DEVICE, load
from tests.v4.pages import state_bytes
from vllm_lsa.config import LsaConfig
from vllm_lsa.memory.device_transfers import DeviceTransfers
from vllm_lsa.models.deepseek_v4.device_engine import DeepseekV4DeviceEngine, entry_view
from vllm_lsa.models.deepseek_v4.engine import DeepseekV4Engine
from vllm_lsa.models.deepseek_v4.geometry import EntryGeometry
from vllm_lsa.models.deepseek_v4.page_tables import PageTable, PageTables
from vllm_lsa.models.deepseek_v4.selection import TOP_K
from vllm_lsa.models.deepseek_v4.settings import PAGE_TOKENS, for_deepseek_v4
from vllm_lsa.ops.index_logits import KEY, PAGE_BYTES
from vllm_lsa.residency.lookahead import READ_AFTER
from vllm_lsa.residency.requests import NewRequest, Request, RequestUpdate, StepUpdate

for _name in ("pages", "index_logits", "missing_entries"):
    load(_name)

LAYERS, HEADS, REQUESTS, BLOCKS, TOKENS, LENGTH = 2, 4, 4, 80, 4096, 24 * PAGE_TOKENS
GEOMETRY = EntryGeometry(
    num_layers=LAYERS, num_page_bytes=37440, entries=64, entry_tokens=4, index_bytes=PAGE_BYTES
)  # fmt: skip


def settings(**values) -> LsaConfig:
    return for_deepseek_v4(LsaConfig(**{"indexer": "native", "budget": 0.4, "period": 4, **values}))


class Both:
    """Two engines and what both are told. Pages get new bytes in every entry that a step completes."""

    def __init__(self, config: LsaConfig, slots: int) -> None:
        self.random = np.random.default_rng(3)
        self.generator = torch.Generator().manual_seed(3)
        self.cpu = DeepseekV4Engine(config, GEOMETRY, slots, REQUESTS)
        self.gpu = DeepseekV4DeviceEngine(config, GEOMETRY, slots, REQUESTS, TOKENS, LENGTH, HEADS, DEVICE)
        keys = torch.zeros(LAYERS, BLOCKS, PAGE_BYTES, dtype=torch.uint8)
        keys[..., : 64 * KEY] = torch.randn(LAYERS, BLOCKS, 64 * KEY, generator=self.generator).to(
            torch.float8_e4m3fn
        ).view(torch.uint8)  # fmt: skip
        keys[..., 64 * KEY :] = torch.ones(LAYERS, BLOCKS, 64).view(torch.uint8)
        for engine, device in ((self.cpu, torch.device("cpu")), (self.gpu, DEVICE)):
            engine.attach(BLOCKS, list(keys.to(device)))
        self.free = list(range(BLOCKS))
        self.live: dict[str, dict] = {}
        self.compared = self.sparse = 0

    def add(self, prompt: int) -> str:
        name = f"request-{len(self.live)}-{self.random.integers(1 << 30)}"
        self.live[name] = {"prompt": prompt, "computed": 0, "blocks": [], "known": False}
        return name

    def step(self, scheduled: dict[str, int], finished: tuple[str, ...] = ()) -> None:
        """scheduled: rows of one token first, as vLLM orders them."""
        new, cached = [], []
        for name in finished:
            self.free += self.live.pop(name)["blocks"]
        for name, tokens in scheduled.items():
            state = self.live[name]
            lacking = -(-(state["computed"] + tokens) // PAGE_TOKENS) - len(state["blocks"])
            fresh = [self.free.pop(int(self.random.integers(len(self.free)))) for _ in range(lacking)]
            state["blocks"] += fresh
            if state["known"]:
                cached.append(RequestUpdate(name, fresh, state["computed"], False))
            else:
                new.append(NewRequest(name, list(state["blocks"]), 0, state["prompt"]))
                state["known"] = True
        for engine in (self.cpu, self.gpu):
            engine.open_step(StepUpdate(finished=finished, new=new, cached=cached, num_scheduled=dict(scheduled)))
        rows = list(scheduled.items())
        plans = self.cpu.plan(rows), self.gpu.plan(rows)
        self.forward(scheduled, *plans)
        self.check_tables(plans[1])
        self.check(*plans)
        for name, tokens in scheduled.items():
            self.live[name]["computed"] += tokens
        for engine in (self.cpu, self.gpu):
            engine.close_step()

    def forward(self, scheduled, cpu_plan, gpu_plan) -> None:
        tokens = sum(scheduled.values())
        for layer in range(LAYERS):
            for name, count in scheduled.items():
                state = self.live[name]
                for entry in range(state["computed"] // 4, (state["computed"] + count) // 4):
                    data = torch.from_numpy(self.random.integers(0, 256, 584, dtype=np.uint8))
                    for engine in (self.cpu, self.gpu):
                        pages = entry_view(engine.layer_pages(layer), 64)
                        pages[state["blocks"][entry // 64], entry % 64] = data
            q = torch.randn(tokens, HEADS, KEY, generator=self.generator).to(torch.float8_e4m3fn)
            w = torch.randn(tokens, HEADS, generator=self.generator)
            self.cpu.write_through(cpu_plan, layer)
            self.cpu.note_queries(cpu_plan, layer, q, w)
            self.gpu.write_through_on_device(layer, len(gpu_plan.written_pages))
            hidden = torch.zeros(tokens, 8, device=DEVICE)
            self.gpu.note_on_device(layer, len(gpu_plan.rows), hidden, q.to(DEVICE), w.to(DEVICE))

    def check_tables(self, plan) -> None:
        """What is on the device, from whatever step, is what the sets of now say."""
        for row, shown in enumerate(plan.shown[: len(plan.pool_rows)]):
            made, pages = self.gpu._resident_pages(plan.rows[row].request), len(shown.blocks)
            assert int(self.gpu.tables.entries[row]) == made.entries(GEOMETRY, plan.rows[row].request.length)
            assert torch.equal(self.gpu.tables.table[row, :pages].cpu(), torch.from_numpy(made.blocks))
            assert torch.equal(self.gpu.tables.slots[:, row, :pages].cpu(), torch.from_numpy(made.slots))

    def check(self, cpu_plan, gpu_plan) -> None:
        tables, pool = self.gpu.tables, self.gpu.pool.pages.view(len(self.gpu.pool.pages), -1)
        assert gpu_plan.pool_rows == list(range(len(gpu_plan.pool_rows)))
        assert not tables.entries[len(gpu_plan.pool_rows) :].any()
        for row in gpu_plan.pool_rows:
            count = int(tables.entries[row])
            pages = -(-count // 64)
            blocks = tables.table[row, :pages].cpu()
            request = gpu_plan.rows[row].request
            self.sparse += count < request.length // 4
            if row in cpu_plan.pool_rows and row not in cpu_plan.host_rows:
                assert count == int(cpu_plan.entries[row])
                assert torch.equal(blocks, cpu_plan.table[row, :pages])
                self.compared += 1
            for layer in range(LAYERS):
                slots = tables.slots[layer, row, :pages].long()
                assert torch.equal(pool[slots].cpu(), self.gpu.layer_pages(layer)[blocks.long()])


class Exact(Both):
    """Rows that decode choose from everything. Their sets stay those that both engines chose, since the engine of a CPU
    is not told of the choices."""

    def __init__(self, config: LsaConfig, slots: int) -> None:
        super().__init__(config, slots)
        self.entries = self.pages = self.steps = 0

    def check(self, cpu_plan, gpu_plan) -> None:
        tables = self.gpu.tables
        rows = len(gpu_plan.pool_rows)
        assert gpu_plan.pool_rows == cpu_plan.pool_rows == list(range(rows))
        # A row behind, as a graph pads a step with, has no entries, whatever stands there.
        chosen = torch.full((rows + 1, TOP_K), 1 << 20, dtype=torch.int32)
        for row in range(rows):
            request = gpu_plan.rows[row].request
            count, pages = request.length // 4, GEOMETRY.chunks(request.length)
            assert int(tables.entries[row]) == count == int(cpu_plan.entries[row])
            assert torch.equal(tables.table[row, :pages].cpu(), torch.from_numpy(request.blocks[:pages]))
            here = tables.slots[:, row, :pages].cpu() >= 0
            assert torch.equal(here, cpu_plan.slots[:, row, :pages] >= 0)
            self.compared += 1
            self.sparse += not here.all()
            some = torch.randperm(count, generator=self.generator)[:TOP_K].int()
            chosen[row] = torch.cat([some, torch.full((TOP_K - len(some),), -1)])
        self.steps += 1
        for layer in range(LAYERS if self.steps % 3 == 0 else 0):  # the interpreter takes its time
            places = self.gpu.read_missing(layer, chosen.to(DEVICE)).cpu()
            assert (places[rows:] == -1).all()
            store = self.gpu.layer_pages(layer)
            for row in range(rows):
                named, found = chosen[row].long(), places[row].long()
                assert torch.equal(named < 0, found < 0)
                named, found = named[named >= 0], found[found >= 0]
                slots = tables.slots[layer, row].cpu().long()
                blocks = torch.from_numpy(gpu_plan.rows[row].request.blocks).long()
                there = state_bytes(self.gpu.pool_pages().cpu(), 64, slots[found // 64], found % 64)
                assert torch.equal(there, state_bytes(store, 64, blocks[named // 64], named % 64))
                missing = slots[named // 64] < 0
                self.entries += int(missing.sum())
                self.pages += len((named // 64)[missing].unique())


def two_requests(both: Both) -> tuple[str, str]:
    """A long one and a short one, some decode steps on; their names."""
    long, short = both.add(20 * PAGE_TOKENS + 3), both.add(700)
    both.step({long: 4000})
    both.step({long: 1123, short: 300})
    both.step({long: 1, short: 400})
    for _ in range(14):
        both.step({long: 1, short: 1})
    return long, short


@pytest.mark.parametrize("lead, budget", [(2, 0.4), (3, 0.4), (0, 0.01)])
def test_exact_finds_everything_that_was_chosen(lead, budget):
    config = settings(indexer="exact", lead=lead, budget=budget, sink_tokens=256, recency_tokens=256)
    both = Exact(config, slots=LAYERS * (20 if budget > 0.1 else 7))
    long, short = two_requests(both)
    both.step({short: 1}, finished=(long,))
    assert both.compared > 25 and both.sparse > 12
    # What was read is counted, and no set has changed for it.
    both.gpu.counted()  # asks
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    counts = both.gpu.counted()
    assert both.entries > 0 and counts["bytes_streamed"] == both.entries * 584
    assert counts["chunks_missed"] == both.pages + both.gpu.lookahead.counts.chunks_missed
    # One was still under way when its request left.
    assert counts["cycles"] == both.cpu.counted()["cycles"] - (lead == 3) >= 3
    both.gpu.open_step(StepUpdate(finished=list(both.live)))
    assert both.gpu.pool.num_pinned == 0


@pytest.mark.parametrize("lead", (0, 2, 3))
def test_both_engines_hold_the_same_sets(lead):
    both = Both(settings(lead=lead), slots=LAYERS * 20)
    long, short = two_requests(both)
    other = both.add(2 * PAGE_TOKENS)
    both.step({long: 1, short: 1, other: 2 * PAGE_TOKENS})
    for _ in range(6):
        both.step({other: 1, long: 1, short: 1})
    both.step({other: 1}, finished=(long, short))
    assert both.compared > 40 and both.sparse > 15
    # One was still under way when its request left.
    assert both.gpu.counted()["cycles"] == both.cpu.counted()["cycles"] - (lead == 3) > 3
    both.gpu.open_step(StepUpdate(finished=list(both.live)))
    assert both.gpu.pool.num_pinned == 0


def test_a_prompts_tokens_that_come_alone_go_by_a_set():
    both = Both(settings(), slots=LAYERS * 14)
    long = both.add(18 * PAGE_TOKENS)
    both.step({long: 4000})
    both.step({long: 300})
    for _ in range(3):
        both.step({long: 1})
    assert both.sparse == 3
    # Sink, recency and the newest at least, whatever came before.
    assert (both.gpu.tables.entries[0] > 9 * 64).all()
    both.step({long: 18 * PAGE_TOKENS - 4304})
    both.step({long: 1})
    assert both.sparse == 4 and (both.gpu.tables.entries[0] > 9 * 64).all()
    for _ in range(5):
        both.step({long: 1})
    assert both.sparse == 9


@pytest.mark.parametrize("indexer", ["native", "exact"])
def test_a_selection_begun_ahead_is_read_when_it_has_arrived(indexer, monkeypatch):
    """And on a GPU nobody waits, whatever the step has to plan but a request's first selection."""
    period, lead, prompt = 12, 5, 20 * PAGE_TOKENS
    both = (Exact if indexer == "exact" else Both)(settings(indexer=indexer, lead=lead, period=period), LAYERS * 20)
    long = both.add(prompt)
    both.step({long: 4000})
    both.step({long: prompt - 4000})
    both.step({long: 1})
    lookahead, stock, times = both.gpu.lookahead, both.gpu._begin, []

    def begin(request, *args):
        read, at = stock(request, *args), request.num_computed

        def noted():
            times.append(((at - prompt) % period, (request.num_computed - prompt) % period))
            return read()

        return noted

    def plan(rows):
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            return type(both.gpu).plan(both.gpu, rows)
        finally:
            if DEVICE.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(lookahead, "_begin", begin)
    monkeypatch.setattr(both.gpu, "plan", plan)
    for _ in range(2 * period + 1):
        both.step({long: 1})
    assert times == [(period - lead, period - lead + READ_AFTER)] * 2
    assert both.sparse > 2 * period and both.gpu.counted()["cycles"] == both.cpu.counted()["cycles"] == 3
    # One that is under way when its request leaves.
    for _ in range(period - lead):
        both.step({long: 1})
    assert lookahead._states[both.gpu.mirror.requests[long]].begun is not None
    both.gpu.open_step(StepUpdate(finished=[long]))
    assert both.gpu.pool.num_pinned == 0 and len(times) == 2


def test_a_set_chosen_ahead_of_more_of_the_prompt_is_given_up():
    both = Both(settings(lead=2), slots=LAYERS * 14)
    long = both.add(18 * PAGE_TOKENS)
    both.step({long: 4000})
    for _ in range(3):  # selects, and then the next set
        both.step({long: 1})
    both.step({long: 603})
    both.step({long: 1})
    resident = both.gpu.lookahead.resident(both.gpu.mirror.requests[long])
    assert resident.tail == 17 and np.isin(np.arange(10, 18), resident.lane(0)[0]).all()


def test_pages_without_a_slot_leave_the_set():
    both = Both(settings(), slots=LAYERS * 16)
    requests = [both.add(11 * PAGE_TOKENS + n) for n in range(2)]
    for request in requests:
        both.step({request: both.live[request]["prompt"]})
    for _ in range(6):
        both.step(dict.fromkeys(requests, 1))
    assert both.gpu.counted()["chunks_missed"] > 0
    assert both.sparse > 0


def test_a_step_of_nobody_reads_and_notes_nothing():
    both = Both(settings(), slots=LAYERS * 14)
    one = both.add(700)
    both.step({one: 700})
    both.step({one: 1})
    both.gpu.tables.clear()
    kept = both.gpu.pool.pages.clone()
    for layer in range(LAYERS):
        both.gpu.write_through_on_device(layer, REQUESTS)
    assert torch.equal(kept, both.gpu.pool.pages) and not both.gpu.tables.entries.any()
    assert (both.gpu.tables.last_row == REQUESTS).all()


@pytest.mark.parametrize("indexer", ["native", "exact"])
def test_between_cycles_only_what_changed_is_sent(indexer, monkeypatch):
    both = (Exact if indexer == "exact" else Both)(settings(indexer=indexer, period=64), slots=LAYERS * 20)
    first, second = (both.add(9 * PAGE_TOKENS + 250 + n) for n in range(2))
    for request in (first, second):
        both.step({request: both.live[request]["prompt"]})
    both.step({first: 1, second: 1})
    sent: list[torch.Tensor] = []
    stock = DeviceTransfers.update

    def update(transfers, pairs):
        pairs = list(pairs)
        sent.extend(tensor for tensor, _ in pairs)
        stock(transfers, pairs)

    monkeypatch.setattr(DeviceTransfers, "update", update)

    def rows() -> list[int]:
        """Rows whose tables were sent since the last call."""
        tables = both.gpu.tables.table
        offsets = [
            each.data_ptr() - tables.data_ptr() for each in sent if each.dtype == torch.int32 and each.dim() == 1
        ]
        sent.clear()
        return [offset // (4 * tables.shape[1]) for offset in offsets]

    seen = []
    for _ in range(6):
        both.step({first: 1, second: 1})
        seen.append(rows())
    assert seen == [[], [], [], [], [1], [0]]  # a page is full
    both.step({second: 1, first: 1})
    assert rows() == [0, 1]
    both.step({second: 1, first: 1})
    assert rows() == []
    both.step({first: 1}, finished=(second,))
    assert rows() == [0]
    # Another in the same row, in blocks that are given again; the second row has had the first one's pages before.
    third = both.add(300)
    both.step({first: 1, third: 300})
    assert rows() == []
    both.step({third: 1, first: 1})
    assert rows() == [0]


@pytest.mark.parametrize("change", ["full", "blocks", "slots"])
def test_a_table_that_missed_a_change_is_found(change):
    made = PageTable(np.arange(3, dtype=np.int32), np.zeros((LAYERS, 3), np.int32), full=2, tail=2, version=1)
    tables, request = PageTables(lambda _: made, check=True), Request(NewRequest("one", [1, 2, 3], 0, 600))
    assert tables.of(request, 1) is made is tables.of(request, 1)
    made = replace(made, **{change: getattr(made, change) + 1})
    with pytest.raises(RuntimeError, match="unnoticed"):
        tables.of(request, 1)
    made = replace(made, version=2)
    assert tables.of(request, 2) is made


@pytest.mark.skipif(DEVICE.type == "cuda", reason="what scores pinned memory there needs vLLM's view of it")
@pytest.mark.parametrize("indexer", ["native", "exact"])
def test_index_keys_in_pages_are_found_where_rows_look(indexer):
    """Of the second layer, whose keys are behind the entries: in the pool, or all of them in the store."""
    geometry = EntryGeometry(
        num_layers=LAYERS, num_page_bytes=37440 + 8640, entries=64, entry_tokens=4, index_bytes=PAGE_BYTES,
        key_layers=1, key_offset=37440,
    )  # fmt: skip
    config, length = settings(indexer=indexer), 18 * PAGE_TOKENS + 700
    engine = DeepseekV4DeviceEngine(config, geometry, LAYERS * 14, REQUESTS, length, LENGTH, HEADS, DEVICE)
    engine.attach(BLOCKS, [torch.zeros(BLOCKS, PAGE_BYTES, dtype=torch.uint8, device=DEVICE), None])
    assert engine.store is not None
    generator = torch.Generator().manual_seed(1)
    # Finite and above 0, as codes and as scales.
    engine.store.pages.copy_(torch.randint(1, 56, engine.store.pages.shape, generator=generator, dtype=torch.uint8))
    blocks = torch.randperm(BLOCKS, generator=generator)[: geometry.chunks(length + 1)]
    new, later = NewRequest("one", blocks.tolist(), 0, length), RequestUpdate("one", [], length, False)
    engine.open_step(StepUpdate(new=[new], num_scheduled={"one": length}))
    engine.plan([("one", length)])
    engine.open_step(StepUpdate(cached=[later], num_scheduled={"one": 1}))
    engine.plan([("one", 1)])
    keys, table = engine.decode_keys(1, 1)
    assert keys.shape[1:] == (64, 132) and table.dtype == torch.int32 and len(table) == 1
    pages = -(-int(engine.tables.entries[0]) // 64)
    named, shown = table[0, :pages].long(), engine.tables.table[0, :pages].cpu().long()
    # The page that is being written is repeated later, by the step's own kernels.
    found = keys[named.to(keys.device)][:-1].cpu().flatten(1)
    assert torch.equal(found, engine.layer_pages(1)[shown, 37440 : 37440 + PAGE_BYTES][:-1])
    assert (pages == len(blocks)) == (indexer == "exact") and torch.isin(shown, blocks).all()
