"""Decode attention of one layer on a CUDA device, beside FlashAttention 3 and xformers: `python -m benchmarks.kernels`.

Random resident sets of the share `--budget` for `--batch` requests of `--context` tokens, in bf16. Compared are

- LSA: `resident_decode` on those sets, and on whole rows;
- FlashAttention 3 of vLLM on the same slots, a sequence for each row and KV head, and dense over the full context;
- xformers' Triton split-K kernel on the same slots, where xformers is installed.

Each is a CUDA graph of one call per layer, over enough layers that L2 serves no reads, and is checked before it is
timed: its distance from the naive twin, or from attention in fp32, must be under 1 % of the latter's norm. Times are
the median of 20 replays, per call. The floor is the bytes of K, V and tables at the read bandwidth measured here.
`--sweep` times LSA's kernel in many launch configurations as well.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.report import RESULTS, read_bandwidth, write_csv
from vllm_lsa.device.state import PAGE, DeviceRows, DeviceSets
from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.ops.resident_decode import DecodeConfig, DecodeScratch, resident_decode, resident_decode_naive

DEVICE = torch.device("cuda")
COLD_BYTES = 2**29  # several times the L2 of any device so far


class Case:
    """Rows of one length over a pool of their own, for `layers` layers that are timed in turn."""

    def __init__(self, args: argparse.Namespace, budget: float | None) -> None:
        """budget: share of the chunks that each lane keeps; None for whole rows."""
        self.length, self.chunk, n = args.context, args.chunk, args.batch
        total = -(-args.context // args.chunk)
        self.kept = total if budget is None else max(1, round(budget * total))
        page_bytes = 2 * args.chunk * args.dim * 2
        layer_bytes = n * args.kv_heads * self.kept * page_bytes
        self.layers = max(2, min(64, -(-COLD_BYTES // layer_bytes)))
        self.geometry = g = KVGeometry(
            self.layers, args.q_heads, args.kv_heads, args.dim, torch.bfloat16, args.chunk, args.chunk, args.kv_heads
        )
        self.scale = args.dim**-0.5
        num_slots = n * g.num_lanes * self.kept
        self.pool = torch.randn(num_slots, *g.page_shape, dtype=g.dtype, device=DEVICE)
        # Larger than 1, so that attention is not an average over everything, which would hide mistakes.
        self.q = 3 * torch.randn(n, args.q_heads, args.dim, dtype=g.dtype, device=DEVICE)
        self.out = torch.empty_like(self.q)
        slots = torch.randperm(num_slots, device=DEVICE).to(torch.int32).view(n, g.num_lanes, self.kept)
        self.slots = slots
        row_pages = -(-self.kept // PAGE)
        self.sets = DeviceSets.empty(n, row_pages, n * row_pages, g, DEVICE)
        if budget is None:
            # Never read, since all has slots: pages that are not touched take no memory.
            self.host_pages = torch.empty(n * total * g.num_lanes, *g.page_shape, dtype=g.dtype)
            blocks = torch.randperm(n * total, device=DEVICE).to(torch.int32).view(n, total)
            self.slot_of = torch.empty(n * total * g.num_lanes, dtype=torch.int32, device=DEVICE)
            pages = blocks.long()[:, None] * g.num_lanes + torch.arange(g.num_lanes, device=DEVICE)[:, None]
            self.slot_of[pages] = slots
        else:
            # Rows share the blocks that are read from the host, which are few.
            host_blocks = total if args.host_read else 1
            host = torch.randn(host_blocks * g.num_lanes, *g.page_shape, dtype=g.dtype)
            self.host_pages = host.pin_memory()
            blocks = torch.arange(total, dtype=torch.int32, device=DEVICE).expand(n, total).contiguous()
            self.slot_of = torch.full((len(host),), -1, dtype=torch.int32, device=DEVICE)
            away = torch.rand(slots.shape, device=DEVICE) < args.host_read
            chunks = torch.rand(n, g.num_lanes, total - 1, device=DEVICE).argsort(-1)[..., : self.kept - 1]
            tail = torch.full_like(chunks[..., :1], total - 1) if total > 1 else slots[..., :1] * 0
            for buffer, entries in (
                (self.sets.slot, slots.masked_fill(away, -1)),
                (self.sets.chunk, torch.cat([chunks, tail], -1).to(torch.int32)),
            ):
                padded = F.pad(entries, (0, row_pages * PAGE - self.kept)).view(n, g.num_lanes, row_pages, PAGE)
                buffer.copy_(padded.transpose(1, 2).flatten(0, 1))
            self.sets.pages.copy_(torch.arange(n * row_pages, device=DEVICE).view(n, row_pages))
            self.sets.counts.fill_(self.kept)
        state = torch.arange(n, device=DEVICE) if budget is not None else torch.full((n,), -1, device=DEVICE)
        self.rows = DeviceRows(
            token=torch.arange(n, dtype=torch.int32, device=DEVICE),
            length=torch.full((n,), self.length, dtype=torch.int32, device=DEVICE),
            state=state.to(torch.int32),
            query_row=torch.arange(n, dtype=torch.int32, device=DEVICE),
            block_table=blocks,
        )
        self.bytes = layer_bytes + 8 * n * args.kv_heads * self.kept

    def operands(self, layer: int) -> dict[str, Any]:
        return {
            "q": self.q,
            "pool": self.pool,
            "host_pages": self.host_pages,
            "rows": self.rows,
            "slot_of": self.slot_of,
            "sets": self.sets,
            "layer": layer,
            "geometry": self.geometry,
            "scale": self.scale,
            "out": self.out,
        }

    def twin(self, layer: int = 0) -> torch.Tensor:
        want = torch.empty_like(self.q, dtype=torch.float32)
        resident_decode_naive(**self.operands(layer) | {"out": want})
        return want

    def lsa(self, config: DecodeConfig | None = None) -> Callable[[int], torch.Tensor]:
        scratch = DecodeScratch.empty(len(self.q), self.geometry, self.length, DEVICE, config)

        def call(layer: int) -> torch.Tensor:
            resident_decode(**self.operands(layer), scratch=scratch, max_length=self.kept * self.chunk)
            return self.out

        return call

    def sequences(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Slots int32 [n * Hkv, kept] and lengths int32 [n * Hkv] of a layer, one row per KV head, and the longest."""
        g = self.geometry
        table = self.slots[:, layer * g.layer_lanes : (layer + 1) * g.layer_lanes].reshape(-1, self.kept).contiguous()
        length = (self.kept - 1) * self.chunk + (self.length - 1) % self.chunk + 1
        return table, torch.full((len(table),), length, dtype=torch.int32, device=DEVICE), length


