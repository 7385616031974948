"""Reading DeepSeek-V4's compressed entries that a step chose and that are not in the pool, from the host in place."""

import sys
from importlib import import_module

import torch

from vllm_lsa.ops.native import power_of_two, require, require_tensor, unsupported

_KERNELS = "vllm_lsa.kernels.missing_entries"
PER_PAGE = 64
DATA_BYTES, SCALE_BYTES = 576, 8
ENTRY_BYTES = DATA_BYTES + SCALE_BYTES
"""Bytes of an entry in fp8_ds_mla. A page has the data of all of its entries, then the scales of all."""
_PART = 16  # entries of a program


def read_missing(
    chosen: torch.Tensor,
    entries: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    layer: int,
    pool: torch.Tensor,
    store: torch.Tensor,
    places: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Copy what rows chose and have no slot for into their staging pages, and say where all of it is.

    Of R rows that choose K entries each out of W pages, and L c4 layers:

    chosen: int32 [R, K], entries of the row's history, -1 for none; rows may be strided. K: a multiple of 64, and a
    power of two. entries: int32 [R or more], entries that each row has; what is chosen from there on counts as none.
    table: int32 [R or more, W], block of each page. slots: int32 [L, R or more, W + K / 64], slot of each page in the
    pool, -1 for none, then the row's staging pages there. layer: of L. pool: uint8 [S, page bytes]. store: uint8
    [blocks, L, page bytes], pinned host memory. Both contiguous, at multiples of 8 bytes.

    places: int32 [R, K], is written: where what was chosen is in the row of `slots`, in entries; -1 for none. What was
    chosen i-th and is in no slot is the i-th entry of the staging pages. counts: int64 [2], is added to: entries read
    from the store, and pages that these are on, counted for each row.

    Nothing is allocated or read back: fit for a CUDA graph. On CPU tensors this is `read_missing_naive`, unless the
    kernel was loaded in Triton's interpreter. Raises ValueError on a bad shape, dtype, stride or address; what only the
    device knows is not checked.
    """
    kernels = sys.modules.get(_KERNELS)
    if pool.device.type == "cpu":
        if kernels is None or not kernels.INTERPRETED:
            return read_missing_naive(chosen, entries, table, slots, layer, pool, store, places, counts)
    elif pool.device.type != "cuda":
        raise unsupported(pool.device)
    _check(chosen, entries, table, slots, layer, pool, store, places, counts)
    (rows, top_k), words = chosen.shape, pool.shape[1] // 8
    if not rows:
        return
    kernels = kernels or import_module(_KERNELS)
    kernels.read_missing_kernel[(rows, top_k // _PART)](
        chosen, entries, table, slots, pool.view(torch.int64), places, counts,
        chosen.stride(0), table.stride(0), slots.stride(1), layer * slots.stride(0),
        (store.data_ptr() - pool.data_ptr()) // 8, store.shape[1], layer, table.shape[1],
        TOP_K=top_k, PART=_PART, PER_PAGE=PER_PAGE, DATA=DATA_BYTES // 8, WORDS=power_of_two(DATA_BYTES // 8 + 1),
        PAGE=words, num_warps=4,
    )  # fmt: skip


def _check(
    chosen: torch.Tensor, entries: torch.Tensor, table: torch.Tensor, slots: torch.Tensor, layer: int,
    pool: torch.Tensor, store: torch.Tensor, places: torch.Tensor, counts: torch.Tensor,
) -> None:  # fmt: skip
    (rows, top_k), width, page = chosen.shape, table.shape[1], pool.shape[1]
    require(
        top_k % PER_PAGE == 0 and top_k == power_of_two(top_k),
        f"rows must choose a power of two and a multiple of {PER_PAGE}, got {top_k}",
    )
    require_tensor("chosen", chosen, (rows, top_k), torch.int32, pool.device)
    require_tensor("places", places, (rows, top_k), torch.int32, pool.device)
    require(places.is_contiguous(), "places must be contiguous")
    for name, x in (("entries", entries), ("table", table)):
        require(
            x.dtype == torch.int32 and x.device == pool.device and len(x) >= rows and x.stride(-1) == 1,
            f"{name} must be int32 of {rows} rows or more, got {x.dtype} {list(x.shape)}",
        )
    require(entries.dim() == 1, f"entries must have one dimension, got {list(entries.shape)}")
    layers, more = slots.shape[0], width + top_k // PER_PAGE
    require(0 <= layer < layers == store.shape[1], f"layer {layer} is not of {layers}, or the store's differ")
    require(slots.shape[1] >= rows, f"slots must have {rows} rows or more, got {slots.shape[1]}")
    require_tensor("slots", slots, (layers, slots.shape[1], more), torch.int32, pool.device)
    require_tensor("pool", pool, (len(pool), page), torch.uint8, pool.device)
    require_tensor("store", store, (len(store), layers, page), torch.uint8, store.device)
    require_tensor("counts", counts, (2,), torch.int64, pool.device)
    require(pool.is_contiguous() and store.is_contiguous(), "pool and store must be contiguous")
    require(
        page % 8 == 0 and page >= PER_PAGE * ENTRY_BYTES and pool.data_ptr() % 8 == 0 and store.data_ptr() % 8 == 0,
        f"pages must be {PER_PAGE * ENTRY_BYTES} bytes or more, in multiples of 8 and at such, got {page}",
    )


def read_missing_naive(
    chosen: torch.Tensor,
    entries: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    layer: int,
    pool: torch.Tensor,
    store: torch.Tensor,
    places: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Twin of `read_missing`, a row and an entry at a time."""
    width = table.shape[1]
    for row, names in enumerate(chosen.tolist()):
        pages: set[int] = set()
        for i, entry in enumerate(names):
            if not 0 <= entry < int(entries[row]):
                places[row, i] = -1
                continue
            page = entry // PER_PAGE
            if slots[layer, row, page] >= 0:
                places[row, i] = entry
                continue
            source = store[int(table[row, page]), layer]
            target = pool[int(slots[layer, row, width + i // PER_PAGE])]
            for size, begin in ((DATA_BYTES, 0), (SCALE_BYTES, PER_PAGE * DATA_BYTES)):
                here, there = begin + size * (entry % PER_PAGE), begin + size * (i % PER_PAGE)
                target[there : there + size] = source[here : here + size]
            places[row, i] = width * PER_PAGE + i
            pages.add(page)
            counts[0] += 1
        counts[1] += len(pages)
