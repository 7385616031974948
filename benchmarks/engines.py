"""vLLM engines with dummy weights: stock FlashAttention and LSA, each with just the memory for what it is to hold, and
each in a process of its own."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import ranks as several
from benchmarks.report import RESULTS, write_csv
from benchmarks.shapes import SHAPES, Shape
from vllm_lsa.config import GIB, LsaConfig
from vllm_lsa.device.control import beside
from vllm_lsa.device.state import NEXT
from vllm_lsa.residency.shares import Shares

STEP_TOKENS = 8192
"""Most tokens of a step."""
WHOLE = 8192
"""Requests of at most as many tokens are to be resident as a whole."""
SPARE = 1.03
"""Slots of the pool, relative to those that sets need."""

CONFIGURATIONS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "lookahead": {"indexer": "mean_key", "demand": "off"},
    "quality": {"lookahead": "usage", "demand": "product"},
    "quality-fetch": {"lookahead": "usage", "demand": "product", "demand_threshold": 0.0},
    "refill": {"indexer": "random", "demand": "off"},
    "resident": {"demand": "off", "device_pool_fraction": 1.0},
}
ABOUT = """configurations:
  stock          vLLM's FLASH_ATTN
  lookahead      LSA, sets by mean keys, no demand
  quality        LSA, sets by usage, demand by product tables; random dummy keys hardly ever make it fetch
  quality-fetch  the same, but every KV head takes in all 8 chunks at every step: the most that demand can cost
  refill         the most that lookahead can copy: sets are drawn anew at random in every cycle
  resident       LSA, with a device pool as large as the host store"""


@dataclass(frozen=True)
class Load:
    """Requests at a time, and the tokens that each has in the end."""

    requests: int
    tokens: int


def lsa_settings(
    shape: Shape, name: str, loads: Sequence[Load], model: Path, extra: dict[str, Any], max_len: int, ranks: int = 1
) -> dict[str, Any]:
    """Settings of an LSA configuration with a host store and a device pool that are large enough for every load."""
    base = CONFIGURATIONS[name]
    assert base is not None
    demands = base["demand"] == "product"
    settings: dict[str, Any] = {"budget": shape.budgets[demands], **base}
    if demands:
        settings["indexer"] = str(shape.checkpoint(model))
    settings |= extra
    config = LsaConfig.parse({"lsa": settings})
    geometry = shape.geometry(config.layer_lanes(shape.kv_heads))
    blocks = max(geometry.blocks(max_len), *(load.requests * geometry.blocks(load.tokens) for load in loads)) + 2
    settings["host_memory_gib"] = (blocks + 0.5) * geometry.block_bytes / GIB
    if "device_pool_fraction" not in settings and "device_pool_gib" not in settings:
        slots = max(load.requests * _slots(config, geometry, load) for load in loads)
        settings["device_pool_gib"] = SPARE * slots * geometry.page_bytes / GIB / ranks
    LsaConfig.parse({"lsa": settings})
    return settings


def _slots(config: LsaConfig, geometry: Any, load: Load) -> int:
    """Slots of one request: a lane has some beside those of its set, see `DeviceControl`."""
    chunks = geometry.chunks(load.tokens + config.period)
    if load.tokens <= WHOLE:
        return geometry.num_lanes * (chunks + 1)
    caps = Shares(config, geometry, 0).caps(chunks)
    return int((caps + beside(config, caps) + NEXT).sum())


def stock_kv_bytes(shape: Shape, loads: Sequence[Load], max_len: int) -> int:
    geometry = shape.geometry()
    blocks = max(geometry.blocks(max_len), *(load.requests * geometry.blocks(load.tokens) for load in loads))
    spare = 1 + 8 * max(load.requests for load in loads)  # the null block, and blocks of up to 128 tokens
    return (blocks + spare) * geometry.block_bytes


def shape_of(args: argparse.Namespace) -> Shape:
    """The model that was asked for, with its KV cache as asked for."""
    return replace(SHAPES[args.shape], fp8=args.kv_cache_dtype == "fp8")


def make_llm(args: argparse.Namespace, name: str, loads: Sequence[Load], ranks: int = 1) -> Any:
    """The engine of a configuration, in this process; workers of several ranks are processes of their own."""
    from vllm import LLM

    shape = shape_of(args)
    model = shape.write()
    max_len = max(load.tokens for load in loads)
    if max_len > shape.max_positions:
        sys.exit(f"{max_len} tokens with those that are generated, but {shape.name} has {shape.max_positions}: do less")
    backend: dict[str, Any]
    if CONFIGURATIONS[name] is None:
        room = stock_kv_bytes(shape, loads, max_len) // ranks
        backend = {"attention_backend": "FLASH_ATTN", "kv_cache_memory_bytes": room}
    else:
        settings = lsa_settings(shape, name, loads, model, json.loads(args.lsa), max_len, ranks)
        print("LSA settings:", json.dumps(settings), flush=True)
        backend = {"attention_backend": "LSA", "additional_config": {"lsa": settings}}
    if ranks > 1:
        backend |= {"tensor_parallel_size": ranks, **several.ARGUMENTS}
    return LLM(
        str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=args.eager,
        max_model_len=max_len,
        max_num_seqs=max(load.requests for load in loads),
        max_num_batched_tokens=STEP_TOKENS,
        kv_cache_dtype=args.kv_cache_dtype,
        gpu_memory_utilization=0.9,
        enable_prefix_caching=False,
        seed=0,
        **backend,
    )


class Requests:
    """The requests of an engine: started, stepped and dropped together."""

    def __init__(self, llm: Any) -> None:
        self._engine = llm.llm_engine
        self._count = 0
        self.live: dict[str, int] = {}
        """Tokens that each has generated."""

    def add(self, prompts: Sequence[list[int]], max_tokens: int) -> float:
        """Seconds until all of them have their first token."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        start = time.perf_counter()
        for prompt in prompts:
            name = f"r{self._count}"
            self._count += 1
            self.live[name] = 0
            self._engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while not all(self.live.values()):
            self.step()
        return time.perf_counter() - start

    def step(self) -> int:
        """Returns how many requests got a token."""
        outputs = self._engine.step()
        for output in outputs:
            if output.request_id in self.live:
                self.live[output.request_id] += len(output.outputs[0].token_ids)
        return len(outputs)

    def decode(self, steps: int) -> list[float]:
        """Seconds between the tokens of `steps` steps in which every request gets one. vLLM has a step more under way,
        so what is between two returns is the time of a step, and nobody waits for the device in addition."""
        intervals: list[float] = []
        last = time.perf_counter()
        while len(intervals) < steps:
            if self.step() < len(self.live):
                continue
            now = time.perf_counter()
            intervals.append(now - last)
            last = now
        return intervals

    def drop(self) -> None:
        if self.live:
            self._engine.abort_request(list(self.live))
        self.live = {}
        for _ in range(4):  # what was under way
            self._engine.step()


