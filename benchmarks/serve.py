"""Throughput of the HTTP server at a fixed device KV budget, stock beside LSA: `python -m benchmarks.serve`.

For each configuration a real server (dummy weights, bf16, CUDA graphs) and `vllm bench serve` with random prompts
against it. Stock has `--kv-gib` for its KV cache; LSA has the same for its resident chunks and its index together, and
a host store of `--host-gib`. Decode tokens/s are the most requests that ever generated at the same time over the median
time between two tokens of a request. The floor is the bytes of such a step at the read bandwidth measured in this run.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import engines
from benchmarks.report import pyplot, read_rows, write_csv
from benchmarks.shapes import Shape
from vllm_lsa.config import GIB, LsaConfig
from vllm_lsa.engine import index_layout
from vllm_lsa.serving.server import Server, signals_raise


def settings(args: argparse.Namespace, shape: Shape, name: str, model: Path) -> tuple[dict[str, Any] | None, float]:
    """LSA's settings, None for stock, and the share of the KV bytes that a decode step reads."""
    if engines.CONFIGURATIONS[name] is None:
        return None, 1.0
    load = engines.Load(1, args.input_len + args.output_len)
    lsa = engines.lsa_settings(shape, name, [load], model, json.loads(args.lsa), load.tokens)
    config = LsaConfig.parse({"lsa": lsa})
    geometry = shape.geometry(config.layer_lanes(shape.kv_heads))
    cell = index_layout(config, geometry.chunk_tokens, shape.head_dim, torch.bfloat16, torch.device("cpu")).cell_bytes
    index = shape.kv_heads * cell / (geometry.layer_lanes * geometry.page_bytes)
    # Index cells are for every block of the host store.
    lsa["host_memory_gib"] = args.host_gib
    lsa["device_pool_gib"] = args.kv_gib - index * args.host_gib
    if lsa["device_pool_gib"] <= 0:
        sys.exit(f"the index of {args.host_gib} GiB takes {index * args.host_gib:.1f} GiB: raise --kv-gib")
    lsa.pop("device_pool_fraction", None)
    return lsa, config.budget + index * (config.demand != "off")


