"""The c4 layers' attention of DeepSeek-V4-Flash on a CUDA device, stock and LSA: `python -m benchmarks.v4_stack`.

No model: 21 c4 layers at real dimensions (64 heads of 512, index keys of 128 with 64 heads, top-k 512, window 128) over
caches of random data that no request shares with another. Per layer and step, in one CUDA graph: index logits → top-k →
the entries' places → FlashMLA's sparse decode. Stock scores all entries of a request; LSA those of its resident pages,
which are in a pool on the device while all pages are in pinned host memory. Kernels are those that vLLM 0.32 calls on
Hopper, but for the index logits: DeepGEMM does not load on torch 2.11, so BOTH sides use vllm_lsa.ops.index_logits, and
the slower it is, the better LSA looks. floor_ratio is what kernels at the device's bandwidth would give.

LSA is served in cycles of 64 steps. In each, the memory indexer (published size, random weights, three layers) scores
all entries and pages are selected, in a thread and on a stream of its own. Then sets change by --churn of their pages
(1: drawn anew), since random scores say nothing of how much they would: at most --next pages of a request at a time are
copied by LSA's kernel beside a step, and put into the tables before the next one. What that step waits for them is its
stall. Times are means over steps, everything included; medians beside them. Every kernel's result is checked before it
is timed, and what the pool holds after; nothing is written of a case that fails.
"""

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.gpu_decode import case
from benchmarks.report import RESULTS, machine, pyplot, read_bandwidth, read_rows, write_csv
from benchmarks.v4_caches import ENTRY_BYTES, Memory, ResidentSets, Tier, Wave
from benchmarks.v4_kernels import WINDOW, VllmKernels
from benchmarks.v4_layers import PARTS, Queries, Side, Step, check, check_graph, check_pool
from benchmarks.v4_plan import C4_LAYERS, GIB, request_gib, resident_pages
from vllm_lsa.device.stalls import StallClock
from vllm_lsa.indexer import MemoryIndexer
from vllm_lsa.indexer.published import HEAD_DIM as KEY
from vllm_lsa.indexer.published import infer_config, inverse_frequencies
from vllm_lsa.models.deepseek_v4.scorer import PagedScorer
from vllm_lsa.models.deepseek_v4.selection import TOP_K, least_budget, page_count, select_pages
from vllm_lsa.models.deepseek_v4.specs import C4_TOKENS, PAGE_ENTRIES

PERIOD = 64
SPREAD = 48
"""Waves that a cycle's copies are spread over; what is left of the period is for scoring."""
RECENCY = TOP_K
"""Entries that are always resident: what V4's settings keep by default."""
HIDDEN, RANK, SCORING_HEADS = 4096, 2048, 128
DEVICE_GIB = 60
"""For how many requests that fit."""


def note(text: str) -> None:
    print(f"[{time.perf_counter() - _START:6.1f} s] {text}", flush=True)


_START = time.perf_counter()


def make_scorer(layers: Sequence[int], device: torch.device) -> PagedScorer:
    """A memory indexer in the published form with random weights."""
    with torch.device("meta"):
        shapes = {
            f"retrievers.l{layer}.{name}.weight": torch.empty(shape)
            for layer in layers
            for name, shape in (("wq_a", (RANK, HIDDEN)), ("weights_proj", (SCORING_HEADS, HIDDEN)))
        }
    with torch.device(device):
        return PagedScorer(MemoryIndexer(infer_config(shapes, Path("random")), inverse_frequencies().to(device)))


