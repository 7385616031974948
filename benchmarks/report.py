"""What every benchmark leaves behind: a CSV that says when, where, with what and how it was measured."""

import csv
import datetime
import json
import platform
import shlex
import statistics
import sys
import time
import timeit
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> str:
    """The device in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names)} cores, {torch.backends.cpu.get_cpu_capability()}"


def versions() -> str:
    found = {}
    for name in ("vllm", "vllm-lsa", "torch", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(f"{name} {version}" for name, version in found.items())


def host_loop(repeats: int = 5) -> float:
    """Seconds that a fixed loop takes here: where it is slower than elsewhere, the host is, and what waits for it."""
    loop = "for i in range(200_000): total += i"
    return statistics.median(timeit.repeat(loop, "total = 0", repeat=repeats, number=1))


def read_bandwidth(device: str = "cpu", gib: float = 1.0, repeats: int = 5) -> float:
    """GB/s at which the device reads memory, best of several sums over a buffer that no cache holds."""
    data = torch.ones(int(gib * 2**30) // 4, device=device)
    best = 0.0
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        data.sum()
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, data.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def write_csv(path: Path, rows: list[dict[str, Any]], notes: dict[str, Any]) -> None:
    """Rows of one measurement, under comment lines with date, machine, versions, command and notes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "command": "python " + shlex.join(["-m", "benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
        **notes,
    }
    with path.open("w", newline="") as file:
        for name, value in facts.items():
            file.write(f"# {name}: {value}\n")
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read_rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Rows of CSV files of `write_csv`, or of files with one JSON object a line; numbers as floats."""
    rows: list[dict[str, Any]] = []
    for path in paths:
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        rows += map(json.loads, lines) if path.suffix == ".jsonl" else csv.DictReader(lines)
    return [{key: _number(value) for key, value in row.items()} for row in rows]


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def pyplot() -> Any:
    """matplotlib.pyplot that needs no display. Ends the program with one line where there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("plots need matplotlib: pip install matplotlib, or plot the CSV where it is installed")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
