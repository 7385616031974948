import random

import numpy as np
import pytest
import torch

from vllm_lsa.residency.selection import select


def expected(
    scores: torch.Tensor, budget: int, threshold: float, sink: int, recency: int, shared: bool, mode: str
) -> torch.Tensor:
    layers, n = scores.shape
    rows = scores.double().tolist()
    if shared:
        columns = list(zip(*rows, strict=True))
        rows = [[max(c) if mode == "or" else sum(c) / layers for c in columns]] * layers
    mask = torch.zeros(layers, n, dtype=torch.bool)
    for layer, row in enumerate(rows):
        kept = {i for i in range(n) if i < sink or i >= n - recency}
        for i in sorted(range(n), key=lambda i: (-row[i], -i)):
            if i not in kept and row[i] > threshold and len(kept) < budget:
                kept.add(i)
        mask[layer, list(kept)] = True
    return mask


@pytest.mark.parametrize("seed", range(60))
def test_against_loops(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    layers, n = rng.choice([1, 2, 4]), rng.choice([1, 2, 7, 63, 111, 1000])
    # Multiples of 1/8: many ties, and means over 1, 2 or 4 layers that are exact.
    scores = torch.randint(0, 9, (layers, n)) / 8 if seed % 2 else torch.rand(layers, n)
    sink, recency, budget = rng.randint(0, 3), rng.randint(0, 12), rng.randint(0, n + 2)
    threshold = rng.choice([0.0, 0.25, 0.5, 0.99])
    for shared in (False, True):
        for mode in ("or", "mean"):
            if shared and mode == "mean" and seed % 2 == 0:
                continue
            got = select(
                scores, budget_chunks=np.full(layers, budget), threshold=threshold, sink_chunks=sink,
                recency_chunks=recency, shared=shared, mode=mode,
            )  # fmt: skip
            assert got.dtype == torch.bool and got.is_contiguous()
            assert torch.equal(got, expected(scores, budget, threshold, sink, recency, shared, mode))
            assert (got.sum(1) <= max(budget, min(sink + recency, n))).all()


def keep(scores: list[list[float]], **settings: object) -> list[list[int]]:
    defaults: dict[str, object] = dict(
        budget_chunks=np.full(len(scores), 3),
        threshold=0.0,
        sink_chunks=0,
        recency_chunks=0,
        shared=False,
        mode="or",
    )
    mask = select(torch.tensor(scores), **(defaults | settings))  # type: ignore[arg-type]
    return [row.nonzero().flatten().tolist() for row in mask]


def test_threshold_is_strict() -> None:
    assert keep([[0.5, 0.6, 0.4, 0.5]], threshold=0.5) == [[1]]
    assert keep([[0.0, 0.0, 0.1]]) == [[2]]


def test_newer_wins_a_tie() -> None:
    assert keep([[0.5] * 6]) == [[3, 4, 5]]
    assert keep([[0.5, 0.9, 0.5, 0.5, 0.1]], budget_chunks=np.array([2])) == [[1, 3]]


def test_forced_chunks_outgrow_the_budget() -> None:
    assert keep([[0.9] * 9], sink_chunks=2, recency_chunks=3) == [[0, 1, 6, 7, 8]]
    assert keep([[0.9] * 3], sink_chunks=2, recency_chunks=3) == [[0, 1, 2]]


def test_forced_chunks_count_and_are_not_chosen_again() -> None:
    assert keep([[0.9, 0.2, 0.3, 0.8]], sink_chunks=1, recency_chunks=1) == [[0, 2, 3]]


def test_shared_sets() -> None:
    scores = [[0.9, 0.5, 0.0], [0.0, 0.6, 0.2]]
    assert keep(scores, shared=True, budget_chunks=np.array([1])) == [[0], [0]]
    assert keep(scores, shared=True, budget_chunks=np.array([1]), mode="mean") == [[1], [1]]
    assert keep(scores, budget_chunks=np.array([1])) == [[0], [1]]


def test_no_chunks() -> None:
    assert keep([[], []], sink_chunks=1, recency_chunks=8) == [[], []]


def test_nan_is_never_chosen() -> None:
    assert keep([[float("nan"), 0.1, float("nan"), 0.2]]) == [[1, 3]]


def test_each_lane_has_its_own_budget() -> None:
    assert keep([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]], budget_chunks=np.array([1, 2])) == [[2], [1, 2]]