class Selection:
    """The memory indexer's part of a cycle for a case, on a stream of its own."""

    def __init__(
        self, memory: Memory, scorer: PagedScorer, table: torch.Tensor, budget: int, stream: torch.cuda.Stream
    ) -> None:
        rows, pages = table.shape
        device = memory.device
        self._scorer, self._table, self._budget, self._entries = scorer, table, budget, pages * PAGE_ENTRIES
        self._caches = {layer: memory.narrow.keys[:, layer] for layer in scorer.layers}
        self._hidden = {layer: torch.randn(rows, HIDDEN, device=device).bfloat16() for layer in scorer.layers}
        self._positions = torch.full((rows,), self._entries * C4_TOKENS, device=device)
        self._lengths = torch.full((rows,), self._entries, dtype=torch.int32, device=device)
        self._stream = stream

    def select(self) -> torch.Tensor:
        """Pages to keep, bool [B, P], on the current stream."""
        scores = self._scorer.scores(
            self._hidden, self._positions, self._caches, self._table, self._lengths, self._entries
        )
        return select_pages(scores, self._budget, recency_entries=RECENCY)

    def milliseconds(self, repeats: int) -> float:
        """Median time of a selection alone."""
        times = []
        for _ in range(repeats + 1):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            chosen = self.select()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        count = chosen.sum(1)
        if int(count.max()) > self._budget or int(count.min()) < min(self._budget, TOP_K // PAGE_ENTRIES):
            sys.exit(f"check failed: {count.tolist()} pages were selected with a budget of {self._budget}")
        return statistics.median(times[1:])

    def next_waves(self, sets: ResidentSets, churn: float, tiers: Sequence[Tier]) -> list[Wave]:
        """A cycle's scoring, and the waves that bring `churn` of the sets; for a thread beside the steps."""
        with torch.no_grad(), torch.cuda.stream(self._stream):
            self.select().cpu()
            waves = sets.plan(sets.churned(churn), tiers, SPREAD)
            self._stream.synchronize()
        return waves


@dataclass
class Times:
    """Milliseconds of steps."""

    steps: list[float]
    stall: float = 0.0
    copied: int = 0
    """Pages in all."""
    selections: int = 0

    @property
    def mean(self) -> float:
        return statistics.fmean(self.steps)

    @property
    def median(self) -> float:
        return statistics.median(self.steps)


def captured(step: Step, parts: Collection[str] = PARTS) -> torch.cuda.CUDAGraph:
    """A CUDA graph of all layers."""
    step.run(parts)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run(parts)
    return graph


def replayed(graph: torch.cuda.CUDAGraph, steps: int, warm_up: int = 4) -> Times:
    """Steps of a graph one after the other, nothing beside them."""
    for _ in range(warm_up):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return Times([a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)])


def served(
    graph: torch.cuda.CUDAGraph, sets: ResidentSets, selection: Selection, tiers: Sequence[Tier], churn: float,
    cycles: int, programs: int, copies: torch.cuda.Stream,
) -> Times:  # fmt: skip
    """Cycles of steps with everything that LSA does beside them. One cycle before them is not counted.

    Copies that are not done when a cycle ends put off the next selection.
    """
    stream, clock, total = torch.cuda.current_stream(), StallClock(torch.device("cuda")), PERIOD * (cycles + 1)
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(total)]
    job: Future[list[Wave]] | None = None
    waves: list[Wave] = []
    planned: list[list[Wave]] = []  # kept, so that no memory is used again while a stream may read it
    arriving: tuple[Wave, torch.cuda.Event] | None = None
    due, copied, selections, stalled = False, 0, 0, 0.0
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as thread:
        for t in range(total):
            if t == PERIOD:
                torch.cuda.synchronize()
                stalled, copied, selections = clock.seconds, 0, 0
            due = due or t % PERIOD == 0
            if due and job is None and not waves:
                job = thread.submit(selection.next_waves, sets, churn, tiers)
                due, selections = False, selections + 1
            if arriving is not None:
                wave, there = arriving
                clock.start()
                stream.wait_event(there)
                clock.stop()
                sets.apply(wave)
                arriving = None
            applied = torch.cuda.Event()
            applied.record()
            graph.replay()
            ends[t].record()
            if job is not None and job.done():
                planned.append(job.result())
                waves, job = list(planned[-1]), None
            if waves:
                wave = waves.pop(0)
                copies.wait_event(applied)
                with torch.cuda.stream(copies):
                    fetch(tiers, wave, programs)
                    there = torch.cuda.Event()
                    there.record()
                arriving, copied = (wave, there), copied + wave.count
            if t:
                ends[t - 1].synchronize()  # as an engine does that hands out tokens
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in zip(ends[PERIOD - 1 :], ends[PERIOD:], strict=False)]
        result = Times(times, 1e3 * (clock.seconds - stalled), copied, selections)
        # The sets on the host are those after the last wave.
        if job is not None:
            waves = job.result()
            planned.append(waves)
        if arriving is not None:
            sets.apply(arriving[0])
        for wave in waves:
            fetch(tiers, wave)
            sets.apply(wave)
        torch.cuda.synchronize()
    return result


def fetch(tiers: Sequence[Tier], wave: Wave, programs: int | None = None) -> None:
    for tier, (page, slot) in zip(tiers, wave.copies, strict=True):
        tier.fetch(page, slot, programs)


