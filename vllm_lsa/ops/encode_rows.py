"""Index cells of the chunks that a step completes, written where the scores read them."""

import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch

from vllm_lsa.device.state import PAGE, DeviceRows, DeviceSets
from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.ops.e4m3 import unscaled
from vllm_lsa.ops.native import DTYPES, require, require_tensor, unsupported
from vllm_lsa.ops.product_lse import CENTROIDS, encode_product_naive
from vllm_lsa.ops.resident_rows import host_delta

_KERNELS = "vllm_lsa.kernels.encode"


class ProductCodec(NamedTuple):
    """A layer's tables of the product index, fp32 and contiguous, on the device of the cells; or [L, ...] of all L."""

    to_code: torch.Tensor
    """[Hkv, D, D]"""
    mean: torch.Tensor
    """[Hkv, D]"""
    centroids: torch.Tensor
    """[Hkv, M, 256, D / M]"""


class LayerCells:
    """One index's cells of all layers, on one device: what a single launch for all of them needs to know."""

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        """parts: of each layer uint8 [num_blocks, Hkv, per_block, b], alike in all but where they begin. Raises
        ValueError if they are not."""
        first = parts[0]
        for part in parts:
            require(
                part.shape == first.shape and part.stride() == first.stride() and part.device == first.device,
                f"cells of layers differ: {list(part.shape)} {part.stride()} and {list(first.shape)} {first.stride()}",
            )
        self.parts = list(parts)
        self.offsets = torch.tensor([part.data_ptr() - first.data_ptr() for part in parts], device=first.device)
        """int64 [L], bytes from where the first layer's begin."""


def encode_chunks(
    k: torch.Tensor,
    first_token: torch.Tensor,
    block: torch.Tensor,
    chunk_in_block: torch.Tensor,
    cells: torch.Tensor,
    chunk: int,
    codec: ProductCodec | None = None,
    key_scale: float = 1.0,
) -> None:
    """Cells of chunks whose tokens are ``k[first_token : first_token + C]``, to ``cells[block, :, chunk_in_block]``.

    k: [T, Hkv, D], rows and heads may be strided; fp32, bf16 or fp16. first_token, block, chunk_in_block: int32 [m] on
    the device; entries with first_token < 0 are skipped. cells: uint8 [num_blocks, Hkv, per_block, b], all but the last
    dimension may be strided. chunk: C. With a codec b is M·C and byte m·C + t is token t's code in subspace m; without
    one it is D values of k's dtype, the mean key. Codes are those of `encode_product` but where two centroids are
    equally near to the precision of fp32. key_scale: what keys are multiplied by.

    Nothing is allocated or read back. On CPU tensors this is the twin, unless the kernels were loaded in Triton's
    interpreter. Raises ValueError on a bad shape, dtype or stride; what only the device knows is not checked.
    """
    require(k.dim() == 3 and k.dtype in DTYPES, f"k must be fp32, bf16 or fp16 [T, Hkv, D], got {k.dtype} {k.shape}")
    require(k.stride(2) == 1, f"k: the last dimension must be contiguous, got strides {k.stride()}")
    _check_cells(cells, k.shape[1], k.shape[2], k.dtype, k.device, chunk, codec)
    _check_lists(k.device, torch.int32, first_token=first_token, block=block, chunk_in_block=chunk_in_block)
    kernels = _kernels(cells.device)
    if kernels is None:
        return encode_chunks_naive(k, first_token, block, chunk_in_block, cells, chunk, codec, key_scale)
    kernels.encode(
        kernels.TOKENS, k, first_token, block, chunk_in_block, cells, chunk, k.shape[2], (k.stride(0), k.stride(1)),
        0, (1, 1, k.shape[1]), codec, k.dtype, key_scale,
    )  # fmt: skip


def encode_pages(
    host_pages: torch.Tensor,
    page: torch.Tensor,
    block: torch.Tensor,
    chunk_in_block: torch.Tensor,
    cells: torch.Tensor,
    layer: int,
    geometry: KVGeometry,
    codec: ProductCodec | None = None,
    key_scale: float = 1.0,
) -> None:
    """Cells of full chunks that lie in host pages, for one layer.

    host_pages: [M, 2, lane_heads, C, D], pinned host memory. page: int64 [m] on the device, each chunk's page in lane
    0, or -1 to skip the entry. Mean keys have the geometry's compute_dtype. The rest as in `encode_chunks`.
    """
    _check_pages(host_pages, cells, layer, geometry, codec)
    _check_lists(cells.device, torch.int64, page=page)
    _check_lists(cells.device, torch.int32, block=block, chunk_in_block=chunk_in_block)
    require(len(page) == len(block) == len(chunk_in_block), "page, block and chunk_in_block must be of one length")
    kernels = _kernels(cells.device)
    if kernels is None:
        return encode_pages_naive(host_pages, page, block, chunk_in_block, cells, layer, geometry, codec, key_scale)
    lists = page, block, chunk_in_block
    _encode_pages(kernels, kernels.PAGES, host_pages, *lists, cells, layer, geometry, codec, key_scale)


