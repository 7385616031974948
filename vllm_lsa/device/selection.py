"""Making a selected set the resident one, on the device and without a look at it from the host."""

import torch

from vllm_lsa.device.state import PAGE, DeviceSets


def apply_selection(
    sets: DeviceSets,
    row: int,
    mask: torch.Tensor,
    owned: torch.Tensor,
    most_owned: int,
    blocks: torch.Tensor,
    lane_page: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace a row's set by the chunks of `mask` and its tail. What stays keeps its slot; what comes takes the slots
    of what leaves, and spare ones.

    mask: bool [lanes, N], the row's N full chunks; the tail is chunk N and entry counts - 1. owned: int32 [lanes],
    slots of each lane, at least one more than it keeps; most_owned: the most of them. blocks: int64 [>= N], each
    chunk's page in lane 0. lane_page: int64 [lanes], what a lane adds to a page.
    Returns what has to be copied, page int64 and slot int32 [lanes, E], -1 where nothing is.
    """
    lanes, full = mask.shape
    # The lists are short beside the chunks that they are chosen from.
    width = -(-most_owned // PAGE) * PAGE
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
    write_by_chunk(sets, row, sets.held, held)
    sets.counts[row] = (kept + coming + 1).flatten().int()
    return page + lane_page[:, None], torch.where(is_new, new_slot, -1)


def by_chunk(sets: DeviceSets, row: int, paged: torch.Tensor, count: int) -> torch.Tensor:
    """A row's values of a buffer by chunk, [lanes, count]."""
    return paged[sets.pages[row, : -(-count // PAGE)].long()].transpose(0, 1).flatten(1)[:, :count]


def write_by_chunk(sets: DeviceSets, row: int, paged: torch.Tensor, values: torch.Tensor) -> None:
    """Put [lanes, count] values of a row's first chunks into a buffer by chunk."""
    pages = sets.pages[row, : -(-values.shape[1] // PAGE)].long()
    whole = torch.zeros(len(values), len(pages) * PAGE, dtype=paged.dtype, device=paged.device)
    whole[:, : values.shape[1]] = values
    paged[pages] = whole.view(len(values), -1, PAGE).transpose(0, 1)


def first_step(sets: DeviceSets, row: int, mask: torch.Tensor) -> torch.Tensor:
    """The set of the selected size that is nearest to the present one, bool [lanes, N] as mask: chunks that were not
    selected hold the places of those that are still to come, newest first.
    """
    held = by_chunk(sets, row, sets.held, mask.shape[1]) == 1
    extra, missing = held & ~mask, mask & ~held
    waiting = torch.minimum(extra.sum(1), missing.sum(1))[:, None]
    at_once = missing.sum(1)[:, None] - waiting

    def newest(chunks: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
        return chunks & (chunks.flip(1).cumsum(1).flip(1) <= most)

    return (held & mask) | newest(extra, waiting) | newest(missing, at_once)