def measure(args: argparse.Namespace, name: str, bandwidth: float) -> dict[str, Any]:
    shape = engines.shape_of(args)
    model = shape.write(tokenizer=True)
    lsa, share = settings(args, shape, name, model)
    most = args.input_len + args.output_len + 16
    arguments = ["--load-format", "dummy", "--max-num-seqs", str(args.concurrency), "--no-enable-prefix-caching"]
    arguments += ["--max-num-batched-tokens", str(engines.STEP_TOKENS), "--gpu-memory-utilization", "0.9"]
    arguments += ["--kv-cache-dtype", args.kv_cache_dtype]
    if not args.eager:
        arguments.append("--no-enforce-eager")
    if lsa is None:
        arguments += ["--kv-cache-memory-bytes", str(int(args.kv_gib * GIB))]
    backend = "FLASH_ATTN" if lsa is None else "LSA"
    log = args.logs / f"serve-{name}.log"
    start = time.perf_counter()
    with Server(model, backend, log, most, dtype="bfloat16", lsa=lsa, arguments=arguments) as server:
        startup = time.perf_counter() - start
        result = bench(args, server, model, args.logs / f"serve-{name}.json")
    if result["completed"] < args.num_prompts:
        why = "; ".join(sorted(set(filter(None, result.get("errors", [])))))
        sys.exit(f"{name}: {args.num_prompts - result['completed']} requests failed ({why}); the server's log is {log}")
    holds = re.findall(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x", log.read_text(errors="replace"))
    between = [gap for gaps in result["itls"] for gap in gaps if gap > 0]
    gap = engines.median(between)
    together = most_together(result)
    length = args.input_len + args.output_len / 2
    floor = (shape.weight_bytes + together * length * shape.geometry().token_bytes * share) / bandwidth / 1e9
    return {
        "shape": shape.name,
        "configuration": name,
        "kv_gib": args.kv_gib,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "prompts": args.num_prompts,
        "completed": result["completed"],
        "requests_that_fit": float(holds[-1]) if holds else "",
        "decoded_together": together,
        "duration_s": engines.rounded(result["duration"]),
        "output_tokens_per_s": engines.rounded(result["output_throughput"]),
        "total_tokens_per_s": engines.rounded(result["total_token_throughput"]),
        "decode_tokens_per_s": engines.rounded(together / gap),
        "peak_tokens_per_s": result.get("max_output_tokens_per_s", ""),
        "median_itl_ms": engines.rounded(gap * 1e3),
        "floor_ms": engines.rounded(floor * 1e3),
        "times_floor": engines.rounded(gap / floor, 3),
        "median_ttft_ms": engines.rounded(result["median_ttft_ms"]),
        "p99_ttft_ms": engines.rounded(result["p99_ttft_ms"]),
        "median_tpot_ms": engines.rounded(result["median_tpot_ms"]),
        "p99_tpot_ms": engines.rounded(result["p99_tpot_ms"]),
        "startup_s": engines.rounded(startup),
    }


def bench(args: argparse.Namespace, server: Server, model: Path, path: Path) -> dict[str, Any]:
    """What `vllm bench serve` measured. Its whole output is beside `path`."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai"]
    command += ["--base-url", server.url, "--model", server.model, "--tokenizer", str(model), "--disable-tqdm"]
    command += ["--dataset-name", "random", "--random-input-len", str(args.input_len)]
    command += ["--random-output-len", str(args.output_len), "--num-prompts", str(args.num_prompts)]
    command += ["--max-concurrency", str(args.concurrency), "--num-warmups", str(args.warmups), "--ignore-eos"]
    command += ["--save-result", "--save-detailed", "--result-dir", str(path.parent), "--result-filename", path.name]
    with path.with_suffix(".bench.log").open("w") as out:
        subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=True)
    return json.loads(path.read_text())


def most_together(result: dict[str, Any]) -> int:
    """The most requests that were between their first and their last token at the same time."""
    ends: list[tuple[float, int]] = []
    for start, first, gaps in zip(result["start_times"], result["ttfts"], result["itls"], strict=True):
        ends += [(start + first, 1), (start + first + sum(gaps), -1)]
    running = most = 0
    for _, change in sorted(ends):
        running += change
        most = max(most, running)
    return most


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    plt = pyplot()
    values = {
        "decoded_together": "requests decoded together",
        "decode_tokens_per_s": "decode tokens/s",
        "output_tokens_per_s": "output tokens/s, prompts included",
        "median_ttft_ms": "median time to first token (ms)",
    }
    figure, axes = plt.subplots(1, len(values), figsize=(3 * len(values), 3.4))
    names = [r["configuration"] for r in rows]
    for axis, (key, title) in zip(axes, values.items(), strict=True):
        axis.bar(names, [r[key] for r in rows], color=["grey" if n == "stock" else "C0" for n in names])
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=engines.ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    engines.add_arguments(parser, "serve", ("stock", "lookahead"))
    parser.add_argument("--kv-gib", type=float, default=20, help="device memory for K, V and index")
    parser.add_argument("--host-gib", type=float, default=100, help="host store of LSA")
    parser.add_argument("--input-len", type=int, default=131072)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--num-prompts", type=int, default=6)
    parser.add_argument("--concurrency", type=int, default=6)
    parser.add_argument("--warmups", type=int, default=1, help="requests before those that are measured")
    args = parser.parse_args()
    if args.plot:
        plot(read_rows(args.plot), args.out.with_suffix(".png"))
        return
    args.logs = args.logs or Path(tempfile.mkdtemp(prefix="vllm-lsa-serve-"))
    args.logs.mkdir(parents=True, exist_ok=True)
    lines = args.out.with_suffix(".jsonl")
    lines.parent.mkdir(parents=True, exist_ok=True)
    lines.write_text("")
    bandwidth = engines.measured_elsewhere("report.read_bandwidth('cuda', gib=4)")
    rows: list[dict[str, Any]] = []
    for name in args.configurations:
        with signals_raise():
            rows.append(measure(args, name, bandwidth))
        engines.emit(lines, rows[-1])
        stock = next((r["decode_tokens_per_s"] for r in rows if r["configuration"] == "stock"), None)
        for row in rows:
            row["decode_vs_stock"] = engines.rounded(row["decode_tokens_per_s"] / stock, 3) if stock else ""
        write_csv(args.out, rows, {"read bandwidth": f"{bandwidth:.0f} GB/s", "logs": args.logs})


if __name__ == "__main__":
    main()
