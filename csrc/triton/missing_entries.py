"""Entries of DeepSeek-V4's c4 cache that a step's own choice names and that no slot holds: read from the host store.

Launched by `vllm_lsa.ops.missing_entries`, which explains the operands. The grid follows from shapes alone.
"""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["row_chosen", "row_table", "row_slots", "layer_slots", "host_delta", "layers", "layer", "extra"]
)
def read_missing_kernel(
    chosen, entries, table, slots, pool, places, counts,
    row_chosen, row_table, row_slots, layer_slots, host_delta, layers, layer, extra,
    TOP_K: tl.constexpr, PART: tl.constexpr, PER_PAGE: tl.constexpr, DATA: tl.constexpr, WORDS: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """Grid (rows, TOP_K / PART). Sizes are in words of 8 bytes: DATA of an entry, which one of scales follows behind
    those of all; PAGE of a page. WORDS: a power of two above DATA. extra: columns of `slots` before those of staging.
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * PART + tl.arange(0, PART)
    length = tl.load(entries + row)
    mine = tl.load(chosen + row * row_chosen + i)
    here = (mine >= 0) & (mine < length)
    page = tl.where(here, mine, 0) // PER_PAGE
    slots += layer_slots + row * row_slots
    missing = here & (tl.load(slots + page, mask=here, other=0) < 0)
    tl.store(places + row * TOP_K + i, tl.where(missing, extra * PER_PAGE + i, tl.where(here, mine, -1)))
    if tl.max(missing.to(tl.int32), 0) > 0:
        block = tl.load(table + row * row_table + page, mask=missing, other=0).to(tl.int64)
        source = host_delta + (block * layers + layer) * PAGE
        target = tl.load(slots + extra + i // PER_PAGE).to(tl.int64) * PAGE
        word = tl.arange(0, WORDS)[None, :]
        copied = missing[:, None] & (word <= DATA)
        entry, to = (tl.where(here, mine, 0) % PER_PAGE)[:, None], (i % PER_PAGE)[:, None]
        data = tl.load(
            pool + source[:, None] + tl.where(word < DATA, entry * DATA + word, PER_PAGE * DATA + entry), mask=copied
        )
        tl.store(
            pool + target[:, None] + tl.where(word < DATA, to * DATA + word, PER_PAGE * DATA + to), data, mask=copied
        )
        # A page counts where it is named first.
        every = tl.arange(0, TOP_K)
        named = tl.load(chosen + row * row_chosen + every)
        before = (named >= 0) & (named < length)
        before = before[None, :] & (every[None, :] < i[:, None]) & ((named // PER_PAGE)[None, :] == page[:, None])
        first = missing & (tl.max(before.to(tl.int32), 1) == 0)
        tl.atomic_add(counts, tl.sum(missing.to(tl.int64), 0))
        tl.atomic_add(counts + 1, tl.sum(first.to(tl.int64), 0))


INTERPRETED = not isinstance(read_missing_kernel, triton.JITFunction)
"""Whether the kernel runs in Triton's interpreter, on CPU tensors."""
