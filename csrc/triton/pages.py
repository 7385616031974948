"""Pages from the host store: into slots, and as contiguous history for attention over a whole prefix."""

import triton
import triton.language as tl
from vllm_lsa.kernels.e4m3 import widen


@triton.jit
def copy_page(pool, page, slot, host_delta, ELEMENTS: tl.constexpr, TILE: tl.constexpr):
    """Copies a host page of so many elements into a slot, both int64; -1 for none."""
    if slot >= 0:
        at = host_delta + page * ELEMENTS
        for begin in range(0, ELEMENTS, TILE):
            part = begin + tl.arange(0, TILE)
            inside = part < ELEMENTS
            tl.store(pool + slot * ELEMENTS + part, tl.load(pool + at + part, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["count"])
def fetch_kernel(
    pool, page, slot, count, host_delta, ELEMENTS: tl.constexpr, TILE: tl.constexpr, LOOK: tl.constexpr
):  # fmt: skip
    """Copies host pages into slots, -1 to leave one out. The programs share the list; each looks at LOOK entries at a
    time, since most of a long list may be left out.
    """
    for first in range(tl.program_id(0) * LOOK, count, tl.num_programs(0) * LOOK):
        here = first + tl.arange(0, LOOK)
        if tl.max(tl.load(slot + here, mask=here < count, other=-1), 0) >= 0:
            for i in range(first, tl.minimum(first + LOOK, count)):
                copy_page(pool, tl.load(page + i), tl.load(slot + i).to(tl.int64), host_delta, ELEMENTS, TILE)


@triton.jit(do_not_specialize=["first_chunk", "num_chunks", "lane_first"])
def gather_history_kernel(
    pool, blocks, slot_of, keys, values, first_chunk, num_chunks, host_delta, lanes, lane_first,
    HEADS: tl.constexpr, LANE_HEADS: tl.constexpr, CHUNK: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    PER_BLOCK: tl.constexpr, E4M3: tl.constexpr,
):  # fmt: skip
    """K and V of a request's chunks as [tokens, HEADS, DIM], from slots where they have one, else from the host.

    E4M3: pages are e4m3 bytes, keys and values what these say.
    """
    elements: tl.constexpr = 2 * LANE_HEADS * CHUNK * DIM
    tokens = tl.arange(0, CHUNK)[:, None]
    dims = tl.arange(0, DIM_PAD)[None, :]
    inside = dims < DIM
    for i in range(tl.program_id(0), num_chunks * HEADS, tl.num_programs(0)):
        head = i % HEADS
        local = i // HEADS
        chunk = first_chunk + local
        block = tl.load(blocks + chunk // PER_BLOCK).to(tl.int64)
        page = (block * lanes + lane_first + head // LANE_HEADS) * PER_BLOCK + chunk % PER_BLOCK
        slot = tl.load(slot_of + page).to(tl.int64)
        base = tl.where(slot >= 0, slot * elements, host_delta + page * elements)
        within = (head % LANE_HEADS) * CHUNK * DIM + tokens * DIM + dims
        to = (local.to(tl.int64) * CHUNK + tokens) * (HEADS * DIM) + head * DIM + dims
        key = tl.load(pool + base + within, mask=inside)
        value = tl.load(pool + base + LANE_HEADS * CHUNK * DIM + within, mask=inside)
        if E4M3:
            key = widen(key).to(keys.dtype.element_ty)
            value = widen(value).to(values.dtype.element_ty)
        tl.store(keys + to, key, mask=inside)
        tl.store(values + to, value, mask=inside)
