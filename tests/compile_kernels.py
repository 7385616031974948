"""`python -m tests.compile_kernels`: compile every Triton kernel for Hopper without a GPU, as the wrappers launch it;
with pages of e4m3, which Ampere reads by its bits, for that as well.

The interpreter takes what the compiler refuses, such as a variable that changes its shape in a loop.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)

import dataclasses
import importlib
import re
import sys
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import vllm_lsa.ops.early as launches

TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "launch_pdl")
compiled: set[str] = set()
capability = 90


def launch(kernel: JITFunction, *args: Any, **kwargs: Any) -> None:
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    if "WIDEN" in given:  # for the interpreter alone
        given["WIDEN"] = False
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for number, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[number,] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[number,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    rounded = re.findall(r"tt.dot .*inputPrecision = tf32 :.*xf32>", done.asm["ttir"])
    assert not rounded, f"{kernel.__name__} rounds fp32 to TF32: {rounded[0]}"
    compiled.add(f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}")


class Launcher:
    def __init__(self, kernel: JITFunction) -> None:
        self._kernel = kernel

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        launch(self._kernel, *args, **kwargs)


def main() -> None:
    launches.early = lambda device: dict.fromkeys(("EARLY", "launch_pdl"), capability >= 90)  # before others import it
    JITFunction.__getitem__ = lambda self, grid: Launcher(self)  # type: ignore[assignment]
    from tests.device_state import State
    from vllm_lsa.device.state import DeviceRefresh, DeviceTails
    from vllm_lsa.memory.geometry import KVGeometry
    from vllm_lsa.ops import encode_rows as encode
    from vllm_lsa.ops import index_logits as index
    from vllm_lsa.ops import missing_entries as missing
    from vllm_lsa.ops import renew_set as renew
    from vllm_lsa.ops import resident_decode as decode
    from vllm_lsa.ops import resident_rows as ops
    from vllm_lsa.ops import score_rows as score
    from vllm_lsa.ops.resident_decode import Arrivals, DecodeConfig, DecodeScratch

    # What the wrappers do on a GPU, with tensors that are on the CPU.
    for name in ("encode", "index_logits", "missing_entries", "score", "paged_decode"):
        importlib.import_module(f"vllm_lsa.kernels.{name}").INTERPRETED = True
    global capability
    decode.has_e4m3 = lambda device: capability >= 89
    bf16, fp32, e4m3 = torch.bfloat16, torch.float32, torch.uint8
    for dtype, pages_dtype, dim, lanes, target in (
        (bf16, bf16, 128, 8, 90), (fp32, fp32, 80, 1, 90), (bf16, e4m3, 128, 8, 90), (bf16, e4m3, 64, 1, 80),
        (fp32, e4m3, 80, 1, 80), (torch.float16, e4m3, 256, 1, 80),
    ):  # fmt: skip
        capability = target
        g = KVGeometry(2, 32, 8, dim, pages_dtype, 16, 16, lanes, model_dtype=dtype)
        s = State(g, [200, 0, 90], [True, False, False])
        pool, host = s.pools(g.dtype)
        q = torch.zeros(3, 32, dim, dtype=dtype)
        k = torch.zeros(3, 8, dim, dtype=dtype)
        queries = torch.zeros(3, 2, 32, dim, dtype=dtype)
        refresh = DeviceRefresh.empty(5, len(s.sets.chunk), g, torch.device("cpu"))
        page, offset = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)
        tails = DeviceTails.empty(3, g, torch.device("cpu"))
        ops.write_rows(q, k, k, pool, host, s.rows, tails, 1, g, queries)
        ops.write_tokens(k, k, pool, host, page, offset, s.slot_of, 1, g)
        ops.advance(s.rows, s.sets, s.slot_of, tails, g)
        for chunks in (512, 9000):
            scratch = ops.DemandScratch.empty(3, 8, len(s.sets.chunk), g, torch.device("cpu"), chunks)
            ops.pick(s.rows, s.sets, scratch, 1, g, pool, host, threshold=0.01, decay=0.7)
            ops.settle(s.rows, s.sets, scratch, g, sink=1, recency=2)
        ops.refresh(s.rows, s.sets, refresh, g, sink=1, recency=2, most_used=0.01)
        lengths = np.full(g.num_lanes, 9)
        renew.renew_set(
            torch.zeros(1, 12), s.sets, refresh, 0, s.rows.block_table, 0, lengths, lengths, g, threshold=0.0, sink=1,
            recency=2, first=True, copy_tail=True, incoming=torch.zeros(1, dtype=torch.int64),
        )  # fmt: skip
        ops.fetch(pool, host, scratch.page, scratch.slot)
        ops.fetch(pool, host, scratch.page, scratch.slot, 2)
        ops.gather_history(pool, host, s.rows.block_table[0], s.slot_of, k, k, 0, 1, 1, g, 16)
        for codec in (None, encode.ProductCodec(
            torch.zeros(2, 8, dim, dim), torch.zeros(2, 8, dim), torch.zeros(2, 8, 16, 256, dim // 16))):  # fmt: skip
            size = dim * dtype.itemsize if codec is None else 16 * 16
            cells = torch.zeros(s.num_blocks, 8, 1, size, dtype=torch.uint8)
            decoded = pool, host, s.rows, s.slot_of, s.sets, encode.LayerCells([cells, cells])
            encode.encode_decoded(*decoded, g, codec, torch.ones(2))
            if codec is None:
                every = torch.zeros(2, *scratch.logits.shape)
                score.score_layers(queries, decoded[-1], s.rows, s.sets, 16, 0.1, every)
            own = encode.of_layer(codec, 1)
            encode.encode_pages(host, page, offset, offset, cells, 1, g, own)
            encode.encode_chunks(k, offset, offset, offset, cells, 16, own)
            tables: dict[str, Any] = {}
            if own is not None:
                room = score.score_scratch(3, 32, 8, 16, torch.device("cpu"), "triton")
                tables = {"to_query": own.to_code, "centroids": own.centroids, "scratch": room}
            score.score_rows(q, cells, s.rows, s.sets, 16, 0.1, scratch.logits, **tables)
        page = torch.full((3, lanes, 3), -1)
        new = Arrivals(page, page.int())
        for splits, rows, arrivals in ((1, 1, None), (4, 1, None), (4, 3, None), (1, 1, new), (64, 3, new)):
            config = dataclasses.replace(DecodeConfig.default(g, rows, arrivals is not None), splits=splits)
            room = DecodeScratch.empty(3, g, 1024, torch.device("cpu"), config)
            decode.resident_decode(
                q, pool, host, s.rows, s.slot_of, s.sets, 1, g, 0.1, torch.zeros_like(q), room, arrivals=arrivals
            )
    capability = 90
    pages, table = torch.zeros(2, 8640, dtype=torch.uint8)[:, : index.PAGE_BYTES], torch.zeros(3, 2, dtype=torch.int32)
    for native in (True, False):
        index.has_e4m3 = lambda device, native=native: native
        for heads, dtype, fp8 in (
            (16, torch.float8_e4m3fn, None), (64, torch.float8_e4m3fn, None), (128, torch.float8_e4m3fn, None),
            (128, torch.float8_e4m3fn, False), (64, torch.bfloat16, None), (128, torch.bfloat16, None),
            (64, torch.float16, None), (64, torch.float32, None),
        ):  # fmt: skip
            query, weights = torch.zeros(3, heads, 128).to(dtype), torch.zeros(3, heads)
            index.index_logits(query, weights, pages, table, table[:, 0].contiguous(), torch.zeros(3, 100), fp8)
    chosen, named = torch.zeros(3, 512, dtype=torch.int32), torch.zeros(2, 3, 10, dtype=torch.int32)
    pool, store = torch.zeros(4, 37440, dtype=torch.uint8), torch.zeros(2, 2, 37440, dtype=torch.uint8)
    counts = torch.zeros(2, dtype=torch.int64)
    missing.read_missing(chosen, named[0, :, 0].contiguous(), table, named, 1, pool, store, chosen.clone(), counts)
    print("compiled", *sorted(compiled))
    sys.exit(len(compiled) < 10)


if __name__ == "__main__":
    main()
