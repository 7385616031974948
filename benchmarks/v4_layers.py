"""The c4 layers of one decode step in `benchmarks.v4_stack`, over stock's memory or LSA's, and whether they are right.

A layer is index logits → top-k of 512 → the entries' places in a cache → sparse attention over them and the window.
"""

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.v4_caches import Memory, ResidentSets, fill_c4
from benchmarks.v4_kernels import HEAD_DIM, HEADS, WINDOW, Kernels, NaiveKernels
from benchmarks.v4_plan import C4_PAGE
from vllm_lsa.models.deepseek_v4.scorer import index_pages, quantize_query
from vllm_lsa.models.deepseek_v4.selection import TOP_K
from vllm_lsa.models.deepseek_v4.specs import C4_TOKENS, PAGE_ENTRIES
from vllm_lsa.ops.index_logits import KEY, index_logits, index_logits_naive

PARTS = ("logits", "topk", "attention")
LOGITS_WITHIN, ATTENTION_WITHIN = 5e-3, 1e-2
"""Largest error, relative to the largest value: tensor cores of Hopper sum products of e4m3 with fewer bits than fp32
has, and FlashMLA rounds probabilities and its result to bf16."""
ORDER_WITHIN = 1e-5
"""The same of logits of one entry that programs of different length have summed in different order."""


class Queries:
    """Random operands of a decode step of B requests in every layer, the sliding window's pages among them."""

    def __init__(self, rows: int, layers: int, device: torch.device) -> None:
        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(layers, rows, *shape, device=device)

        self.rows = rows
        self.index = [quantize_query(q, w) for q, w in zip(randn(HEADS, KEY), randn(HEADS) * HEADS**-0.5, strict=True)]
        self.q = randn(HEADS, HEAD_DIM).bfloat16()
        self.sink = torch.randn(layers, HEADS, device=device)
        per_row = WINDOW // PAGE_ENTRIES
        self.window = torch.zeros(layers, rows * per_row, C4_PAGE, dtype=torch.uint8, device=device)
        fill_c4(self.window)
        self.window_entries = torch.arange(rows * WINDOW, dtype=torch.int32, device=device).view(rows, WINDOW)
        self.window_lengths = torch.full((rows,), WINDOW, dtype=torch.int32, device=device)


@dataclass
class Side:
    """Stock or LSA: where a step reads. Of each layer keys uint8 [n, 8448 …] with key_tables int32 [B, W], and c4 pages
    uint8 [n, C4_PAGE]; table int32 [B, W or more] has the c4 page of each place. entries: of each row."""

    name: str
    keys: Sequence[torch.Tensor]
    key_tables: Sequence[torch.Tensor]
    pages: Sequence[torch.Tensor]
    table: torch.Tensor
    entries: int

    @classmethod
    def stock(cls, memory: Memory, table: torch.Tensor) -> "Side":
        keys, pages = memory.stock.keys, memory.stock.pages
        layers = range(memory.layers)
        return cls(
            "stock", [keys[:, i] for i in layers], [table] * memory.layers, [pages[:, i] for i in layers], table,
            table.shape[1] * PAGE_ENTRIES,
        )  # fmt: skip

    @classmethod
    def lsa(cls, memory: Memory, sets: ResidentSets, offloaded: bool) -> "Side":
        """offloaded: index keys of most layers are resident pages' alone."""
        layers = range(memory.layers)
        keys, tables = [memory.narrow.keys[:, i] for i in layers], [sets.table[:, : sets.width]] * memory.layers
        if offloaded:
            for i, layer in enumerate(memory.offloaded):
                keys[layer], tables[layer] = memory.keys.pool[:, i], sets.slots[:, : sets.width]
        return cls(
            "lsa-offloaded" if offloaded else "lsa", keys, tables, [memory.c4.pool[:, i] for i in layers], sets.slots,
            sets.width * PAGE_ENTRIES,
        )  # fmt: skip


