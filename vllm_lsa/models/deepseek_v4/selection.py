"""The resident pages of a request: threshold ∪ recency ∪ sink under a budget (lsa.md §4), a page at a time.

Entries of c4 are scored one by one, pages of 64 of them move. A page is as good as its best entry, so that one entry
that the next cycle needs is enough to bring its page. What that loses against choosing entries is measured on synthetic
scores in tests/test_v4_selection.py: nothing while the entries over the threshold lie on no more pages than the budget
has; where 8,192 lie scattered over a million tokens four fifths of them, but only a twentieth of the best 512. Ranking
pages by how many entries they have over the threshold keeps more of the former, and loses two thirds of the latter.
"""

from typing import Literal, get_args

import torch

from vllm_lsa.models.deepseek_v4.specs import PAGE_ENTRIES
from vllm_lsa.ops.native import require

PageScore = Literal["max", "count"]
TOP_K = 512
"""Entries that the native indexer attends to."""
FULL_PAGES = TOP_K // PAGE_ENTRIES
"""Full pages that a request keeps at the least, or all it has, so that the native top-k finds enough entries."""


def page_count(entries: int) -> int:
    """Pages of so many entries, the last of which may be partly filled."""
    return -(-entries // PAGE_ENTRIES)


def least_budget(recency_entries: int = 0, sink_entries: int = 0) -> int:
    """The smallest budget, in pages, that `select_pages` keeps to whatever the length of a request.

    A recency tail that begins within a page takes one page more; eight full pages may need a partly filled one beside.
    """
    return max(page_count(sink_entries) + page_count(recency_entries) + 1, FULL_PAGES + 1)


def select_pages(
    scores: torch.Tensor,
    budget: int,
    *,
    threshold: float = 0.5,
    recency_entries: int = 2048,
    sink_entries: int = 0,
    page_score: PageScore = "max",
    lengths: torch.Tensor | None = None,
    check: bool = True,
) -> torch.Tensor:
    """Pages to keep, bool [P] or [B, P] with P = ⌈N / 64⌉, from the scores of entries, fp32 [N] or [B, N].

    Kept in any case: the first `sink_entries`, the last `recency_entries`, and the newest page, which is being written.
    Then pages with an entry strictly above `threshold`, best first, as long as at most `budget` pages are kept in all;
    and if that leaves fewer than `FULL_PAGES` full pages, the best of the others up to that number. Of equal pages the
    newer is better.

    page_score: "max" ranks pages by their best entry. "count" by how many of their entries are above the threshold
    (then by the best one): the paper's "densest page", which prefers many entries on few pages to the best entries.
    lengths: integers [B], entries that each row has; scores behind them are not read. Default: N.
    check: refuse NaN, which waits for the device; otherwise whoever calls does.

    Raises ValueError on other shapes and dtypes, NaN, a budget below `least_budget`, or another page_score.
    """
    require(
        scores.dtype == torch.float32 and scores.dim() in (1, 2),
        f"scores must be float32 [N] or [B, N], got {scores.dtype} {list(scores.shape)}",
    )
    require(recency_entries >= 0 and sink_entries >= 0, "recency_entries and sink_entries must not be negative")
    least = least_budget(recency_entries, sink_entries)
    require(budget >= least, f"a budget of {budget} pages is too small: sink, recency and top-k need {least}")
    require(page_score in get_args(PageScore), f"page_score={page_score!r} is not one of {get_args(PageScore)}")
    if scores.dim() == 1:
        require(lengths is None, "lengths are for scores [B, N]")
        scores, alone = scores.unsqueeze(0), True
    else:
        alone = False
    rows, entries = scores.shape
    if lengths is None:
        lengths = torch.full((rows,), entries, device=scores.device)
    require(
        lengths.shape == (rows,) and not lengths.is_floating_point(),
        f"lengths must be integers [{rows}], got {lengths.dtype} {list(lengths.shape)}",
    )
    chosen = _select(
        scores, lengths.long().clamp(0, entries).unsqueeze(1), budget, threshold, recency_entries, sink_entries,
        page_score, check,
    )  # fmt: skip
    return chosen[0] if alone else chosen


def resident_entries(pages: torch.Tensor, entries: int) -> torch.Tensor:
    """Whether each of so many entries is on a page that is kept: bool [..., entries] of pages bool [..., P]."""
    return pages.repeat_interleave(PAGE_ENTRIES, dim=-1)[..., :entries]


def page_list(pages: torch.Tensor, width: int) -> torch.Tensor:
    """The numbers of the pages that are kept, int32 [..., width], ascending, -1 behind; pages: bool [..., P].

    As the candidate mask of vLLM's indexer takes them, at a block size of 64. More than `width` pages lose the newest.
    """
    number = torch.arange(pages.shape[-1], device=pages.device, dtype=torch.int32)
    listed = number.expand(pages.shape).masked_fill(~pages, pages.shape[-1]).sort(dim=-1).values
    listed = torch.nn.functional.pad(listed, (0, max(0, width - pages.shape[-1])), value=pages.shape[-1])[..., :width]
    return listed.masked_fill(listed == pages.shape[-1], -1).contiguous()


def _select(
    scores: torch.Tensor,
    lengths: torch.Tensor,
    budget: int,
    threshold: float,
    recency: int,
    sink: int,
    by: PageScore,
    check: bool,
) -> torch.Tensor:
    """`select_pages` of scores [B, N] with lengths [B, 1]."""
    total = page_count(scores.shape[1])
    entry = torch.arange(scores.shape[1], device=scores.device)
    scores = scores.masked_fill(entry >= lengths, -torch.inf)
    require(not check or not bool(scores.isnan().any()), "scores must not be NaN")
    scores = torch.nn.functional.pad(scores, (0, total * PAGE_ENTRIES - scores.shape[1]), value=-torch.inf)
    per_page = scores.unflatten(1, (total, PAGE_ENTRIES))
    best = per_page.amax(-1)
    over = (per_page > threshold).sum(-1)

    first = torch.arange(total, device=scores.device) * PAGE_ENTRIES  # entry of each page
    exists, full = first < lengths, first + PAGE_ENTRIES <= lengths
    newest = exists & (first + PAGE_ENTRIES >= lengths)
    forced = exists & ((first < sink) | (first + PAGE_ENTRIES > lengths - recency) | newest)

    # Newest first before stable sorts, so that the newer of equals comes first; the last sort is by what counts most.
    order = best.masked_fill(forced, -torch.inf).flip(1).argsort(dim=1, descending=True, stable=True)
    order = total - 1 - order
    keys = [over] if by == "count" else []
    for key in (*keys, exists & ~forced):
        order = order.gather(1, key.gather(1, order).int().argsort(dim=1, descending=True, stable=True))
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(total, device=scores.device).expand_as(order))

    free = exists & ~forced
    room = budget - forced.sum(1, keepdim=True)
    lacking = FULL_PAGES - (forced & full).sum(1, keepdim=True)
    return forced | (free & (((over > 0) & (rank < room)) | (rank < lacking)))
