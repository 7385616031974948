"""Decode attention over resident sets: split-KV with all query heads of a KV head in one program, then a merge.

Launched by `vllm_lsa.ops.resident_decode`, which explains the operands. Everything about a row (length, set, count) is
read on the device and the grids follow from shapes alone, so both kernels can be captured in a CUDA graph.
"""

import triton
import triton.language as tl
from vllm_lsa.kernels.e4m3 import widen
from vllm_lsa.kernels.early import await_ahead, await_grid, let_next_begin


@triton.jit
def locate(
    t,
    state_page,
    listed_end,
    whole_end,
    table,
    slot_of,
    set_slot,
    set_chunk,
    lane,
    host_delta,
    LANES: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    SET_PAGE: tl.constexpr,
    PAGE_UNITS: tl.constexpr,
):
    """Where the pages of tokens t begin, int64, in units of 16 bytes from the pool. Tokens past the end read nothing.

    state_page: that of their entries, for rows on a budget. listed_end, whole_end: the end of a row on a budget and of
    a whole row; 0 for a row of the other kind. The former goes state page → slot (→ block where the slot is -1), the
    latter block → slot_of, by masked loads: a branch would keep the loop around it from being pipelined.
    """
    entry = t // CHUNK
    listed = t < listed_end
    whole = t < whole_end
    at = (state_page.to(tl.int64) * LANES + lane) * SET_PAGE + entry % SET_PAGE
    listed_slot = tl.load(set_slot + at, mask=listed, other=-1)
    # Not only where the slot is -1: 4 bytes a chunk are cheaper than waiting for the slot first.
    listed_chunk = tl.load(set_chunk + at, mask=listed, other=0)
    chunk = tl.where(listed, listed_chunk, entry)
    block = tl.load(table + chunk // BLOCK_CHUNKS, mask=whole | (listed & (listed_slot < 0)), other=0)
    page = (block.to(tl.int64) * LANES + lane) * BLOCK_CHUNKS + chunk % BLOCK_CHUNKS
    whole_slot = tl.load(slot_of + page, mask=whole, other=-1)
    slot = tl.where(listed, listed_slot, whole_slot).to(tl.int64)
    return tl.where(slot >= 0, slot * PAGE_UNITS, host_delta + page * PAGE_UNITS)


@triton.jit
def divide(
    tokens,
    set_row,
    counts,
    lane,
    splits,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """Tokens that a row attends to in a lane, tiles of these, and the splits that have some: the first ones."""
    budget = set_row >= 0
    full = (tokens - 1) // CHUNK  # chunks before the tail
    full = tl.where(budget, tl.load(counts + set_row.to(tl.int64) * LANES + lane, mask=budget, other=0) - 1, full)
    total = full * CHUNK + (tokens - 1) % CHUNK + 1
    tiles = (total + TILE - 1) // TILE
    return total, tiles, tl.minimum(splits, (tiles + MIN_TILES - 1) // MIN_TILES)


# Not specialised by what differs between layers: one compilation serves all of them, also during capture.
@triton.jit(do_not_specialize=["layer", "host_delta", "splits"])
def attend(
    q,
    pool,
    token,
    length,
    state,
    table,
    slot_of,
    pages,
    counts,
    set_chunk,
    set_slot,
    out,
    partial,
    lse,
    q_row,
    q_head,
    out_row,
    out_head,
    table_row,
    pages_row,
    layer,
    host_delta,
    splits,
    scale_log2,
    v_factor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    LANE_HEADS: tl.constexpr,
    SET_PAGE: tl.constexpr,
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    DIRECT: tl.constexpr,
    E4M3: tl.constexpr,
    WIDEN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (row and KV head, split): attention of the head's group over the split's share of the row's tokens.

    host_delta: from pool to the host pages in units of VECTOR elements, which are 16 bytes: so the compiler sees that
    every row of K and V is aligned. scale_log2: scale · log2(e) · that of the keys. v_factor: 1 / that of the values.
    TILE: tokens of an iteration. MIN_TILES: a row has at most one split for each so many tiles. DIRECT: there is one
    split, which writes `out`; else `partial` and `lse` (base 2) are for `merge`. E4M3: pages are bytes of it, for
    devices that do not convert it; to those that do, pages are e4m3 themselves. WIDEN: products of fp32 numbers, for
    Triton's interpreter, whose `dot` takes bf16 for integers. INTERLEAVED: a split has every so many tiles, not tiles
    in a row.

    The kernel right ahead writes the newest token and nothing else that is read here, so only its split waits before
    it reads.
    """
    row = tl.program_id(0) // KV_HEADS
    head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    tokens = tl.load(length + row)
    set_row = tl.load(state + row)
    at = tl.load(token + row).to(tl.int64)
    if tokens <= 0:
        if EARLY:
            await_grid()
        return

    budget = set_row >= 0
    lane = layer * (KV_HEADS // LANE_HEADS) + head // LANE_HEADS
    pages += set_row.to(tl.int64) * pages_row
    t = split * TILE + tl.arange(0, TILE)
    if INTERLEAVED:
        # Beside the count: the first tile does not depend on that.
        in_row = t // CHUNK // SET_PAGE < tl.where(budget, pages_row, 0)
        state_page = tl.load(pages + t // CHUNK // SET_PAGE, mask=in_row, other=0)
    total, tiles, used = divide(tokens, set_row, counts, lane, splits, LANES, CHUNK, TILE, MIN_TILES)
    # As even as whole tiles are, for the longest share is what the merge waits for. 0 is of a set without a tail.
    used = tl.maximum(used, 1)
    if INTERLEAVED:
        begin = split * TILE
        end = tl.where(split < used, total, 0)
        step = used * TILE
        last = (tiles - 1) % used
    else:
        begin = tiles * split // used * TILE
        end = tl.minimum(tiles * (split + 1) // used * TILE, total)
        step = TILE
        last = used - 1

    g = tl.arange(0, GROUP_PAD)
    d = tl.arange(0, D_PAD)
    in_group = g < GROUP
    in_dim = d < D
    heads = head * GROUP + g
    state_index = (row * (KV_HEADS * GROUP) + heads) * splits + split
    if DIRECT == 0:
        if begin >= end:
            if EARLY:
                await_grid()
            return

    query = tl.load(
        q + at * q_row + heads[:, None] * q_head + d[None, :],
        mask=in_group[:, None] & in_dim[None, :],
        other=0.0,
    )
    if WIDEN:
        query = query.to(tl.float32)
    # The values follow all keys of a page.
    V_OFFSET: tl.constexpr = LANE_HEADS * CHUNK * D
    PAGE_UNITS: tl.constexpr = 2 * V_OFFSET // VECTOR
    ROW_UNITS: tl.constexpr = D // VECTOR
    head_units = (head % LANE_HEADS) * (CHUNK * ROW_UNITS)
    table += row.to(tl.int64) * table_row
    host_delta = host_delta.to(tl.int64)
    listed_end = tl.where(budget, end, 0)
    whole_end = tl.where(budget, 0, end)

    highest = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    sum_p = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, D_PAD], tl.float32)
    t = begin + tl.arange(0, TILE)
    if not INTERLEAVED:
        state_page = tl.load(pages + t // CHUNK // SET_PAGE, mask=t < listed_end, other=0)
    unit = locate(
        t, state_page, listed_end, whole_end, table, slot_of, set_slot, set_chunk, lane, host_delta,
        LANES, BLOCK_CHUNKS, CHUNK, SET_PAGE, PAGE_UNITS,
    )  # fmt: skip
    if EARLY:
        let_next_begin()
        if split == last:
            await_ahead()
    for first in range(begin, end, step):
        t = first + tl.arange(0, TILE)
        valid = t < end
        base = (unit + head_units + (t % CHUNK) * ROW_UNITS) * VECTOR
        if D == D_PAD:
            read = valid[:, None]
        else:
            read = valid[:, None] & in_dim[None, :]
        at_key = pool + base[:, None] + d[None, :]
        key = tl.load(at_key, mask=read, other=0.0)
        value = tl.load(at_key + V_OFFSET, mask=read, other=0.0)
        # The next tile's addresses, carried by the loop: found in the tile itself, they would be loads that the loads
        # of K and V depend on, and Triton would want a pipeline stage for each.
        t += step
        state_page = tl.load(pages + t // CHUNK // SET_PAGE, mask=t < listed_end, other=0)
        unit = locate(
            t, state_page, listed_end, whole_end, table, slot_of, set_slot, set_chunk, lane, host_delta,
            LANES, BLOCK_CHUNKS, CHUNK, SET_PAGE, PAGE_UNITS,
        )  # fmt: skip
        if E4M3:
            key = widen(key)
            value = widen(value)
        # Exact from e4m3, and nothing else is converted.
        key = key.to(q.dtype.element_ty)
        value = value.to(q.dtype.element_ty)
        if WIDEN:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        # "ieee" matters for fp32 only.
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        logits = tl.where(valid[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))  # finite: the first token of a tile is valid
        decay = tl.exp2(highest - higher)
        p = tl.exp2(logits - higher[:, None])
        sum_p = sum_p * decay + tl.sum(p, 1)
        p = p.to(q.dtype.element_ty).to(value.dtype)
        acc = tl.dot(p, value, acc * decay[:, None], input_precision="ieee")
        highest = higher

    if EARLY:
        await_ahead()
    acc = acc / tl.where(sum_p == 0.0, 1.0, sum_p * v_factor)[:, None]
    mask = in_group[:, None] & in_dim[None, :]
    if DIRECT:
        target = out + at * out_row + heads[:, None] * out_head + d[None, :]
        tl.store(target, acc.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(partial + state_index.to(tl.int64)[:, None] * D + d[None, :], acc, mask=mask)
        tl.store(lse + state_index, highest + tl.log2(sum_p), mask=in_group)


@triton.jit(do_not_specialize=["layer", "host_delta", "splits"])
def merge(
    partial,
    lse,
    token,
    length,
    state,
    counts,
    out,
    q,
    pool,
    new_page,
    new_slot,
    out_row,
    out_head,
    q_row,
    q_head,
    layer,
    host_delta,
    splits,
    scale_log2,
    v_factor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    D_PART: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    LANE_HEADS: tl.constexpr,
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    ARRIVALS: tl.constexpr,
    ARRIVALS_PAD: tl.constexpr,
    NEW_TILE: tl.constexpr,
    E4M3: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (row, query head, part of the head): the splits' results by log-sum-exp, and attention over arrivals.

    ARRIVALS: most of a lane, whose host pages and slots are in `new_page` and `new_slot`; 0 for none, where nothing
    from `q` to `new_slot` is read. NEW_TILE: tokens of them in an iteration. The rest is as in `attend`.

    What `attend` did not write is not read: how many splits it used is found while it still runs, so that `lse` and
    `partial` are under way together. So nothing that runs from when `attend` begins until this ends may write `counts`.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    tokens = tl.load(length + row)
    set_row = tl.where(tokens > 0, tl.load(state + row), -1)
    at = tl.load(token + row).to(tl.int64)
    lane_of_layer = head // GROUP // LANE_HEADS
    lane = layer * (KV_HEADS // LANE_HEADS) + lane_of_layer
    total, tiles, used = divide(tokens, set_row, counts, lane, splits, LANES, CHUNK, TILE, MIN_TILES)
    all_d = tl.arange(0, D_PAD)
    if ARRIVALS:
        query = tl.load(q + at * q_row + head * q_head + all_d, mask=all_d < tl.where(tokens > 0, D, 0), other=0.0)
    if EARLY:
        await_grid()
    if tokens <= 0:
        return

    if ARRIVALS:
        new_page += (row * (KV_HEADS // LANE_HEADS) + lane_of_layer) * ARRIVALS
        new_slot += (row * (KV_HEADS // LANE_HEADS) + lane_of_layer) * ARRIVALS
        arrival = tl.arange(0, ARRIVALS_PAD)
        came = tl.load(new_page + arrival, mask=arrival < ARRIVALS, other=-1) >= 0
    d = tl.program_id(2) * D_PART + tl.arange(0, D_PART)
    split = tl.arange(0, SPLITS_PAD)
    index = (row * (KV_HEADS * GROUP) + head) * splits + split
    written = split < used
    part = tl.load(lse + index, mask=written, other=float("-inf"))
    value = tl.load(
        partial + index.to(tl.int64)[:, None] * D + d[None, :], mask=written[:, None] & (d < D)[None, :], other=0.0
    )
    highest = tl.max(part, 0)
    weight = tl.exp2(part - tl.where(highest == float("-inf"), 0.0, highest))
    total_weight = tl.sum(weight, 0)
    acc = tl.sum(value * weight[:, None], 0)
    if ARRIVALS:
        V_OFFSET: tl.constexpr = LANE_HEADS * CHUNK * D
        PAGE_UNITS: tl.constexpr = 2 * V_OFFSET // VECTOR
        ROW_UNITS: tl.constexpr = D // VECTOR
        head_units = (head // GROUP % LANE_HEADS) * (CHUNK * ROW_UNITS)
        end = tl.sum(came.to(tl.int32), 0) * CHUNK
        for first in range(0, end, NEW_TILE):
            t = first + tl.arange(0, NEW_TILE)
            valid = t < end
            page = tl.load(new_page + t // CHUNK, mask=valid, other=0)
            slot = tl.load(new_slot + t // CHUNK, mask=valid, other=0).to(tl.int64)
            unit = tl.where(slot >= 0, slot * PAGE_UNITS, host_delta + page * PAGE_UNITS)
            at_key = pool + ((unit + head_units + (t % CHUNK) * ROW_UNITS) * VECTOR)[:, None]
            key = tl.load(at_key + all_d[None, :], mask=valid[:, None] & (all_d < D)[None, :], other=0.0)
            new = tl.load(at_key + V_OFFSET + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)
            if E4M3:
                key = widen(key)
                new = widen(new)
            logits = tl.sum(key.to(tl.float32) * query.to(tl.float32)[None, :], 1) * scale_log2
            logits = tl.where(valid, logits, float("-inf"))
            higher = tl.maximum(highest, tl.max(logits, 0))  # finite: the first token of a tile is valid
            decay = tl.exp2(highest - higher)
            p = tl.exp2(logits - higher)
            total_weight = total_weight * decay + tl.sum(p, 0)
            acc = acc * decay + tl.sum(new.to(tl.float32) * p[:, None], 0) / v_factor
            highest = higher
    result = acc / tl.where(total_weight == 0.0, 1.0, total_weight)
    tl.store(out + at * out_row + head * out_head + d, result.to(out.dtype.element_ty), mask=d < D)


INTERPRETED = not isinstance(attend, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter, on CPU tensors."""
