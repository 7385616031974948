"""Logits of DeepSeek-V4's paged index keys, e4m3 with a scale for each entry.

Launched by `vllm_lsa.ops.index_logits`, which explains the operands. Lengths are read on the device, and the grid
follows from shapes alone.
"""

import torch

import triton
import triton.language as tl
from vllm_lsa.kernels.e4m3 import widen

_TILE = 64  # entries that are multiplied at a time
_MOST_TILES = 8  # of a program
_PROGRAMS = 4096
"""Programs that fill every device: a program has several tiles only if there are more of them."""


@triton.jit
def _heads(
    q, weights, first,
    q_head, H: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, E4M3: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """HEADS queries of a row from head `first` on, and their weights; zeros behind the last head."""
    h = first + tl.arange(0, HEADS)
    here = h < H
    w = tl.load(weights + h, mask=here, other=0.0)
    at = q + h[:, None] * q_head + tl.arange(0, D)[None, :]
    if E4M3:
        if NATIVE:
            at = at.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
            query = tl.load(at, mask=here[:, None], other=0.0)
        else:
            query = widen(tl.load(at, mask=here[:, None], other=0))
    else:
        query = tl.load(at, mask=here[:, None], other=0.0)
    return query, w


@triton.jit
def _weighted(keys, query, w, FP8: tl.constexpr):
    """Sum over heads of relu(query · key) w, for each key."""
    if not FP8:
        query = query.to(keys.dtype)
    x = tl.dot(keys, tl.trans(query), input_precision="ieee")
    return tl.sum(tl.maximum(x, 0.0) * w[None, :], 1)


@triton.jit(do_not_specialize=["entries", "row_weights", "row_blocks", "row_out"])
def _index_logits(
    q, weights, pages, block_table, lengths, out,
    q_row, q_head, row_weights, page_bytes, row_blocks, row_out, entries,
    H: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, PER_PAGE: tl.constexpr, TILE: tl.constexpr,
    TILES: tl.constexpr, E4M3: tl.constexpr, NATIVE: tl.constexpr, FP8: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid (parts of TILES tiles of TILE entries, rows). HEADS at a time are multiplied, H in all.

    E4M3: q is e4m3, as bytes. NATIVE: the device converts e4m3. FP8: it multiplies it as well; else keys are widened to
    q's dtype, or to bf16. WIDEN: to fp32, for Triton's interpreter, which multiplies no bf16 matrices.
    """
    row = tl.program_id(1).to(tl.int64)
    length = tl.minimum(tl.load(lengths + row).to(tl.int32), entries)
    begin = tl.program_id(0) * TILES
    filled = tl.minimum(tl.maximum(tl.cdiv(length, TILE) - begin, 0), TILES)
    q += row * q_row
    weights += row * row_weights
    block_table += row * row_blocks
    out += row * row_out
    d = tl.arange(0, D)
    # All of most models' heads, read once for all tiles: they are as many bytes as the keys of a tile.
    query, w = _heads(q, weights, 0, q_head, H, HEADS, D, E4M3, NATIVE)
    for tile in range(begin, begin + filled):
        n = tile * TILE + tl.arange(0, TILE)
        here = n < length
        block = tl.load(block_table + n // PER_PAGE, mask=here, other=0).to(tl.int64)
        page = pages + block * page_bytes
        at = page[:, None] + (n % PER_PAGE)[:, None] * D + d[None, :]
        if NATIVE:
            at = at.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
            keys = tl.load(at, mask=here[:, None], other=0.0)
        else:
            keys = widen(tl.load(at, mask=here[:, None], other=0))
        scales = (page + PER_PAGE * D).to(tl.pointer_type(tl.float32), bitcast=True) + n % PER_PAGE
        scale = tl.load(scales, mask=here, other=0.0)
        if not FP8:
            if WIDEN:
                keys = keys.to(tl.float32)
            elif E4M3:
                keys = keys.to(tl.bfloat16)  # exact, as each product is
            else:
                keys = keys.to(q.dtype.element_ty)
        total = _weighted(keys, query, w, FP8)
        for first in tl.static_range(HEADS, H, HEADS):
            more, more_w = _heads(q, weights, first, q_head, H, HEADS, D, E4M3, NATIVE)
            total += _weighted(keys, more, more_w, FP8)
        logits = tl.where(here, total * scale, float("-inf"))  # positive, so that it may come after the maximum
        tl.store(out + n, logits, mask=n < entries)
    for tile in range(begin + filled, begin + TILES):
        n = tile * TILE + tl.arange(0, TILE)
        tl.store(out + n, tl.full((TILE,), float("-inf"), tl.float32), mask=n < entries)


INTERPRETED = not isinstance(_index_logits, triton.JITFunction)
"""Whether the kernel runs in Triton's interpreter, on CPU tensors."""


def index_logits(
    q: torch.Tensor,
    weights: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    per_page: int,
    native: bool,
    fp8: bool,
) -> None:
    """Launch. native, fp8: see the kernel."""
    (rows, heads, dim), entries, e4m3 = q.shape, out.shape[1], q.dtype == torch.float8_e4m3fn
    tiles = triton.cdiv(entries, _TILE)
    most = max(1, min(_MOST_TILES, tiles * rows // _PROGRAMS))
    per_program = 1 << most.bit_length() - 1  # a power of two, so that few kernels are compiled
    _index_logits[(triton.cdiv(tiles, per_program), rows)](
        q.view(torch.uint8) if e4m3 else q, weights, pages, block_table, lengths, out,
        q.stride(0), q.stride(1), weights.stride(0), pages.stride(0), block_table.stride(0), out.stride(0), entries,
        H=heads, HEADS=min(64, max(16, triton.next_power_of_2(heads))), D=dim, PER_PAGE=per_page, TILE=_TILE,
        TILES=per_program, E4M3=e4m3, NATIVE=native, FP8=fp8, WIDEN=INTERPRETED,
    )  # fmt: skip