def lsa_engine() -> Any:
    """The LSA engine in this process, None for the stock backend."""
    from vllm_lsa.plugin.runtime import DenseRuntime, Runtime

    if not Runtime._by_config:
        return None
    runtime = Runtime.latest()
    assert isinstance(runtime, DenseRuntime)  # the shapes here are of such models
    return runtime.engine


def skip_prompt_attention() -> None:
    """Prompts are read without attention to what came before the step, in this process, so that long ones take seconds.

    Their K and V are then other numbers, of which the time of a decode step knows nothing.
    """
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    from vllm_lsa.device.engine import DeviceEngine

    attend, plan_prefill = FlashAttentionImpl.forward, DeviceEngine._plan_prefill

    def forward(self: Any, layer: Any, q: Any, k: Any, v: Any, cache: Any, metadata: Any, **more: Any) -> Any:
        if metadata is not None and metadata.max_query_len > 1:
            return more["output"].zero_()  # K and V are written by another operation
        return attend(self, layer, q, k, v, cache, metadata, **more)

    def plan(self: Any, rows: Any, placed: Any) -> Any:
        found = plan_prefill(self, rows, placed)
        return replace(found, histories=[replace(history, tokens=0) for history in found.histories])

    FlashAttentionImpl.forward = forward
    DeviceEngine._plan_prefill = plan  # type: ignore[method-assign]


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def rounded(value: float, digits: int = 4) -> float:
    """To so many significant digits."""
    return float(f"{value:.{digits}g}")


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


# -- a process for each configuration ------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, stem: str, default: Sequence[str]) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument(
        "--only-configurations", nargs="+", choices=CONFIGURATIONS, default=list(default), dest="configurations"
    )
    parser.add_argument("--lsa", default="{}", help="JSON of settings for all LSA configurations, e.g. a budget")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto", help="of all configurations")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{stem}.csv")
    parser.add_argument("--logs", type=Path, help="folder to keep the engines' logs in")
    parser.add_argument(
        "--plot", type=Path, nargs="+", metavar="CSV", help="measure nothing: plot what was measured into --out's PNG"
    )
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--speed", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.set_defaults(ranks=1)


def emit(path: Path, row: dict[str, Any]) -> None:
    """Keep a row: it is on the disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)


def measured_elsewhere(expression: str, module: str = "report") -> float:
    """The number that an expression gives in another process, which leaves nothing on the device."""
    code = f"from benchmarks import {module}; print({expression})"
    return float(subprocess.check_output([sys.executable, "-c", code], text=True).split()[-1])


def run_all(
    module: str,
    args: argparse.Namespace,
    speed: float,
    finish: Callable[[list[dict[str, Any]]], None],
    notes: dict[str, Any],
) -> None:
    """Measure each configuration in a process of its own, `python -m module … --only NAME --speed SPEED`, which emits
    its rows to --out's .jsonl. The CSV is written anew after each of them; one that fails is reported and left out.

    finish: completes rows in place, such as by ratios between configurations.
    """
    lines = args.out.with_suffix(".jsonl")
    lines.parent.mkdir(parents=True, exist_ok=True)
    lines.write_text("")
    env = {
        **os.environ,
        **(several.ENVIRONMENT if args.ranks > 1 else {}),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        logs = args.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        for name in args.configurations:
            log, start = logs / f"{args.out.stem}-{name}.log", time.perf_counter()
            command = [sys.executable, "-m", module, *sys.argv[1:], "--only", name, "--speed", repr(speed)]
            with log.open("w") as out:
                code = subprocess.call(command, env=env, stdout=out, stderr=subprocess.STDOUT)
            print(f"{name}: {time.perf_counter() - start:.0f} s, status {code}", flush=True)
            if code:
                failed.append(name)
                tail = log.read_text(errors="replace").splitlines()[-40:]
                print("\n".join(line[:300] for line in tail), flush=True)
            rows = [json.loads(line) for line in lines.read_text().splitlines()]
            finish(rows)
            if rows:
                write_csv(args.out, rows, notes)
            for row in rows:
                if row["configuration"] == name:
                    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def against_stock(rows: list[dict[str, Any]], value: str, same: Sequence[str]) -> None:
    """Adds `vs_stock`: how many times as fast as stock in the same case, by the time in column `value`."""

    def case(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[key] for key in same)

    stock = {case(row): row[value] for row in rows if row["configuration"] == "stock"}
    for row in rows:
        row["vs_stock"] = rounded(stock[case(row)] / row[value], 3) if case(row) in stock else ""
