"""A hunt for races on a CUDA device: `python -m benchmarks.race_hunt --generations 10000`.

The same requests in the same order by two engines side by side: one as it is served (asynchronous scheduling, CUDA
graphs, copies on streams of their own), one that waits for every launch (CUDA_LAUNCH_BLOCKING; with --eager, for every
kernel). A small pool, poisoned slots and shared prefixes; SmolLM2 in fp32. Every token has to be the same: a read that
came too early finds NaN or what was there before. Differences are printed with their request; the status is 1 if there
are any.
"""

import argparse
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm


def requests(count: int, seed: int, vocabulary: int = 49152) -> list[list[int]]:
    """Prompts of 20 to 900 random tokens; each third one begins as one of eight others do."""
    rng = np.random.default_rng(seed)
    prefixes = [rng.integers(0, vocabulary, 320).tolist() for _ in range(8)]
    prompts = []
    for number in range(count):
        own = rng.integers(0, vocabulary, int(rng.integers(20, 580))).tolist()
        prompts.append(prefixes[number % 8] + own if number % 3 == 0 else own)
    return prompts


def generate(args: argparse.Namespace) -> None:
    """All generations on one engine, in this process."""
    from vllm import LLM, SamplingParams

    settings = {"budget": 0.2, "period": 16, "check": "poison", "device_pool_gib": args.pool_gib, "demand": args.demand}
    with (args.out.parent / "turn").open("w") as turn:
        # vLLM refuses to start where another gives memory back meanwhile.
        fcntl.flock(turn, fcntl.LOCK_EX)
        llm = LLM(
            args.model,
            dtype="float32",
            attention_backend="LSA",
            additional_config={"lsa": settings},
            enforce_eager=args.eager,
            max_model_len=1024,
            max_num_seqs=args.batch,
            max_num_batched_tokens=2048,
            gpu_memory_utilization=0.3,
            seed=0,
        )
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True, detokenize=False)
    engine, waiting = llm.llm_engine, list(enumerate(requests(args.generations, args.seed)))
    found: dict[str, list[int]] = {}
    running, progress = 0, tqdm(total=args.generations, mininterval=5, desc="eager" if args.eager else "graphs")
    while (waiting or engine.has_unfinished_requests()) and time.monotonic() < args.until:
        # By the engine's own steps, so that both runs schedule alike.
        while waiting and running < args.batch:
            number, prompt = waiting.pop(0)
            engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
            running += 1
        for output in engine.step():
            if output.finished:
                found[output.request_id] = list(output.outputs[0].token_ids)
                running -= 1
                progress.update()
    args.out.write_text(json.dumps(found))


def start(until: float, blocking: bool, out: Path) -> subprocess.Popen[bytes]:
    options = ["--only", "--out", str(out), "--until", repr(until)]
    command = [sys.executable, "-m", "benchmarks.race_hunt", *sys.argv[1:], *options]
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    if blocking:
        env["CUDA_LAUNCH_BLOCKING"] = "1"
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".model/SmolLM2-135M-Instruct")
    parser.add_argument("--generations", type=int, default=10000)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each generation")
    parser.add_argument("--batch", type=int, default=64, help="requests at a time")
    parser.add_argument("--pool-gib", type=float, default=0.1, help="device pool: far less than the requests' chunks")
    parser.add_argument("--demand", default="mean_key")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs, both engines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="stop after that, start-up included, and compare what both have finished",
    )
    parser.add_argument("--only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        return generate(args)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "served.json", Path(folder) / "waited.json"]
        until = time.monotonic() + args.seconds  # the same clock in all processes
        running = [start(until, blocking, out) for blocking, out in zip((False, True), files, strict=True)]
        if failed := [process.args for process in running if process.wait()]:
            sys.exit(f"failed: {failed}")
        served, waited = (json.loads(out.read_text()) for out in files)
    print(f"{time.perf_counter() - begin:.0f} s")
    both = served.keys() & waited.keys()
    different = [name for name in both if served[name] != waited[name]]
    for name in different[:20]:
        print(f"request {name}: {served[name]} as served, {waited[name]} when waited for")
    print(f"{len(both)} generations of {args.tokens} tokens, {len(different)} different")
    sys.exit(bool(different) or (args.seconds == float("inf") and len(both) != args.generations))


if __name__ == "__main__":
    main()
