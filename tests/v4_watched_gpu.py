"""`python -m tests.v4_watched_gpu SPEC OUT`: run a small DeepSeek-V4 on a GPU and look at c4 layers' attention.

SPEC and OUT as in `tests.v4_watched`, with fewer results: {"tokens", "chosen", "preemptions", "counts", "pinned",
"oracle": rows compared with the oracle, "from_store": rows whose attention was repeated out of the store, "held":
[resident pages, all of them] of each row and step, "steps": of each selection, the decode steps since a period began,
"selected": selections compared with the twin of the memory indexer, "missing": with indexer="exact" [entries that rows
chose and had no slot for, pages that these were on, kept pages without a slot]}. Layers are watched outside CUDA
graphs; with them "pages" are instead: those of which the pool holds what the store does, after a step, and "missing" is
of the last layer.

With LSA, each row of one token is checked after each layer: the entries chosen are the best that its set has (all of
its history, if it is exact), they hold in the pool what the store holds, staged entries included, and the result is
that of `tests.v4.oracle`. A memory indexer's scores, from fp8
queries, are near those of a float64 twin, and its pages are what the rule makes of them.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
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
from tests.v4.pages import state_bytes
from tests.v4.scorer_twin import Scorers, best_pages
from vllm_lsa.plugin.runtime import Runtime
from vllm_lsa.residency.requests import StepUpdate

ROWS = 2
"""Rows of a step whose attention is compared with the oracle, in float64 on the host."""
MOST_APART, MEAN_APART = 0.1, 0.015
"""How far scores in [0, 1] from queries in fp8 may be from float64's."""