def encode_decoded(
    pool: torch.Tensor,
    host_pages: torch.Tensor,
    rows: DeviceRows,
    slot_of: torch.Tensor,
    sets: DeviceSets,
    cells: LayerCells,
    geometry: KVGeometry,
    codec: ProductCodec | None,
    key_scales: torch.Tensor,
) -> None:
    """Cells, in all layers, of the chunks that the rows' own tokens completed: of each row whose length is a multiple
    of C.

    Once a step, after its last layer: scores leave a row's newest chunk out until then. Keys are read from the chunk's
    slot, or its host page if it has none. The slot is ``slot_of[page]`` for a whole row, that of the tail for a row on
    a budget. pool: [S, 2, lane_heads, C, D] on the device. slot_of: int32 [M]. Rows of length 0 are skipped. codec: of
    all layers. key_scales: fp32 [L], what each layer's keys are multiplied by. The rest as in `encode_pages`.
    """
    g = geometry
    require(len(cells.parts) == g.num_layers, f"cells of {len(cells.parts)} layers, not of {g.num_layers}")
    device = cells.parts[0].device
    # The others are alike.
    _check_pages(host_pages, cells.parts[0], 0, g, of_layer(codec, 0))
    if codec is not None:
        for name, x in codec._asdict().items():
            require(len(x) == g.num_layers and x.is_contiguous(), f"{name}: not of {g.num_layers} layers, contiguous")
    require_tensor("pool", pool, (len(pool), *g.page_shape), g.dtype, device)
    _check_lists(device, torch.int32, length=rows.length, state=rows.state)
    for name, x, lead in (
        ("slot_of", slot_of, (len(host_pages),)),
        ("sets.pages", sets.pages, tuple(sets.pages.shape)),
        ("sets.counts", sets.counts, (len(sets.pages), g.num_lanes)),
        ("sets.slot", sets.slot, (len(sets.slot), g.num_lanes, PAGE)),
    ):
        require_tensor(name, x, lead, torch.int32, device)
        require(x.is_contiguous(), f"{name} must be contiguous")
    require_tensor("key_scales", key_scales, (g.num_layers,), torch.float32, device)
    shape = (len(rows.length), rows.block_table.shape[1])
    require_tensor("rows.block_table", rows.block_table, shape, torch.int32, device)
    kernels = _kernels(device)
    if kernels is None:
        return encode_decoded_naive(pool, host_pages, rows, slot_of, sets, cells, g, codec, key_scales)
    lists = rows.length, rows.block_table, rows.block_table
    resident = rows, slot_of, sets, host_delta(pool, host_pages), cells.offsets, key_scales
    _encode_pages(kernels, kernels.ROWS, pool, *lists, cells.parts[0], 0, g, codec, 1.0, resident)


def of_layer(codec: ProductCodec | None, layer: int) -> ProductCodec | None:
    """One layer's tables, views, of those of all layers."""
    return None if codec is None else ProductCodec(*(x[layer] for x in codec))


def _encode_pages(
    kernels: ModuleType,
    kind: int,
    keys: torch.Tensor,
    source: torch.Tensor,
    blocks: torch.Tensor,
    places: torch.Tensor,
    cells: torch.Tensor,
    layer: int,
    geometry: KVGeometry,
    codec: ProductCodec | None,
    key_scale: float,
    resident: tuple[DeviceRows, torch.Tensor, DeviceSets, int, torch.Tensor, torch.Tensor] | None = None,
) -> None:
    g = geometry
    kernels.encode(
        kind, keys, source, blocks, places, cells, g.chunk_tokens, g.head_dim, (0, 0), layer,
        (g.num_layers, g.layer_lanes, g.lane_heads), codec, g.compute_dtype, key_scale, resident,
    )  # fmt: skip


def _kernels(device: torch.device) -> ModuleType | None:
    """The kernels, or None for the CPU."""
    kernels = sys.modules.get(_KERNELS)
    if device.type == "cpu":
        return kernels if kernels is not None and kernels.INTERPRETED else None
    if device.type != "cuda":
        raise unsupported(device)
    return kernels or import_module(_KERNELS)


def _check_lists(device: torch.device, dtype: torch.dtype, **lists: torch.Tensor) -> None:
    n = len(next(iter(lists.values())))
    for name, x in lists.items():
        require_tensor(name, x, (n,), dtype, device)
        require(x.is_contiguous(), f"{name} must be contiguous")


def _check_pages(
    host_pages: torch.Tensor, cells: torch.Tensor, layer: int, geometry: KVGeometry, codec: ProductCodec | None
) -> None:
    g = geometry
    shape = (len(host_pages), *g.page_shape)
    require_tensor("host_pages", host_pages, shape, g.dtype, torch.device("cpu"))
    require(host_pages.is_contiguous(), "host_pages must be contiguous")
    require(0 <= layer < g.num_layers, f"layer {layer} is outside 0..{g.num_layers - 1}")
    _check_cells(cells, g.num_kv_heads, g.head_dim, g.compute_dtype, cells.device, g.chunk_tokens, codec)
    require(cells.shape[2] == g.chunks_per_block, f"cells have {cells.shape[2]} chunks a block, not that of geometry")


