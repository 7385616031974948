"""What demand takes in and what leaves, one lane at a time, against a plain loop."""

import random

import numpy as np
import pytest

from vllm_lsa.residency.replacement import Replacement
from vllm_lsa.residency.resident_set import ResidentSet
from vllm_lsa.residency.usage import DECAY, Usage


def expected(rule: Replacement, held: list[int], mass, usage, cap: int) -> tuple[set[int], list[int]]:
    """(chunks that leave, chunks that come)."""
    wanted = sorted((c for c in range(len(mass)) if c not in held and mass[c] > rule.threshold), key=lambda c: -mass[c])
    picked = wanted[: rule.most]
    tail = held[0]
    may_leave = [c for c in held if rule.sink <= c < tail - rule.recency]
    over = max(0, len(held) + len(picked) - cap)
    leaving = sorted(may_leave, key=lambda c: usage[c])[:over]
    if over > len(may_leave):
        picked = picked[: max(0, len(picked) - (over - len(may_leave)))]
    return set(leaving), picked


@pytest.mark.parametrize("seed", range(200))
def test_against_a_loop(seed: int) -> None:
    rng, order = np.random.default_rng(seed), random.Random(seed)
    full = order.choice([1, 2, 9, 60])
    rule = Replacement(
        order.choice([1, 3, 8]), order.choice([0.0, 0.02]), order.choice([0, 1, 2]), order.choice([0, 4])
    )
    mass = rng.permutation(np.arange(1, full + 1)).astype(np.float32) / (full * 20)
    usage = rng.permutation(full).astype(np.float32)
    some = [c for c in range(full) if order.random() < 0.4]
    order.shuffle(some)
    chunks = np.array([full, *some], np.int32)
    cap = order.randint(1, len(chunks) + 4)
    entries, picked = rule.choose(chunks, mass, usage, cap)
    leaving, coming = expected(rule, chunks.tolist(), mass, usage, cap)
    assert set(chunks[entries].tolist()) == leaving and len(set(entries.tolist())) == len(entries)
    assert picked.tolist() == coming


@pytest.mark.parametrize(
    ("entries", "chunks"), [([1, 4], [7, 8]), ([3], [7, 8, 9]), ([4, 1, 2], [7]), ([], []), ([1], [])]
)
def test_swap_keeps_the_rest_and_the_count_of_missing(entries: list[int], chunks: list[int]) -> None:
    resident = ResidentSet(2, 5)
    resident.extend(np.array([10, 11, 12, 13, 14]), np.array([[0, 1, 2, -1, 4], [5, 6, 7, 8, 9]]))
    before = dict(zip(*(x.tolist() for x in resident.lane(0)), strict=True))
    gone = [int(resident.chunks[0, e]) for e in entries]
    slots = np.array([20 + i if i % 2 == 0 else -1 for i in range(len(chunks))], np.int64)
    resident.swap(0, np.array(entries, np.int64), np.array(chunks, np.int64), slots)
    after = dict(zip(*(x.tolist() for x in resident.lane(0)), strict=True))
    assert after == {c: s for c, s in before.items() if c not in gone} | dict(zip(chunks, slots.tolist(), strict=True))
    assert resident.chunks[0, 0] == resident.tail == 14
    assert resident.missing == sum(s < 0 for s in after.values())
    assert resident.lane(1)[1].tolist() == [9, 5, 6, 7, 8]


def test_usage_decays_and_grows() -> None:
    usage = Usage(4)
    usage.note(slice(0, 2), np.array([[0.5, 0.1], [0.0, 1.0]], np.float32))
    seen = usage.note(slice(0, 2), np.array([[0.1, 0.2, 0.3], [0.0, 0.0, 0.0]], np.float32))
    np.testing.assert_allclose(seen, [[0.5 * DECAY, 0.2, 0.3], [0.0, DECAY, 0.0]], rtol=1e-6)
    long = np.full((2, 5000), 0.25, np.float32)
    assert usage.note(slice(2, 4), long).shape == (2, 5000)
    assert usage.of(6000).shape == (4, 6000) and usage.of(6000)[0, 1] == np.float32(0.2)