def flash_attention() -> Callable[..., torch.Tensor] | None:
    """vLLM's `flash_attn_varlen_func`, None with a line said where it has no version 3."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
        from vllm.vllm_flash_attn.flash_attn_interface import fa_version_unsupported_reason, is_fa_version_supported
    except ImportError as error:
        print(f"FlashAttention 3: skipped, {error}")
        return None
    if not is_fa_version_supported(3):
        print(f"FlashAttention 3: skipped, {fa_version_unsupported_reason(3)}")
        return None
    return flash_attn_varlen_func


def flash_on_slots(case: Case, attend: Callable[..., torch.Tensor]) -> Callable[[int], torch.Tensor]:
    """FlashAttention 3 over the same slots: every KV head of a row is a sequence with one KV head."""
    g = case.geometry
    keys, values = (case.pool[:, i].transpose(1, 2) for i in (0, 1))  # [S, C, 1, D]
    layers = [case.sequences(layer) for layer in range(case.layers)]
    n = len(layers[0][0])
    starts = torch.arange(n + 1, dtype=torch.int32, device=DEVICE)

    def call(layer: int) -> torch.Tensor:
        table, lengths, longest = layers[layer]
        return attend(
            case.q.view(n, -1, g.head_dim),
            keys,
            values,
            max_seqlen_q=1,
            cu_seqlens_q=starts,
            max_seqlen_k=longest,
            seqused_k=lengths,
            block_table=table,
            softmax_scale=case.scale,
            fa_version=3,
        ).view(case.q.shape)

    return call


def xformers_on_slots(case: Case) -> Callable[[int], torch.Tensor]:
    """xformers' split-K kernel over the same slots."""
    from xformers.ops import fmha
    from xformers.ops.fmha.attn_bias import PagedBlockDiagonalPaddedKeysMask as Mask

    g, chunk = case.geometry, case.chunk
    # Its blocks must divide a page, and its pages be one behind the other: K and V are two views of the pool as pages
    # of one chunk, of which every other one is the view's own.
    op = type("SplitK", (fmha.triton_splitk.FwOp,), {"BLOCK_N": chunk})
    tokens = (2 * len(case.pool) - 1) * chunk
    size, stride = (1, tokens, 1, g.num_q_heads // g.num_kv_heads, g.head_dim), (0, g.head_dim, 0, 0, 1)
    keys, values = (case.pool.as_strided(size, stride, i * chunk * g.head_dim) for i in (0, 1))
    masks = []
    for layer in range(case.layers):
        table, lengths, _ = case.sequences(layer)
        masks.append(Mask.from_seqlens([1] * len(table), lengths.tolist(), 2 * table, chunk, device=DEVICE))

    def call(layer: int) -> torch.Tensor:
        q = case.q.view(1, -1, 1, size[3], g.head_dim)
        out = fmha.memory_efficient_attention_forward(q, keys, values, masks[layer], scale=case.scale, op=op)
        return out.view(case.q.shape)

    return call


class Dense:
    """FlashAttention 3 over the full context, in vLLM's layout: pages of `chunk` tokens with all KV heads."""

    def __init__(self, args: argparse.Namespace, attend: Callable[..., torch.Tensor]) -> None:
        n, pages = args.batch, -(-args.context // args.chunk)
        self.bytes = 4 * n * args.context * args.kv_heads * args.dim
        self.layers = max(2, min(64, -(-COLD_BYTES // self.bytes)))
        shape = (self.layers, 2, n * pages, args.chunk, args.kv_heads, args.dim)
        self.cache = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)
        self.q = 3 * torch.randn(n, args.q_heads, args.dim, dtype=torch.bfloat16, device=DEVICE)
        self.table = torch.randperm(n * pages, device=DEVICE).to(torch.int32).view(n, pages)
        self.lengths = torch.full((n,), args.context, dtype=torch.int32, device=DEVICE)
        self.starts = torch.arange(n + 1, dtype=torch.int32, device=DEVICE)
        self.attend, self.length = attend, args.context

    def __call__(self, layer: int) -> torch.Tensor:
        return self.attend(
            self.q,
            self.cache[layer, 0],
            self.cache[layer, 1],
            max_seqlen_q=1,
            cu_seqlens_q=self.starts,
            max_seqlen_k=self.length,
            seqused_k=self.lengths,
            block_table=self.table,
            softmax_scale=self.q.shape[-1] ** -0.5,
            fa_version=3,
        )

    def twin(self) -> torch.Tensor:
        out = torch.empty_like(self.q, dtype=torch.float32)
        for row, table in enumerate(self.table.long()):
            keys, values = (x[table].flatten(0, 1)[: self.length].float() for x in self.cache[0])
            q = self.q[row].float().view(keys.shape[1], -1, keys.shape[2])
            weights = (torch.einsum("hgd,thd->hgt", q, keys) * keys.shape[2] ** -0.5).softmax(-1)
            out[row] = torch.einsum("hgt,thd->hgd", weights, values).flatten(0, 1)
        return out


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


def microseconds(call: Callable[[int], torch.Tensor], layers: int, repeats: int) -> float:
    """Median time of one call, over replays of a graph that calls each layer in turn at least 8 times in all."""
    order = list(range(layers)) * -(-8 // layers)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for layer in order[:3]:
            call(layer)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in order:
            call(layer)
    for _ in range(3):
        graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) * 1e3 / len(order)


def configurations(base: DecodeConfig) -> Iterator[DecodeConfig]:
    """What a sweep tries of tiles, warps and stages."""
    shapes = [(32, 1), (32, 2), (64, 1), (64, 2), (64, 4), (128, 2), (128, 4), (128, 8)]
    for (tile, warps), stages in itertools.product(shapes, (2, 3, 4)):
        yield dataclasses.replace(base, tile=tile, warps=warps, stages=stages)


def describe(config: DecodeConfig) -> str:
    splits = config.splits or f"by {config.per_sm}/SM"
    order = ", interleaved" if config.interleaved else ""
    return f"tile {config.tile}, {config.warps} warps, {config.stages} stages, splits {splits}{order}"


class Report:
    """Checks and times calls, and keeps the rows."""

    def __init__(self, args: argparse.Namespace, bandwidth: float) -> None:
        self.args, self.bandwidth = args, bandwidth
        self.rows: list[dict[str, Any]] = []

    def add(
        self, name: str, config: str, call: Callable[[int], torch.Tensor], want: torch.Tensor, nbytes: int, layers: int
    ) -> float:
        """Microseconds of a call that reads `nbytes`; `want` is its result in layer 0."""
        error = distance(call(0), want)
        if not error < 1e-2:
            sys.exit(f"{name} ({config}) is wrong: its distance from the reference is {error:.3g} of the norm")
        time = microseconds(call, layers, self.args.repeats)
        floor = nbytes / self.bandwidth / 1e3
        row = {
            "kernel": name,
            "configuration": config,
            "context": self.args.context,
            "batch": self.args.batch,
            "mb_read": round(nbytes / 1e6, 1),
            "us": round(time, 1),
            "gb_per_s": round(nbytes / time / 1e3),
            "floor_us": round(floor, 1),
            "times_floor": round(time / floor, 3),
            "distance": float(f"{error:.2g}"),
        }
        self.rows.append(row)
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        return time


def on_budget(args: argparse.Namespace, report: Report, attend: Callable[..., torch.Tensor] | None) -> None:
    """Everything that attends to the resident sets."""
    from triton.runtime.errors import OutOfResources

    case = Case(args, args.budget)
    want, default = case.twin(), DecodeConfig.default(case.geometry, args.batch)

    def lsa(config: DecodeConfig) -> float:
        try:
            return report.add("LSA", describe(config), case.lsa(config), want, case.bytes, case.layers)
        except OutOfResources as error:
            print(f"{describe(config)}: skipped, {error}")
            return float("inf")

    lsa(default)
    if args.sweep:
        best = min(configurations(default), key=lsa)
        best = min((dataclasses.replace(best, per_sm=per_sm) for per_sm in (1, 2, 3, 4, 6, 8)), key=lsa)
        print(f"fastest: {describe(best)}")
    if args.host_read:
        print("FlashAttention 3 and xformers on the slots: skipped, they do not read from the host")
        return
    if attend:
        call = flash_on_slots(case, attend)
        report.add("FlashAttention 3, same slots", "", call, want, case.bytes, case.layers)
    if importlib.util.find_spec("xformers") is None:
        print("xformers: skipped, it is not installed")
        return
    try:
        call = xformers_on_slots(case)
        report.add("xformers split-K, same slots", "", call, want, case.bytes, case.layers)
    except (ImportError, NotImplementedError, ValueError, RuntimeError) as error:  # it is not what is measured
        print(f"xformers: skipped, {type(error).__name__}: {error}")


def in_full(args: argparse.Namespace, report: Report, attend: Callable[..., torch.Tensor] | None) -> None:
    """Everything that attends to the full context."""
    whole = Case(args, None)
    config = describe(DecodeConfig.default(whole.geometry, args.batch))
    report.add("LSA, whole rows", config, whole.lsa(), whole.twin(), whole.bytes, whole.layers)
    if attend:
        del whole
        dense = Dense(args, attend)
        report.add("FlashAttention 3, dense", "", dense, dense.twin(), dense.bytes, dense.layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=131072, help="tokens of each request")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--budget", type=float, default=0.135, help="share of the chunks that is resident")
    parser.add_argument("--host-read", type=float, default=0.0, help="share of the entries that is read from the host")
    parser.add_argument("--q-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sweep", action="store_true", help="LSA's kernel in many launch configurations")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.csv")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels needs a CUDA device")
    torch.manual_seed(0)
    bandwidth = read_bandwidth("cuda", gib=8)
    print(f"{torch.cuda.get_device_name()}, reads at {bandwidth:.0f} GB/s")
    report, attend = Report(args, bandwidth), flash_attention()
    on_budget(args, report, attend)
    in_full(args, report, attend)
    notes = {
        "read bandwidth": f"{bandwidth:.0f} GB/s",
        "shape": f"{args.q_heads}/{args.kv_heads} heads of {args.dim}, chunks of {args.chunk}, bf16",
        "resident": f"{args.budget:g} of the chunks, {args.host_read:g} of their entries read from the host",
    }
    write_csv(args.out, report.rows, notes)


if __name__ == "__main__":
    main()
