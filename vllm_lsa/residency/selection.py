"""Turns scores into the set of chunks to keep."""

import numpy as np
import torch


def room(budget_chunks: np.ndarray, num_chunks: int, sink_chunks: int, recency_chunks: int) -> np.ndarray:
    """Chunks that each lane may keep for their scores, int64 as budget_chunks; below 1 where it has room for none."""
    return np.minimum(budget_chunks, num_chunks) - min(sink_chunks + recency_chunks, num_chunks)


def shared_scores(scores: torch.Tensor, mode: str) -> torch.Tensor:
    """Scores [1, N] for all lanes, from those of each [L, N]: their maximum ("or") or mean ("mean")."""
    return scores.amax(0, keepdim=True) if mode == "or" else scores.mean(0, keepdim=True)


def select(
    scores: torch.Tensor, *, budget_chunks: np.ndarray, threshold: float, sink_chunks: int, recency_chunks: int,
    shared: bool, mode: str,
) -> torch.Tensor:  # fmt: skip
    """Keep = sink ∪ recency ∪ chunks over the threshold (paper section on selection; lsa.md §4).

    scores: fp32 [L, N], a row for each lane. budget_chunks: int64 [L], or [1] for all. The first sink_chunks and the
    last recency_chunks are kept whatever they score; of the others those whose score is strictly above `threshold`,
    best first, newer first among equals, as long as a lane keeps at most its budget_chunks in all. shared: one set for
    all lanes, by the maximum ("or") or mean ("mean") of their scores and the first lane's budget.
    Returns bool [L, N], contiguous. Does not wait for the device.
    """
    lanes, num_chunks = scores.shape
    if shared:
        scores = shared_scores(scores, mode)
        budget_chunks = budget_chunks[:1]
    position = torch.arange(num_chunks, device=scores.device)
    forced = (position < sink_chunks) | (position >= num_chunks - recency_chunks)
    most = room(budget_chunks, num_chunks, sink_chunks, recency_chunks)
    if most.max() <= 0:
        return forced.expand(lanes, num_chunks).contiguous()
    eligible = (scores > threshold) & ~forced
    # Integers in the order of the scores, and of equals in that of the chunks: no two are the same.
    bits = (scores + 0.0).view(torch.int32)  # 0 has no sign
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32 | position
    keys = keys.masked_fill(~eligible, torch.iinfo(torch.int64).min)
    best = keys.topk(int(most.max())).values
    last = torch.from_numpy(np.maximum(most, 1) - 1).to(scores.device, non_blocking=True)
    some = torch.from_numpy(most > 0).to(scores.device, non_blocking=True)
    least = best.gather(1, last[:, None].expand(len(scores), 1))
    chosen = eligible & (keys >= least) & some[:, None]
    return (chosen | forced).expand(lanes, num_chunks).contiguous()
