"""Decode speed of LSA beside the stock backend, by context length: `python -m benchmarks.decode`.

Each configuration runs in a process of its own, one after the other, on the same prompts. A row gives the median time
of a decode step, tokens/s, the bytes a step has to read (weights, K and V attended to, index), the rate that is, and
the ratio to the floor: those bytes at the bandwidth measured in this run. The stock backend comes first and last, so
that the drift of a shared machine shows.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.engines import lsa_engine
from benchmarks.report import RESULTS, machine, read_bandwidth, write_csv

CONFIGURATIONS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "LSA, all resident": {"budget": 1.0, "device_pool_fraction": 1.0},
    "LSA, lookahead + demand": {"device_pool_fraction": 0.05},
    "LSA, usage + 4-bit demand": {"indexer": "usage", "demand": "four_bit", "device_pool_fraction": 0.05},
    "stock again": None,
}


def measure(args: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """Decode on one configuration in this process."""
    from vllm import LLM, SamplingParams

    lsa = CONFIGURATIONS[name]
    backend = {} if lsa is None else {"attention_backend": "LSA", "additional_config": {"lsa": lsa}}
    llm = LLM(
        args.model,
        dtype=args.dtype,
        enforce_eager=args.eager,
        max_model_len=max(args.contexts) + args.tokens + 1,
        max_num_seqs=args.batch,
        gpu_memory_utilization=0.4,
        kv_cache_memory_bytes=args.kv_gib << 30,
        **backend,
    )
    tokens = llm.get_tokenizer()(Path(args.text).read_text())["input_ids"]
    tokens = tokens * (1 + (max(args.contexts) + args.batch) // len(tokens))
    engine = llm.llm_engine
    weights = sum(p.numel() * p.element_size() for p in llm.apply_model(parameters)[0])
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    rows = []
    for context in args.contexts:
        for i in range(args.batch):
            engine.add_request(f"{context}-{i}", {"prompt_token_ids": tokens[i : i + context]}, params)
        times, started = [], False
        shares: list[float] = []
        while engine.has_unfinished_requests():
            start = time.perf_counter()
            outputs = engine.step()
            if started:
                times.append(time.perf_counter() - start)
                shares.append(resident_share())
            started = started or (len(outputs) == args.batch and all(o.outputs[0].token_ids for o in outputs))
        step = statistics.median(times[1:])
        read = weights + args.batch * (context + args.tokens / 2) * token_bytes(llm) * statistics.mean(shares)
        rows.append(
            {
                "configuration": name,
                "context": context,
                "batch": args.batch,
                "step_ms": round(step * 1e3, 2),
                "tokens_per_s": round(args.batch / step, 2),
                "share_read": round(statistics.mean(shares), 3),
                "gb_per_s": round(read / step / 1e9, 2),
                "floor_ms": round(read / args.bandwidth / 1e6, 2),
                "times_floor": round(step / (read / args.bandwidth / 1e9), 2),
            }
        )
    return rows


def parameters(model: Any) -> list[Any]:
    return list(model.parameters())


def token_bytes(llm: Any) -> int:
    config = llm.llm_engine.vllm_config.model_config
    parallel = llm.llm_engine.vllm_config.parallel_config
    heads = config.get_num_kv_heads(parallel) * config.get_head_size()
    return 2 * config.get_num_layers(parallel) * heads * config.dtype.itemsize


def resident_share() -> float:
    """(resident + index) ÷ total of the live requests; 1.0 for the stock backend and with everything resident."""
    engine = lsa_engine()
    total, resident, index = engine.footprint() if engine else (0, 0, 0)
    return min(1.0, (resident + index) / total) if total else 1.0


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    for name in CONFIGURATIONS:
        mine = [row for row in rows if row["configuration"] == name]
        style = {"linestyle": "--", "color": "grey"} if name.startswith("stock") else {}
        axis.plot([r["context"] for r in mine], [r["tokens_per_s"] for r in mine], marker="o", label=name, **style)
    axis.set(xlabel="context (tokens)", ylabel="decode tokens/s", ylim=(0, None), title=machine())
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".model/SmolLM2-135M-Instruct")
    parser.add_argument("--text", default="vllm_lsa/demo/document.txt", help="what the prompts are cut from")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 8000])
    parser.add_argument("--tokens", type=int, default=96, help="decode steps measured per context")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--kv-gib", type=int, default=2, help="device memory for the KV cache of the stock backend")
    parser.add_argument("--out", type=Path, default=RESULTS / "decode.csv")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--bandwidth", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        json.dump(measure(args, args.only), args.out.open("w"))
        return
    bandwidth = read_bandwidth()
    rows: list[dict[str, Any]] = []
    cores = str(len(os.sched_getaffinity(0)))
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": cores}
    with tempfile.TemporaryDirectory() as folder:
        for name in tqdm(CONFIGURATIONS, desc="configurations"):
            part, log = Path(folder) / "part.json", Path(folder) / "log"
            command = [
                sys.executable,
                "-m",
                "benchmarks.decode",
                *sys.argv[1:],
                "--only",
                name,
                "--bandwidth",
                str(bandwidth),
            ]
            with log.open("w") as out:
                code = subprocess.call([*command, "--out", str(part)], env=env, stdout=out, stderr=out)
            if code:
                sys.exit(f"{name} failed:\n{log.read_text()[-3000:]}")
            rows += json.loads(part.read_text())
            for row in rows[-len(args.contexts) :]:
                tqdm.write(str(row))
    write_csv(args.out, rows, {"read bandwidth": f"{bandwidth:.1f} GB/s", "dtype": args.dtype})
    plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
