"""Fallbacks that read V4's caches: the indexer's logits and top-k, and sparse attention."""

from itertools import pairwise

import torch

from tests.v4.operators import fallback
from tests.v4.pages import HEAD, read_index_keys, read_mla
from tests.v4.rows import product

TOP_K = 512
# Query rows that are worked on together. Rows of one prompt mostly read the same states.
_ROWS = 128


@fallback(
    "(Tensor q_fp8, Tensor kvcache_fp8, Tensor weight, Tensor seq_lens, Tensor page_table, int block_size, "
    "int max_seq_len) -> Tensor"
)
def fp8_paged_mqa_logits_cpu(
    q_fp8: torch.Tensor,
    kvcache_fp8: torch.Tensor,
    weight: torch.Tensor,
    seq_lens: torch.Tensor,
    page_table: torch.Tensor,
    block_size: int,
    max_seq_len: int,
) -> torch.Tensor:
    """sum over heads of weight * relu(q . k), times k's scale -> fp32 [T, max_seq_len], -inf from seq_lens on.

    q e4m3 [T, h, 128], pages uint8 [B, stride], weight fp32 [T, h], seq_lens int [T] and page_table int [T, P] in
    compressed states. The kernel, paged_mqa_logits.cpp `fp8_paged_mqa_logits_cpu_impl`, leaves the rest undefined.
    """
    logits = torch.full((len(q_fp8), max_seq_len), -torch.inf)
    # Neighbouring rows with the same page table are rows of one prompt.
    changes = (page_table[1:] != page_table[:-1]).any(dim=1).nonzero().squeeze(-1) + 1
    bounds = [0, *changes.tolist(), len(q_fp8)]
    for begin, end in pairwise(bounds):
        length = int(seq_lens[begin:end].max())
        if length <= 0:
            continue
        tokens = torch.arange(length)
        slots = page_table[begin][tokens // block_size].long() * block_size + tokens % block_size
        keys, scales = read_index_keys(kvcache_fp8, block_size, slots)
        for row in range(begin, end, _ROWS):
            rows = slice(row, min(row + _ROWS, end))
            reach = int(seq_lens[rows].max())
            dots = product(q_fp8[rows].float().flatten(0, 1), keys[:reach]).relu_().view(-1, q_fp8.shape[1], reach)
            sums = dots.mul_(weight[rows].unsqueeze(-1)).sum(dim=1) * scales[:reach]
            logits[rows, :reach] = sums.masked_fill(tokens[:reach] >= seq_lens[rows].unsqueeze(-1), -torch.inf)
    return logits


@fallback(
    "(Tensor scores, Tensor seq_lens, Tensor page_tables, Tensor(a!) out_page_indices, int page_size, "
    "Tensor(b!)? out_raw_indices) -> ()"
)
def topk_transform_512_cpu(
    scores: torch.Tensor,
    seq_lens: torch.Tensor,
    page_tables: torch.Tensor,
    out_page_indices: torch.Tensor,
    page_size: int,
    out_raw_indices: torch.Tensor | None = None,
) -> None:
    """The 512 highest of scores fp32 [T, N] before seq_lens int [T]; of equal ones the first. -1 where there are less.

    -> out_raw_indices int32 [T, 512], positions in ascending order (the kernel's order is that of a heap), and
    out_page_indices, the same through page_tables int [T, P]. topk.cpp `topk_transform_512_cpu_kernel_impl`.
    """
    lengths = seq_lens.long().clamp(0, scores.shape[1])
    raw = torch.arange(TOP_K).expand(len(scores), TOP_K)
    raw = raw.masked_fill(raw >= lengths.unsqueeze(-1), -1)
    long = (lengths > TOP_K).nonzero().squeeze(-1)
    if len(long):
        columns = torch.arange(scores.shape[1])
        chosen = scores[long].masked_fill(columns >= lengths[long].unsqueeze(-1), -torch.inf)
        bar = chosen.topk(TOP_K, dim=1).values[:, -1:]
        above, level = chosen > bar, chosen == bar
        room = TOP_K - above.sum(dim=1, keepdim=True)
        raw[long] = (above | (level & (level.cumsum(dim=1) <= room))).nonzero()[:, 1].view(-1, TOP_K)
    if out_raw_indices is not None:
        out_raw_indices[:, :TOP_K] = raw
    pages = page_tables.long().gather(1, raw.clamp(min=0) // page_size)
    out_page_indices[:, :TOP_K] = (pages * page_size + raw % page_size).masked_fill(raw < 0, -1)


def _runs(window_slots: torch.Tensor) -> list[slice]:
    """Rows of window_slots int64 [T, K] in parts of at most _ROWS successive tokens of one request.

    So that what a request gets does not depend on what else is in its batch. A window is in order of positions, -1
    behind: a row goes on with the row before if the last but one of its slots is that one's last.
    """
    count = (window_slots >= 0).sum(dim=1)
    last = window_slots.gather(1, (count - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    before = window_slots.gather(1, (count - 2).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    starts = ((before[1:] != last[:-1]) | (count[1:] < 2)).nonzero().squeeze(-1) + 1
    bounds = [0, *starts.tolist(), len(window_slots)]
    return [slice(row, min(row + _ROWS, end)) for begin, end in pairwise(bounds) for row in range(begin, end, _ROWS)]


def _gather(pages: torch.Tensor, states: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """States at slots int64 [R, K] (-1 or beyond the pages: none) -> the distinct ones fp32 [N, 512], read [R, N].

    In the order in which they appear, which is that of positions: sums must not depend on where blocks lie.
    """
    valid = (slots >= 0) & (slots < pages.shape[0] * states)
    flat = slots[valid]
    distinct, index = flat.unique(return_inverse=True)
    first = torch.full((len(distinct),), len(flat)).scatter_reduce_(0, index, torch.arange(len(flat)), "amin")
    order = first.argsort()
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    read = torch.zeros(len(slots), len(distinct), dtype=torch.bool)
    read[valid.nonzero()[:, 0], place[index]] = True
    return read_mla(pages, states, distinct[order]), read


@fallback(
    "(Tensor(a!) out, Tensor q, Tensor window_cache_2d, Tensor window_slots, int window_block_size, "
    "Tensor compressed_cache_2d, Tensor compressed_slots, int compressed_block_size, Tensor attn_sink, float scale) "
    "-> ()"
)
def flash_mla_with_kvcache_cpu(
    out: torch.Tensor,
    q: torch.Tensor,
    window_cache_2d: torch.Tensor,
    window_slots: torch.Tensor,
    window_block_size: int,
    compressed_cache_2d: torch.Tensor,
    compressed_slots: torch.Tensor,
    compressed_block_size: int,
    attn_sink: torch.Tensor,
    scale: float,
) -> None:
    """Attention of q bf16 [T, H, 512] over its window's and its compressed states -> out bf16 [T, H, 512].

    window_slots, compressed_slots int64 [T, K] (-1: none; a slot at most once in a row); attn_sink fp32 [H], the
    logit of a state without value. Without any state the output is 0. flash_mla.cpp `sparse_mla_decode_kernel_impl`,
    which rounds probabilities to bf16 and sums in fp32. Here they are fp32 and the sum is fp64: with its order, which
    follows from what else is read beside a row, a result in bf16 hardly ever changes.
    """
    for rows in _runs(window_slots):
        states, read = _gather(window_cache_2d, window_block_size, window_slots[rows])
        if compressed_slots.shape[1]:
            more, more_read = _gather(compressed_cache_2d, compressed_block_size, compressed_slots[rows])
            states, read = torch.cat([states, more]), torch.cat([read, more_read], dim=1)
        count, heads = q[rows].shape[:2]
        if not len(states):
            out[rows] = 0
            continue
        scores = product(q[rows].float().flatten(0, 1), states).view(count, heads, -1) * scale
        scores.masked_fill_(~read.unsqueeze(1), -torch.inf)
        # With a sink that is finite, or any state, the maximum is finite; the clamp is for rows with neither.
        top = torch.maximum(scores.amax(-1), attn_sink).clamp(min=torch.finfo(torch.float32).min).unsqueeze(-1)
        shares = scores.sub_(top).exp_().double()
        total = shares.sum(-1, keepdim=True) + (attn_sink.view(1, -1, 1) - top).exp()
        attended = (shares.flatten(0, 1) @ states.double()).view(count, heads, HEAD) / total
        out[rows] = attended.masked_fill(~read.any(-1).view(-1, 1, 1), 0.0).to(out.dtype)