class Watch:
    """Collects what the calls showed."""

    def __init__(self) -> None:
        self.chosen: set[str] = set()
        self.oracle = 0
        self.from_store = 0
        self.pages = 0
        self.missing = [0, 0]
        self.held: list[list[int]] = []
        self.steps: list[int] = []
        self.selected = 0
        self.hidden: dict[str, dict[int, torch.Tensor]] = {}
        self.queries: tuple[Any, Any] = (None, None)

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
            full = (slots >= 0) & (torch.arange(pages, device=slots.device) < count // size)
            assert torch.equal(engine.pool_pages()[slots[full]].cpu(), store[blocks[full.cpu()]])
            chosen = attention.topk_indices_buffer[row].cpu().long()
            chosen = chosen[chosen >= 0]
            assert len(chosen.unique()) == min(TOP_K, count), (len(chosen.unique()), count)
            assert not len(chosen) or int(chosen.max()) < count
            self.check_choice(engine, layer, plan, row, blocks.numpy(), count, chosen.numpy())
            if layer == 0:
                request = plan.rows[row].request
                self.held.append([int((slots >= 0).sum()), -(-engine.geometry.num_entries(request.length) // size)])
            check_entries(engine, layer, row, blocks, attention.topk_indices_buffer)
            if row < ROWS:
                states = oracle.states(store, size, (blocks[chosen // size] * size + chosen % size).numpy())
                want = self.attended(attention, row, q, positions, states)
                got = output[row, : want.shape[0]].double().cpu().numpy()
                assert np.abs(got - want).max() <= 2**-6 * np.abs(want).max()
                self.oracle += 1

    def count_missing(self, engine: Any, layer: int, rows: list[int], chosen: torch.Tensor) -> None:
        """With everything chosen from: what of it had no slot."""
        for row in rows:
            page = chosen[row][chosen[row] >= 0].long() // engine.geometry.entries
            page = page[engine.tables.slots[layer, row, page] < 0]
            self.missing[0] += len(page)
            self.missing[1] += len(page.unique())

    def check_choice(
        self, engine: Any, layer: int, plan: Any, row: int, blocks: np.ndarray, count: int, chosen: np.ndarray
    ) -> None:
        if count <= TOP_K:
            return
        here = torch.from_numpy(blocks).to(engine._keys[layer].device)
        keys = oracle.index_keys(engine._keys[layer][here].cpu(), np.arange(len(blocks)), count)
        q, w = (each[plan.rows[row].start].cpu() for each in self.queries)
        if engine.scorer is None:
            place = int(plan.last_row[row])
            assert torch.equal(engine.queries.queries[place, layer].view(torch.uint8).cpu(), q.view(torch.uint8))
            assert torch.equal(engine.queries.weights[place, layer].cpu(), w.float())
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

    def selecting(self, engine: Any, scorers: Scorers | None) -> None:
        """Note when selections are made or begun, and check those of a memory indexer."""
        lookahead, config = engine.lookahead, engine.config
        stock, stock_begin = lookahead._select, lookahead._begin

        def noted(request: Any, row: int, num_chunks: int, budget: np.ndarray, cycle: int) -> Callable[..., np.ndarray]:
            """What looks at the mask that is selected from the scores of now."""
            self.steps.append((request.num_computed - request.num_prompt) % config.period)
            if scorers is None:
                return lambda mask: mask
            scores = self.checked_scores(engine, scorers, request, row, cycle)
            threshold = config.threshold
            if "threshold" not in config.model_fields_set:
                threshold = scorers.threshold(config.budget)
            kept = best_pages(
                scores, int(budget[0]) + -(-len(scores) // 64) - num_chunks, threshold,
                config.recency_tokens // 4, config.sink_tokens // 4,
            )  # fmt: skip

            def checked(mask: np.ndarray) -> np.ndarray:
                assert (mask == np.array(kept[:num_chunks])).all()
                self.selected += 1
                return mask

            return checked

        def select(*args: Any) -> np.ndarray:
            return noted(*args[:5])(stock(*args))

        def begin(*args: Any) -> Callable[[], np.ndarray]:
            checked, read = noted(*args[:5]), stock_begin(*args)
            return lambda: checked(read())

        lookahead._select = select
        if stock_begin is not None:
            lookahead._begin = begin

    def checked_scores(self, engine: Any, scorers: Scorers, request: Any, row: int, cycle: int) -> list[float]:
        """The memory indexer's scores of a request's entries, compared with the twin's."""
        entries, noted = request.num_computed // 4, engine.hidden.of(row)
        for layer, hidden in noted.items():
            # Outside graphs the layers have been seen themselves.
            assert not self.hidden or torch.equal(hidden[0], self.hidden[request.id][layer])
        blocks = torch.from_numpy(request.blocks.astype(np.int64))
        keys = {}
        for layer in scorers.layers:
            cache = engine._keys[layer]
            keys[layer] = oracle.index_keys(cache[blocks.to(cache.device)].cpu(), np.arange(len(blocks)), entries)
        inputs = {layer: hidden[0].double().cpu().numpy() for layer, hidden in noted.items()}
        want = scorers.scores(inputs, request.num_computed - 1, keys, engine.config.mode)
        got: torch.Tensor = engine._scores(request, row, entries, cycle)[0].cpu()
        apart = np.abs(got.double().numpy() - want)
        assert apart.max() <= MOST_APART and apart.mean() <= MEAN_APART, (apart.max(), apart.mean())
        return got.tolist()


def check_entries(engine: Any, layer: int, row: int, blocks: torch.Tensor, chosen: torch.Tensor) -> None:
    """Attention of a row has read in the pool, and in its staging pages, what the store holds, bit for bit.

    blocks: int64 [W]. chosen: int32 [n, 512] of all rows. With indexer="exact" the last layer that ran is meant.
    """
    size, here = engine.geometry.entries, chosen[row] >= 0
    where = chosen if engine.exact is None else engine._places
    at, named = where[row][here].long(), chosen[row][here].cpu().long()
    assert (at >= 0).all() and (engine.exact is None or (where[row][~here] == -1).all())
    slots = engine.tables.slots[layer, row, at // size].long()
    assert (slots >= 0).all()
    read = state_bytes(engine.pool_pages(), size, slots, at % size).cpu()
    assert torch.equal(read, state_bytes(engine.layer_pages(layer), size, blocks[named // size], named % size))


def watch_inputs(seen: Watch) -> None:
    """Keep what each c4 layer's indexer is given, and the attention input of each request's last token."""
    from vllm_lsa.models.deepseek_v4.cuda_hooks import LsaAttention

    stock = LsaAttention._sparse_indexer_and_attn

    def _sparse_indexer_and_attn(
        self: Any, hidden_states: torch.Tensor, q: Any, scale: Any, w: Any, *args: Any
    ) -> None:
        metadata = get_forward_context().attn_metadata
        plan = self._runtime.index_metadata(metadata).plan if isinstance(metadata, dict) else None
        seen.queries = (q, w)
        for row in plan.rows if plan is not None else ():
            of_request = seen.hidden.setdefault(row.request.id, {})
            of_request[self._layer] = hidden_states[row.start + row.length - 1].float()
        stock(self, hidden_states, q, scale, w, *args)

    LsaAttention._sparse_indexer_and_attn = _sparse_indexer_and_attn


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
            if self._engine.exact is not None:
                seen.count_missing(self._engine, self._layer, plan.pool_rows, self.topk_indices_buffer)
            calls += 1
            if calls % every == 0 or self._layer == 0:
                seen.check(self, plan, q, positions, output)

    DeepseekV4FlashMLAAttention.forward_mqa = forward_mqa


def watch_pages(runtime: Any, seen: Watch) -> None:
    """Before each plan: what the step before has left in the pool is what it left in the store, in graphs as well. With
    indexer="exact" also what its last c4 layer read."""
    engine, last_layer = runtime.engine, runtime._attentions[-1]
    stock, last = engine.plan, []

    def plan(rows: Any) -> Any:
        torch.cuda.synchronize()
        for made in last:
            for layer in range(engine.geometry.num_layers):
                for row in made.pool_rows:
                    pages = -(-int(made.entries[row]) // engine.geometry.entries)
                    here = made.slots[layer, row, :pages] >= 0
                    slots = made.slots[layer, row, :pages][here].to(engine.pool.pages.device)
                    blocks = made.table[row, :pages][here].long()
                    assert torch.equal(engine.pool_pages()[slots].cpu(), engine.layer_pages(layer)[blocks])
                    seen.pages += len(slots)
            if engine.exact is not None and made.pool_rows:
                chosen = last_layer.topk_indices_buffer
                for row in made.pool_rows:
                    check_entries(engine, last_layer._layer, row, made.table[row].long(), chosen)
                seen.count_missing(engine, last_layer._layer, made.pool_rows, chosen)
        last[:] = [stock(rows)]
        return last[0]

    engine.plan = plan


def main() -> None:
    spec = json.load(open(sys.argv[1]))
    llm = LLM(**{"disable_log_stats": False, **spec["llm"]})
    settings = spec["llm"].get("additional_config", {}).get("lsa")
    seen, eager = Watch(), spec["llm"].get("enforce_eager", True)
    if eager:
        watch(seen, spec.get("every", 1))
    if settings is not None:
        engine, indexer = Runtime.latest().engine, Path(settings.get("indexer", ""))
        scorers = Scorers(indexer, Path(spec["llm"]["model"])) if indexer.is_absolute() else None
        seen.selecting(engine, scorers)
        if not eager:
            watch_pages(Runtime.latest(), seen)
        else:
            watch_inputs(seen)
    tokens = [run_batch(llm, {"name": f"batch-{n}", **batch}) for n, batch in enumerate(spec["batches"])]
    metrics = {metric.name: metric for metric in llm.llm_engine.get_metrics()}
    result: dict[str, Any] = {"tokens": tokens, "chosen": sorted(seen.chosen), "held": seen.held}
    result |= {"oracle": seen.oracle, "from_store": seen.from_store, "pages": seen.pages}
    result |= {"steps": seen.steps, "selected": seen.selected, "missing": seen.missing}
    result |= {"preemptions": int(metrics["vllm:num_preemptions"].value)}
    if settings is not None:
        engine = Runtime.latest().engine
        engine.open_step(StepUpdate(finished=list(engine.mirror.requests)))
        torch.cuda.synchronize()
        engine.counted()  # asks the device for what it has counted
        torch.cuda.synchronize()
        result["missing"].append(engine.lookahead.counts.chunks_missed)
        result |= {"counts": engine.counted(), "pinned": engine.pool.num_pinned}
    json.dump(result, open(sys.argv[2], "w"))


if __name__ == "__main__":
    main()
