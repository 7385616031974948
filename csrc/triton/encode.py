"""Index cells of chunks that a step completes: mean keys, and codes of the product index.

Launched by `vllm_lsa.ops.encode_rows`, which explains the operands. Where a chunk's keys lie and where its cell goes is
read on the device, from lists or from the rows of a step.
"""

from typing import Any

import torch

import triton
import triton.language as tl

# Where chunk i comes from: tokens source[i].. of a step, host page source[i], or the row i that a step may complete.
TOKENS, PAGES, ROWS = 0, 1, 2
_TOKENS, _PAGES, _ROWS = tl.constexpr(TOKENS), tl.constexpr(PAGES), tl.constexpr(ROWS)
_DYNAMIC = ["n", "row_blocks", "key_token", "key_head", "layer", "cell_block", "cell_head", "cell_chunk"]


@triton.jit
def _locate(
    i, h, n, source, blocks, places, row_blocks, key_token, key_head, layer,
    KIND: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, PER_BLOCK: tl.constexpr, LAYER_LANES: tl.constexpr,
    LAYERS: tl.constexpr, LANE_HEADS: tl.constexpr,
):  # fmt: skip
    """(whether chunk i is to be encoded, where its first key begins in head h, elements from one key to the next, its
    block, its place there); i may be a tensor."""
    inside = i < n
    if KIND == _ROWS:
        length = tl.load(source + i, mask=inside, other=0)
        valid = inside & (length > 0) & (length % CHUNK == 0)
        chunk = tl.where(valid, length // CHUNK - 1, 0)
        block = tl.load(blocks + i * row_blocks + chunk // PER_BLOCK, mask=valid, other=0).to(tl.int64)
        place = chunk % PER_BLOCK
        page = block * (LAYERS * LAYER_LANES * PER_BLOCK) + place
    else:
        page = tl.load(source + i, mask=inside, other=-1).to(tl.int64)
        valid = inside & (page >= 0)
        block = tl.load(blocks + i, mask=valid, other=0).to(tl.int64)
        place = tl.load(places + i, mask=valid, other=0)
    if KIND == _TOKENS:
        first = page * key_token + h * key_head
    else:
        lane = layer * LAYER_LANES + h // LANE_HEADS
        first = (page + lane * PER_BLOCK) * (2 * LANE_HEADS * CHUNK * D) + h % LANE_HEADS * (CHUNK * D)
    return valid, first, block, place


@triton.jit(do_not_specialize=_DYNAMIC)
def _product(
    keys, source, blocks, places, to_code, mean, centroids, cells,
    n, row_blocks, key_token, key_head, layer, cell_block, cell_head, cell_chunk,
    KIND: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, PER_BLOCK: tl.constexpr, LAYER_LANES: tl.constexpr,
    LAYERS: tl.constexpr, LANE_HEADS: tl.constexpr, D_PAD: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr, CHUNKS: tl.constexpr, TOKENS: tl.constexpr, SUBSPACES: tl.constexpr,
):  # fmt: skip
    """Grid (chunks / CHUNKS, Hkv, M / SUBSPACES). A program's keys are TOKENS rows of one matrix, chunk after chunk."""
    h = tl.program_id(1)
    r = tl.arange(0, TOKENS)
    i, t = tl.program_id(0) * CHUNKS + r // CHUNK, r % CHUNK
    valid, first, block, place = _locate(
        i, h, tl.where(r < CHUNKS * CHUNK, n, 0), source, blocks, places, row_blocks, key_token, key_head, layer,
        KIND, CHUNK, D, PER_BLOCK, LAYER_LANES, LAYERS, LANE_HEADS,
    )  # fmt: skip
    if tl.max(valid.to(tl.int32), 0) > 0:
        d, w, c = tl.arange(0, D_PAD), tl.arange(0, WIDTH_PAD), tl.arange(0, 256)
        # Read once for all subspaces: it may come from host memory.
        key = tl.load(
            keys + (first + t * (key_token if KIND == _TOKENS else D))[:, None] + d[None, :],
            mask=valid[:, None] & (d[None, :] < D),
            other=0.0,
        ).to(tl.float32)
        key -= tl.load(mean + h * D + d, mask=d < D, other=0.0)[None, :]
        to = cells + block * cell_block + h * cell_head + place * cell_chunk + t
        for m in range(tl.program_id(2) * SUBSPACES, tl.minimum(M, (tl.program_id(2) + 1) * SUBSPACES)):
            matrix = tl.load(
                to_code + (h * D + d[:, None]) * D + m * WIDTH + w[None, :],
                mask=(d[:, None] < D) & (w[None, :] < WIDTH),
                other=0.0,
            )
            centroid = tl.load(
                centroids + ((h * M + m) * 256 + c[None, :]) * WIDTH + w[:, None], mask=w[:, None] < WIDTH, other=0.0
            )
            y = tl.dot(key, matrix, input_precision="ieee")
            distance = tl.sum(centroid * centroid, 0)[None, :] - 2 * tl.dot(y, centroid, input_precision="ieee")
            tl.store(to + m * CHUNK, tl.argmin(distance, 1).to(tl.uint8), mask=valid)


@triton.jit(do_not_specialize=_DYNAMIC)
def _mean_key(
    keys, source, blocks, places, cells,
    n, row_blocks, key_token, key_head, layer, cell_block, cell_head, cell_chunk,
    KIND: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, PER_BLOCK: tl.constexpr, LAYER_LANES: tl.constexpr,
    LAYERS: tl.constexpr, LANE_HEADS: tl.constexpr, D_PAD: tl.constexpr, CHUNK_PAD: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, Hkv)."""
    h = tl.program_id(1)
    valid, first, block, place = _locate(
        tl.program_id(0), h, n, source, blocks, places, row_blocks, key_token, key_head, layer,
        KIND, CHUNK, D, PER_BLOCK, LAYER_LANES, LAYERS, LANE_HEADS,
    )  # fmt: skip
    if valid:
        t, d = tl.arange(0, CHUNK_PAD), tl.arange(0, D_PAD)
        key = tl.load(
            keys + first + (t * (key_token if KIND == _TOKENS else D))[:, None] + d[None, :],
            mask=(t[:, None] < CHUNK) & (d[None, :] < D),
            other=0.0,
        ).to(tl.float32)
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
) -> None:
    """Cells of the chunks that source names, as `kind` says.

    source: int [n]. blocks: int32 [n], or the rows' block table. places: int32 [n], unused for ROWS. key_strides: of
    tokens and heads, for TOKENS. lanes: the geometry's num_layers, layer_lanes and lane_heads. tables: to_code, mean
    and centroids of the product index; None for mean keys.
    """
    n, (_, kv_heads, per_block, _) = len(source), cells.shape
    if n == 0:
        return
    layers, layer_lanes, lane_heads = lanes
    if tables is None:
        cells = cells.view(keys.dtype)
    dynamic = (n, blocks.stride(0), *key_strides, layer, *cells.stride()[:3])
    static: dict[str, Any] = dict(
        KIND=kind, CHUNK=chunk, D=dim, PER_BLOCK=per_block, LAYER_LANES=layer_lanes, LAYERS=layers,
        LANE_HEADS=lane_heads, D_PAD=max(16, triton.next_power_of_2(dim)),
    )  # fmt: skip
    if tables is None:
        _mean_key[(n, kv_heads)](
            keys, source, blocks, places, cells, *dynamic, CHUNK_PAD=triton.next_power_of_2(chunk), **static
        )
        return
    to_code, mean, centroids = tables
    subspaces, width = centroids.shape[1], centroids.shape[3]
    chunks = 1 if kind == ROWS else max(1, 32 // chunk)
    # Of a step's rows few complete a chunk: fewer programs then, since most only look and end.
    each = 4 if kind == ROWS else 1
    _product[(triton.cdiv(n, chunks), kv_heads, triton.cdiv(subspaces, each))](
        keys, source, blocks, places, to_code, mean, centroids, cells, *dynamic,
        M=subspaces, WIDTH=width, WIDTH_PAD=max(16, triton.next_power_of_2(width)), CHUNKS=chunks,
        TOKENS=max(16, triton.next_power_of_2(chunks * chunk)), SUBSPACES=each, **static,
    )  # fmt: skip