class Step:
    """The c4 layers of one decode step on a side; nothing but the kernels allocates."""

    def __init__(self, side: Side, queries: Queries, kernels: Kernels) -> None:
        device, rows, layers = queries.q.device, queries.rows, len(side.keys)
        self.side, self.queries, self.kernels = side, queries, kernels
        self.lengths = torch.full((rows, 1), side.entries, dtype=torch.int32, device=device)
        self.logits = torch.full((rows, side.entries), torch.nan, device=device)
        self.chosen = torch.full((layers, rows, TOP_K), -1, dtype=torch.int32, device=device)
        self.out = torch.full((layers, rows, HEADS, HEAD_DIM), torch.nan, dtype=torch.bfloat16, device=device)

    def layer(self, i: int, plan: Any, parts: Collection[str] = PARTS) -> None:
        """parts: some leave out what others would have left in the buffers."""
        side, queries = self.side, self.queries
        if "logits" in parts:
            index_logits(
                *queries.index[i], index_pages(side.keys[i]), side.key_tables[i], self.lengths.squeeze(1), self.logits
            )
        if "topk" in parts:
            self.kernels.top_k(self.logits, self.lengths, self.chosen[i], side.entries * C4_TOKENS)
        if "attention" in parts:
            entries, counts = self.kernels.remap(self.chosen[i], side.table)
            self.kernels.attend(
                queries.q[i], queries.window[i], queries.window_entries, queries.window_lengths, side.pages[i], entries,
                counts, queries.sink[i], plan, self.out[i],
            )  # fmt: skip

    def run(self, parts: Collection[str] = PARTS) -> None:
        """All layers. FlashMLA makes its plan in the first of them, as in vLLM."""
        plan = self.kernels.plan()
        for i in range(len(self.side.keys)):
            self.layer(i, plan, parts)


