"""Merging two attention states over disjoint keys."""

import torch

from vllm_lsa.ops.native import require


def merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    out_a, out_b: [n, Hq, D] of one dtype. lse_a, lse_b: [n, Hq] fp32, natural log. Returns out [n, Hq, D] and
    lse [n, Hq]. A side with lse -inf saw no keys and is left out whatever its `out` holds; with both -inf the result is
    0 and -inf. out = Σ out_i exp(lse_i - lse), lse = log Σ exp(lse_i) (Dao et al. 2022, FlashAttention, section 3.1).
    """
    require(out_a.shape == out_b.shape, f"shapes of out differ: {list(out_a.shape)}, {list(out_b.shape)}")
    require(lse_a.shape == lse_b.shape == out_a.shape[:-1], f"lse_a, lse_b must be {list(out_a.shape[:-1])}")
    lse = torch.logaddexp(lse_a, lse_b)
    out = torch.zeros_like(out_a, dtype=lse.dtype)
    for part, part_lse in ((out_a, lse_a), (out_b, lse_b)):
        empty = part_lse == -torch.inf
        weight = torch.where(empty, 0, part_lse - lse).exp().unsqueeze(-1)
        out += (part * weight).masked_fill_(empty.unsqueeze(-1), 0)
    return out.to(out_a.dtype), lse


def merge_states_naive(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of `merge_states` in float64, as the softmax of two logits that weigh two values."""
    logits = torch.stack([lse_a, lse_b]).double()
    outs = torch.stack([out_a, out_b]).double().masked_fill(logits.isneginf().unsqueeze(-1), 0)
    weights = logits.softmax(0).nan_to_num(0)
    return (weights.unsqueeze(-1) * outs).sum(0).to(out_a.dtype), logits.logsumexp(0).to(lse_a.dtype)
