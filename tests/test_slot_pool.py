"""The slot pool: pinning, least recently used eviction, invalidation, poison."""

import numpy as np
import pytest
import torch

from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.memory.slot_pool import SlotPool

GEOMETRY = KVGeometry(1, 3, 1, 8, torch.float32, 32, 16)


def make(slots: int, poison: bool = False) -> SlotPool:
    pool = SlotPool(GEOMETRY, slots, 2, torch.device("cpu"), poison)
    pool.bind(100)
    return pool


def ids(*pages: int) -> np.ndarray:
    return np.array(pages, np.int64)


def test_acquire_shares_resident_pages_and_reports_fresh_ones():
    pool = make(4)
    slots, fresh = pool.acquire(ids(7, 8))
    assert fresh.all() and len(set(slots)) == 2
    again, fresh = pool.acquire(ids(8, 9))
    assert again[0] == slots[1] and fresh.tolist() == [False, True]
    assert pool.num_pinned == 3 and pool.num_available == 1


def test_exhausted_pool_gives_minus_one_and_keeps_what_is_pinned():
    pool = make(2)
    first, _ = pool.acquire(ids(1, 2))
    slots, fresh = pool.acquire(ids(3, 1))
    assert slots.tolist() == [-1, first[0]] and not fresh.any()


def test_least_recently_used_goes_first():
    pool = make(3)
    slots, _ = pool.acquire(ids(1, 2, 3))
    for slot in (slots[1], slots[0], slots[2]):
        pool.release(np.array([slot]))
    pool.acquire(ids(2))
    pool.release(np.array([slots[1]]))
    pool.acquire(ids(4, 5))
    assert pool.evictions == 2
    assert pool.lookup(ids(1, 2, 3)).tolist() == [-1, slots[1], -1]


def test_released_pages_come_back_without_a_copy():
    pool = make(3)
    slots, _ = pool.acquire(ids(1, 2))
    pool.release(slots)
    assert pool.num_cached == 2
    again, fresh = pool.acquire(ids(2, 1))
    assert again.tolist() == slots[::-1].tolist() and not fresh.any()


def test_invalidate_forgets_and_refuses_pinned_pages():
    pool = make(3)
    slots, _ = pool.acquire(ids(1, 2))
    pool.release(slots[:1])
    pool.invalidate(ids(1, 50))
    assert pool.lookup(ids(1)).tolist() == [-1] and pool.num_cached == 0
    with pytest.raises(RuntimeError, match="resident set"):
        pool.invalidate(ids(2))


def test_release_more_often_than_acquired_is_an_error():
    pool = make(2)
    slots, _ = pool.acquire(ids(1))
    pool.release(slots)
    with pytest.raises(RuntimeError, match="more often"):
        pool.release(slots)


def test_poison_drops_what_is_released():
    pool = make(2, poison=True)
    slots, _ = pool.acquire(ids(1, 2))
    pool.pages[:] = 1.0
    pool.release(slots[:1])
    assert pool.pages[slots[0]].isnan().all() and not pool.pages[slots[1]].isnan().any()
    assert pool.num_cached == 0


def test_sharing_a_page_that_is_still_on_its_way_waits_for_it():
    pool = make(2)
    slots, _ = pool.acquire(ids(1))
    pool.arriving[slots] = True
    waited = []
    pool.settle = lambda: (waited.append(1), pool.arriving.fill(False))
    pool.acquire(ids(2))
    assert not waited
    pool.acquire(ids(1))
    assert waited


def test_random_use_against_a_model():
    rng = np.random.default_rng(0)
    pool, held = make(16), {}
    for _ in range(2000):
        if held and rng.random() < 0.5:
            name = rng.choice(list(held))
            pool.release(held.pop(name)[1])
        else:
            pages = rng.choice(100, rng.integers(1, 5), replace=False)
            slots, _ = pool.acquire(pages)
            held[len(held) + rng.integers(10**9)] = (pages, slots)
        pinned = {int(s) for _, slots in held.values() for s in slots if s >= 0}
        assert pool.num_pinned == len(pinned)
        for pages, slots in held.values():
            live = slots >= 0
            assert (pool.lookup(pages)[live] == slots[live]).all()
            assert (pool.owner[slots[live]] == pages[live]).all()
