"""Resident pages of DeepSeek-V4 against a loop over pages, and what choosing pages instead of entries loses.

Measured (`python -m tests.test_v4_selection` prints it): 1M tokens, that is 262,144 entries on 4,096 pages, 8,192 of
them over the threshold, in runs of so many neighbours; both choices keep 12 % (491 pages, 31,424 entries), of which
the newest 2,048 entries are forced. Of what a choice of single entries keeps, what a choice of pages keeps too, for
page_score="max" / "count":

| run of neighbours | pages they lie on | score mass | best 512 entries |
|-|-|-|-|
| 1 | 3522 | 0.179 / 0.259 | 0.947 / 0.307 |
| 4 | 1694 | 0.337 / 0.436 | 1.000 / 0.592 |
| 16 | 575 | 0.851 / 0.918 | 1.000 / 0.932 |
| 64 | 249 | 1.000 / 1.000 | 1.000 / 1.000 |

The scores are synthetic; how real ones cluster is not known here.
"""

import math

import pytest
import torch

from tests.v4.scorer_twin import best_pages
from vllm_lsa.models.deepseek_v4.selection import (
    FULL_PAGES,
    TOP_K,
    least_budget,
    page_count,
    page_list,
    resident_entries,
    select_pages,
)

M1 = 1 << 18  # entries of a million tokens


@pytest.mark.parametrize("by", ["max", "count"])
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 511, 512, 513, 577, 640, 1000, 4096, 5000])
@pytest.mark.parametrize(("recency", "sink"), [(0, 0), (100, 0), (2048, 4), (1, 65)])
def test_twin(n: int, recency: int, sink: int, by: str) -> None:
    """Random and equal scores, tight and wide budgets, thresholds that take few and many."""
    torch.manual_seed(n)
    least = least_budget(recency, sink)
    for values in (torch.rand(n), torch.randint(0, 4, (n,)) / 4, torch.zeros(n), -torch.rand(n) * torch.inf):
        values = values.nan_to_num(nan=-math.inf, neginf=-math.inf)
        for budget in (least, least + 3, 10_000):
            for threshold in (0.5, 0.98, -1.0):
                got = select_pages(
                    values, budget, threshold=threshold, recency_entries=recency, sink_entries=sink, page_score=by
                )
                want = best_pages(values.tolist(), budget, threshold, recency, sink, by)
                assert got.dtype == torch.bool and got.tolist() == want
                assert int(got.sum()) <= budget
                assert int(resident_entries(got, n).sum()) >= min(n, TOP_K)


