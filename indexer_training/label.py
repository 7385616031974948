"""Labels of attention masses: positives and hard negatives. ``python -m indexer_training.label --out DIR``

Makes label/window_*.safetensors, beside the masses that they are about (see `capture`; the mass itself is the soft
label):

    positive   uint8 [L, S, Hkv, K]   of next_chunk: among the fewest chunks that hold top_p of the free mass
    hard       uint8 [L, S, Hkv, K]   of last_chunk: was so in the period before, and is no positive

Chunks that are always kept, the first and the newest, are neither; free mass is that of the others.

With ``--form shared`` it makes instead, about one set for all layers and heads (see `Union`):

    mass, usage     fp32 [S, N]    golden, hard     uint8 [S, N]
"""

from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from indexer_training.distributed import Group
from indexer_training.masses import Masses, dense_mean, forced, top_share
from indexer_training.settings import Settings
from indexer_training.workspace import Workspace, progress, write_tensors


def counts_of(settings: Settings) -> torch.Tensor:
    """Chunks of the past at each cycle, int64 [S]."""
    return torch.tensor(settings.starts) // settings.chunk_tokens


def forced_of(settings: Settings, counts: torch.Tensor) -> torch.Tensor:
    """Chunks that are not learned, bool [S, N]: always kept, or not past at each of the cycles."""
    chunk = settings.chunk_tokens
    return forced(counts, settings.chunks, -(-settings.sink_tokens // chunk), -(-settings.recency_tokens // chunk))


def free(masses: Masses, fixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The masses [..., S, Hkv, K] of chunks that are not fixed [S, N], 0 for others; and the chunks."""
    index = masses.chunk.long()
    is_fixed = fixed.expand(*index.shape[:-3], *fixed.shape).unsqueeze(-2).expand(*index.shape[:-1], -1)
    return masses.mass.float().masked_fill(is_fixed.gather(-1, index), 0), index


def labels(upcoming: Masses, last: Masses, fixed: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Positives among upcoming.chunk and hard negatives among last.chunk, bool [L, S, Hkv, K]. fixed: [S, N]."""

    def chosen(masses: Masses) -> tuple[torch.Tensor, torch.Tensor]:
        mass, index = free(masses, fixed)
        return top_share(mass, masses.rest, top_p), index

    positive, index = chosen(upcoming)
    used, last_index = chosen(last)
    everywhere = torch.zeros(*index.shape[:-1], fixed.shape[-1], dtype=torch.bool)
    # Where an index is there twice it stands for a chunk that none can choose.
    is_positive = everywhere.scatter_(-1, index, positive)
    return positive, used & ~is_positive.gather(-1, last_index)


class Union(NamedTuple):
    """What all layers and heads together attend to.

    mass, usage: fp32 [S, N], of the window to come and noted up to the cycle's start, means over layers and KV heads.
    golden: bool [S, N], a positive of some head in enough layers (arXiv 2606.09079's rule, with this step's
    positives). hard: bool [S, N], was so in the period before, and is not golden.
    """

    mass: torch.Tensor
    usage: torch.Tensor
    golden: torch.Tensor
    hard: torch.Tensor


def union(upcoming: Masses, last: Masses, counts: torch.Tensor, fixed: torch.Tensor, settings: Settings) -> Union:
    """Labels of one set for all layers. counts: [S]; fixed: [S, N], neither golden nor hard."""

    def golden(masses: Masses) -> torch.Tensor:
        mass, index = free(masses, fixed)
        flags = top_share(mass, masses.rest, settings.top_p)
        everywhere = torch.zeros(*index.shape[:-1], fixed.shape[-1], dtype=torch.bool)
        return everywhere.scatter_(-1, index, flags).any(2).sum(0) >= settings.golden_layers

    chunks, needed = fixed.shape[-1], golden(upcoming)
    return Union(dense_mean(upcoming, counts, chunks), dense_mean(last, counts, chunks), needed, golden(last) & ~needed)


def run(work: Workspace, group: Group) -> dict[str, Any]:
    """Label the windows that are not labelled yet."""
    s = work.settings
    counts = counts_of(s)
    fixed = forced_of(s, counts)
    mine = list(group.mine(range(s.captured)))
    left = [i for i in mine if not work.shard("label", i).exists()]
    for i in progress(left, "label", group, " windows", len(mine) - len(left)):
        x = load_file(work.shard("capture", i))
        upcoming, last = (Masses(*(x[f"{kind}_{part}"] for part in Masses._fields)) for kind in ("next", "last"))
        if s.shared:
            found = union(upcoming, last, counts, fixed, s)
            flags = {"golden": found.golden.byte(), "hard": found.hard.byte()}
            write_tensors(work.shard("label", i), {"mass": found.mass, "usage": found.usage, **flags})
            continue
        positive, hard = labels(upcoming, last, fixed, s.top_p)
        write_tensors(work.shard("label", i), {"positive": positive.byte(), "hard": hard.byte()})
    return {}


if __name__ == "__main__":
    from indexer_training.cli import step_main

    step_main("label")
