"""A request's set for its next cycle, from the scores of its chunks. Launched by `vllm_lsa.ops.renew_set`.

A lane is the work of one program: it goes over the lane's chunks a tile at a time, several times, and its passes have
barriers between them where one reads what another wrote.
"""

import triton
import triton.language as tl

NO_DIGIT = 256
"""In place of the digit of what is not counted; nobody looks at its bin."""


@triton.jit
def _key(score):
    """An int32 in the order of fp32 scores."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # 0 has no sign
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _scored(scores, chunk, full, threshold, sink, recency):
    """(whether a chunk may be chosen for its score, the key of that) of some chunks."""
    score = tl.load(scores + chunk, mask=chunk < full, other=float("-inf"))
    return (score > threshold) & (chunk >= sink) & (chunk < full - recency), _key(score)


@triton.jit
def _by_chunk(set_pages, chunk, mask, lane, lanes, PAGE: tl.constexpr):
    """Offsets of entries or chunks of a lane in the paged buffers."""
    return (tl.load(set_pages + chunk // PAGE, mask=mask, other=0).to(tl.int64) * lanes + lane) * PAGE + chunk % PAGE


_UNSPECIALISED = [
    "row", "table_row", "score_stride", "pages_stride", "lanes", "full", "width", "sink", "recency", "threshold",
    "first", "copy_tail",
]  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALISED)
def renew_kernel(
    scores, all_pages, counts, entry_chunk, entry_slot, held, target, selected, on_the_way, block_table, limits,
    old_chunk, old_slot, fetch_page, fetch_slot, incoming,
    row, table_row, score_stride, pages_stride, lanes, full, width, sink, recency, threshold, first, copy_tail,
    NEXT: tl.constexpr, PER_BLOCK: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, NO_DIGIT: tl.constexpr,
):  # fmt: skip
    """limits: int32 [2, lanes], chunks to choose by their scores, and slots. table_row: offset in block_table. first:
    whether nothing was selected before, so that there is nothing to keep for a while. copy_tail: whether to copy the
    tail too. The rest as in `ops.renew_set`; old_chunk, old_slot: int32 [lanes, width], scratch.
    """
    lane = tl.program_id(0)
    tile = tl.arange(0, BLOCK)
    set_pages = all_pages + row * pages_stride
    scores += lane * score_stride
    old_chunk += lane * width
    old_slot += lane * width
    fetch_page += lane.to(tl.int64) * width
    fetch_slot += lane.to(tl.int64) * width
    last = tl.load(counts + row * lanes + lane) - 1
    room = tl.load(limits + lane)
    owned = tl.load(limits + lanes + lane)
    for begin in range(0, width, BLOCK):
        entry = begin + tile
        here = entry < width
        at = _by_chunk(set_pages, entry, here, lane, lanes, PAGE)
        tl.store(old_chunk + entry, tl.load(entry_chunk + at, mask=here, other=0), mask=here)
        tl.store(old_slot + entry, tl.load(entry_slot + at, mask=here, other=-1), mask=here)

    # The least key that is chosen, eight bits at a time, and how many have just that.
    least = 0
    need = room
    equals = 0
    enough = False
    for step in tl.static_range(4):
        bins = tl.zeros([2 * NO_DIGIT], tl.int32)
        for begin in range(0, full, BLOCK):
            eligible, key = _scored(scores, begin + tile, full, threshold, sink, recency)
            if step == 0:
                digit = (key >> 24) + 128
            else:
                digit = (key >> (24 - 8 * step)) & 255
                eligible = eligible & ((key >> (32 - 8 * step)) == least)
            bins += tl.histogram(tl.where(eligible, digit, NO_DIGIT), 2 * NO_DIGIT)
        which = tl.arange(0, 2 * NO_DIGIT)
        bins = tl.where(which < NO_DIGIT, bins, 0)
        above = tl.sum(bins, 0) - tl.cumsum(bins, 0)
        if step == 0:
            enough = tl.sum(bins, 0) > room
        hit = (above < need) & (above + bins >= need) & (bins > 0)
        found = tl.max(tl.where(hit, which, 0), 0)
        equals = tl.max(tl.where(hit, bins, 0), 0)
        need -= tl.max(tl.where(hit, above, 0), 0)
        if step == 0:
            least = found - 128
        else:
            least = (least << 8) | found
    # Where there is room for all, all are above the least. Where there is none, none are.
    least = tl.where(enough, least, -2147483648)
    least = tl.where(room > 0, least, 2147483647)
    need = tl.where(enough & (room > 0), need, 0)

    # What the selection keeps, and how far the set is from that.
    paged = tl.cdiv(full, PAGE) * PAGE
    seen = 0
    num_both = 0
    num_extra = 0
    num_missing = 0
    for begin in range(0, paged, BLOCK):
        chunk = begin + tile
        valid = chunk < full
        eligible, key = _scored(scores, chunk, full, threshold, sink, recency)
        equal = eligible & (key == least)
        newer = equals - seen - tl.cumsum(equal.to(tl.int32), 0)
        seen += tl.sum(equal.to(tl.int32), 0)
        chosen = (chunk < sink) | (chunk >= full - recency) | (eligible & (key > least)) | (equal & (newer < need))
        chosen = valid & chosen
        at = _by_chunk(set_pages, chunk, chunk < paged, lane, lanes, PAGE)
        present = tl.load(held + at, mask=valid, other=0) == 1
        num_both += tl.sum((chosen & present).to(tl.int32), 0)
        num_extra += tl.sum((present & (chosen == 0) & valid).to(tl.int32), 0)
        num_missing += tl.sum((chosen & (present == 0)).to(tl.int32), 0)
        tl.store(target + at, chosen.to(tl.uint8), mask=chunk < paged)
    tl.debug_barrier()

    # The set of that size nearest to the present one: what is to leave holds the places of what is still to come, the
    # newest of each first.
    waiting = tl.where(first != 0, 0, tl.minimum(num_extra, num_missing))
    kept = num_both + waiting
    coming = num_missing - waiting
    held_paged = tl.cdiv(full + 1, PAGE) * PAGE
    extra_seen = 0
    missing_seen = 0
    came = 0
    for begin in range(0, held_paged, BLOCK):
        chunk = begin + tile
        valid = chunk < full
        at = _by_chunk(set_pages, chunk, chunk < held_paged, lane, lanes, PAGE)
        chosen = tl.load(target + at, mask=valid, other=0) == 1
        present = tl.load(held + at, mask=valid, other=0) == 1
        extra = present & (chosen == 0) & valid
        missing = chosen & (present == 0)
        rank = extra_seen + tl.cumsum(extra.to(tl.int32), 0)
        stays = extra & (rank > num_extra - waiting)
        extra_seen += tl.sum(extra.to(tl.int32), 0)
        rank = missing_seen + tl.cumsum(missing.to(tl.int32), 0)
        comes = missing & (rank > num_missing - coming)
        missing_seen += tl.sum(missing.to(tl.int32), 0)
        there = (chosen & present) | stays | comes | (chunk == full)
        tl.store(held + at, there.to(tl.uint8), mask=chunk < held_paged)
        to = kept + came + tl.cumsum(comes.to(tl.int32), 0) - 1
        came += tl.sum(comes.to(tl.int32), 0)
        tl.store(entry_chunk + _by_chunk(set_pages, to, comes, lane, lanes, PAGE), chunk, mask=comes)
        block = tl.load(block_table + table_row + chunk // PER_BLOCK, mask=comes, other=0).to(tl.int64)
        tl.store(fetch_page + to, (block * lanes + lane) * PER_BLOCK + chunk % PER_BLOCK, mask=comes)
    tl.debug_barrier()

    # The list: what stays, what comes, the tail, and slots to spare.
    kept_seen = 0
    free_seen = 0
    copied = tl.zeros([BLOCK], tl.int64)
    for begin in range(0, width, BLOCK):
        entry = begin + tile
        here = entry < width
        chunk = tl.load(old_chunk + entry, mask=here, other=0)
        slot = tl.load(old_slot + entry, mask=here, other=-1)
        listed = here & (entry < last)
        there = tl.load(held + _by_chunk(set_pages, chunk, listed, lane, lanes, PAGE), mask=listed, other=0) == 1
        keeps = listed & there
        tail = here & (entry == last)
        free = here & (entry < owned) & (keeps == 0) & (tail == 0)
        keep_rank = kept_seen + tl.cumsum(keeps.to(tl.int32), 0) - 1
        free_rank = free_seen + tl.cumsum(free.to(tl.int32), 0) - 1
        kept_seen += tl.sum(keeps.to(tl.int32), 0)
        free_seen += tl.sum(free.to(tl.int32), 0)
        filled = free & (free_rank < coming)
        to = tl.where(keeps, keep_rank, entry)
        to = tl.where(tail, kept + coming, to)
        to = tl.where(free, kept + free_rank + (free_rank >= coming).to(tl.int32), to)
        at = _by_chunk(set_pages, to, here, lane, lanes, PAGE)
        tl.store(entry_slot + at, slot, mask=here)
        tl.store(entry_chunk + at, chunk, mask=keeps | tail)
        copies = filled | (tail & (copy_tail != 0))
        tl.store(fetch_slot + to, tl.where(copies, slot, -1), mask=here)
        copied += (copies & (slot >= 0)).to(tl.int64)
    if copy_tail != 0:
        block = tl.load(block_table + table_row + full // PER_BLOCK).to(tl.int64)
        tl.store(fetch_page + kept + coming, (block * lanes + lane) * PER_BLOCK + full % PER_BLOCK)
    tl.store(counts + row * lanes + lane, kept + coming + 1)
    tl.store(on_the_way + (row * lanes + lane) * NEXT + tl.arange(0, NEXT), tl.full([NEXT], -1, tl.int32))
    tl.atomic_add(incoming, tl.sum(copied, 0))
    if lane == 0:
        tl.store(selected + row, full)