def test_rows_are_apart() -> None:
    """A row is chosen as if it were alone, whatever lies behind its length."""
    torch.manual_seed(1)
    lengths = torch.tensor([0, 5, 640, 3000, 2999])
    scores = torch.rand(5, 3000)
    for row, length in enumerate(lengths.tolist()):
        scores[row, length:] = math.nan if row % 2 else math.inf
    got = select_pages(scores, 20, threshold=0.9, recency_entries=128, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = select_pages(scores[row, :length], 20, threshold=0.9, recency_entries=128)
        assert got[row, : len(alone)].equal(alone) and not got[row, len(alone) :].any()
    assert select_pages(torch.rand(0, 100), 9, recency_entries=0).shape == (0, 2)


def test_a_million_tokens() -> None:
    """As long as the largest request: enough full pages, no more than the budget, the same when asked again."""
    torch.manual_seed(2)
    scores = torch.rand(2, M1 - 1)
    got = select_pages(scores, 491, threshold=0.99)
    assert got.shape == (2, 4096) and got.sum(1).tolist() == [491, 491]
    assert got.equal(select_pages(scores, 491, threshold=0.99))
    nothing = select_pages(scores, 491, threshold=2.0, recency_entries=0)
    assert nothing.sum(1).tolist() == [FULL_PAGES + 1] * 2 and resident_entries(nothing, M1 - 1).sum() == 2 * 575
    assert nothing.equal(select_pages(scores, 9, threshold=0.0, recency_entries=0))


def test_max_and_count_differ() -> None:
    """One needle, and a page full of entries that are a little over the threshold."""
    scores = torch.full((30 * 64,), 0.1)
    scores[3 * 64 + 7], scores[64 : 2 * 64] = 0.99, 0.6
    for by, page in (("max", 3), ("count", 1)):
        got = select_pages(scores, 32 + 1, threshold=0.5, recency_entries=28 * 64, page_score=by)  # type: ignore[arg-type]
        assert got[1] and got[3]  # room for both
        got = select_pages(scores[: 12 * 64], 9, threshold=0.5, recency_entries=8 * 64, page_score=by)  # type: ignore[arg-type]
        assert got.nonzero().flatten().tolist() == [page, *range(4, 12)]


def test_page_list() -> None:
    pages = torch.tensor([[True, False, True, True], [False, False, False, False]])
    assert page_list(pages, 3).tolist() == [[0, 2, 3], [-1, -1, -1]]
    assert page_list(pages, 6).tolist() == [[0, 2, 3, -1, -1, -1], [-1] * 6]
    assert page_list(pages, 2).tolist() == [[0, 2], [-1, -1]]
    assert page_list(pages[0], 3).tolist() == [0, 2, 3] and page_list(pages, 3).dtype == torch.int32


def test_refusals() -> None:
    scores = torch.rand(2, 700)
    for bad in (scores.double(), scores[None], scores[0, 0]):
        with pytest.raises(ValueError, match="scores must be float32"):
            select_pages(bad, 40)
    with pytest.raises(ValueError, match="a budget of 33 pages is too small: sink, recency and top-k need 34"):
        select_pages(scores, 33, sink_entries=1)
    with pytest.raises(ValueError, match="a budget of 8 pages .* need 9"):
        select_pages(scores, 8, recency_entries=0)
    with pytest.raises(ValueError, match="page_score='densest'"):
        select_pages(scores, 40, page_score="densest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must not be negative"):
        select_pages(scores, 40, sink_entries=-1)
    with pytest.raises(ValueError, match="lengths must be integers"):
        select_pages(scores, 40, lengths=torch.tensor([1]))
    with pytest.raises(ValueError, match="lengths are for"):
        select_pages(scores[0], 40, lengths=torch.tensor([1]))
    scores[1, 600] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        select_pages(scores, 40)


def synthetic(run: int, over: int = 8192, seed: int = 0) -> torch.Tensor:
    """Scores of M1 entries: `over` of them uniform in (0.5, 1), in runs of neighbours; the others in (0, 0.5)."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(M1, generator=g) / 2
    begin = torch.randperm(M1 // run, generator=g)[: over // run] * run
    # Runs begin anywhere, not where pages do.
    where = ((begin + int(torch.randint(0, 64, (1,), generator=g))).unsqueeze(1) + torch.arange(run)).flatten() % M1
    # Neighbours resemble each other: half of a score is its run's.
    level = torch.rand(len(begin), 1, generator=g).expand(-1, run).flatten()
    scores[where] = 0.5 + (level + torch.rand(len(where), generator=g)) / 4 + 1e-6
    return scores


def pooling_loss(run: int, by: str) -> tuple[int, float, float]:
    """Pages that a choice of entries lies on, and what pages keep of its mass and of its best 512 entries."""
    scores, budget, recency = synthetic(run), int(0.12 * 4096), 2048
    pages = select_pages(scores, budget, recency_entries=recency, page_score=by)  # type: ignore[arg-type]
    assert int(pages.sum()) <= budget
    forced = torch.arange(M1) >= M1 - recency
    chosen = scores.masked_fill(forced | (scores <= 0.5), 0.0).topk(budget * 64 - recency)  # as many entries
    entries = chosen.indices[chosen.values > 0]
    kept = resident_entries(pages, M1)[entries]
    mass = scores[entries] * kept
    return len((entries // 64).unique()), float(mass.sum() / scores[entries].sum()), float(kept[:TOP_K].float().mean())


RUNS = (1, 4, 16, 64)


def table_row(run: int) -> str:
    pages, mass, best = pooling_loss(run, "max")
    _, mass_by_count, best_by_count = pooling_loss(run, "count")
    return f"| {run} | {pages} | {mass:.3f} / {mass_by_count:.3f} | {best:.3f} / {best_by_count:.3f} |"


@pytest.mark.parametrize("run", RUNS)
def test_pooling_loss(run: int) -> None:
    """The table above is what is measured."""
    assert __doc__ is not None and table_row(run) in __doc__
    assert page_count(M1) == 4096


if __name__ == "__main__":
    print("\n".join(map(table_row, RUNS)))
