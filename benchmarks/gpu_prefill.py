"""Time to the first token of one long prompt on a CUDA device, stock beside LSA: `python -m benchmarks.gpu_prefill`.

Dummy weights, bf16, vLLM's chunked prefill in steps of 8,192 tokens. Each configuration runs in a process of its own,
on the same random prompts. LSA's device pool holds the resident share alone, so that the history of a long prompt comes
from the host. The floor is the prompt's floating point operations at the rate of a large bf16 product in this run.
"""

import argparse
import time
from typing import Any

from benchmarks import engines
from benchmarks.report import pyplot, read_rows


def matmul_rate(size: int = 8192, repeats: int = 10) -> float:
    """Floating point operations per second of a bf16 product, the fastest of several."""
    import torch

    a, b = torch.randn(2, size, size, device="cuda").bfloat16()
    best = 0.0
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(8):
            a @ b
        torch.cuda.synchronize()
        best = max(best, 8 * 2 * size**3 / (time.perf_counter() - start))
    return best


def measure(args: argparse.Namespace, name: str) -> None:
    """All contexts on one configuration, in this process."""
    shape = engines.shape_of(args)
    loads = [engines.Load(1, context + 32) for context in args.contexts]
    start = time.perf_counter()
    requests = engines.Requests(engines.make_llm(args, name, loads))
    startup = time.perf_counter() - start
    requests.add(shape.prompts(1, min(args.contexts[-1], 3 * engines.STEP_TOKENS), seed=1), 16)
    requests.decode(4)
    requests.drop()
    for context in args.contexts:
        for repeat in range(args.repeats):
            engine = engines.lsa_engine()
            before = engine.counted() if engine else {}
            seconds = requests.add(shape.prompts(1, context, seed=10 + repeat), 16)
            streamed = engine.counted()["bytes_streamed"] - before["bytes_streamed"] if engine else 0
            requests.drop()
            floor = shape.prefill_flops(context) / args.speed
            row = {
                "shape": shape.name,
                "configuration": name,
                "context": context,
                "repeat": repeat,
                "prefill_s": engines.rounded(seconds),
                "floor_s": engines.rounded(floor),
                "times_floor": engines.rounded(seconds / floor, 3),
                "tokens_per_s": engines.rounded(context / seconds),
                "gb_streamed": engines.rounded(streamed / 1e9),
                "startup_s": engines.rounded(startup),
            }
            engines.emit(args.out.with_suffix(".jsonl"), row)


def finish(rows: list[dict[str, Any]]) -> None:
    """Medians over the repeats, and how they compare with stock's."""

    def case(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["shape"], row["configuration"], row["context"]

    for row in rows:
        row["median_s"] = engines.median([other["prefill_s"] for other in rows if case(other) == case(row)])
    engines.against_stock(rows, "median_s", ("shape", "context"))


def plot(rows: list[dict[str, Any]], path: Any) -> None:
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 4))
    for name in engines.CONFIGURATIONS:
        mine = {int(r["context"]): r for r in rows if r["configuration"] == name}
        if mine:
            style = {"linestyle": "--", "color": "grey"} if name == "stock" else {}
            axis.plot(list(mine), [r["median_s"] for r in mine.values()], marker="o", label=name, **style)
    floors = {int(r["context"]): r["floor_s"] for r in rows}
    axis.plot(list(floors), list(floors.values()), ":", color="black", label="floor")
    axis.set(xlabel="prompt (tokens)", ylabel="time to first token (s)", ylim=(0, None))
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=engines.ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    engines.add_arguments(parser, "gpu_prefill", ("stock", "lookahead"))
    parser.add_argument("--contexts", type=int, nargs="+", default=[131072], help="tokens of the prompt")
    parser.add_argument("--repeats", type=int, default=2, help="prompts per context, all different")
    args = parser.parse_args()
    args.contexts.sort()
    if args.plot:
        plot(read_rows(args.plot), args.out.with_suffix(".png"))
        return
    if args.only:
        measure(args, args.only)
        return
    rate = engines.measured_elsewhere("gpu_prefill.matmul_rate()", "gpu_prefill")
    notes = {"bf16 product": f"{rate / 1e12:.0f} Tflop/s", "model": f"{args.shape}, dummy weights, bf16"}
    engines.run_all("benchmarks.gpu_prefill", args, rate, finish, notes)


if __name__ == "__main__":
    main()
