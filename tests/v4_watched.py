"""`python -m tests.v4_watched SPEC OUT`: run a small DeepSeek-V4 and look at every c4 layer's attention on the way.

SPEC: {"llm": arguments of LLM, "batches": [{"prompts": [token ids, …], "max_tokens"}, …]}. OUT: {"tokens": [[…], …],
"chosen": a checksum of the top-k of each call, "reads": calls that read the pool alone, "held": for each row and step
[resident pages with entries, all of them], "sets": the sets of the first request one after the other, "counts": of the
engine, "pinned": slots still in use when all requests have left}.

With LSA, a call that reads the pool is checked: entries in the pool are those of the store, byte for byte, the top-k
stays in the set, nothing better in the set was left out, and where no row reads the store, the layer's pages there are
poison while attention runs.
"""

import hashlib
import json
import sys
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.models.deepseek_v4.cpu.cpu_sparse import DeepseekV4CPUAttention

from tests.v4.attention import TOP_K
from tests.v4.pages import DATA_BYTES, SCALE_BYTES, Pages
from vllm_lsa.models.deepseek_v4.scorer import paged_logits
from vllm_lsa.plugin.runtime import Runtime
from vllm_lsa.residency.requests import StepUpdate

POISON = 0xFF


class Watch:
    """Collects what the calls showed."""

    def __init__(self) -> None:
        self.chosen: list[str] = []
        self.reads = 0
        self.held: list[list[int]] = []
        self.sets: list[list[int]] = []

    def note(self, attention: Any, tokens: int) -> None:
        chosen = attention.topk_indices_buffer[:tokens].sort(dim=1).values
        self.chosen.append(hashlib.sha256(chosen.contiguous().numpy().tobytes()).hexdigest()[:12])

    def check(self, attention: Any, plan: Any) -> None:
        """The rows of a c4 layer that read the pool."""
        engine, layer = attention._engine, attention._layer
        pool = engine.pool.pages.view(len(engine.pool.pages), -1)
        store = engine.layer_pages(layer)
        for row in plan.pool_rows:
            count = int(plan.entries[row])
            places = torch.arange(count)
            page, entry = places // engine.geometry.entries, places % engine.geometry.entries
            blocks, slots = plan.table[row].long()[page], plan.slots[layer, row][page]
            assert (slots >= 0).all()
            assert torch.equal(_entries(pool, slots, entry), _entries(store, blocks, entry))

            chosen = attention.topk_indices_buffer[plan.rows[row].start]
            chosen = chosen[chosen >= 0].long()
            assert len(chosen.unique()) == min(TOP_K, count)
            assert chosen.max() < count
            if count > TOP_K:
                self._check_choice(attention, plan, row, chosen)
            if layer == 0:
                # Pages with entries: the newest may have none yet.
                whole = -(-engine.geometry.num_entries(plan.rows[row].request.length) // engine.geometry.entries)
                self.held.append([len(set(blocks.tolist())), whole])
                if plan.rows[row].request is engine.watched:
                    held = sorted(set(blocks.tolist()))
                    if not self.sets or self.sets[-1] != held:
                        self.sets.append(held)
        self.reads += bool(plan.pool_rows and not plan.host_rows)

    def _check_choice(self, attention: Any, plan: Any, row: int, chosen: torch.Tensor) -> None:
        engine, layer = attention._engine, attention._layer
        count, place = int(plan.entries[row]), int(plan.last_row[row])
        blocks = plan.table[row][: -(-count // engine.geometry.entries)].long()
        query, weights = engine.queries.queries[place, layer][None], engine.queries.weights[place, layer][None]
        logits = paged_logits(query, weights, engine._keys[layer], blocks[None], torch.tensor([count]), count)[0]
        others = torch.ones(count, dtype=torch.bool)
        others[chosen] = False
        assert logits[chosen].min() >= logits[others].max() - 1e-3 * logits.abs().max()


def _entries(pages: torch.Tensor, page: torch.Tensor, entry: torch.Tensor) -> torch.Tensor:
    """Bytes of entries [n, 584] of pages uint8 [M, bytes] in any stride."""
    view = Pages.of(pages, 64, DATA_BYTES, SCALE_BYTES)
    return torch.cat([view.data[page, entry], view.scales[page, entry]], dim=1)


def watch(kind: type, seen: Watch) -> None:
    """Wrap the attention of a class of layers."""
    stock = kind.forward_mqa

    def forward_mqa(self: Any, q: Any, kv: Any, positions: Any, output: Any) -> None:
        if self.compress_ratio != 4:
            return stock(self, q, kv, positions, output)
        seen.note(self, len(q))
        plan = self._plan() if hasattr(self, "_plan") else None
        if plan is None:
            return stock(self, q, kv, positions, output)
        engine = self._engine
        engine.watched = getattr(engine, "watched", None) or plan.rows[0].request
        seen.check(self, plan)
        if plan.host_rows:
            return stock(self, q, kv, positions, output)
        blocks = plan.table.long().unique()
        pages = engine.layer_pages(self._layer)
        kept = pages[blocks]
        pages[blocks] = POISON
        stock(self, q, kv, positions, output)
        pages[blocks] = kept
        assert output.isfinite().all()
        return None

    kind.forward_mqa = forward_mqa


def main() -> None:
    spec = json.load(open(sys.argv[1]))
    seen = Watch()
    llm = LLM(**spec["llm"])
    lsa = "additional_config" in spec["llm"]
    if lsa:
        from vllm_lsa.models.deepseek_v4.hooks import LsaAttention

        watch(LsaAttention, seen)
    else:
        watch(DeepseekV4CPUAttention, seen)
    tokens = []
    for batch in spec["batches"]:
        params = SamplingParams(temperature=0, max_tokens=batch["max_tokens"], ignore_eos=True, detokenize=False)
        answers = llm.generate([{"prompt_token_ids": p} for p in batch["prompts"]], params, use_tqdm=False)
        tokens.append([list(answer.outputs[0].token_ids) for answer in answers])
    result: dict[str, Any] = {"tokens": tokens, "chosen": seen.chosen, "reads": seen.reads, "held": seen.held}
    if lsa:
        engine = Runtime.latest().engine
        # The scheduler says who has finished at its next step, which there is none of.
        engine.open_step(StepUpdate(finished=list(engine.mirror.requests)))
        result |= {"sets": seen.sets, "counts": engine.counted(), "pinned": engine.pool.num_pinned}
    json.dump(result, open(sys.argv[2], "w"))


if __name__ == "__main__":
    main()