def fail(what: str) -> None:
    sys.exit(f"check failed, so nothing is reported: {what}")


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference, relative to the largest value of want. NaN counts as infinite."""
    error = (got.float() - want.float()).abs().max() / want.float().abs().max()
    return float("inf") if error.isnan() else float(error)


def check_logits(step: Step, layer: int, pages: int = 16) -> float:
    """Logits of a layer's first and last pages against their twin; the error. Leaves the layer's logits in place."""
    side, queries = step.side, step.queries
    step.layer(layer, None, ("logits",))
    if not bool(step.logits.isfinite().all()):
        fail(f"{side.name}: logits of layer {layer} are not finite")
    worst, width = 0.0, side.entries // PAGE_ENTRIES
    for first in (0, max(0, width - pages)):
        table = side.key_tables[layer][:, first : min(width, first + pages)]
        want = torch.full((queries.rows, table.shape[1] * PAGE_ENTRIES), torch.nan, device=table.device)
        lengths = torch.full((queries.rows,), want.shape[1], device=table.device)
        index_logits_naive(*queries.index[layer], index_pages(side.keys[layer]), table, lengths, want)
        got = step.logits[:, first * PAGE_ENTRIES :][:, : want.shape[1]]
        worst = max(worst, *(relative(g, w) for g, w in zip(got, want, strict=True)))
    if worst > LOGITS_WITHIN:
        fail(f"{side.name}: index logits of layer {layer} are {worst:.2e} off their twin")
    return worst


def check_top_k(
    name: str, logits: torch.Tensor, chosen: torch.Tensor, places: torch.Tensor | None = None, within: float = 0.0
) -> None:
    """Whether chosen int32 [B, 512] are the highest of logits [B, N], those of equal height aside.

    places: int64 [B, n], entries of logits that chosen counts through. within: how far, relative to the highest logit,
    heights may differ and still count as equal.
    """
    chosen = chosen.long()
    if bool((chosen < 0).any()):
        fail(f"{name}: top-k left {int((chosen < 0).sum())} of {chosen.numel()} places empty")
    if places is not None:
        chosen = places.gather(1, chosen)
        allowed = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, places, True)
        logits = logits.masked_fill(~allowed, -torch.inf)
    chosen = chosen.sort(dim=1).values
    if bool((chosen[:, 1:] == chosen[:, :-1]).any()):
        fail(f"{name}: top-k chose an entry twice")
    got = logits.gather(1, chosen).sort(dim=1, descending=True).values
    want = logits.topk(TOP_K, dim=1).values
    bar = want[:, -1:]
    if bool(((got - want).abs() > within * want[:, :1].abs()).any()):
        fail(f"{name}: {int((got < bar).sum())} of {got.numel()} chosen entries are not among the {TOP_K} highest")


def check_attention(step: Step, layer: int, plan: Any, rows: int = 2) -> float:
    """Sparse attention of a layer after its top-k, against the reference in fp32; the error."""
    side, queries = step.side, step.queries
    step.layer(layer, plan, ("attention",))
    naive = NaiveKernels()
    entries, counts = naive.remap(step.chosen[layer][:rows], side.table[:rows])
    want = torch.full((min(rows, queries.rows), HEADS, HEAD_DIM), torch.nan, device=step.out.device)
    naive.attend(
        queries.q[layer][:rows], queries.window[layer], queries.window_entries[:rows], queries.window_lengths[:rows],
        side.pages[layer], entries, counts, queries.sink[layer], None, want,
    )  # fmt: skip
    error = relative(step.out[layer][:rows], want)
    if error > ATTENTION_WITHIN:
        fail(f"{side.name}: attention of layer {layer} is {error:.2e} off the reference")
    return error


def check(stock: Step, lsa: Sequence[Step], sets: ResidentSets, layers: Sequence[int]) -> dict[str, float]:
    """Every kernel on both sides, and that LSA's choice and result are stock's where stock is left the resident pages.

    Ends the program if not. Returns the largest errors.
    """
    errors = {"logits": 0.0, "attention": 0.0}
    device = stock.logits.device
    pages = torch.from_numpy(sets.pages).to(device)
    places = (pages.unsqueeze(2) * PAGE_ENTRIES + torch.arange(PAGE_ENTRIES, device=device)).flatten(1)
    for layer in layers:
        errors["logits"] = max(errors["logits"], check_logits(stock, layer))
        stock.layer(layer, None, ("topk",))
        check_top_k(f"stock, layer {layer}", stock.logits, stock.chosen[layer])
        errors["attention"] = max(errors["attention"], check_attention(stock, layer, stock.kernels.plan()))
        for step in lsa:
            name = f"{step.side.name}, layer {layer}"
            errors["logits"] = max(errors["logits"], check_logits(step, layer))
            error = relative(step.logits, stock.logits.gather(1, places))
            if error > ORDER_WITHIN:
                fail(f"{name}: logits of resident entries are {error:.1e} off those of stock")
            step.layer(layer, None, ("topk",))
            check_top_k(name, step.logits, step.chosen[layer])
            check_top_k(name, stock.logits, step.chosen[layer], places, 2 * ORDER_WITHIN)
            errors["attention"] = max(errors["attention"], check_attention(step, layer, step.kernels.plan()))
            # The same entries in the same order, out of stock's cache.
            chosen = stock.chosen[layer].clone()
            stock.chosen[layer] = places.gather(1, step.chosen[layer].long())
            stock.layer(layer, stock.kernels.plan(), ("attention",))
            stock.chosen[layer] = chosen
            if not torch.equal(step.out[layer], stock.out[layer]):
                error = relative(step.out[layer], stock.out[layer])
                fail(f"{name}: attention over the pool is not bit for bit that over stock's cache ({error:.2e} off)")
    return errors


def check_graph(step: Step, replay: Callable[[], object]) -> None:
    """Whether replaying a step's graph does what its layers do one by one. Tables may have changed since its capture.

    Not bit for bit: vLLM's top-k leaves equal sets in any order, and attention sums in that order.
    """
    step.run()
    want, chosen = step.out.clone(), step.chosen.sort(dim=2).values
    step.out.fill_(torch.nan)
    step.chosen.fill_(-1)
    replay()
    torch.cuda.synchronize()
    error = relative(step.out, want)
    if error > ATTENTION_WITHIN or not torch.equal(step.chosen.sort(dim=2).values, chosen):
        fail(f"{step.side.name}: the graph's choice or result ({error:.1e} off) is not that of its layers one by one")


def check_pool(memory: Memory, sets: ResidentSets) -> None:
    """Whether tables on the device are those that the host planned, and every resident slot holds what stock has."""
    blocks, slots = (torch.from_numpy(x).long().to(memory.device) for x in sets.blocks_and_slots())
    for name, table, want in (("block", sets.table, blocks), ("slot", sets.slots, slots)):
        if not torch.equal(table[:, : sets.width].long(), want):
            fail(f"the {name} table on the device is not the one that was planned")
    for row in range(len(blocks)):
        at, slot = blocks[row], slots[row]
        if not torch.equal(memory.c4.pool[slot], memory.stock.pages[at]):
            fail(f"request {row}: resident c4 pages are not those of the store")
        if not torch.equal(memory.keys.pool[slot], memory.stock.keys[at][:, memory.offloaded]):
            fail(f"request {row}: resident index keys are not those of the store")
