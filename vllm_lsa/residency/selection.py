"""Turns scores into the set of chunks to keep."""

import torch


def select(
    scores: torch.Tensor, *, budget_chunks: int, threshold: float, sink_chunks: int, recency_chunks: int, shared: bool,
    mode: str,
) -> torch.Tensor:  # fmt: skip
    """Keep = sink ∪ recency ∪ chunks over the threshold (paper section on selection; lsa.md §4).

    scores: fp32 [L, N]. The first sink_chunks and the last recency_chunks are kept whatever they score; of the others
    those whose score is strictly above `threshold`, best first, newer first among equals, as long as a layer keeps at
    most budget_chunks in all. shared: one set for all layers, by the maximum ("or") or mean ("mean") of their scores.
    Returns bool [L, N], contiguous.
    """
    layers, num_chunks = scores.shape
    if shared:
        scores = scores.amax(0, keepdim=True) if mode == "or" else scores.mean(0, keepdim=True)
    position = torch.arange(num_chunks, device=scores.device)
    forced = (position < sink_chunks) | (position >= num_chunks - recency_chunks)
    eligible = (scores > threshold) & ~forced
    room = min(budget_chunks, num_chunks) - min(sink_chunks + recency_chunks, num_chunks)
    if room > 0:
        ranked = scores.masked_fill(~eligible, -torch.inf)
        last = ranked.topk(room, dim=1, sorted=True).values[:, -1:]
        better, equal = ranked > last, eligible & (ranked == last)
        newer = equal.flip(1).cumsum(1).flip(1)
        chosen = better | (equal & (newer <= room - better.sum(1, keepdim=True)))
    else:
        chosen = torch.zeros_like(eligible)
    return (chosen | forced).expand(layers, num_chunks).contiguous()
