"""Index cells of chunks that a step completes: mean keys, and codes of the product index.

Launched by `vllm_lsa.ops.encode_rows`, which explains the operands. Where a chunk's keys lie and where its cell goes is
read on the device, from lists for one layer, or from the rows of a step for all layers in one launch.
"""

from typing import Any

import torch

import triton
import triton.language as tl
from vllm_lsa.device.state import PAGE, DeviceRows, DeviceSets
from vllm_lsa.kernels.e4m3 import widen

# Where chunk i comes from: tokens source[i].. of a step, host page source[i], or the end of row i's source[i] tokens.
TOKENS, PAGES, ROWS = 0, 1, 2
_TOKENS, _PAGES, _ROWS = tl.constexpr(TOKENS), tl.constexpr(PAGES), tl.constexpr(ROWS)
_DYNAMIC = [
    "n", "row_blocks", "row_pages", "key_token", "key_head", "layer", "cell_block", "cell_head", "cell_chunk",
]  # fmt: skip
_MOST_ROWS = 1024
"""Rows of a step that a program looks at: one number for all steps, so that none waits for a compilation."""
_PROGRAMS = 4
"""For the rows of a step, per layer, KV head and few subspaces: rows seldom complete their chunks together."""


@triton.jit
def _locate(
    i, h, n, source, blocks, places, state, slot_of, set_pages, counts, entry_slot, host_delta,
    row_blocks, row_pages, key_token, key_head, layer,
    KIND: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, PER_BLOCK: tl.constexpr, LAYER_LANES: tl.constexpr,
    LAYERS: tl.constexpr, LANE_HEADS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """(whether chunk i is to be encoded, where its first key begins in head h, its block, its place there); i may be a
    tensor."""
    inside = i < n
    lane = layer * LAYER_LANES + h // LANE_HEADS
    lanes: tl.constexpr = LAYERS * LAYER_LANES
    elements: tl.constexpr = 2 * LANE_HEADS * CHUNK * D
    if KIND == _ROWS:
        length = tl.load(source + i, mask=inside, other=0)
        valid = inside & (length > 0) & (length % CHUNK == 0)
        chunk = tl.where(valid, length // CHUNK - 1, 0)
        block = tl.load(blocks + i * row_blocks + chunk // PER_BLOCK, mask=valid, other=0).to(tl.int64)
        place = chunk % PER_BLOCK
        page = (block * lanes + lane) * PER_BLOCK + place
        # From the slot if there is one: the chunk is still the tail of a row on a budget.
        mine = tl.load(state + i, mask=valid, other=-1)
        budget = mine >= 0
        entry = tl.load(counts + mine * lanes + lane, mask=budget, other=1) - 1
        state_page = tl.load(set_pages + mine * row_pages + entry // PAGE, mask=budget, other=0).to(tl.int64)
        tail = tl.load(entry_slot + (state_page * lanes + lane) * PAGE + entry % PAGE, mask=budget, other=-1)
        slot = tl.where(budget, tail, tl.load(slot_of + page, mask=valid & (mine < 0), other=-1)).to(tl.int64)
        first = tl.where(slot >= 0, slot * elements, page * elements + host_delta)
    else:
        page = tl.load(source + i, mask=inside, other=-1).to(tl.int64)
        valid = inside & (page >= 0)
        block = tl.load(blocks + i, mask=valid, other=0).to(tl.int64)
        place = tl.load(places + i, mask=valid, other=0)
        first = (page + lane * PER_BLOCK) * elements
    if KIND == _TOKENS:
        first = page * key_token + h * key_head
    else:
        first += h % LANE_HEADS * (CHUNK * D)
    return valid, first, block, place


@triton.jit
def _of_layer(cells, offsets, scales, layer):
    """(where a layer's cells begin, the scale of its keys) for the rows of a step. offsets: in bytes."""
    size: tl.constexpr = cells.dtype.element_ty.primitive_bitwidth // 8
    return cells + tl.load(offsets + layer) // size, tl.load(scales + layer)


@triton.jit
def _values(raw, scale, E4M3: tl.constexpr):
    """Keys in fp32. E4M3: raw ones are e4m3 bytes."""
    if E4M3:
        raw = widen(raw)
    return raw.to(tl.float32) * scale


@triton.jit
def _codes(
    keys, to, valid, h, group, to_code, mean, centroids, key_scale,
    CHUNK: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr, SUBSPACES: tl.constexpr, E4M3: tl.constexpr,
):  # fmt: skip
    """Codes of a group of subspaces, of keys that begin at `keys`."""
    d, w, c = tl.arange(0, D_PAD), tl.arange(0, WIDTH_PAD), tl.arange(0, 256)
    # Read once for all subspaces: it may come from host memory.
    key = tl.load(keys[:, None] + d[None, :], mask=valid[:, None] & (d[None, :] < D), other=0)
    key = _values(key, key_scale, E4M3)
    key -= tl.load(mean + h * D + d, mask=d < D, other=0.0)[None, :]
    for m in range(group * SUBSPACES, tl.minimum(M, (group + 1) * SUBSPACES)):
        matrix = tl.load(
            to_code + (h * D + d[:, None]) * D + m * WIDTH + w[None, :],
            mask=(d[:, None] < D) & (w[None, :] < WIDTH),
            other=0.0,
        )
        centroid = tl.load(
            centroids + ((h * M + m) * 256 + c[None, :]) * WIDTH + w[:, None], mask=w[:, None] < WIDTH, other=0.0
        )
        # On tensor cores, as exact as fp32: plain TF32 would take the wrong one of two near centroids. Sums of products
        # are no way round that, since the compiler makes TF32 products of them.
        y = tl.dot(key, matrix, input_precision="tf32x3")
        product = tl.dot(y, centroid, input_precision="tf32x3")
        distance = tl.sum(centroid * centroid, 0)[None, :] - 2 * product
        tl.store(to + m * CHUNK, tl.argmin(distance, 1).to(tl.uint8), mask=valid)


@triton.jit(do_not_specialize=_DYNAMIC)
def _product(
    keys, source, blocks, places, state, slot_of, set_pages, counts, entry_slot, offsets, scales, to_code, mean,
    centroids, cells,
    host_delta, n, row_blocks, row_pages, key_token, key_head, layer, cell_block, cell_head, cell_chunk, key_scale,
    KIND: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, PER_BLOCK: tl.constexpr, LAYER_LANES: tl.constexpr,
    LAYERS: tl.constexpr, LANE_HEADS: tl.constexpr, PAGE: tl.constexpr, D_PAD: tl.constexpr, M: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, CHUNKS: tl.constexpr, TOKENS: tl.constexpr,
    SUBSPACES: tl.constexpr, ROWS_PAD: tl.constexpr, E4M3: tl.constexpr,
):  # fmt: skip
    """Grid (programs, Hkv, M / SUBSPACES, for ROWS times LAYERS), where a program's keys are TOKENS rows of one matrix:
    of CHUNKS chunks one after the other, or for ROWS of a chunk that a row has completed. Few have, so it's few
    programs that find theirs.
    """
    h, group, r = tl.program_id(1), tl.program_id(2), tl.arange(0, TOKENS)
    if KIND == _ROWS:
        groups: tl.constexpr = (M + SUBSPACES - 1) // SUBSPACES
        layer = group // groups
        group = group % groups
        cells, key_scale = _of_layer(cells, offsets, scales, layer)
        of_layers = layer * tl.num_programs(1)  # KV heads before this layer's
        to_code += of_layers * D * D
        mean += of_layers * D
        centroids += of_layers * M * 256 * WIDTH
        rows = tl.arange(0, ROWS_PAD)
        length = tl.load(source + rows, mask=rows < n, other=0)
        full = ((length > 0) & (length % CHUNK == 0)).to(tl.int32)
        place = tl.cumsum(full, 0) - full
        for k in range(tl.program_id(0), tl.sum(full, 0), tl.num_programs(0)):
            i = tl.sum(tl.where((full > 0) & (place == k), rows, 0), 0)
            _, first, block, at = _locate(
                i, h, n, source, blocks, places, state, slot_of, set_pages, counts, entry_slot, host_delta,
                row_blocks, row_pages, key_token, key_head, layer,
                KIND, CHUNK, D, PER_BLOCK, LAYER_LANES, LAYERS, LANE_HEADS, PAGE,
            )  # fmt: skip
            to = cells + block * cell_block + h * cell_head + at * cell_chunk + r
            _codes(
                keys + first + r * D, to, r < CHUNK, h, group, to_code, mean, centroids, key_scale,
                CHUNK, D, D_PAD, M, WIDTH, WIDTH_PAD, SUBSPACES, E4M3,
            )  # fmt: skip
    else:
        i, t = tl.program_id(0) * CHUNKS + r // CHUNK, r % CHUNK
        valid, first, block, at = _locate(
            i, h, tl.where(r < CHUNKS * CHUNK, n, 0), source, blocks, places, state, slot_of, set_pages, counts,
            entry_slot, host_delta, row_blocks, row_pages, key_token, key_head, layer,
            KIND, CHUNK, D, PER_BLOCK, LAYER_LANES, LAYERS, LANE_HEADS, PAGE,
        )  # fmt: skip
        if tl.max(valid.to(tl.int32), 0) > 0:
            to = cells + block * cell_block + h * cell_head + at * cell_chunk + t
            _codes(
                keys + first + t * (key_token if KIND == _TOKENS else D), to, valid, h, group, to_code, mean,
                centroids, key_scale, CHUNK, D, D_PAD, M, WIDTH, WIDTH_PAD, SUBSPACES, E4M3,
            )  # fmt: skip


@triton.jit(do_not_specialize=_DYNAMIC)
def _mean_key(
    keys, source, blocks, places, state, slot_of, set_pages, counts, entry_slot, offsets, scales, cells,
    host_delta, n, row_blocks, row_pages, key_token, key_head, layer, cell_block, cell_head, cell_chunk, key_scale,
    KIND: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, PER_BLOCK: tl.constexpr, LAYER_LANES: tl.constexpr,
    LAYERS: tl.constexpr, LANE_HEADS: tl.constexpr, PAGE: tl.constexpr, D_PAD: tl.constexpr, CHUNK_PAD: tl.constexpr,
    E4M3: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, Hkv, for ROWS LAYERS)."""
    h = tl.program_id(1)
    if KIND == _ROWS:
        layer = tl.program_id(2)
        cells, key_scale = _of_layer(cells, offsets, scales, layer)
    valid, first, block, place = _locate(
        tl.program_id(0), h, n, source, blocks, places, state, slot_of, set_pages, counts, entry_slot, host_delta,
        row_blocks, row_pages, key_token, key_head, layer,
        KIND, CHUNK, D, PER_BLOCK, LAYER_LANES, LAYERS, LANE_HEADS, PAGE,
    )  # fmt: skip
    if valid:
        t, d = tl.arange(0, CHUNK_PAD), tl.arange(0, D_PAD)
        key = tl.load(
            keys + first + (t * (key_token if KIND == _TOKENS else D))[:, None] + d[None, :],
            mask=(t[:, None] < CHUNK) & (d[None, :] < D),
            other=0,
        )
        key = _values(key, key_scale, E4M3)
        to = cells + block * cell_block + h * cell_head + place * cell_chunk + d
        tl.store(to, (tl.sum(key, 0) / CHUNK).to(cells.dtype.element_ty), mask=d < D)


INTERPRETED = not isinstance(_mean_key, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter, on CPU tensors."""


def encode(
    kind: int,
    keys: torch.Tensor,
    source: torch.Tensor,
    blocks: torch.Tensor,
    places: torch.Tensor,
    cells: torch.Tensor,
    chunk: int,
    dim: int,
    key_strides: tuple[int, int],
    layer: int,
    lanes: tuple[int, int, int],
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    dtype: torch.dtype,
    key_scale: float,
    resident: tuple[DeviceRows, torch.Tensor, DeviceSets, int, torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Cells of the chunks that source names, as `kind` says.

    source: int [n]. blocks: int32 [n], or the rows' block table. places: int32 [n], unused for ROWS. key_strides: of
    tokens and heads, for TOKENS. lanes: the geometry's num_layers, layer_lanes and lane_heads. tables: to_code, mean
    and centroids of the product index; None for mean keys. dtype: of mean keys. key_scale: what keys are multiplied by;
    uint8 ones are e4m3 bytes. resident, for ROWS, whose keys are the pool: the rows, slot_of, the sets and the elements
    from the pool to the host pages; then of each layer where its cells are from the first's, in bytes, int64 [L], and
    its keys' scale, fp32 [L]. Tables are then those of all layers, and `layer` and `key_scale` are not read.
    """
    n, (_, kv_heads, per_block, _) = len(source), cells.shape
    if n == 0:
        return
    layers, layer_lanes, lane_heads = lanes
    if tables is None:
        cells = cells.view(dtype)
    slots: tuple[torch.Tensor | None, ...] = (None,) * 7
    delta = row_pages = 0
    if resident is not None:
        rows, slot_of, sets, delta, *of_layers = resident
        slots = rows.state, slot_of, sets.pages, sets.counts, sets.slot, *of_layers
        row_pages = sets.pages.stride(0)
    dynamic = (delta, n, blocks.stride(0), row_pages, *key_strides, layer, *cells.stride()[:3], key_scale)
    static: dict[str, Any] = dict(
        KIND=kind, CHUNK=chunk, D=dim, PER_BLOCK=per_block, LAYER_LANES=layer_lanes, LAYERS=layers,
        LANE_HEADS=lane_heads, PAGE=PAGE, D_PAD=max(16, triton.next_power_of_2(dim)),
        E4M3=keys.dtype == torch.uint8,
    )  # fmt: skip
    together = layers if kind == ROWS else 1
    if tables is None:
        _mean_key[(n, kv_heads, together)](
            keys, source, blocks, places, *slots, cells, *dynamic, CHUNK_PAD=triton.next_power_of_2(chunk), **static
        )
        return
    to_code, mean, centroids = tables
    subspaces, width = centroids.shape[-3], centroids.shape[-1]
    chunks = 1 if kind == ROWS else max(1, 32 // chunk)
    tokens, width_pad = max(16, triton.next_power_of_2(chunks * chunk)), max(16, triton.next_power_of_2(width))
    each = 4 if kind == ROWS else 1
    programs = min(n, _PROGRAMS) if kind == ROWS else triton.cdiv(n, chunks)
    _product[(programs, kv_heads, triton.cdiv(subspaces, each) * together)](
        keys, source, blocks, places, *slots, to_code, mean, centroids, cells, *dynamic,
        M=subspaces, WIDTH=width, WIDTH_PAD=width_pad, CHUNKS=chunks, TOKENS=tokens, SUBSPACES=each,
        ROWS_PAD=max(_MOST_ROWS, triton.next_power_of_2(n)) if kind == ROWS else 1, **static, num_warps=4,
    )  # fmt: skip
