"""DeepSeek-V4's table: how much of what held-out text asks for lies on the pages that serving would keep.

The pages are chosen as the engine chooses them (`select_pages`), once per cycle, and judged by what is golden in the
window after it, mean over all c4 layers (see `Recorder`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from indexer_training import v4_model
from indexer_training.distributed import Group
from indexer_training.evaluate import selected
from indexer_training.settings import Settings
from indexer_training.train import Batch, Windows, read_trained
from indexer_training.workspace import Workspace, progress, write_json
from vllm_lsa.indexer import MemoryIndexer
from vllm_lsa.models.deepseek_v4.selection import least_budget, page_count, resident_entries, select_pages


@torch.no_grad()
def kept_mass(
    scores: torch.Tensor, mass: torch.Tensor, counts: torch.Tensor, budget: float, always: list[int]
) -> float:
    """Sum of the mass on the pages that are kept within the budget.

    scores, mass: fp32 [S, N]. counts: int64 [S], entries of the past of each cycle. budget: share of the past's pages.
    always: newest and first entries that are kept.
    """
    recency, sink = always
    total = 0.0
    for score, of_cycle, count in zip(scores, mass, counts.tolist(), strict=True):
        pages = max(int(budget * page_count(count)), least_budget(recency, sink))
        kept = select_pages(
            score[:count].float().cpu(), pages, threshold=-1.0, recency_entries=recency, sink_entries=sink
        )
        total += float(of_cycle[:count].cpu()[resident_entries(kept, count)].sum())
    return total


def scores_of(batch: Batch, trained: MemoryIndexer, before: MemoryIndexer) -> dict[str, torch.Tensor]:
    """What is compared, by column: scores fp32 [S, N], 0 or above."""

    def ensemble(indexer: MemoryIndexer) -> torch.Tensor:
        logits = {layer: batch.logits(indexer.layer(layer), layer).squeeze(1) for layer in indexer.layers}
        return indexer.ensemble(logits)

    mass = batch.mass(0).squeeze(1)
    return {
        "newest": torch.arange(mass.shape[1], device=mass.device).float().expand_as(mass),
        "usage": batch.usage(0).squeeze(1),
        "untrained": ensemble(before),
        "trained": ensemble(trained),
        "oracle": mass,
    }


def kept_shares(
    windows: Windows,
    numbers: Sequence[int],
    group: Group,
    settings: Settings,
    budgets: Sequence[float],
    scores: Callable[[Batch], dict[str, torch.Tensor]],
) -> dict[float, dict[str, float]]:
    """By budget and column, the share of golden entries on the pages that are kept, over windows of these numbers.

    scores: fp32 [S, N] by column, of a window's cycles.
    """
    always = [tokens // settings.chunk_tokens for tokens in (settings.recency_tokens, settings.sink_tokens)]
    caught: dict[float, dict[str, float]] = {budget: {} for budget in budgets}
    whole = 0.0
    for i in progress(numbers, "evaluate", group, " windows"):
        batch = windows.batch(i, torch.arange(len(settings.starts)))
        mass = batch.mass(0).squeeze(1)
        whole += float(mass.sum())
        for name, of_column in scores(batch).items():
            for budget, found in caught.items():
                found[name] = found.get(name, 0.0) + kept_mass(of_column, mass, batch.counts, budget, always)
    return {
        budget: {name: round(x / max(whole, 1e-12), 4) for name, x in found.items()} for budget, found in caught.items()
    }


def run(work: Workspace, group: Group) -> dict[str, Any]:
    """Measure; the leading process alone."""
    if not group.leads:
        return {}
    s = work.settings
    device = s.torch_device()
    windows = Windows(work, device)
    indexer, about = read_trained(work)
    begin = v4_model.untrained(work)
    v4_model.initialise(begin, work)
    trained, before = (selected(x, about).to(device) for x in (indexer, begin))
    numbers = range(s.documents, s.captured)
    shares = kept_shares(
        windows, numbers, group, s, s.evaluate_budgets, lambda batch: scores_of(batch, trained, before)
    )
    rows = {f"golden on kept pages, {budget:.1%}": found for budget, found in shares.items()}
    write_json(work.folder("evaluate") / "table.json", rows)
    return {"documents": s.heldout_documents, "table": rows}
