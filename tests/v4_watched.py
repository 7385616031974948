"""`python -m tests.v4_watched SPEC OUT`: run a small DeepSeek-V4 and look at every c4 layer's attention on the way.

SPEC: {"llm": arguments of LLM, "batches": [scenarios of `tests.generate` without names, …]}. OUT: {"tokens": [[…], …],
"chosen": a checksum of each token's top-k in each layer, sorted, "preemptions", "reads": calls that read the pool
alone, "oracle": rows compared with the oracle, "held": for each row and step [resident pages with entries, all of
them], "sets": the first request's, one after the other, less those of all its pages, "selected": selections compared
with the twin of the memory indexer, "steps": of each selection, the decode steps since a period began, "counts" of the
engine, "pinned": slots still in use when all requests have left}.

With LSA, rows that read the pool are checked: what they read there are the bytes of the store, which are poison while
attention runs; the top-k is the best of what the set has; and the result is that of `tests.v4.oracle`.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import LLM
from vllm.forward_context import get_forward_context
from vllm.models.deepseek_v4.cpu.cpu_sparse import DeepseekV4CPUAttention

from tests.generate import run_batch
from tests.v4 import oracle
from tests.v4.attention import TOP_K
from tests.v4.pages import state_bytes
from tests.v4.scorer_twin import Scorers, best_pages
from vllm_lsa.plugin.runtime import Runtime
from vllm_lsa.residency.requests import StepUpdate

POISON = 0xFF


class Watch:
    """Collects what the calls showed."""

    def __init__(self) -> None:
        self.hidden: dict[str, dict[int, np.ndarray]] = {}
        self.chosen: set[str] = set()
        self.reads = 0
        self.oracle = 0
        self.selected = 0
        self.steps: list[int] = []
        self.held: list[list[int]] = []
        self.sets: list[list[int]] = []
        self.first: Any = None

    def note(self, attention: Any, positions: torch.Tensor) -> None:
        chosen = attention.topk_indices_buffer[: len(positions)].sort(dim=1).values
        for row, position in zip(chosen.numpy(), positions.tolist(), strict=True):
            name = hashlib.sha256(row.tobytes()).hexdigest()[:10]
            self.chosen.add(f"{attention.prefix.split('.')[2]}:{position}:{name}")

    def reading(self, attention: Any, plan: Any, read: Any, q: torch.Tensor, positions: torch.Tensor) -> Iterator[Any]:
        """Around attention of the tokens that read the pool. Yields what undoes the poison and compares the result."""
        engine, layer = attention._engine, attention._layer
        store, size = engine.layer_pages(layer), engine.geometry.entries
        expected = {}
        for token, row in zip(read.tokens.tolist(), read.rows.tolist(), strict=True):
            chosen = attention.topk_indices_buffer[token]
            chosen = chosen[chosen >= 0].long()
            page, entry = chosen // size, chosen % size
            blocks, slots = plan.table[row].long()[page], read.table[row][page]
            assert (slots >= 0).all()
            assert torch.equal(state_bytes(read.pages, size, slots, entry), state_bytes(store, size, blocks, entry))
            self._check_choice(attention, plan, row, chosen)
            states = oracle.states(store, size, (blocks * size + entry).numpy())
            expected[token] = self._attended(attention, token, q, positions, states)
            if layer == 0:
                self._note_set(engine, plan, row)
        blocks = plan.table[read.rows].long().unique()
        kept = store[blocks]
        store[blocks] = POISON
        output = yield
        store[blocks] = kept
        for token, want in expected.items():
            got = output[token].double().numpy()
            # The library's own attention rounds probabilities to bf16.
            assert np.abs(got - want).max() <= 2**-6 * np.abs(want).max()
        self.oracle += len(expected)
        yield

    def _attended(
        self, attention: Any, token: int, q: torch.Tensor, positions: torch.Tensor, states: np.ndarray
    ) -> np.ndarray:
        swa = get_forward_context().attn_metadata[attention.swa_cache_layer.prefix]
        cache = attention.swa_cache_layer.kv_cache.flatten(1)
        position = int(positions[token])
        window = np.arange(max(0, position - attention.window_size + 1), position + 1)
        table = swa.block_table[int(swa.token_to_req_indices[token])].numpy()
        slots = table[window // swa.block_size].astype(np.int64) * swa.block_size + window % swa.block_size
        every = np.concatenate([oracle.states(cache, swa.block_size, slots), states])
        return oracle.attend(q[token], attention.attn_sink, attention.scale, every)

    def _check_choice(self, attention: Any, plan: Any, row: int, chosen: torch.Tensor) -> None:
        """The top-k is the best of the entries that the row was shown."""
        engine, layer = attention._engine, attention._layer
        count, place = int(plan.entries[row]), int(plan.last_row[row])
        assert len(chosen.unique()) == min(TOP_K, count) and int(chosen.max()) < count
        if count <= TOP_K:
            return
        keys = oracle.index_keys(engine._keys[layer], plan.table[row].numpy(), count)
        found = oracle.logits(engine.queries.queries[place, layer], engine.queries.weights[place, layer], keys)
        others = np.ones(count, bool)
        others[chosen.numpy()] = False
        assert found[chosen.numpy()].min() >= found[others].max() - 1e-5 * np.abs(found).max()

    def _note_set(self, engine: Any, plan: Any, row: int) -> None:
        size, request = engine.geometry.entries, plan.rows[row].request
        slots = plan.slots[0, row, : -(-int(plan.entries[row]) // size)]
        held = sorted(plan.table[row, : len(slots)][slots >= 0].tolist())
        # Pages with entries: the newest may have none yet.
        whole = -(-engine.geometry.num_entries(request.length) // size)
        self.held.append([len(held), whole])
        self.first = self.first or request
        if request is self.first and len(held) < whole and self.sets[-1:] != [held]:
            self.sets.append(held)

    def selecting(self, engine: Any, scorers: Scorers | None) -> None:
        """Note when selections are made, and compare every one by a memory indexer with its float64 twin."""
        stock = engine.lookahead._select
        if scorers is not None:
            threshold = engine.config.threshold
            if "threshold" not in engine.config.model_fields_set:
                threshold = scorers.threshold(engine.config.budget)

        def select(request: Any, row: int, num_chunks: int, budget: np.ndarray, cycle: int, usage: Any) -> np.ndarray:
            mask: np.ndarray = stock(request, row, num_chunks, budget, cycle, usage)
            self.steps.append((request.num_computed - request.num_prompt) % engine.config.period)
            if scorers is None:
                return mask
            entries = request.num_computed // 4
            keys = {n: oracle.index_keys(engine._keys[n], request.blocks, entries) for n in scorers.layers}
            scores = scorers.scores(self.hidden[request.id], request.num_computed - 1, keys, engine.config.mode)
            kept = best_pages(
                scores.tolist(), int(budget[0]) + -(-entries // 64) - num_chunks, threshold,
                engine.config.recency_tokens // 4, engine.config.sink_tokens // 4,
            )  # fmt: skip
            assert (mask == np.array(kept[:num_chunks])).all()
            self.selected += 1
            return mask

        engine.lookahead._select = select


def watch(kind: type, seen: Watch) -> None:
    """Wrap the attention of a class of layers."""
    stock = kind.forward_mqa

    def forward_mqa(self: Any, q: Any, kv: Any, positions: Any, output: Any) -> None:
        if self.compress_ratio != 4:
            return stock(self, q, kv, positions, output)
        seen.note(self, positions)
        plan = self._plan() if hasattr(self, "_plan") else None
        if plan is None:
            return stock(self, q, kv, positions, output)
        engine = self._engine
        reads = type(engine).reads

        def watched(plan: Any, layer: int, chosen: torch.Tensor) -> Iterator[Any]:
            for read in reads(engine, plan, layer, chosen):
                if read.pages.data_ptr() != engine.pool.pages.data_ptr():
                    yield read
                    continue
                around = seen.reading(self, plan, read, q, positions)
                next(around)
                yield read
                around.send(output)

        engine.reads = watched
        stock(self, q, kv, positions, output)
        seen.reads += bool(plan.pool_rows and not plan.host_rows)
        assert output.isfinite().all()
        return None

    kind.forward_mqa = forward_mqa


def watch_hidden(kind: type, seen: Watch) -> None:
    """Keep the attention input of each request's last token, in each c4 layer."""
    stock = kind._sparse_indexer_and_attn

    def _sparse_indexer_and_attn(self: Any, hidden_states: torch.Tensor, *args: Any) -> None:
        plan = self._plan()
        for row in plan.rows if plan is not None else ():
            of_request = seen.hidden.setdefault(row.request.id, {})
            of_request[self._layer] = hidden_states[row.start + row.length - 1].double().numpy()
        stock(self, hidden_states, *args)

    kind._sparse_indexer_and_attn = _sparse_indexer_and_attn


