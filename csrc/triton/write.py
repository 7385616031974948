"""Write-through of new tokens: into slots and host pages, from the kernel itself.

The host store is pinned, so its pages are addressed like device memory: their offset from the pool is `host_delta`.
"""

import triton
import triton.language as tl
from vllm_lsa.kernels.e4m3 import narrow, widen
from vllm_lsa.kernels.early import await_grid


@triton.jit(do_not_specialize=["layer", "lane_first"])
def write_rows_kernel(
    q, k, v, pool, queries, token, length, query_row, tail_page, tail_slot,
    host_delta, q_stride, k_stride, v_stride, query_stride, lanes, lane_first, layer, k_factor, v_factor,
    GROUP: tl.constexpr, LANE_HEADS: tl.constexpr, CHUNK: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    PER_BLOCK: tl.constexpr, E4M3: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program for each decode row and KV head: its K and V to the tail, its queries to the buffer.

    tail_page: int64 [rows], the tail's page in lane 0. tail_slot: int32 [rows, lanes], -1 for none. E4M3: K and V times
    k_factor and v_factor are written as e4m3 bytes.
    """
    if EARLY:
        await_grid()
    row = tl.program_id(0)
    head = tl.program_id(1)
    lane = lane_first + head // LANE_HEADS
    # Asked for at once: each takes the time of a trip to memory.
    tokens = tl.load(length + row)
    source = tl.load(token + row).to(tl.int64)
    page = tl.load(tail_page + row) + lane * PER_BLOCK
    slot = tl.load(tail_slot + row * lanes + lane).to(tl.int64)
    keeper = tl.load(query_row + row).to(tl.int64)
    if tokens == 0:
        return
    position = tokens - 1
    dims = tl.arange(0, DIM_PAD)
    inside = dims < DIM
    key = tl.load(k + source * k_stride + head * DIM + dims, mask=inside)
    value = tl.load(v + source * v_stride + head * DIM + dims, mask=inside)
    if E4M3:
        key = narrow(key.to(tl.float32) * k_factor)
        value = narrow(value.to(tl.float32) * v_factor)
    within = (head % LANE_HEADS) * CHUNK * DIM + (position % CHUNK) * DIM
    elements: tl.constexpr = 2 * LANE_HEADS * CHUNK * DIM
    to_host = host_delta + page * elements + within
    tl.store(pool + to_host + dims, key, mask=inside)
    tl.store(pool + to_host + LANE_HEADS * CHUNK * DIM + dims, value, mask=inside)
    if slot >= 0:
        to_slot = slot * elements + within
        tl.store(pool + to_slot + dims, key, mask=inside)
        tl.store(pool + to_slot + LANE_HEADS * CHUNK * DIM + dims, value, mask=inside)
    to_query = queries + keeper * query_stride
    to_query += layer * tl.num_programs(1) * GROUP * DIM
    for g in range(GROUP):
        at = (head * GROUP + g) * DIM + dims
        tl.store(to_query + at, tl.load(q + source * q_stride + at, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["lane_first", "num_tokens"])
def write_tokens_kernel(
    k, v, pool, page0, offset, slot_of, read_k, read_v, host_delta, k_stride, v_stride, lane_first, num_tokens,
    k_factor, v_factor,
    LANE_HEADS: tl.constexpr, CHUNK: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PER_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr, E4M3: tl.constexpr,
):  # fmt: skip
    """One program for some tokens and a KV head. page0: each token's page in lane 0, -1 to leave it out.

    E4M3: K and V times k_factor and v_factor are written as e4m3 bytes, whose values go to read_k and read_v,
    [num_tokens, HEADS, DIM].
    """
    head = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    first = tl.load(page0 + token, mask=token < num_tokens, other=-1)
    given = first >= 0
    page = first + (lane_first + head // LANE_HEADS) * PER_BLOCK
    slot = tl.load(slot_of + page, mask=given, other=-1).to(tl.int64)
    dims = tl.arange(0, DIM_PAD)[None, :]
    inside = given[:, None] & (dims < DIM)
    key = tl.load(k + (token * k_stride)[:, None] + head * DIM + dims, mask=inside)
    value = tl.load(v + (token * v_stride)[:, None] + head * DIM + dims, mask=inside)
    if E4M3:
        key = narrow(key.to(tl.float32) * k_factor)
        value = narrow(value.to(tl.float32) * v_factor)
        at = (token * tl.num_programs(1) + head)[:, None] * DIM + dims
        tl.store(read_k + at, widen(key).to(read_k.dtype.element_ty), mask=inside)
        tl.store(read_v + at, widen(value).to(read_v.dtype.element_ty), mask=inside)
    within = (head % LANE_HEADS) * CHUNK * DIM + tl.load(offset + token, mask=given, other=0) * DIM
    elements: tl.constexpr = 2 * LANE_HEADS * CHUNK * DIM
    to_host = pool + (host_delta + page * elements + within)[:, None] + dims
    tl.store(to_host, key, mask=inside)
    tl.store(to_host + LANE_HEADS * CHUNK * DIM, value, mask=inside)
    resident = inside & (slot >= 0)[:, None]
    to_slot = pool + (slot * elements + within)[:, None] + dims
    tl.store(to_slot, key, mask=resident)
    tl.store(to_slot + LANE_HEADS * CHUNK * DIM, value, mask=resident)
