"""What vLLM's own scheduler makes of a batch of tests/test_v4_gpu.py, and the engine of a CUDA device of that: without
a GPU, where Triton's interpreter runs the kernels."""

from collections import Counter
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
from tests.amx import without_amx  # noqa: E402
from tests.kernels import DEVICE, load  # noqa: E402
from tests.test_v4_gpu import AHEAD, FEW_BLOCKS, GROWING, LAYERS, PAGE  # noqa: E402
from tests.v4 import model, planned  # noqa: E402
from vllm_lsa.config import GIB, LsaConfig  # noqa: E402
from vllm_lsa.models.deepseek_v4.device_engine import DeepseekV4DeviceEngine  # noqa: E402
from vllm_lsa.models.deepseek_v4.geometry import EntryGeometry  # noqa: E402
from vllm_lsa.models.deepseek_v4.settings import for_deepseek_v4  # noqa: E402
from vllm_lsa.models.deepseek_v4.specs import lsa_specs  # noqa: E402
from vllm_lsa.ops.index_logits import KEY, PAGE_BYTES  # noqa: E402
from vllm_lsa.plugin.scheduler_output import step_update  # noqa: E402
from vllm_lsa.residency.requests import StepUpdate  # noqa: E402

for _name in ("pages", "index_logits"):
    load(_name)

HEADS, LONG = 4, "0"
GEOMETRY = EntryGeometry(num_layers=LAYERS, num_page_bytes=PAGE, entries=64, entry_tokens=4, index_bytes=PAGE_BYTES)


class Engine:
    """An engine of random pages, told of vLLM's steps."""

    def __init__(self, settings: dict[str, Any], blocks: int, group: int) -> None:
        config, requests = for_deepseek_v4(LsaConfig(**settings)), int(FEW_BLOCKS["max_num_seqs"])
        self.generator, self.group = torch.Generator().manual_seed(3), group
        slots = int(config.device_pool_gib * GIB) // PAGE
        self.lsa = DeepseekV4DeviceEngine(
            config, GEOMETRY, slots, requests, FEW_BLOCKS["chunk"], FEW_BLOCKS["max_model_len"], HEADS, DEVICE
        )
        keys = torch.zeros(LAYERS, blocks, PAGE_BYTES, dtype=torch.uint8)
        codes = torch.randn(LAYERS, blocks, 64 * KEY, generator=self.generator).to(torch.float8_e4m3fn)
        keys[..., : 64 * KEY] = codes.view(torch.uint8)
        keys[..., 64 * KEY :] = torch.ones(LAYERS, blocks, 64).view(torch.uint8)
        self.lsa.attach(blocks, list(keys.to(DEVICE)))
        assert self.lsa.store is not None
        pages = self.lsa.store.pages
        pages.copy_(torch.randint(0, 256, pages.shape, generator=self.generator, dtype=torch.uint8))
        self.sparse = 0

    def step(self, output: Any) -> None:
        """One of vLLM's; the pool then has what the store has."""
        self.lsa.open_step(step_update(output, self.group))
        # vLLM has rows of one token first.
        rows = sorted(output.num_scheduled_tokens.items(), key=lambda row: row[1] > 1)
        if rows:
            self.forward(self.lsa.plan(rows))
        self.lsa.close_step()

    def forward(self, plan: Any) -> None:
        tokens, rows = sum(row.length for row in plan.rows), len(plan.rows)
        for layer in range(LAYERS):
            q = torch.randn(tokens, HEADS, KEY, generator=self.generator).to(torch.float8_e4m3fn).to(DEVICE)
            w = torch.randn(tokens, HEADS, generator=self.generator).to(DEVICE)
            self.lsa.write_through_on_device(layer, len(plan.written_pages))
            self.lsa.note_on_device(layer, rows, torch.zeros(tokens, 8, device=DEVICE), q, w)
        tables = self.lsa.tables
        for row in plan.pool_rows:
            count = int(tables.entries[row])
            pages = -(-count // 64)
            blocks = tables.table[row, :pages].cpu().long()
            self.sparse += count < plan.rows[row].request.length // 4
            for layer in range(LAYERS):
                slots = tables.slots[layer, row, :pages].long()
                assert torch.equal(self.lsa.pool_pages()[slots].cpu(), self.lsa.layer_pages(layer)[blocks])


@without_amx
def test_a_request_whose_sets_are_chosen_ahead_is_preempted_and_comes_back(tmp_path, monkeypatch):
    limits = {name: FEW_BLOCKS[name] for name in ("max_model_len", "max_num_seqs")}
    config = planned.gpu_config(
        tmp_path, model.CONFIG, chunk=FEW_BLOCKS["chunk"], policy=FEW_BLOCKS["scheduling_policy"], **limits
    )
    monkeypatch.setattr(config.scheduler_config, "async_scheduling", True)
    made = planned.plan(config, lsa_specs(planned.stock_specs(config)), FEW_BLOCKS["kv_cache_memory_bytes"])
    (group,) = (i for i, each in enumerate(made.kv_cache_groups) if "indexer.k_cache" in each.layer_names[0])
    engine = Engine(AHEAD, made.num_blocks, group)
    lookahead, prompt = engine.lsa.lookahead, len(GROWING["prompts"][0])
    chosen: list[tuple[str, int]] = []
    for name in ("_select", "_begin"):
        stock = getattr(lookahead, name, None)
        if stock is not None:

            def noted(request, *args, stock=stock):
                chosen.append((request.id, request.num_computed - prompt))
                return stock(request, *args)

            monkeypatch.setattr(lookahead, name, noted)
    preempted, tokens, on_budget = Counter(), Counter(), []
    for output in planned.scheduled(config, made, GROWING):
        if LONG in (output.preempted_req_ids or ()):
            request = engine.lsa.mirror.requests[LONG]
            # A set for the next cycle is on the way, into slots that others would soon get.
            assert lookahead._states[request].pending is not None
        preempted.update(output.preempted_req_ids or ())
        tokens.update(output.num_scheduled_tokens)
        engine.step(output)
        if output.num_scheduled_tokens.get(LONG) == 1:
            on_budget.append(lookahead.caps(engine.lsa.mirror.requests[LONG]) is not None)
    assert preempted[LONG] == 1 and len(tokens) == 11
    # Each was read to its end, the last sampled token but one, and what was preempted once more.
    again = {name for name in tokens if preempted[name]}
    for name, prompt_tokens in ((str(i), len(tokens)) for i, tokens in enumerate(GROWING["prompts"])):
        assert (tokens[name] > prompt_tokens + GROWING["max_tokens"] - 1) == (name in again)
    # Begun beside the fifth of the others; then ahead of two cycles.
    assert {name for name, _ in chosen} == {LONG}
    assert [step % 16 for _, step in chosen[-2:]] == [11, 11] and len(chosen) >= 3
    assert on_budget.index(True) > 25 and engine.sparse > 25 and not on_budget[-1]
    engine.lsa.open_step(StepUpdate(finished=list(engine.lsa.mirror.requests)))
    assert engine.lsa.pool.num_pinned == 0
