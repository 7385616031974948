"""A request's set for its next cycle: its chunks chosen by their scores, and the list brought to that choice."""

import numpy as np
import torch

from vllm_lsa.device.state import NEXT, PAGE, DeviceRefresh, DeviceSets
from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.ops.native import require, require_tensor
from vllm_lsa.residency.selection import room, select

MAX_TILE = 4096
"""Most chunks that a program looks at at a time."""


def renew_set(
    scores: torch.Tensor,
    sets: DeviceSets,
    refresh: DeviceRefresh,
    row: int,
    block_table: torch.Tensor,
    place: int,
    keep: np.ndarray,
    owned: np.ndarray,
    geometry: KVGeometry,
    *,
    threshold: float,
    sink: int,
    recency: int,
    first: bool,
    copy_tail: bool,
    incoming: torch.Tensor,
    tile: int = MAX_TILE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose which of a request's N full chunks each lane keeps, as `residency.selection.select` does, and make that
    its set. What stays keeps its slot; what comes takes the slots of what leaves, and spare ones. The tail is chunk N.

    scores: fp32 [lanes, N], or [1, N] for all lanes. row: of sets and refresh. block_table: int32 [n, >= blocks],
    block ids, place: the request's row in it. keep: int64 [lanes], most full chunks of each lane. owned: int64 [lanes],
    slots of each, at least one more than it keeps. threshold, sink, recency: see `select`.
    first: without a set before this, all of the choice comes at once. Otherwise it is left in refresh.target and the
    set becomes what is nearest to it: chunks that are to leave hold the places of those that are still to come, the
    newest of each first. copy_tail: whether the tail is copied as well. incoming: int64 [1], counted up by what is
    copied.
    tile: chunks that a program looks at at a time, a power of two.

    Returns what has to be copied, page int64 and slot int32 [lanes, E], both of no meaning where the slot is -1.
    Nothing is read back from the device. Raises ValueError on a bad shape or dtype.
    """
    from vllm_lsa.kernels.renew import NO_DIGIT, renew_kernel

    g, device = geometry, sets.counts.device
    lanes, full = g.num_lanes, scores.shape[1]
    require_tensor("scores", scores, (lanes if scores.shape[0] > 1 else 1, full), torch.float32, device)
    require_tensor("block_table", block_table, tuple(block_table.shape), torch.int32, device)
    require(len(keep) == len(owned) == lanes, f"keep and owned must be of {lanes} lanes, got {len(keep)}, {len(owned)}")
    width = -(-int(owned.max()) // PAGE) * PAGE  # lists are short beside the chunks that they are chosen from
    limits = np.stack([room(keep, full, sink, recency), owned]).astype(np.int32)
    page = torch.empty(lanes, width, dtype=torch.int64, device=device)
    slot, old_chunk, old_slot = torch.empty(3, lanes, width, dtype=torch.int32, device=device)
    scores = scores.contiguous()
    renew_kernel[(lanes,)](
        scores, sets.pages, sets.counts, sets.chunk, sets.slot, sets.held, refresh.target, refresh.selected,
        refresh.chunk, block_table, torch.from_numpy(limits).to(device, non_blocking=True), old_chunk, old_slot, page,
        slot, incoming, row, place * block_table.stride(0), full if scores.shape[0] > 1 else 0,
        sets.pages.stride(0), lanes, full, width, sink, recency, threshold, int(first), int(copy_tail),
        NEXT=NEXT, PER_BLOCK=g.chunks_per_block, PAGE=PAGE, BLOCK=tile, NO_DIGIT=NO_DIGIT,
        num_warps=max(4, tile // 256),
    )  # fmt: skip
    return page, slot


def renew_set_naive(
    scores: torch.Tensor, sets: DeviceSets, refresh: DeviceRefresh, row: int, block_table: torch.Tensor, place: int,
    keep: np.ndarray, owned: np.ndarray, geometry: KVGeometry, *, threshold: float, sink: int, recency: int,
    first: bool, copy_tail: bool, incoming: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Twin of `renew_set`."""
    g, full = geometry, scores.shape[1]
    mask = select(
        scores.expand(g.num_lanes, full), budget_chunks=keep, threshold=threshold, sink_chunks=sink,
        recency_chunks=recency, shared=False, mode="or",
    )  # fmt: skip
    refresh.selected[row] = full
    refresh.chunk[row] = -1
    if not first:
        _write_by_chunk(sets, row, refresh.target, mask.to(torch.uint8))
        mask = _first_step(sets, row, mask)
    chunks = torch.arange(full + 1, device=scores.device)
    block = block_table[place, chunks // g.chunks_per_block].long()
    pages = block * g.num_lanes * g.chunks_per_block + chunks % g.chunks_per_block
    lane_page = torch.arange(g.num_lanes, device=scores.device) * g.chunks_per_block
    page, slot = _apply(sets, row, mask, torch.from_numpy(owned).to(scores.device), pages, lane_page)
    if copy_tail:
        last = sets.counts[row].long() - 1
        state_page = sets.pages[row].long()[last // PAGE]
        lanes = torch.arange(g.num_lanes, device=scores.device)
        page[lanes, last] = pages[full] + lane_page
        slot[lanes, last] = sets.slot[state_page, lanes, last % PAGE]
    incoming += (slot >= 0).sum()
    return page, slot


def _apply(
    sets: DeviceSets, row: int, mask: torch.Tensor, owned: torch.Tensor, blocks: torch.Tensor, lane_page: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace a row's set by the chunks of `mask` and its tail.

    mask: bool [lanes, N]. owned: int64 [lanes]. blocks: int64 [>= N], each chunk's page in lane 0. lane_page: int64
    [lanes], what a lane adds to a page.
    """
    lanes, full = mask.shape
    width = -(-int(owned.max()) // PAGE) * PAGE
    pages = sets.pages[row, : width // PAGE].long()
    device = mask.device

    def lane_major(paged: torch.Tensor) -> torch.Tensor:
        return paged[pages].transpose(0, 1).reshape(lanes, width)

    def write(paged: torch.Tensor, values: torch.Tensor) -> None:
        paged[pages] = values.view(lanes, -1, PAGE).transpose(0, 1)

    chunk, slot = lane_major(sets.chunk), lane_major(sets.slot)
    last = sets.counts[row][:, None].long() - 1
    entry = torch.arange(width, device=device).expand(lanes, width)
    in_use, tail = entry < last, entry == last
    known = torch.where(in_use, chunk, full).long()
    keep = in_use & torch.cat([mask, mask.new_zeros(lanes, 1)], 1).gather(1, known)
    resident = torch.zeros(lanes, full + 1, dtype=torch.bool, device=device).scatter_(1, known, True)[:, :full]
    incoming = mask & ~resident
    kept, coming = keep.sum(1, keepdim=True), incoming.sum(1, keepdim=True)
    free = (entry < owned[:, None]) & ~keep & ~tail
    rank = free.cumsum(1) - 1
    to = torch.where(keep, keep.cumsum(1) - 1, entry)
    to = torch.where(tail, kept + coming, to)
    to = torch.where(free, kept + rank + (rank >= coming), to)
    new_slot = torch.empty_like(slot).scatter_(1, to, slot)
    new_chunk = torch.zeros(lanes, width + 1, dtype=torch.int32, device=device)
    new_chunk.scatter_(1, torch.where(keep | tail, to, width), chunk)
    numbers = torch.arange(full, dtype=torch.int32, device=device).expand(lanes, full)
    new_chunk.scatter_(1, torch.where(incoming, kept + incoming.cumsum(1) - 1, width), numbers)
    new_chunk = new_chunk[:, :width]
    is_new = (entry >= kept) & (entry < kept + coming)
    page = blocks[torch.where(is_new, new_chunk, 0).long()] if full else torch.zeros_like(entry)
    write(sets.slot, new_slot)
    write(sets.chunk, new_chunk)
    held = torch.ones(lanes, full + 1, dtype=torch.uint8, device=device)
    held[:, :full] = mask
    _write_by_chunk(sets, row, sets.held, held)
    sets.counts[row] = (kept + coming + 1).flatten().int()
    return page + lane_page[:, None], torch.where(is_new, new_slot, -1)


def _write_by_chunk(sets: DeviceSets, row: int, paged: torch.Tensor, values: torch.Tensor) -> None:
    """Put [lanes, count] values of a row's first chunks into a buffer by chunk."""
    pages = sets.pages[row, : -(-values.shape[1] // PAGE)].long()
    whole = torch.zeros(len(values), len(pages) * PAGE, dtype=paged.dtype, device=paged.device)
    whole[:, : values.shape[1]] = values
    paged[pages] = whole.view(len(values), -1, PAGE).transpose(0, 1)


def _first_step(sets: DeviceSets, row: int, mask: torch.Tensor) -> torch.Tensor:
    """The set of the selected size that is nearest to the present one, bool [lanes, N] as mask: chunks that were not
    selected hold the places of those that are still to come, newest first.
    """
    held = sets.by_chunk(row, sets.held, mask.shape[1]) == 1
    extra, missing = held & ~mask, mask & ~held
    waiting = torch.minimum(extra.sum(1), missing.sum(1))[:, None]
    at_once = missing.sum(1)[:, None] - waiting

    def newest(chunks: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
        return chunks & (chunks.flip(1).cumsum(1).flip(1) <= most)

    return (held & mask) | newest(extra, waiting) | newest(missing, at_once)
