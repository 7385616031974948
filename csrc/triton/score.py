"""Chunk scores of decode rows from index cells: the mean key, and the form of the product index without CUDA C++.

Launched by `vllm_lsa.ops.score_rows`, which explains the operands. A row's control is read on the device, and the grids
follow from shapes alone.
"""

from typing import Any

import torch

import triton
import triton.language as tl
from vllm_lsa.device.state import PAGE, DeviceRows, DeviceSets
from vllm_lsa.kernels.early import await_grid
from vllm_lsa.ops.early import early

_LOG2E = 1.4426950408889634
_PROGRAMS = 4096  # more than keep a device busy, since those of rows that do not take part end at once
_STRIDES = ["q_token", "q_head", "cell_block", "cell_head", "cell_chunk", "row_blocks", "row_pages", "splits"]
_OF_LAYERS = [*_STRIDES, "q_layer", "logits_layer"]


@triton.jit(do_not_specialize=["q_token", "q_head"])
def _tables(
    q, to_query, centroids, token, length, state, out, q_token, q_head, factor,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, CHUNK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out[row, h, m, 256, GROUP_PAD]: what each centroid adds to the logits in base 2. Grid (M, Hkv, n)."""
    if EARLY:
        await_grid()
    m, h, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if tl.load(state + row) >= 0 and tl.load(length + row) > CHUNK:
        e, d, c = tl.arange(0, D_PAD), tl.arange(0, WIDTH_PAD), tl.arange(0, 256)
        matrix = tl.load(
            to_query + (h * D + m * WIDTH + d[:, None]) * D + e[None, :],
            mask=(d[:, None] < WIDTH) & (e[None, :] < D),
            other=0.0,
        )
        centroid = tl.load(
            centroids + ((h * M + m) * 256 + c[:, None]) * WIDTH + d[None, :], mask=d[None, :] < WIDTH, other=0.0
        )
        at = q + tl.load(token + row).to(tl.int64) * q_token + h * GROUP * q_head
        to = out + ((row.to(tl.int64) * HEADS + h) * M + m) * 256 * GROUP_PAD
        for g in range(GROUP):
            query = tl.load(at + g * q_head + e, mask=e < D, other=0.0).to(tl.float32)
            lifted = tl.sum(matrix * query[None, :], 1) * factor
            tl.store(to + c * GROUP_PAD + g, tl.sum(centroid * lifted[None, :], 1))


@triton.jit(do_not_specialize=_STRIDES[2:])
def _product(
    tables, cells, length, state, blocks, pages, logits,
    cell_block, cell_head, cell_chunk, row_blocks, row_pages, splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr,
    CHUNK_PAD: tl.constexpr, PER_BLOCK: tl.constexpr, STATE_PAGE: tl.constexpr, TILE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (n·Hkv, splits): a program takes every splits-th tile of TILE chunks."""
    if EARLY:
        await_grid()
    row, h = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    set_row = tl.load(state + row)
    tokens = tl.load(length + row)
    chunks = tl.where((set_row >= 0) & (tokens > 0), (tokens - 1) // CHUNK, 0)
    t = tl.arange(0, CHUNK_PAD)
    for tile in range(tl.program_id(1), tl.cdiv(chunks, TILE), splits):
        c = tile * TILE + tl.arange(0, TILE)
        here = c < chunks
        block = tl.load(blocks + row * row_blocks + c // PER_BLOCK, mask=here, other=0).to(tl.int64)
        cell = cells + block * cell_block + h * cell_head + (c % PER_BLOCK) * cell_chunk
        page = tl.load(pages + set_row * row_pages + c // STATE_PAGE, mask=here, other=0).to(tl.int64)
        valid = here[:, None] & (t[None, :] < CHUNK)
        for g in range(GROUP):
            x = tl.zeros([TILE, CHUNK_PAD], tl.float32)
            for m in range(M):
                code = tl.load(cell[:, None] + m * CHUNK + t[None, :], mask=valid, other=0).to(tl.int64)
                table = tables + ((row.to(tl.int64) * HEADS + h) * M + m) * 256 * GROUP_PAD + g
                x += tl.load(table + code * GROUP_PAD, mask=valid, other=0.0)
            x = tl.where(t[None, :] < CHUNK, x, float("-inf"))
            peak = tl.max(x, 1)
            result = (peak + tl.log2(tl.sum(tl.exp2(x - peak[:, None]), 1))) * 0.6931471805599453
            to = logits + (page * HEADS * GROUP + h * GROUP + g) * STATE_PAGE + c % STATE_PAGE
            tl.store(to, result, mask=here)


@triton.jit(do_not_specialize=_OF_LAYERS)
def _mean_key(
    q, cells, offsets, token, length, state, blocks, pages, logits,
    q_token, q_layer, q_head, cell_block, cell_head, cell_chunk, row_blocks, row_pages, logits_layer, splits, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    CHUNK: tl.constexpr, PER_BLOCK: tl.constexpr, STATE_PAGE: tl.constexpr, TILE: tl.constexpr, LAYERS: tl.constexpr,
    WIDEN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (n·Hkv, splits, L): a program takes every splits-th tile of TILE chunks, all query heads of the group.
    offsets: int64 [L], bytes from the cells of the first layer to those of each; looked at if there are LAYERS.
    """
    if EARLY:
        await_grid()
    if LAYERS:
        layer = tl.program_id(2).to(tl.int64)
        cells += tl.load(offsets + layer) // (cells.dtype.element_ty.primitive_bitwidth // 8)
        q += layer * q_layer
        logits += layer * logits_layer
    row, h = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    set_row = tl.load(state + row)
    tokens = tl.load(length + row)
    chunks = tl.where((set_row >= 0) & (tokens > 0), (tokens - 1) // CHUNK, 0)
    tiles = tl.cdiv(chunks, TILE)
    if tl.program_id(1) < tiles:
        d, g = tl.arange(0, D_PAD), tl.arange(0, GROUP_PAD)
        query = tl.load(
            q + tl.load(token + row).to(tl.int64) * q_token + (h * GROUP + g[:, None]) * q_head + d[None, :],
            mask=(g[:, None] < GROUP) & (d[None, :] < D),
            other=0.0,
        )
        if WIDEN:  # the interpreter multiplies no bf16 matrices
            query = query.to(tl.float32)
        for tile in range(tl.program_id(1), tiles, splits):
            c = tile * TILE + tl.arange(0, TILE)
            here = c < chunks
            block = tl.load(blocks + row * row_blocks + c // PER_BLOCK, mask=here, other=0).to(tl.int64)
            page = tl.load(pages + set_row * row_pages + c // STATE_PAGE, mask=here, other=0).to(tl.int64)
            cell = cells + block * cell_block + h * cell_head + (c % PER_BLOCK) * cell_chunk
            mean = tl.load(cell[None, :] + d[:, None], mask=here[None, :] & (d[:, None] < D), other=0.0)
            if WIDEN:
                mean = mean.to(tl.float32)
            x = tl.dot(query, mean, input_precision="ieee") * scale
            to = logits + (page[None, :] * HEADS * GROUP + h * GROUP + g[:, None]) * STATE_PAGE
            tl.store(to + c[None, :] % STATE_PAGE, x, mask=here[None, :] & (g[:, None] < GROUP))


INTERPRETED = not isinstance(_mean_key, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter, on CPU tensors."""


def score_product(
    q: torch.Tensor,
    cells: torch.Tensor,
    rows: DeviceRows,
    sets: DeviceSets,
    to_query: torch.Tensor,
    centroids: torch.Tensor,
    chunk: int,
    scale: float,
    logits: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """`score_rows` of the product index; scratch: see `score_scratch`."""
    n, (_, q_heads, dim), (_, kv_heads, per_block, _) = len(rows.length), q.shape, cells.shape
    subspaces, width, group = centroids.shape[1], centroids.shape[3], q_heads // kv_heads
    heads: dict[str, Any] = dict(
        HEADS=kv_heads, GROUP=group, GROUP_PAD=-(-group // 4) * 4, M=subspaces, CHUNK=chunk, **early(q.device)
    )
    tables = scratch.view(torch.float32)
    _tables[(subspaces, kv_heads, n)](
        q, to_query, centroids, rows.token, rows.length, rows.state, tables, q.stride(0), q.stride(1), scale * _LOG2E,
        D=dim, D_PAD=triton.next_power_of_2(dim), WIDTH=width, WIDTH_PAD=triton.next_power_of_2(width), **heads,
    )  # fmt: skip
    tile, splits = 32, _splits(n * kv_heads, rows, per_block, 32)
    _product[(n * kv_heads, splits)](
        tables, cells, rows.length, rows.state, rows.block_table, sets.pages, logits,
        *cells.stride()[:3], rows.block_table.stride(0), sets.pages.stride(0), splits,
        CHUNK_PAD=triton.next_power_of_2(chunk), PER_BLOCK=per_block, STATE_PAGE=PAGE, TILE=tile, **heads,
    )  # fmt: skip


def score_mean_key(
    q: torch.Tensor,
    cells: torch.Tensor,
    rows: DeviceRows,
    sets: DeviceSets,
    chunk: int,
    scale: float,
    logits: torch.Tensor,
    offsets: torch.Tensor | None = None,
) -> None:
    """`score_rows` of the mean key; with `offsets` `score_layers`, cells are then the first layer's."""
    layers = 1 if offsets is None else len(offsets)
    n, (_, kv_heads, per_block, _), (q_heads, dim) = len(rows.length), cells.shape, q.shape[-2:]
    group, cells = q_heads // kv_heads, cells.view(q.dtype)
    tile, splits = 64, _splits(n * kv_heads * layers, rows, per_block, 64)
    _mean_key[(n * kv_heads, splits, layers)](
        q, cells, offsets, rows.token, rows.length, rows.state, rows.block_table, sets.pages, logits,
        q.stride(0), q.stride(1), q.stride(-2), *cells.stride()[:3], rows.block_table.stride(0), sets.pages.stride(0),
        logits.stride(0), splits, scale,
        HEADS=kv_heads, GROUP=group, GROUP_PAD=max(16, triton.next_power_of_2(group)), D=dim,
        D_PAD=max(16, triton.next_power_of_2(dim)), CHUNK=chunk, PER_BLOCK=per_block, STATE_PAGE=PAGE, TILE=tile,
        LAYERS=offsets is not None, WIDEN=INTERPRETED and q.dtype == torch.bfloat16, **early(q.device),
    )  # fmt: skip


def _splits(lanes: int, rows: DeviceRows, per_block: int, tile: int) -> int:
    """Programs for each row and KV head: no more than the longest possible row has tiles."""
    tiles = -(-rows.block_table.shape[1] * per_block // tile)
    return max(1, min(tiles, 64, max(4, _PROGRAMS // lanes)))
