"""Copies of scattered chunks between pinned host memory and a CUDA device: `python -m benchmarks.transfer`.

Compared, for chunks of some sizes in some numbers, in both directions:

- LSA: `resident_rows.fetch`, by how many programs share the list (all: one each), in a CUDA graph;
- one `copy_` of as many contiguous bytes: what the link gives, the floor of the same row;
- one `copy_` per chunk, for few chunks;
- vLLM's `swap_blocks_batch` (driver's batched copies), and its Triton kernel for small chunks, where it has them.

Then, by number of programs, how much an elementwise kernel over device memory on another stream is slowed while chunks
are fetched, and how much the fetch is. Every method is checked before it is timed. Times are medians.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import RESULTS, machine, pyplot, read_rows, write_csv

PROGRAMS = (4, 8, 16, 32, 64, 132, None)
Call = Callable[[int], None]


class Pages:
    """Host and device memory as pages of `size` bytes, and lists of random pages and slots to copy between."""

    def __init__(self, host: torch.Tensor, device: torch.Tensor, size: int, count: int, lists: int) -> None:
        """host, device: bf16, flat. lists: how many; no two calls in turn move the same pages."""
        self.host, self.device = (x[: len(x) // (size // 2) * (size // 2)].view(-1, size // 2) for x in (host, device))
        self.size, self.count, self.lists = size, count, lists
        self.page, self.slot = (
            [torch.randperm(len(x))[:count].to(dtype) for _ in range(lists)]
            for x, dtype in ((self.host, torch.int64), (self.device, torch.int32))
        )
        self.page_gpu = [x.cuda() for x in self.page]
        self.slot_gpu = [x.cuda() for x in self.slot]

    def fetch(self, to_device: bool, programs: int | None) -> Call:
        from vllm_lsa.ops.resident_rows import fetch

        if to_device:
            return lambda i: fetch(self.device, self.host, self.page_gpu[i], self.slot_gpu[i], programs)
        pages = [(s.long(), p.int()) for s, p in zip(self.slot_gpu, self.page_gpu, strict=True)]
        return lambda i: fetch(self.host, self.device, *pages[i], programs)

    def one_copy(self, to_device: bool) -> Call:
        host, device = self.host[: self.count], self.device[: self.count]
        target, source = (device, host) if to_device else (host, device)
        return lambda i: _copy(target, source)

    def copies(self, to_device: bool) -> Call:
        pairs = [list(zip(p.tolist(), s.tolist(), strict=True)) for p, s in zip(self.page, self.slot, strict=True)]

        def call(i: int) -> None:
            for page, slot in pairs[i]:
                target, source = self.device[slot], self.host[page]
                _copy(target, source) if to_device else _copy(source, target)

        return call

    def addresses(self, to_device: bool) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Sources, targets and sizes as vLLM wants them, int64 on the CPU."""
        found = []
        for page, slot in zip(self.page, self.slot, strict=True):
            host = self.host.data_ptr() + page * self.size
            device = self.device.data_ptr() + slot.long() * self.size
            sizes = torch.full_like(host, self.size)
            found.append((host, device, sizes) if to_device else (device, host, sizes))
        return found

    def batched(self, to_device: bool) -> Call | None:
        try:
            from vllm._custom_ops import swap_blocks_batch
        except ImportError as error:
            _say_once(f"swap_blocks_batch: skipped, {error}")
            return None
        lists = self.addresses(to_device)
        return lambda i: swap_blocks_batch(*lists[i])

    def batched_triton(self, to_device: bool) -> Call | None:
        try:
            from vllm.v1.kv_offload.cpu.swap_blocks_triton import swap_blocks_batch
        except ImportError as error:
            _say_once(f"vLLM's Triton kernel: skipped, {error}")
            return None
        lists = self.addresses(to_device)
        return lambda i: swap_blocks_batch(*lists[i], bytes_per_chunk=self.size)

    def check(self, call: Call, to_device: bool, contiguous: bool) -> bool:
        """Whether the first list arrives, bit for bit, over memory that held something else."""
        page, slot = (torch.arange(self.count),) * 2 if contiguous else (self.page[0], self.slot[0].long())
        target, at = (self.device, slot) if to_device else (self.host, page)
        target[at.to(target.device)] = -1
        call(0)
        torch.cuda.synchronize()
        same = torch.equal(self.device[slot.cuda()].cpu().view(torch.int16), self.host[page].view(torch.int16))
        return same and bool((target[at[:1].to(target.device)] != -1).any())


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)


