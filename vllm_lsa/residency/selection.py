"""Turns scores into the set of chunks to keep."""

import torch


def select(
    scores: torch.Tensor, *, budget_chunks: torch.Tensor, threshold: float, sink_chunks: int, recency_chunks: int,
    shared: bool, mode: str,
) -> torch.Tensor:  # fmt: skip
    """Keep = sink ∪ recency ∪ chunks over the threshold (paper section on selection; lsa.md §4).

    scores: fp32 [L, N], a row for each lane. budget_chunks: int64 [L]. The first sink_chunks and the last
    recency_chunks are kept whatever they score; of the others those whose score is strictly above `threshold`, best
    first, newer first among equals, as long as a lane keeps at most its budget_chunks in all. shared: one set for all
    lanes, by the maximum ("or") or mean ("mean") of their scores and the first lane's budget.
    Returns bool [L, N], contiguous.
    """
    lanes, num_chunks = scores.shape
    if shared:
        scores = scores.amax(0, keepdim=True) if mode == "or" else scores.mean(0, keepdim=True)
        budget_chunks = budget_chunks[:1]
    position = torch.arange(num_chunks, device=scores.device)
    forced = (position < sink_chunks) | (position >= num_chunks - recency_chunks)
    eligible = (scores > threshold) & ~forced
    room = budget_chunks.to(scores.device).clamp(max=num_chunks) - min(sink_chunks + recency_chunks, num_chunks)
    # Newest first before a stable sort, so that the newer of equals comes first.
    newest = scores.masked_fill(~eligible, -torch.inf).flip(1)
    rank = newest.argsort(dim=1, descending=True, stable=True).argsort(dim=1).flip(1)
    chosen = eligible & (rank < room[:, None])
    return (chosen | forced).expand(lanes, num_chunks).contiguous()