def main() -> None:
    spec = json.load(open(sys.argv[1]))
    llm = LLM(**{"disable_log_stats": False, **spec["llm"]})
    settings = spec["llm"].get("additional_config", {}).get("lsa")
    seen = Watch()
    if settings is not None:
        from vllm_lsa.models.deepseek_v4.hooks import LsaAttention

        watch(LsaAttention, seen)
        indexer, scorers = Path(settings.get("indexer", "")), None
        if indexer.is_absolute():
            watch_hidden(LsaAttention, seen)
            scorers = Scorers(indexer, Path(spec["llm"]["model"]))
        seen.selecting(Runtime.latest().engine, scorers)
    else:
        watch(DeepseekV4CPUAttention, seen)
    tokens = [run_batch(llm, {"name": f"batch-{n}", **batch}) for n, batch in enumerate(spec["batches"])]
    metrics = {metric.name: metric for metric in llm.llm_engine.get_metrics()}
    result: dict[str, Any] = {"tokens": tokens, "chosen": sorted(seen.chosen), "reads": seen.reads, "held": seen.held}
    result |= {"preemptions": int(metrics["vllm:num_preemptions"].value)}
    if settings is not None:
        engine = Runtime.latest().engine
        # The scheduler says who has finished at its next step, which there is none of.
        engine.open_step(StepUpdate(finished=list(engine.mirror.requests)))
        result |= {"sets": seen.sets, "counts": engine.counted(), "pinned": engine.pool.num_pinned}
        result |= {"oracle": seen.oracle, "selected": seen.selected, "steps": seen.steps}
    json.dump(result, open(sys.argv[2], "w"))


if __name__ == "__main__":
    main()