_said: set[str] = set()


def _say_once(line: str) -> None:
    if line not in _said:
        _said.add(line)
        print(line, flush=True)


def milliseconds(work: Callable[[], Any], repeats: int) -> float:
    """Median time of work on the current stream."""
    times = []
    for _ in range(repeats + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:])


def captured(call: Call, lists: int) -> Callable[[], Any]:
    """A CUDA graph of one call per list."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(lists):
            call(i)
    return graph.replay


def bandwidth(args: argparse.Namespace, host: torch.Tensor, device: torch.Tensor) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for to_device in (True, False):
        for size in args.sizes:
            for count in args.counts:
                size_bytes = size << 10
                if size_bytes * count > host.nbytes // 2:
                    print(f"{count} chunks of {size} KiB: skipped, they are more than half of --gib")
                    continue
                lists = max(1, min(8, (64 << 20) // (size_bytes * count)))
                case = Pages(host, device, size_bytes, count, lists)
                rows += compare(args, case, to_device)
    return rows


def compare(args: argparse.Namespace, case: Pages, to_device: bool) -> list[dict[str, Any]]:
    """All methods on the same lists."""
    methods: list[tuple[str, str, Call | None]] = [("one copy", "", case.one_copy(to_device))]
    if case.count <= args.single:
        methods.append(("copy per chunk", "", case.copies(to_device)))
    methods.append(("swap_blocks_batch", "", case.batched(to_device)))
    if to_device:
        methods.append(("vLLM Triton", "", case.batched_triton(to_device)))
    for number in PROGRAMS:
        if number is None or number < case.count:
            methods.append(("LSA fetch", str(number or "all"), case.fetch(to_device, number)))
    rows: list[dict[str, Any]] = []
    floor = 0.0
    direction = "host to device" if to_device else "device to host"
    for method, programs, call in methods:
        if call is None:
            continue
        try:
            right = case.check(call, to_device, method == "one copy")
        except (RuntimeError, ValueError, AttributeError, NotImplementedError) as error:
            _say_once(f"{method}, {direction}: skipped, {type(error).__name__}: {str(error)[:200]}")
            continue
        if not right:
            sys.exit(f"{method} ({programs}), {direction}, {case.count} chunks of {case.size} bytes: wrong result")

        def work(call: Call = call) -> None:
            for i in range(case.lists):
                call(i)

        run = captured(call, case.lists) if method == "LSA fetch" else work
        time = milliseconds(run, args.repeats) / case.lists * 1e3
        floor = floor or time
        nbytes = case.size * case.count
        row = {
            "what": direction,
            "method": method,
            "programs": programs,
            "chunk_kib": case.size >> 10,
            "count": case.count,
            "us": round(time, 2),
            "gb_per_s": round(nbytes / time / 1e3, 2),
            "floor_us": round(floor, 2),
            "times_floor": round(time / floor, 3),
            "slowdown": "",
        }
        rows.append(row)
        print(", ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)
    return rows


def beside(args: argparse.Namespace, host: torch.Tensor, device: torch.Tensor) -> list[dict[str, Any]]:
    """What a fetch and a kernel that is bound by device memory do to each other."""
    a, b = torch.ones(2, 1 << 28, device="cuda")  # 1 GiB each
    other = torch.cuda.Stream()
    rows: list[dict[str, Any]] = []
    for size in args.beside_sizes:
        count = min(host.nbytes // 2, 1 << 29) // (size << 10)
        case = Pages(host, device, size << 10, count, 1)

        def busy(times: int) -> None:
            for _ in range(times):
                torch.add(a, 1.0, out=b)

        once = milliseconds(lambda: busy(8), args.repeats) / 8
        for programs in PROGRAMS:
            fetch = captured(case.fetch(True, programs), 1)
            alone = milliseconds(fetch, args.repeats)
            kernels = max(1, int(alone * 0.6 / once))  # they end before the fetch does
            quiet = milliseconds(functools.partial(busy, kernels), args.repeats)

            def kernels_beside(fetch: Callable[[], Any] = fetch, kernels: int = kernels) -> float:
                torch.cuda.synchronize()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                with torch.cuda.stream(other):
                    fetch()
                start.record()
                busy(kernels)
                end.record()
                torch.cuda.synchronize()
                return start.elapsed_time(end)

            def fetch_beside(fetch: Callable[[], Any] = fetch, kernels: int = kernels) -> float:
                torch.cuda.synchronize()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                busy(1)
                with torch.cuda.stream(other):
                    start.record()
                    fetch()
                    end.record()
                busy(4 * kernels)
                torch.cuda.synchronize()
                return start.elapsed_time(end)

            slowed = statistics.median(kernels_beside() for _ in range(args.repeats))
            fetched = statistics.median(fetch_beside() for _ in range(args.repeats))
            row = {
                "what": "host to device beside a kernel",
                "method": "LSA fetch",
                "programs": str(programs or "all"),
                "chunk_kib": size,
                "count": count,
                "us": round(fetched * 1e3, 1),
                "gb_per_s": round(case.size * count / fetched / 1e6, 2),
                "floor_us": round(alone * 1e3, 1),
                "times_floor": round(fetched / alone, 3),
                "slowdown": round(slowed / quiet, 3),
            }
            rows.append(row)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Host to device by count, a panel for each chunk size; and what a kernel beside a fetch suffers."""
    plt = pyplot()
    sizes = sorted({int(r["chunk_kib"]) for r in rows if r["what"] == "host to device"})
    figure, axes = plt.subplots(1, len(sizes) + 1, figsize=(3.4 * (len(sizes) + 1), 3.6))
    for axis, size in zip(axes, sizes, strict=False):
        lines: dict[str, list[tuple[float, float]]] = {}
        for r in rows:
            if r["what"] == "host to device" and int(r["chunk_kib"]) == size:
                label = f"{r['method']} {_whole(r['programs'])}".strip()
                lines.setdefault(label, []).append((r["count"], r["gb_per_s"]))
        for label, points in lines.items():
            style = {} if label.startswith("LSA") else {"linestyle": "--", "color": "grey", "alpha": 0.7}
            axis.plot(*zip(*points, strict=True), marker=".", label=label, **style)
        axis.set(xscale="log", title=f"chunks of {size} KiB", xlabel="chunks", ylabel="GB/s", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=6)
    last = axes[-1]
    for size in sorted({int(r["chunk_kib"]) for r in rows if r["slowdown"] != ""}):
        mine = [r for r in rows if r["slowdown"] != "" and int(r["chunk_kib"]) == size]
        last.plot([_whole(r["programs"]) for r in mine], [r["slowdown"] for r in mine], marker="o", label=f"{size} KiB")
    last.set(title="kernel beside a fetch", xlabel="programs", ylabel="times its time alone", ylim=(0.9, None))
    last.legend(fontsize=7)
    last.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _whole(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16, 64], help="KiB of a chunk")
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 16, 64, 256, 1024, 4096, 16384])
    parser.add_argument("--beside-sizes", type=int, nargs="+", default=[8, 64], help="KiB, for the last part")
    parser.add_argument("--single", type=int, default=256, help="most chunks that are copied one by one")
    parser.add_argument("--gib", type=float, default=2.0, help="host and device memory to copy between")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "transfer.csv")
    parser.add_argument("--plot", type=Path, nargs="+", metavar="CSV", help="measure nothing: plot into --out's PNG")
    args = parser.parse_args()
    if args.plot:
        plot(read_rows(args.plot), args.out.with_suffix(".png"))
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks.transfer needs a CUDA device")
    torch.manual_seed(0)
    elements = int(args.gib * 2**30) // 4 * 2
    host = torch.empty(elements, dtype=torch.bfloat16, pin_memory=True)
    device = torch.empty(elements, dtype=torch.bfloat16, device="cuda")
    for x, first in ((host, 0), (device, 1 << 30)):  # no two pages are alike
        torch.arange(first, first + elements // 2, dtype=torch.int32, device=x.device, out=x.view(torch.int32))
    print(machine(), flush=True)
    rows = bandwidth(args, host, device)
    write_csv(args.out, rows, {"floor": "one copy of as many bytes; beside a kernel: the same fetch alone"})
    rows += beside(args, host, device)
    write_csv(args.out, rows, {"floor": "one copy of as many bytes; beside a kernel: the same fetch alone"})


if __name__ == "__main__":
    main()
