"""`python -m tests.v4_watched_gpu SPEC OUT`: run a small DeepSeek-V4 on a GPU and look at c4 layers' attention.

SPEC and OUT as in `tests.v4_watched`, with fewer results: {"tokens", "chosen", "preemptions", "counts", "pinned",
"oracle": rows compared with the oracle, "from_store": rows whose attention was repeated out of the store, "held":
[resident pages, all of them] of each row and step}. What is watched
runs outside CUDA graphs; with them only "pages" are: those of which the pool holds what the store does, after a step.

With LSA, each row of one token is checked after each layer: the entries chosen are the best that its set has, they hold
in the pool what the store holds, and the result is that of `tests.v4.oracle`.
"""

import hashlib
import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm import LLM
from vllm.forward_context import get_forward_context
from vllm.models.deepseek_v4.nvidia.flashmla import DeepseekV4FlashMLAAttention

from tests.generate import run_batch
from tests.v4 import oracle
from tests.v4.attention import TOP_K
from vllm_lsa.plugin.runtime import Runtime
from vllm_lsa.residency.requests import StepUpdate

ROWS = 2
"""Rows of a step whose attention is compared with the oracle, in float64 on the host."""


class Watch:
    """Collects what the calls showed."""

    def __init__(self) -> None:
        self.chosen: set[str] = set()
        self.oracle = 0
        self.from_store = 0
        self.pages = 0
        self.held: list[list[int]] = []

    def note(self, attention: Any, positions: torch.Tensor) -> None:
        chosen = attention.topk_indices_buffer[: len(positions)].sort(dim=1).values.cpu().numpy()
        for row, position in zip(chosen, positions.tolist(), strict=True):
            name = hashlib.sha256(row.tobytes()).hexdigest()[:10]
            self.chosen.add(f"{attention.prefix.split('.')[2]}:{position}:{name}")

    def check(self, attention: Any, plan: Any, q: torch.Tensor, positions: torch.Tensor, output: torch.Tensor) -> None:
        """Of a layer, after its attention."""
        engine, layer = attention._engine, attention._layer
        size, tables = engine.geometry.entries, engine.tables
        torch.cuda.synchronize()
        store = engine.layer_pages(layer)
        for row in plan.pool_rows:
            count = int(tables.entries[row])
            pages = -(-count // size)
            blocks, slots = tables.table[row, :pages].cpu().long(), tables.slots[layer, row, :pages].long()
            pool = engine.pool.pages.view(len(engine.pool.pages), -1)[slots].cpu()
            full = count // size
            assert torch.equal(pool[:full], store[blocks[:full]])
            chosen = attention.topk_indices_buffer[row].cpu().long()
            chosen = chosen[chosen >= 0]
            assert len(chosen.unique()) == min(TOP_K, count), (len(chosen.unique()), count)
            assert not len(chosen) or int(chosen.max()) < count
            self.check_choice(engine, layer, plan, row, blocks.numpy(), count, chosen.numpy())
            if layer == 0:
                request = plan.rows[row].request
                self.held.append([pages, -(-engine.geometry.num_entries(request.length) // size)])
            if row < ROWS:
                page, entry = chosen // size, chosen % size
                states = oracle.states(store, size, (blocks[page] * size + entry).numpy())
                again = oracle.states(pool, size, (page * size + entry).numpy())
                assert np.array_equal(states, again)
                want = self.attended(attention, row, q, positions, states)
                got = output[row, : want.shape[0]].double().cpu().numpy()
                assert np.abs(got - want).max() <= 2**-6 * np.abs(want).max()
                self.oracle += 1

    def check_choice(
        self, engine: Any, layer: int, plan: Any, row: int, blocks: np.ndarray, count: int, chosen: np.ndarray
    ) -> None:
        if count <= TOP_K:
            return
        here = torch.from_numpy(blocks).to(engine._keys[layer].device)
        keys = oracle.index_keys(engine._keys[layer][here].cpu(), np.arange(len(blocks)), count)
        place = int(plan.last_row[row])
        q, w = engine.queries.queries[place, layer].cpu(), engine.queries.weights[place, layer].cpu()
        found = oracle.logits(q, w, keys)
        others = np.ones(count, bool)
        others[chosen] = False
        # Tensor cores of Hopper sum products of e4m3 with fewer bits than fp32 has.
        assert found[chosen].min() >= found[others].max() - 5e-3 * np.abs(found).max()

    def attended(
        self, attention: Any, row: int, q: torch.Tensor, positions: torch.Tensor, states: np.ndarray
    ) -> np.ndarray:
        swa = get_forward_context().attn_metadata[attention.swa_cache_layer.prefix]
        cache = attention.swa_cache_layer.kv_cache
        size = swa.block_size
        position = int(positions[row])
        window = np.arange(max(0, position - attention.window_size + 1), position + 1)
        table = swa.block_table[int(swa.token_to_req_indices[row])]
        first = int(window[0]) // size
        mine = table[first : position // size + 1].long()
        pages = cache.as_strided((len(cache), cache.stride(0)), (cache.stride(0), 1))[mine].cpu()
        every = np.concatenate([oracle.states(pages, size, window - first * size), states])
        heads = attention.n_local_heads
        return oracle.attend(q[row, :heads].cpu(), attention.attn_sink[:heads].cpu(), attention.scale, every)


def watch(seen: Watch, every: int) -> None:
    """Wrap the attention of all layers. every: of how many calls one is checked."""
    stock = DeepseekV4FlashMLAAttention.forward_mqa
    attend = DeepseekV4FlashMLAAttention._forward_decode
    calls = 0

    def from_store(attention: Any, q: torch.Tensor, output: torch.Tensor, metadata: dict[str, Any]) -> None:
        """The same entries, read by the same kernel out of the host store: bit for bit the same result."""
        swa, engine = metadata[attention.swa_cache_layer.prefix], attention._engine
        again = torch.full_like(output[: swa.num_decode_tokens], torch.nan)
        blocks = SimpleNamespace(block_table=engine.tables.table, block_size=engine.geometry.block_tokens)
        arguments = {"swa_metadata": swa, "attn_metadata": blocks, "swa_only": False, "output": again}
        attend(attention, q=q[: len(again)], kv_cache=attention.kv_cache, **arguments)
        assert torch.equal(again, output[: len(again)])
        seen.from_store += len(again)

    def forward_mqa(self: Any, q: Any, kv: Any, positions: Any, output: Any) -> None:
        nonlocal calls
        stock(self, q, kv, positions, output)
        metadata = get_forward_context().attn_metadata
        if self.compress_ratio != 4 or not isinstance(metadata, dict):
            return
        seen.note(self, positions)
        plan = getattr(metadata[self.indexer.k_cache.prefix], "plan", None)
        if plan is not None and plan.pool_rows:
            from_store(self, q, output, metadata)
            calls += 1
            if calls % every == 0 or self._layer == 0:
                seen.check(self, plan, q, positions, output)

    DeepseekV4FlashMLAAttention.forward_mqa = forward_mqa


def watch_pages(engine: Any, seen: Watch) -> None:
    """Before each plan: what the step before has left in the pool is what it left in the store, in graphs as well."""
    stock, last = engine.plan, []

    def plan(rows: Any) -> Any:
        torch.cuda.synchronize()
        for made in last:
            for layer in range(engine.geometry.num_layers):
                for row in made.pool_rows:
                    pages = -(-int(made.entries[row]) // engine.geometry.entries)
                    slots = made.slots[layer, row, :pages].to(engine.pool.pages.device)
                    blocks = made.table[row, :pages].long()
                    assert torch.equal(engine.pool_pages()[slots].cpu(), engine.layer_pages(layer)[blocks])
                    seen.pages += pages
        last[:] = [stock(rows)]
        return last[0]

    engine.plan = plan


def main() -> None:
    spec = json.load(open(sys.argv[1]))
    llm = LLM(**{"disable_log_stats": False, **spec["llm"]})
    settings = spec["llm"].get("additional_config", {}).get("lsa")
    seen = Watch()
    if spec["llm"].get("enforce_eager", True):
        watch(seen, spec.get("every", 1))
    elif settings is not None:
        watch_pages(Runtime.latest().engine, seen)
    tokens = [run_batch(llm, {"name": f"batch-{n}", **batch}) for n, batch in enumerate(spec["batches"])]
    metrics = {metric.name: metric for metric in llm.llm_engine.get_metrics()}
    result: dict[str, Any] = {"tokens": tokens, "chosen": sorted(seen.chosen), "held": seen.held}
    result |= {"oracle": seen.oracle, "from_store": seen.from_store, "pages": seen.pages}
    result |= {"preemptions": int(metrics["vllm:num_preemptions"].value)}
    if settings is not None:
        engine = Runtime.latest().engine
        engine.open_step(StepUpdate(finished=list(engine.mirror.requests)))
        result |= {"counts": engine.counted(), "pinned": engine.pool.num_pinned}
    json.dump(result, open(sys.argv[2], "w"))


if __name__ == "__main__":
    main()