def load(sets: ResidentSets, tiers: Sequence[Tier]) -> None:
    """Every resident page into its slot, over poison."""
    blocks, slots = sets.blocks_and_slots()
    for tier in tiers:
        tier.pool[: sets.num_slots].fill_(255)
        page, slot = tier.expand(blocks, slots)
        tier.fetch(page.to(tier.pool.device), slot.to(tier.pool.device))


def floor_bytes(rows: int, entries: int, layers: int) -> int:
    """What a step has to read: index keys of `entries` entries of each row, and the entries that it attends to."""
    return layers * rows * (entries * (KEY + 4) + (TOP_K + WINDOW) * ENTRY_BYTES)


@dataclass
class Machine:
    """What all cases share. Streams are made once: torch has 32, and hands the first out again after the last."""

    memory: Memory
    scorer: PagedScorer
    bandwidth: float
    steps: torch.cuda.Stream
    copies: torch.cuda.Stream
    selection: torch.cuda.Stream


def measure(args: argparse.Namespace, shared: Machine, batch: int, context: int) -> list[dict[str, Any]]:
    """Rows of one case: LSA with index keys on the device and on the host, by churn."""
    memory = shared.memory
    device, rng = memory.device, np.random.default_rng(batch + context)
    width, pages = resident_pages(context, args.budget)
    blocks = rng.permutation(len(memory.stock.memory))[: batch * pages].reshape(batch, pages).astype(np.int32)
    table = torch.from_numpy(blocks).to(device)
    sets = ResidentSets(blocks, width, args.next, page_count(RECENCY), rng, device)
    tiers = [memory.c4, memory.keys]
    load(sets, tiers)
    check_pool(memory, sets)
    queries, kernels = Queries(batch, memory.layers, device), VllmKernels(batch, device, args.topk)
    stock = Step(Side.stock(memory, table), queries, kernels)
    variants = {False: Step(Side.lsa(memory, sets, False), queries, kernels)}
    if args.index_keys != "resident":
        variants[True] = Step(Side.lsa(memory, sets, True), queries, kernels)
    checked = sorted({0, memory.scored[0], memory.layers - 1})
    errors = check(stock, list(variants.values()), sets, checked)
    top_k = kernels.top_k_name(stock.logits)
    note(
        f"{batch} x {context}: checked; largest errors {errors['logits']:.1e} (logits), {errors['attention']:.1e} "
        f"(attention); top-k {top_k}"
    )
    graphs = {step: captured(step) for step in (stock, *variants.values())}
    for step, graph in graphs.items():
        check_graph(step, graph.replay)
    stock_times = replayed(graphs[stock], args.steps)
    parts = {
        step: {part: replayed(captured(step, [part]), args.steps // 2).median for part in PARTS} for step in graphs
    }
    selection = Selection(memory, shared.scorer, table, width, shared.selection)
    score_ms = selection.milliseconds(5)
    rows: list[dict[str, Any]] = []
    for offloaded, step in variants.items():
        used = tiers if offloaded else tiers[:1]
        quiet = replayed(graphs[step], args.steps)
        for churn in args.churn:
            times = served(graphs[step], sets, selection, used, churn, args.cycles, args.programs, shared.copies)
            load(sets, [tier for tier in tiers if tier not in used])
            check_pool(memory, sets)
            check(stock, [step], sets, checked)
            check_graph(step, graphs[step].replay)
            row = {
                "batch": batch,
                "context": context,
                "layers": memory.layers,
                "index_keys": "offloaded" if offloaded else "resident",
                "churn": churn,
                "stock_ms": stock_times.mean,
                "lsa_ms": times.mean,
                "ratio": stock_times.mean / times.mean,
                "lsa_quiet_ms": quiet.mean,
                "slowed_share": times.mean / quiet.mean - 1,
                "stall_share": times.stall / sum(times.steps),
                "stock_median_ms": stock_times.median,
                "lsa_median_ms": times.median,
                **{f"stock_{part}_ms": parts[stock][part] for part in PARTS},
                **{f"lsa_{part}_ms": parts[step][part] for part in PARTS},
                **floors(batch, pages, width, memory.layers, shared.bandwidth),
                "score_ms": score_ms,
                "score_ms_per_step": score_ms / PERIOD,
                "top_k": top_k,
                "selections": times.selections,
                "copied_gib_per_cycle": times.copied * sum(x.block_bytes for x in used) / args.cycles / GIB,
                **planned(context, width + args.next, offloaded),
            }
            rows.append({name: round(x, 4) if isinstance(x, float) else x for name, x in row.items()})
            note(", ".join(f"{name} {rows[-1][name]}" for name in row if name not in ("batch", "context", "layers")))
    return rows


def floors(batch: int, pages: int, width: int, layers: int, bandwidth: float) -> dict[str, float]:
    """Milliseconds at the measured bandwidth, in GB/s."""
    stock, lsa = (floor_bytes(batch, n * PAGE_ENTRIES, layers) / bandwidth / 1e6 for n in (pages, width))
    return {"stock_floor_ms": stock, "lsa_floor_ms": lsa, "floor_ratio": stock / lsa}


def planned(context: int, slots: int, offloaded: bool) -> dict[str, float]:
    """GiB of a request on the device, all its caches and slots, by their specs; and how many requests fit."""
    stock, lsa = request_gib(context), request_gib(context, slots, offloaded)
    fit = {"requests_stock": int(DEVICE_GIB / stock), "requests_lsa": int(DEVICE_GIB / lsa)}
    return {"kv_gib_stock": stock, "kv_gib_lsa": lsa, **fit}


def report(rows: Sequence[dict[str, Any]]) -> None:
    names = {
        "batch": "batch", "context": "context", "index_keys": "index keys", "churn": "churn", "stock_ms": "stock ms",
        "lsa_ms": "LSA ms", "ratio": "ratio", "floor_ratio": "at floor", "stall_share": "stall",
        "slowed_share": "slowed",
        "kv_gib_stock": "GiB stock", "kv_gib_lsa": "GiB LSA", "requests_stock": "fit stock", "requests_lsa": "fit LSA",
    }  # fmt: skip
    print("| " + " | ".join(names.values()) + " |\n" + "|-" * len(names) + "|")
    for row in rows:
        shares = {name: f"{row[name]:.1%}" for name in ("stall_share", "slowed_share")}
        cells = {**row, **shares, "context": f"{row['context'] // 1024}K"}
        print("| " + " | ".join(f"{x:.2f}" if isinstance(x := cells[name], float) else str(x) for name in names) + " |")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of step times with their floors for each case, and of device KV per request for each context."""
    plt = pyplot()
    least = min(float(r["churn"]) for r in rows)
    shown = [r for r in rows if float(r["churn"]) == least]
    cases = sorted({(int(r["context"]), int(r["batch"])) for r in shown})
    kinds = [kind for kind in ("resident", "offloaded") if any(r["index_keys"] == kind for r in shown)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(5 + 2.2 * len(cases), 4))
    width = 0.8 / (1 + len(kinds))
    for i, kind in enumerate(["stock", *kinds]):
        mine = {
            (int(r["context"]), int(r["batch"])): r for r in shown if r["index_keys"] == (kinds[0] if not i else kind)
        }
        side, color = ("lsa", None) if i else ("stock", "grey")
        label = f"LSA, index keys {kind}" if i else "stock"
        at = [cases.index(key) - 0.4 + width * (i + 0.5) for key in mine]
        left.bar(at, [r[f"{side}_ms"] for r in mine.values()], width * 0.9, label=label, color=color)
        ends = [x - 0.4 * width for x in at], [x + 0.4 * width for x in at]
        left.hlines([r[f"{side}_floor_ms"] for r in mine.values()], *ends, "k", label="" if i else "floor")
        contexts = sorted({context for context, _ in mine})
        kv = [next(r[f"kv_gib_{side}"] for (c, _), r in mine.items() if c == context) for context in contexts]
        right.bar([x - 0.4 + width * (i + 0.5) for x in range(len(contexts))], kv, width * 0.9, color=color)
        right.set_xticks(range(len(contexts)), [f"{context // 1024}K" for context in contexts])
    left.set_xticks(range(len(cases)), [f"{batch} × {context // 1024}K" for context, batch in cases])
    left.set(ylabel="c4 layers of a decode step (ms, mean)", title=f"{least:.0%} of the pages renewed in 64 steps")
    right.set(ylabel="device KV of a request (GiB)")
    left.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def prepare(args: argparse.Namespace, device: torch.device) -> Memory:
    """Memory for the largest case, filled."""
    blocks = max(batch * resident_pages(context, args.budget)[1] for batch, context in args.cases)
    slots = max(batch * (resident_pages(context, args.budget)[0] + args.next) for batch, context in args.cases)
    free, _ = torch.cuda.mem_get_info()
    need = Memory.device_bytes(blocks, slots, args.layers)
    if need > 0.9 * free:
        sys.exit(f"the cases need {need / GIB:.1f} GiB on the device and {free / GIB:.1f} are free: give smaller ones")
    memory = Memory(blocks, slots, args.layers, device)
    note(f"{need / GIB:.1f} GiB on the device, {(memory.c4.store.pages.nbytes) / GIB:.1f} GiB of c4 pages pinned")
    for first in tqdm(range(0, blocks, 256), desc="filling", mininterval=2):
        memory.fill(first, min(first + 256, blocks))
    note("filled")
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = [(1, 1 << 20), (8, 1 << 18), (8, 1 << 19), (8, 1 << 20)]
    parser.add_argument(
        "--cases", type=case, nargs="+", default=cases, metavar="BATCHxCONTEXT", help="requests x tokens"
    )
    parser.add_argument("--budget", type=float, default=0.12, help="share of a request's pages that is resident")
    parser.add_argument("--layers", type=int, default=C4_LAYERS)
    parser.add_argument("--index-keys", choices=("resident", "offloaded"), default="offloaded", help="offloaded: both")
    parser.add_argument("--churn", type=float, nargs="+", default=[0.2, 1.0], help="share of a set renewed in a cycle")
    parser.add_argument("--next", type=int, default=8, help="pages of a request that are copied at a time")
    parser.add_argument("--programs", type=int, default=8, help="of a copy")
    parser.add_argument("--steps", type=int, default=64, help="timed without anything beside them")
    parser.add_argument("--cycles", type=int, default=2, help="of 64 steps, timed with copies")
    parser.add_argument(
        "--topk", default="auto", help="vLLM's sparse_indexer_topk_backend: auto, persistent, per_row …"
    )
    parser.add_argument("--quick", action="store_true", help="2x1048576 with three layers, to see whether it runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "v4_stack.csv")
    parser.add_argument("--plot", type=Path, nargs="+", metavar="CSV", help="measure nothing: plot into --out's PNG")
    args = parser.parse_args()
    if args.plot:
        plot(read_rows(args.plot), args.out.with_suffix(".png"))
        return
    if args.quick:
        args.cases, args.layers, args.steps, args.cycles = [(2, 1 << 20)], 3, 16, 1
    for _, context in args.cases:
        width, _ = resident_pages(context, args.budget)
        if width < max(TOP_K // PAGE_ENTRIES, least_budget(RECENCY)) or context % (C4_TOKENS * PAGE_ENTRIES):
            parser.error(f"{context} tokens with a budget of {args.budget}: {width} pages, too few, or no whole pages")
    if not torch.cuda.is_available():
        sys.exit("benchmarks.v4_stack needs a CUDA device")
    run(args)


def run(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    sys.setswitchinterval(2e-4)  # the thread that selects must not keep the one that launches steps waiting
    device = torch.device("cuda", torch.cuda.current_device())
    print(machine(), flush=True)
    bandwidth = read_bandwidth("cuda", gib=4)
    torch.cuda.empty_cache()
    note(f"reads at {bandwidth:.0f} GB/s")
    memory = prepare(args, device)
    streams = [torch.cuda.Stream() for _ in range(3)]  # the default one may have to wait for others
    shared = Machine(memory, make_scorer(memory.scored, device), bandwidth, *streams)
    torch.cuda.synchronize()
    notes = {
        "read bandwidth": f"{bandwidth:.0f} GB/s",
        "model": f"{args.layers} c4 layers of DeepSeek-V4-Flash, random data, nothing shared between requests",
        "index logits": "vllm_lsa.ops.index_logits on both sides: stock's DeepGEMM does not load on torch 2.11",
        "pool": f"{args.budget:.0%} of the pages, and {args.next} more for those on their way",
        "kv_gib": "by the specs of all caches of a request (c128, windows and states too), not this program's memory",
    }
    rows: list[dict[str, Any]] = []
    failed = 0
    for batch, context in args.cases:
        try:
            with torch.no_grad(), torch.cuda.stream(shared.steps):
                rows += measure(args, shared, batch, context)
        except (Exception, SystemExit) as error:  # the other cases are worth their time
            traceback.print_exc()
            note(f"{batch} x {context}: {type(error).__name__}, nothing is reported of it")
            failed += 1
            continue
        write_csv(args.out, rows, notes)
        torch.cuda.empty_cache()
    if rows:
        report(rows)
    sys.exit(failed)


if __name__ == "__main__":
    main()
