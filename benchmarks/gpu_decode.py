"""Decode step time on a CUDA device by context, batch and configuration: `python -m benchmarks.gpu_decode`.

Dummy weights, bf16, CUDA graphs and vLLM's defaults otherwise; with `--kv-cache-dtype fp8` K and V are in e4m3, in
stock too, whose FlashAttention then has queries in e4m3 as well. Each configuration runs in a process of its own; its
cases run one after the other in it, and what a case with the same context has prefilled is kept for the next larger
one. A step's time is the interval between the tokens of two successive steps; host_loop_ms, what a fixed loop of Python
takes right after them, tells a slow host from slow kernels. The floor is the bytes that a step has to read (weights
without the input embedding, K and V attended to, index where demand reads it) at the read bandwidth measured in this
run. Every row is on the disk (.jsonl) as soon as it is measured. With several ranks the floor, the bytes read and the
counts are those of one.
"""

import argparse
import gc
from pathlib import Path
from typing import Any

from benchmarks import engines, ranks
from benchmarks.report import host_loop, machine, pyplot, read_rows

WARM_UP = 2 * engines.STEP_TOKENS + 100
PROFILED = 20


def case(text: str) -> tuple[int, int]:
    batch, context = text.lower().split("x")
    return int(batch), int(context)


def groups(args: argparse.Namespace) -> list[tuple[int, list[int], int]]:
    """Cases of one context together, as (context, batches ascending, most tokens that a request generates)."""
    contexts = dict.fromkeys(context for _, context in args.cases)
    found = []
    for context in contexts:
        batches = sorted({batch for batch, other in args.cases if other == context})
        most = 16
        for batch, before in zip(batches, [0, *batches], strict=False):
            # While a prompt is read the requests before it go on, a token a step.
            prefill = -(-(batch - before) * context // (engines.STEP_TOKENS - batch)) + batch - before
            most += prefill + args.skip + args.steps + (2 * PROFILED + 8) * bool(args.profile) + 8
        found.append((context, batches, most))
    return found


def measure(args: argparse.Namespace, name: str) -> None:
    """All cases of one configuration, in this process."""
    import time

    shape, planned = engines.shape_of(args), groups(args)
    loads = [engines.Load(batches[-1], context + most) for context, batches, most in planned]
    start = time.perf_counter()
    llm = engines.make_llm(args, name, loads, args.ranks)
    startup = time.perf_counter() - start
    if args.no_prompt_attention:
        llm.collective_rpc(ranks.skip_prompt_attention)
    requests = engines.Requests(llm)
    longest = max(context for context, _, _ in planned)
    requests.add(shape.prompts(1, min(WARM_UP, longest), seed=1), 64)
    requests.decode(24)
    requests.drop()
    for number, (context, batches, most) in enumerate(planned):
        for batch in batches:
            fresh = batch - len(requests.live)
            seconds = requests.add(shape.prompts(fresh, context, seed=100 * number + batch), most)
            requests.decode(args.skip)
            row = {
                "shape": shape.name,
                "configuration": name,
                "kv_cache_dtype": args.kv_cache_dtype,
                "batch": batch,
                "context": context,
                "ranks": args.ranks,
                **timed(args, llm, requests, context),
                "prefill_s_per_request": "" if args.no_prompt_attention else engines.rounded(seconds / fresh),
                "startup_s": engines.rounded(startup),
            }
            used = max(report.device_used for report in llm.collective_rpc(ranks.report))
            row["device_used_gib"] = engines.rounded(used / 2**30)
            engines.emit(args.out.with_suffix(".jsonl"), row)
            if args.profile:
                profile(args.profile / f"{shape.name}-{name}-{batch}x{context}.txt", requests)
        requests.drop()


def timed(args: argparse.Namespace, llm: Any, requests: engines.Requests, context: int) -> dict[str, Any]:
    shape = engines.shape_of(args)
    batch = len(requests.live)
    gc.collect()
    gc.freeze()
    before = llm.collective_rpc(ranks.report)
    generated = sum(requests.live.values()) / batch
    held = [footprint(before, shape, context + generated, batch)]
    if args.ranks > 1:
        requests.decode(2)  # workers that are asked have nothing under way afterwards
    times = requests.decode(args.steps)
    host = host_loop()
    length = context + (generated + sum(requests.live.values()) / batch) / 2
    after = llm.collective_rpc(ranks.report, args=(True,))
    held.append(footprint(after, shape, context + sum(requests.live.values()) / batch, batch))
    counts = {key: ranks.difference(after, before, key) for key in after[0].counts}
    mean = sum(times) / len(times)
    total, resident, index = (sum(values) / 2 for values in zip(*held, strict=True))
    demands = after[0].demands and resident < 0.99 * total
    read = (shape.weight_bytes + min(resident, total) + index * demands) / args.ranks
    floor = read / args.speed / 1e6
    return {
        "length": round(length),
        "steps": len(times),
        "step_ms": engines.rounded(engines.median(times) * 1e3),
        "p10_ms": engines.rounded(engines.quantile(times, 0.1) * 1e3),
        "mean_ms": engines.rounded(mean * 1e3),
        "p99_ms": engines.rounded(engines.quantile(times, 0.99) * 1e3),
        "max_ms": engines.rounded(max(times) * 1e3),
        "host_loop_ms": engines.rounded(host * 1e3),
        "floor_ms": engines.rounded(floor),
        "times_floor": engines.rounded(mean * 1e3 / floor, 3),
        "tokens_per_s": engines.rounded(batch / mean),
        "gb_read": engines.rounded(read / 1e9),
        "kv_mb_per_request": engines.rounded((resident + index) / batch / 1e6),
        "kv_share": engines.rounded((resident + index) / total, 3),
        "chunks_demanded_per_step": engines.rounded(counts.get("chunks_demanded", 0) / len(times)),
        "mb_fetched_per_step": engines.rounded(counts.get("bytes_fetched", 0) / len(times) / 1e6),
        "stalled_share": engines.rounded(counts.get("stall_seconds", 0) / sum(times)),
        "chunks_missed": counts.get("chunks_missed", 0),
        "cycles": counts.get("cycles", 0),
    }


def footprint(reports: list[ranks.Report], shape: Any, length: float, batch: int) -> tuple[float, float, float]:
    """Device bytes of the live requests' K and V on all ranks: all there are, those on the device, and the index."""
    parts = [report.footprint for report in reports if report.footprint is not None]
    if not parts:
        whole = batch * length * shape.geometry().token_bytes
        return whole, whole, 0.0
    total, resident, index = (float(sum(values)) for values in zip(*parts, strict=True))
    return total, resident, index


def profile(path: Path, requests: engines.Requests) -> None:
    """The kernels of some decode steps by the time they take, as a table; and the host's functions in some others."""
    import cProfile
    import pstats
    import time

    import torch
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        requests.decode(PROFILED)
        wall = (time.perf_counter() - start) / PROFILED * 1e6
        torch.cuda.synchronize()
    kernels = [
        (event.self_device_time_total / PROFILED, event.count / PROFILED, event.key)
        for event in profiler.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    kernels.sort(reverse=True)
    total = sum(time for time, _, _ in kernels)
    lines = [f"{machine()}; {PROFILED} decode steps: {wall:.0f} us wall, {total:.0f} us of kernels and copies per step"]
    lines.append(f"{'us/step':>10} {'share':>6} {'calls':>7}  kernel")
    lines += [f"{time:10.1f} {time / total:6.1%} {calls:7.1f}  {name[:110]}" for time, calls, name in kernels[:25]]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as out:
        out.write("\n".join(lines) + "\n\nThe host in as many steps:\n")
        with cProfile.Profile() as host:
            requests.decode(PROFILED)
        pstats.Stats(host, stream=out).strip_dirs().sort_stats("tottime").print_stats(20)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A group of bars for each case, a bar for each configuration, its floor as a line across it."""
    plt = pyplot()
    cases = list(dict.fromkeys((int(r["batch"]), int(r["context"])) for r in rows))
    names = [name for name in engines.CONFIGURATIONS if any(r["configuration"] == name for r in rows)]
    figure, axis = plt.subplots(figsize=(1.5 + 1.8 * len(cases), 4))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        mine = [(cases.index((int(r["batch"]), int(r["context"]))), r) for r in rows if r["configuration"] == name]
        at = [x - 0.4 + width * (i + 0.5) for x, _ in mine]
        axis.bar(
            at, [r["mean_ms"] for _, r in mine], width * 0.9, label=name, color="grey" if name == "stock" else None
        )
        floors = [r["floor_ms"] for _, r in mine]
        axis.hlines(floors, [x - 0.4 * width for x in at], [x + 0.4 * width for x in at], "k", label="floor" * (i == 0))
    axis.set_xticks(range(len(cases)), [f"{batch} × {context // 1024}K" for batch, context in cases])
    axis.set(ylabel="decode step (ms, mean)", title=", ".join(dict.fromkeys(r["shape"] for r in rows)))
    axis.legend(fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def finish(rows: list[dict[str, Any]]) -> None:
    engines.against_stock(rows, "mean_ms", ("shape", "batch", "context"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=engines.ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    engines.add_arguments(parser, "gpu_decode", ("stock", "lookahead", "quality"))
    parser.add_argument(
        "--cases",
        type=case,
        nargs="+",
        default=[(1, 2048), (16, 2048), (1, 131072), (4, 131072)],
        metavar="BATCHxCONTEXT",
        help="requests x tokens of each (default: 1x2048 16x2048 1x131072 4x131072)",
    )
    parser.add_argument("--steps", type=int, default=192, help="decode steps timed per case")
    parser.add_argument("--skip", type=int, default=8, help="decode steps before those")
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, dest="ranks", metavar="N", help="GPUs (default: 1)"
    )
    parser.add_argument(
        "--no-prompt-attention",
        action="store_true",
        help="read prompts without attention: the same decode steps, and no prefill times",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="DIR",
        help="write the top kernels and host functions of 20 steps per case there",
    )
    args = parser.parse_args()
    if args.profile and args.ranks > 1:
        parser.error("--profile looks at this process, which has no ranks in it with --tensor-parallel-size above 1")
    if args.plot:
        plot(read_rows(args.plot), args.out.with_suffix(".png"))
        return
    if args.only:
        measure(args, args.only)
        return
    bandwidth = engines.measured_elsewhere("report.read_bandwidth('cuda', gib=4)")
    notes = {"read bandwidth": f"{bandwidth:.0f} GB/s", "model": f"{args.shape}, dummy weights, bf16"}
    notes["K and V"] = "fp8 (e4m3)" if args.kv_cache_dtype == "fp8" else "bf16"
    notes["decode"] = "eager" if args.eager else "torch.compile and CUDA graphs"
    engines.run_all("benchmarks.gpu_decode", args, bandwidth, finish, notes)


if __name__ == "__main__":
    main()
