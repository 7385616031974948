"""Labels of attention masses: positives and hard negatives. ``python -m indexer_training.label --out DIR``

Makes label/window_*.safetensors, beside the masses that they are about (see `capture`; the mass itself is the soft
label):

    positive   uint8 [L, S, Hkv, K]   of next_chunk: among the fewest chunks that hold top_p of the free mass
    hard       uint8 [L, S, Hkv, K]   of last_chunk: was so in the period before, and is no positive

Chunks that are always kept, the first and the newest, are neither; free mass is that of the others.
"""

from typing import Any

import torch
from safetensors.torch import load_file

from indexer_training.distributed import Group
from indexer_training.masses import Masses, forced, top_share
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


def run(work: Workspace, group: Group) -> dict[str, Any]:
    """Label the windows that are not labelled yet."""
    s = work.settings
    fixed = forced_of(s, counts_of(s))
    mine = list(group.mine(range(s.documents)))
    left = [i for i in mine if not work.shard("label", i).exists()]
    for i in progress(left, "label", group, " windows", len(mine) - len(left)):
        x = load_file(work.shard("capture", i))
        upcoming, last = (Masses(*(x[f"{kind}_{part}"] for part in Masses._fields)) for kind in ("next", "last"))
        positive, hard = labels(upcoming, last, fixed, s.top_p)
        write_tensors(work.shard("label", i), {"positive": positive.byte(), "hard": hard.byte()})
    return {}


if __name__ == "__main__":
    from indexer_training.cli import step_main

    step_main("label")
