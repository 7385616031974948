"""Chunks that a step takes into a resident set because its own queries ask for them."""

from collections.abc import Sequence

import numpy as np

from vllm_lsa.memory.slot_pool import SlotPool
from vllm_lsa.memory.transfers import Transfers
from vllm_lsa.residency.requests import Request
from vllm_lsa.residency.resident_set import ResidentSet

Change = tuple[int, np.ndarray, np.ndarray]


def take_in(
    pool: SlotPool, transfers: Transfers, request: Request, resident: ResidentSet, changes: Sequence[Change]
) -> int:
    """Read chunks from the host store into lanes of a resident set, in the place of others. Returns how many came.

    changes: (lane, entries int64 [e] of the lane that leave, chunks int64 [p] that come), see `Replacement.choose`. A
    chunk for which the pool has no slot becomes part of the set without one.
    """
    leaving = np.concatenate([resident.slots[lane, entries] for lane, entries, _ in changes])
    pool.release(leaving.astype(np.int64))
    pages = np.concatenate([transfers.store.page_ids(request.blocks, picked, lane) for lane, _, picked in changes])
    slots, fresh = pool.acquire(pages)
    transfers.demand(pages[fresh], slots[fresh])
    ends = np.cumsum([len(picked) for _, _, picked in changes])[:-1]
    for (lane, entries, picked), given in zip(changes, np.split(slots, ends), strict=True):
        resident.swap(lane, entries, picked, given)
    return len(pages)