def _check_cells(
    cells: torch.Tensor,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    chunk: int,
    codec: ProductCodec | None,
) -> None:
    if codec is None:
        size = dim * dtype.itemsize
    else:
        subspaces = codec.centroids.shape[1]
        size = subspaces * chunk
        shapes = ((kv_heads, dim, dim), (kv_heads, dim), (kv_heads, subspaces, CENTROIDS, dim // max(1, subspaces)))
        for name, x, shape in zip(ProductCodec._fields, codec, shapes, strict=True):
            require_tensor(name, x, shape, torch.float32, device)
            require(x.is_contiguous(), f"{name} must be contiguous")
    require(
        cells.dim() == 4 and cells.shape[1] == kv_heads and cells.shape[3] == size and cells.dtype == torch.uint8
        and cells.device == device and cells.stride(3) == 1,
        f"cells must be uint8 [num_blocks, {kv_heads}, per_block, {size}] on {device} with contiguous bytes, "
        f"got {cells.dtype} {list(cells.shape)} on {cells.device}, strides {cells.stride()}",
    )  # fmt: skip


def _write(
    cells: torch.Tensor,
    block: int,
    place: int,
    keys: torch.Tensor,
    codec: ProductCodec | None,
    dtype: torch.dtype,
    key_scale: float,
) -> None:
    """The cell of a chunk's keys [Hkv, C, D]. dtype: of a mean key."""
    values = unscaled(keys, torch.float32) * key_scale
    if codec is None:
        cell = values.mean(1).to(dtype).contiguous().view(torch.uint8)
    else:
        cell = encode_product_naive(values[None], codec.to_code, codec.mean, codec.centroids)[0]
    cells[block, :, place] = cell


def encode_chunks_naive(
    k: torch.Tensor,
    first_token: torch.Tensor,
    block: torch.Tensor,
    chunk_in_block: torch.Tensor,
    cells: torch.Tensor,
    chunk: int,
    codec: ProductCodec | None = None,
    key_scale: float = 1.0,
) -> None:
    """Twin of `encode_chunks`, chunk by chunk."""
    for first, b, place in zip(first_token.tolist(), block.tolist(), chunk_in_block.tolist(), strict=True):
        if first >= 0:
            _write(cells, b, place, k[first : first + chunk].transpose(0, 1), codec, k.dtype, key_scale)


def encode_pages_naive(
    host_pages: torch.Tensor,
    page: torch.Tensor,
    block: torch.Tensor,
    chunk_in_block: torch.Tensor,
    cells: torch.Tensor,
    layer: int,
    geometry: KVGeometry,
    codec: ProductCodec | None = None,
    key_scale: float = 1.0,
) -> None:
    """Twin of `encode_pages`, chunk by chunk."""
    lanes = range(layer * geometry.layer_lanes, (layer + 1) * geometry.layer_lanes)
    for first, b, place in zip(page.tolist(), block.tolist(), chunk_in_block.tolist(), strict=True):
        if first >= 0:
            keys = [host_pages[first + lane * geometry.chunks_per_block, 0] for lane in lanes]
            _write(cells, b, place, torch.cat(keys).to(cells.device), codec, geometry.compute_dtype, key_scale)


def encode_decoded_naive(
    pool: torch.Tensor,
    host_pages: torch.Tensor,
    rows: DeviceRows,
    slot_of: torch.Tensor,
    sets: DeviceSets,
    cells: LayerCells,
    geometry: KVGeometry,
    codec: ProductCodec | None,
    key_scales: torch.Tensor,
) -> None:
    """Twin of `encode_decoded`, layer by layer and row by row."""
    g = geometry
    full = [
        (i, length // g.chunk_tokens - 1, state)
        for i, (length, state) in enumerate(zip(rows.length.tolist(), rows.state.tolist(), strict=True))
        if length and length % g.chunk_tokens == 0
    ]
    for layer, scale in enumerate(key_scales.tolist()):
        for i, c, state in full:
            block, place = int(rows.block_table[i, c // g.chunks_per_block]), c % g.chunks_per_block
            keys = []
            for lane in range(layer * g.layer_lanes, (layer + 1) * g.layer_lanes):
                page = (block * g.num_lanes + lane) * g.chunks_per_block + place
                slot = int(slot_of[page])
                if state >= 0:
                    e = int(sets.counts[state, lane]) - 1
                    slot = int(sets.slot[sets.pages[state, e // PAGE], lane, e % PAGE])
                keys.append((pool[slot] if slot >= 0 else host_pages[page].to(pool.device))[0])
            _write(cells.parts[layer], block, place, torch.cat(keys), of_layer(codec, layer), g.compute_dtype, scale)
