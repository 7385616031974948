"""The demand of a step: what each lane's attention asks for, what comes in, what leaves. See `residency.replacement`.

Lists change between steps only, so attention may read them while it is decided what comes. A lane is decided, and its
list written, by one program, so its scalar steps need barriers only.
"""

import triton
import triton.language as tl
from vllm_lsa.kernels.early import await_grid
from vllm_lsa.kernels.pages import copy_page


@triton.jit
def advance_kernel(
    length, state, block_table, slot_of, set_pages, counts, entry_chunk, entry_slot, held, usage, tail_page, tail_slot,
    table_stride, pages_stride, lanes,
    CHUNK: tl.constexpr, PER_BLOCK: tl.constexpr, PAGE: tl.constexpr, LANES_PAD: tl.constexpr,
):  # fmt: skip
    """Where a row's token goes to in all lanes. Where it begins a chunk, that becomes the tail of a row on a budget, in
    the lane's first spare entry.
    """
    row = tl.program_id(0)
    tokens = tl.load(length + row)
    mine = tl.load(state + row)
    if tokens == 0:
        return
    chunk = (tokens - 1) // CHUNK
    lane = tl.arange(0, LANES_PAD)
    inside = lane < lanes
    block = tl.load(block_table + row.to(tl.int64) * table_stride + chunk // PER_BLOCK).to(tl.int64)
    first = block * lanes * PER_BLOCK + chunk % PER_BLOCK
    tl.store(tail_page + row, first)
    if mine < 0:
        slot = tl.load(slot_of + first + lane * PER_BLOCK, mask=inside, other=-1)
        tl.store(tail_slot + row * lanes + lane, slot, mask=inside)
        return
    begins = (tokens - 1) % CHUNK == 0
    count = tl.load(counts + mine * lanes + lane, mask=inside, other=1)
    entry = tl.where(begins, count, count - 1)
    page = tl.load(set_pages + mine * pages_stride + entry // PAGE, mask=inside, other=0).to(tl.int64)
    at = (page * lanes + lane) * PAGE + entry % PAGE
    tl.store(tail_slot + row * lanes + lane, tl.load(entry_slot + at, mask=inside, other=-1), mask=inside)
    if begins:
        tl.store(entry_chunk + at, chunk, mask=inside)
        tl.store(counts + mine * lanes + lane, entry + 1, mask=inside)
        of_chunk = tl.load(set_pages + mine * pages_stride + chunk // PAGE).to(tl.int64)
        by_chunk = (of_chunk * lanes + lane) * PAGE + chunk % PAGE
        tl.store(held + by_chunk, tl.full([LANES_PAD], 1, tl.uint8), mask=inside)
        tl.store(usage + by_chunk, tl.zeros([LANES_PAD], tl.float32), mask=inside)


@triton.jit
def _entry(set_pages, entry, lane, lanes, PAGE: tl.constexpr):
    """Offset of a lane's entry in the paged buffers."""
    return (tl.load(set_pages + entry // PAGE).to(tl.int64) * lanes + lane) * PAGE + entry % PAGE


@triton.jit
def _entries(set_pages, entry, mask, lane, lanes, PAGE: tl.constexpr):
    """Those of some entries, where mask says so."""
    page = tl.load(set_pages + entry // PAGE, mask=mask, other=0).to(tl.int64)
    return (page * lanes + lane) * PAGE + entry % PAGE


@triton.jit
def _split_size(full, SPLITS: tl.constexpr, PAGE: tl.constexpr):
    """Chunks of a split: whole state pages."""
    return tl.cdiv(tl.cdiv(full, SPLITS), PAGE) * PAGE


@triton.jit
def _range(full, part, SPLITS: tl.constexpr, PAGE: tl.constexpr):
    """The first chunk of a split, and the first after it."""
    size = _split_size(full, SPLITS, PAGE)
    return part * size, tl.minimum((part + 1) * size, full)


@triton.jit
def _row(length, state, row, n):
    """(tokens, row of sets) of a row, and those of padding from n on. Older than any kernel of a step's layers."""
    return tl.load(length + row, mask=row < n, other=0), tl.load(state + row, mask=row < n, other=-1)


@triton.jit
def _stats(
    set_pages, logits, first, last, local,
    PAGE: tl.constexpr, Q_HEADS: tl.constexpr, LANE_Q: tl.constexpr, LANE_Q_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each head's maximum and sum over the chunks from first up to last."""
    heads = tl.arange(0, LANE_Q_PAD)[:, None]
    real = heads < LANE_Q
    top = tl.full([LANE_Q_PAD], -float("inf"), tl.float32)
    total = tl.zeros([LANE_Q_PAD], tl.float32)
    for begin in range(first, last, BLOCK):
        chunk = begin + tl.arange(0, BLOCK)
        valid = chunk < last
        page = tl.load(set_pages + chunk // PAGE, mask=valid, other=0).to(tl.int64)
        at = (page * Q_HEADS + local * LANE_Q)[None, :] * PAGE + heads * PAGE + (chunk % PAGE)[None, :]
        x = tl.load(logits + at, mask=real & valid[None, :], other=-float("inf"))
        higher = tl.maximum(top, tl.max(x, 1))
        # A head that saw nothing yet is at -inf; its exponent would be NaN.
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(x - safe[:, None]), 1)
        top = higher
    return top, total


@triton.jit(do_not_specialize=["n"])
def mass_stats_kernel(
    length, state, all_pages, logits, top_of, sum_of, n, pages_stride,
    CHUNK: tl.constexpr, PAGE: tl.constexpr, Q_HEADS: tl.constexpr, LANE_Q: tl.constexpr, LANE_Q_PAD: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """For every so many rows, a lane of a layer and a split of the row's chunks: each head's maximum and sum of the
    softmax. Grid (programs, lanes of the layer, SPLITS).

    logits: fp32 [state pages, Q_HEADS, PAGE], estimated log mass of each full chunk. top_of, sum_of: fp32 [rows, lanes
    of the layer, LANE_Q_PAD, SPLITS].
    """
    local = tl.program_id(1)
    part = tl.program_id(2)
    row = tl.program_id(0)
    tokens, mine = _row(length, state, row, n)
    if EARLY:
        await_grid()
    while row < n:
        if (tokens > 0) & (mine >= 0):
            full = (tokens - 1) // CHUNK
            set_pages = all_pages + mine * pages_stride
            first, last = _range(full, part, SPLITS, PAGE)
            top, total = _stats(set_pages, logits, first, last, local, PAGE, Q_HEADS, LANE_Q, LANE_Q_PAD, BLOCK)
            place = ((row * tl.num_programs(1) + local) * LANE_Q_PAD + tl.arange(0, LANE_Q_PAD)) * SPLITS + part
            tl.store(top_of + place, top)
            tl.store(sum_of + place, total)
        row += tl.num_programs(0)
        tokens, mine = _row(length, state, row, n)


@triton.jit(do_not_specialize=["n", "lane_first"])
def mass_kernel(
    length, state, all_pages, held, usage, logits, top_of, sum_of, wanted_of, best_of, where_of,
    n, pages_stride, lanes, lane_first, threshold, decay,
    CHUNK: tl.constexpr, PAGE: tl.constexpr, Q_HEADS: tl.constexpr, LANE_Q: tl.constexpr, LANE_Q_PAD: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """For every so many rows, a lane of a layer and a split: notes usage, and the mass of what may come in place of the
    lane's first head's logits, -1 for the rest. Grid as above. wanted_of, best_of, where_of: [rows, lanes of the layer,
    SPLITS], how many may come, the most mass, and whose it is.
    """
    row = tl.program_id(0)
    tokens, mine = _row(length, state, row, n)
    if EARLY:
        await_grid()
    while row < n:
        if (tokens > 0) & (mine >= 0):
            _mass(
                row, (tokens - 1) // CHUNK, all_pages + mine * pages_stride, held, usage, logits, top_of, sum_of,
                wanted_of, best_of, where_of, lanes, lane_first, threshold, decay,
                PAGE, Q_HEADS, LANE_Q, LANE_Q_PAD, SPLITS, BLOCK,
            )  # fmt: skip
        row += tl.num_programs(0)
        tokens, mine = _row(length, state, row, n)


@triton.jit
def _mass(
    row, full, set_pages, held, usage, logits, top_of, sum_of, wanted_of, best_of, where_of,
    lanes, lane_first, threshold, decay,
    PAGE: tl.constexpr, Q_HEADS: tl.constexpr, LANE_Q: tl.constexpr, LANE_Q_PAD: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`mass_kernel` of one row with that many full chunks."""
    local = tl.program_id(1)
    part = tl.program_id(2)
    lane = lane_first + local
    heads = tl.arange(0, LANE_Q_PAD)[:, None]
    real = heads < LANE_Q
    place = row * tl.num_programs(1) + local
    every = (place * LANE_Q_PAD + heads) * SPLITS + tl.arange(0, SPLITS)[None, :]
    if SPLITS == 1:
        top, total = _stats(set_pages, logits, 0, full, local, PAGE, Q_HEADS, LANE_Q, LANE_Q_PAD, BLOCK)
        tops, sums = top[:, None], total[:, None]
        tl.debug_barrier()
    else:
        tops, sums = tl.load(top_of + every), tl.load(sum_of + every)
    peak = tl.max(tops, 1)
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    norm = tl.sum(sums * tl.exp(tops - peak[:, None]), 1)
    weight = tl.where(norm > 0, 1.0 / (tl.where(norm > 0, norm, 1.0) * LANE_Q), 0.0)
    first, last = _range(full, part, SPLITS, PAGE)
    wanted = 0
    best = 0.0
    where = 2147483647
    for begin in range(first, last, BLOCK):
        chunk = begin + tl.arange(0, BLOCK)
        valid = chunk < last
        page = tl.load(set_pages + chunk // PAGE, mask=valid, other=0).to(tl.int64)
        at = (page * Q_HEADS + local * LANE_Q)[None, :] * PAGE + heads * PAGE + (chunk % PAGE)[None, :]
        x = tl.load(logits + at, mask=real & valid[None, :], other=-float("inf"))
        mass = tl.sum(tl.exp(x - peak[:, None]) * weight[:, None], 0)
        of_lane = (page * lanes + lane) * PAGE + chunk % PAGE
        before = tl.load(usage + of_lane, mask=valid, other=0.0)
        tl.store(usage + of_lane, tl.maximum(before * decay, mass), mask=valid)
        absent = tl.load(held + of_lane, mask=valid, other=1) == 0
        comes = absent & valid & (mass > threshold)
        wanted += tl.sum(comes.to(tl.int32), 0)
        mass = tl.where(comes, mass, -1.0)
        tl.debug_barrier()  # all threads have read what is overwritten
        tl.store(logits + (page * Q_HEADS + local * LANE_Q) * PAGE + chunk % PAGE, mass, mask=valid)
        most = tl.max(mass, 0)
        oldest = tl.min(tl.where(mass == most, chunk, 2147483647), 0)
        where = tl.where(most > best, oldest, where)
        best = tl.maximum(most, best)
    tl.store(wanted_of + place * SPLITS + part, wanted)
    tl.store(best_of + place * SPLITS + part, best)
    tl.store(where_of + place * SPLITS + part, where)


@triton.jit(do_not_specialize=["lane_first"])
def pick_kernel(
    length, state, block_table, all_pages, counts, room, entry_slot, held, logits,
    wanted_of, best_of, where_of, picked, fetch_page, fetch_slot, demanded, pool,
    host_delta, table_stride, pages_stride, lanes, lane_first,
    ELEMENTS: tl.constexpr, TILE: tl.constexpr,
    MOST: tl.constexpr, MOST_PAD: tl.constexpr, CHUNK: tl.constexpr, PER_BLOCK: tl.constexpr, PAGE: tl.constexpr,
    Q_HEADS: tl.constexpr, LANE_Q: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program for each row and lane of a layer, after `mass_kernel`: what comes, into which spare slot; then it
    copies that from the host.

    picked: int32 [rows, lanes, MOST], chunks that come, -1 for none. fetch_page, fetch_slot: [rows, lanes of the layer,
    MOST], where they are and go. demanded: int64 [1], counted up. ELEMENTS: of a page.
    """
    row = tl.program_id(0)
    local = tl.program_id(1)
    lane = lane_first + local
    tokens = tl.load(length + row)
    mine = tl.load(state + row)
    works = (tokens > 0) & (mine >= 0)
    # Nobody changes them before the end of the step.
    count = tl.load(counts + mine * lanes + lane, mask=works, other=0)
    most_here = tl.load(room + mine * lanes + lane, mask=works, other=0)
    if EARLY:
        await_grid()
    place = row * tl.num_programs(1) + local
    picked += (row * lanes + lane) * MOST
    fetch_page += place * MOST
    fetch_slot += place * MOST
    item = tl.arange(0, MOST_PAD)
    none = tl.full([MOST_PAD], -1, tl.int32)
    tl.store(picked + item, none, mask=item < MOST)
    tl.store(fetch_page + item, none.to(tl.int64), mask=item < MOST)
    tl.store(fetch_slot + item, none, mask=item < MOST)
    if works == 0:
        return
    full = (tokens - 1) // CHUNK  # chunks that were full before this step, and the number of the tail's
    set_pages = all_pages + mine * pages_stride
    parts = tl.arange(0, SPLITS)
    picks = tl.minimum(tl.sum(tl.load(wanted_of + place * SPLITS + parts), 0), tl.minimum(most_here, MOST))
    if picks == 0:
        return
    tl.atomic_add(demanded, picks.to(tl.int64))
    tl.debug_barrier()
    step = 0
    while step < picks:
        bests = tl.load(best_of + place * SPLITS + parts)
        wheres = tl.load(where_of + place * SPLITS + parts)
        pick = tl.min(tl.where(bests == tl.max(bests, 0), wheres, 2147483647), 0)
        page = tl.load(set_pages + pick // PAGE).to(tl.int64)
        tl.store(logits + (page * Q_HEADS + local * LANE_Q) * PAGE + pick % PAGE, -1.0)
        tl.store(held + (page * lanes + lane) * PAGE + pick % PAGE, 1)
        tl.debug_barrier()
        if step + 1 < picks:
            # The split that it came from has another best one now.
            part = pick // _split_size(full, SPLITS, PAGE)
            first, last = _range(full, part, SPLITS, PAGE)
            most = 0.0
            oldest = 2147483647
            for begin in range(first, last, BLOCK):
                chunk = begin + tl.arange(0, BLOCK)
                valid = chunk < last
                page_m = tl.load(set_pages + chunk // PAGE, mask=valid, other=0).to(tl.int64)
                at = (page_m * Q_HEADS + local * LANE_Q) * PAGE + chunk % PAGE
                mass = tl.load(logits + at, mask=valid, other=-1.0)
                here = tl.max(mass, 0)
                its = tl.min(tl.where(mass == here, chunk, 2147483647), 0)
                oldest = tl.where(here > most, its, oldest)
                most = tl.maximum(here, most)
            tl.store(best_of + place * SPLITS + part, most)
            tl.store(where_of + place * SPLITS + part, oldest)
        tl.store(picked + step, pick)
        block = tl.load(block_table + row.to(tl.int64) * table_stride + pick // PER_BLOCK).to(tl.int64)
        tl.store(fetch_page + step, (block * lanes + lane) * PER_BLOCK + pick % PER_BLOCK)
        tl.store(fetch_slot + step, tl.load(entry_slot + _entry(set_pages, count + step, lane, lanes, PAGE)))
        tl.debug_barrier()
        step += 1
    for come in range(picks):
        slot = tl.load(fetch_slot + come).to(tl.int64)
        copy_page(pool, tl.load(fetch_page + come), slot, host_delta, ELEMENTS, TILE)


@triton.jit(do_not_specialize=["sink", "recency"])
def settle_kernel(
    length, state, all_pages, counts, caps, entry_chunk, entry_slot, held, usage, picked, victims,
    pages_stride, lanes, sink, recency,
    MOST: tl.constexpr, MOST_PAD: tl.constexpr, CHUNK: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program for each row and lane of the model, at the end of a step: puts what came into the lists, and lets
    others leave. victims: int32 [rows, lanes, MOST + 1], scratch.
    """
    if EARLY:
        await_grid()
    row = tl.program_id(0)
    lane = tl.program_id(1)
    tokens = tl.load(length + row)
    mine = tl.load(state + row)
    if tokens == 0 or mine < 0:
        return
    place = row * lanes + lane
    victims += place * (MOST + 1)
    item = tl.arange(0, MOST_PAD)
    pick = tl.load(picked + place * MOST + item, mask=item < MOST, other=-1)
    picks = tl.sum((pick >= 0).to(tl.int32), 0)
    count = tl.load(counts + mine * lanes + lane)
    over = count + picks - tl.load(caps + mine * lanes + lane)
    if (picks == 0) & (over <= 0):
        return
    full = (tokens - 1) // CHUNK
    set_pages = all_pages + mine * pages_stride
    leaving = 0
    if over > 0:
        # Least used first. A victim is struck off `held`, so the next search passes it by.
        searching = 1
        while searching == 1:
            best = tl.full([BLOCK], float("inf"), tl.float32)
            where = tl.full([BLOCK], 2147483647, tl.int32)
            for begin in range(0, count - 1, BLOCK):
                entry = begin + tl.arange(0, BLOCK)
                valid = entry < count - 1
                page = tl.load(set_pages + entry // PAGE, mask=valid, other=0).to(tl.int64)
                chunk = tl.load(entry_chunk + (page * lanes + lane) * PAGE + entry % PAGE, mask=valid, other=0)
                may = valid & (chunk >= sink) & (chunk < full - recency)
                page = tl.load(set_pages + chunk // PAGE, mask=may, other=0).to(tl.int64)
                of_lane = (page * lanes + lane) * PAGE + chunk % PAGE
                may = may & (tl.load(held + of_lane, mask=may, other=0) == 1)
                used = tl.load(usage + of_lane, mask=may, other=float("inf"))
                less = may & (used < best)
                best = tl.where(less, used, best)
                where = tl.where(less, entry, where)
            least = tl.min(best, 0)
            victim = tl.min(tl.where(best == least, where, 2147483647), 0)
            if victim == 2147483647:
                searching = 0
            else:
                leaver = tl.load(entry_chunk + _entry(set_pages, victim, lane, lanes, PAGE))
                tl.store(held + _entry(set_pages, leaver, lane, lanes, PAGE), 0)
                tl.store(victims + leaving, victim)
                leaving += 1
                if leaving == tl.minimum(over, MOST + 1):
                    searching = 0
                tl.debug_barrier()

    # The first ones come to where others leave, the rest before the tail, which moves up. Freed slots are spare. With
    # less room than came, the last ones go again.
    kept = tl.maximum(picks - tl.maximum(over - leaving, 0), 0)
    swaps = tl.minimum(kept, leaving)
    grown = kept - swaps
    dropped = (item >= kept) & (item < picks)
    tl.store(held + _entries(set_pages, pick, dropped, lane, lanes, PAGE), tl.zeros([MOST_PAD], tl.uint8), mask=dropped)
    stays = item < kept
    swap = item < swaps
    fresh = tl.load(entry_slot + _entries(set_pages, count + item, stays, lane, lanes, PAGE), mask=stays, other=-1)
    gap = tl.load(victims + item, mask=swap, other=0)
    freed = tl.load(entry_slot + _entries(set_pages, gap, swap, lane, lanes, PAGE), mask=swap, other=-1)
    last = tl.load(entry_slot + _entry(set_pages, count - 1, lane, lanes, PAGE))
    tl.debug_barrier()
    to = _entries(set_pages, tl.where(swap, gap, count - 1 + item - swaps), stays, lane, lanes, PAGE)
    tl.store(entry_slot + to, fresh, mask=stays)
    tl.store(entry_chunk + to, pick, mask=stays)
    tl.store(entry_slot + _entries(set_pages, count + grown + item, swap, lane, lanes, PAGE), freed, mask=swap)
    if grown > 0:
        end = _entry(set_pages, count - 1 + grown, lane, lanes, PAGE)
        tl.store(entry_slot + end, last)
        tl.store(entry_chunk + end, full)
    tl.debug_barrier()
    now = count + grown
    step = kept
    while step < leaving:
        # One less: the entry before the tail fills the gap, the tail moves down, the slot becomes spare.
        hole = tl.load(victims + step)
        at = _entry(set_pages, hole, lane, lanes, PAGE)
        before = _entry(set_pages, now - 2, lane, lanes, PAGE)
        tail = _entry(set_pages, now - 1, lane, lanes, PAGE)
        empty = tl.load(entry_slot + at)
        moved_slot = tl.load(entry_slot + before)
        moved_chunk = tl.load(entry_chunk + before)
        tail_slot = tl.load(entry_slot + tail)
        # A later victim that has just moved is found under its new number.
        for other in range(step + 1, leaving):
            renamed = tl.load(victims + other)
            tl.debug_barrier()
            tl.store(victims + other, tl.where(renamed == now - 2, hole, renamed))
        tl.debug_barrier()
        if hole != now - 2:
            tl.store(entry_slot + at, moved_slot)
            tl.store(entry_chunk + at, moved_chunk)
        tl.store(entry_slot + before, tail_slot)
        tl.store(entry_chunk + before, full)
        tl.store(entry_slot + tail, empty)
        now -= 1
        tl.debug_barrier()
        step += 1
    tl.store(counts + mine * lanes + lane, now)


@triton.jit(do_not_specialize=["sink", "recency"])
def refresh_kernel(
    length, state, block_table, all_pages, counts, entry_chunk, entry_slot, held, usage, target,
    selected, next_chunk, next_slot, victims, fetch_page, fetch_slot, brought,
    table_stride, pages_stride, lanes, sink, recency, most_used,
    NEXT: tl.constexpr, CHUNK: tl.constexpr, PER_BLOCK: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each row and lane of the model: brings a set nearer to the one that was selected.

    First what was copied since the last call takes the places of chunks that were not selected, then the next ones to
    copy are named. next_chunk, next_slot: int32 [set rows, lanes, NEXT], on their way, -1 for none, and the slots that
    they come into, which are in no list. selected: int32 [set rows], chunks that the selection knew of. most_used:
    what was used more than that stays. fetch_page, fetch_slot: [rows, lanes, NEXT].
    """
    row = tl.program_id(0)
    lane = tl.program_id(1)
    place = (row * lanes + lane) * NEXT
    item = tl.arange(0, NEXT)
    tl.store(fetch_slot + place + item, tl.full([NEXT], -1, tl.int32))
    tokens = tl.load(length + row)
    mine = tl.load(state + row)
    if tokens == 0 or mine < 0:
        return
    full = (tokens - 1) // CHUNK
    set_pages = all_pages + mine * pages_stride
    known = tl.load(selected + mine)
    count = tl.load(counts + mine * lanes + lane)
    ours = (mine * lanes + lane) * NEXT + item
    coming = tl.load(next_chunk + ours)
    slot = tl.load(next_slot + ours)
    have = coming >= 0
    # Vectors of items have names of their own: those of a loop's blocks have another shape.
    page_c = tl.load(set_pages + coming // PAGE, mask=have, other=0).to(tl.int64)
    of_coming = (page_c * lanes + lane) * PAGE + coming % PAGE
    good = have & (tl.load(held + of_coming, mask=have, other=1) == 0)
    good = good & (tl.load(target + of_coming, mask=have, other=0) == 1)
    rank = tl.cumsum(good.to(tl.int32), 0) - 1
    wanted = tl.sum(good.to(tl.int32), 0)

    found = 0
    for begin in range(0, count - 1, BLOCK):
        entry = begin + tl.arange(0, BLOCK)
        valid = entry < count - 1
        page = tl.load(set_pages + entry // PAGE, mask=valid, other=0).to(tl.int64)
        chunk = tl.load(entry_chunk + (page * lanes + lane) * PAGE + entry % PAGE, mask=valid, other=0)
        may = valid & (chunk >= sink) & (chunk < full - recency) & (chunk < known)
        page = tl.load(set_pages + chunk // PAGE, mask=may, other=0).to(tl.int64)
        of_lane = (page * lanes + lane) * PAGE + chunk % PAGE
        may = may & (tl.load(target + of_lane, mask=may, other=1) == 0)
        may = may & (tl.load(usage + of_lane, mask=may, other=float("inf")) <= most_used)
        number = found + tl.cumsum(may.to(tl.int32), 0) - 1
        tl.store(victims + place + number, entry, mask=may & (number < wanted))
        found += tl.sum(may.to(tl.int32), 0)
    tl.debug_barrier()
    taken = tl.minimum(found, wanted)
    swap = good & (rank < taken)
    gap = tl.load(victims + place + rank, mask=swap, other=0)
    page_g = tl.load(set_pages + gap // PAGE, mask=swap, other=0).to(tl.int64)
    at = (page_g * lanes + lane) * PAGE + gap % PAGE
    old_chunk = tl.load(entry_chunk + at, mask=swap, other=0)
    old_slot = tl.load(entry_slot + at, mask=swap, other=-1)
    page_o = tl.load(set_pages + old_chunk // PAGE, mask=swap, other=0).to(tl.int64)
    tl.debug_barrier()
    tl.store(entry_chunk + at, coming, mask=swap)
    tl.store(entry_slot + at, slot, mask=swap)
    tl.store(held + (page_o * lanes + lane) * PAGE + old_chunk % PAGE, tl.zeros([NEXT], tl.uint8), mask=swap)
    tl.store(held + of_coming, tl.full([NEXT], 1, tl.uint8), mask=swap)
    slot = tl.where(swap, old_slot, slot)
    tl.store(next_slot + ours, slot)
    tl.atomic_add(brought, taken.to(tl.int64))
    tl.debug_barrier()

    # The next ones: no more than there are chunks that may leave for them, in slots that there are.
    tl.store(next_chunk + ours, tl.full([NEXT], -1, tl.int32))
    room = tl.minimum(found - taken, tl.sum((slot >= 0).to(tl.int32), 0))
    tl.debug_barrier()
    begin = 0
    named = 0
    while (named < room) & (begin < known):
        chunk = begin + tl.arange(0, BLOCK)
        valid = chunk < known
        page = tl.load(set_pages + chunk // PAGE, mask=valid, other=0).to(tl.int64)
        of_lane = (page * lanes + lane) * PAGE + chunk % PAGE
        comes = (tl.load(target + of_lane, mask=valid, other=0) == 1) & (
            tl.load(held + of_lane, mask=valid, other=1) == 0
        )
        number = named + tl.cumsum(comes.to(tl.int32), 0) - 1
        tl.store(victims + place + number, chunk, mask=comes & (number < room))
        named += tl.sum(comes.to(tl.int32), 0)
        begin += BLOCK
    tl.debug_barrier()
    usable = slot >= 0
    order = tl.cumsum(usable.to(tl.int32), 0) - 1
    give = usable & (order < tl.minimum(named, room))
    named_chunk = tl.load(victims + place + order, mask=give, other=0)
    tl.store(next_chunk + ours, named_chunk, mask=give)
    to_block = block_table + row.to(tl.int64) * table_stride + named_chunk // PER_BLOCK
    block = tl.load(to_block, mask=give, other=0).to(tl.int64)
    tl.store(fetch_page + place + item, (block * lanes + lane) * PER_BLOCK + named_chunk % PER_BLOCK, mask=give)
    tl.store(fetch_slot + place + item, slot, mask=give)
