"""Dense attention of many queries over contiguous keys, with its log-sum-exp."""

import torch

from vllm_lsa.ops.merge_states import merge_states
from vllm_lsa.ops.native import require, unsupported


def attend_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of s queries over t keys.

    q: [s, Hq, D]; k, v: [t, Hkv, D]; one dtype (fp32, bf16, fp16), strides free but the last must be 1. scale: factor
    on q·k. causal: query i sees keys 0..t-s+i, so the last sees all; needs s ≤ t.
    Returns out [s, Hq, D] and lse [s, Hq] fp32, natural log. With t = 0 they are 0 and -inf.
    Raises ValueError on a bad shape, dtype or stride.
    """
    _check(q, k, v, causal)
    (s, q_heads, dim), (t, kv_heads, _) = q.shape, k.shape
    group = q_heads // kv_heads
    if s == 0 or t == 0:
        return torch.zeros_like(q), torch.full((s, q_heads), -torch.inf, device=q.device)
    if not causal:
        # The group's heads become more queries of one kv head: K and V are read once for all of them.
        folded = q.view(s, kv_heads, group, dim).transpose(0, 1).reshape(1, kv_heads, s * group, dim)
        out, lse = _attend(folded, k.transpose(0, 1)[None], v.transpose(0, 1)[None], scale, causal=False)
        return (
            out.view(kv_heads, s, group, dim).transpose(0, 1).reshape(s, q_heads, dim),
            lse.view(kv_heads, s, group).transpose(0, 1).reshape(s, q_heads),
        )
    if s < t:
        # torch aligns the causal mask to the first key, not the last: split where both agree.
        past = attend_with_lse(q, k[: t - s], v[: t - s], scale, causal=False)
        return merge_states(*past, *attend_with_lse(q, k[t - s :], v[t - s :], scale, causal=True))
    # The group's heads become batch entries that share K and V with stride 0: nothing is copied.
    grouped = q.view(s, kv_heads, group, dim).permute(2, 1, 0, 3)
    keys, values = (x.transpose(0, 1).expand(group, kv_heads, t, dim) for x in (k, v))
    out, lse = _attend(grouped, keys, values, scale, causal=True)
    return out.permute(2, 1, 0, 3).reshape(s, q_heads, dim), lse.permute(2, 1, 0).reshape(s, q_heads)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> None:
    require(q.dim() == k.dim() == 3, f"q and k must be 3-d, got {list(q.shape)}, {list(k.shape)}")
    require(k.shape == v.shape, f"k and v differ in shape: {list(k.shape)}, {list(v.shape)}")
    require(q.dtype == k.dtype == v.dtype, f"dtypes differ: q {q.dtype}, k {k.dtype}, v {v.dtype}")
    require(q.shape[2] == k.shape[2], f"head dimensions differ: q {q.shape[2]}, k {k.shape[2]}")
    heads = (q.shape[1], k.shape[1])
    require(heads[1] > 0 and heads[0] % heads[1] == 0, f"{heads[1]} kv heads do not divide {heads[0]} query heads")
    require(not causal or q.shape[0] <= k.shape[0], f"causal needs s <= t, got s {q.shape[0]}, t {k.shape[0]}")
    require(all(x.stride(2) == 1 for x in (q, k, v)), "the last dimension of q, k and v must have stride 1")


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's fused attention over [B, H, length, D] with as many kv heads as query heads; lse [B, H, length] fp32."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    if q.device.type != "cuda":
        raise unsupported(q.device)
    if q.dtype == torch.float32:  # the flash kernel takes 16-bit types only
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    else:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
    return out, lse[..., : q.shape[2]]  # the efficient kernel pads the queries of lse


def attend_with_lse_naive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of `attend_with_lse`, with all logits in memory; float64 tensors give float64 results."""
    (s, q_heads, dim), (t, kv_heads, _) = q.shape, k.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = scale * torch.einsum("shgd,thd->shgt", q.to(wide).reshape(s, kv_heads, -1, dim), k.to(wide))
    if causal:
        hidden = torch.ones(s, t, dtype=torch.bool, device=q.device).triu(t - s + 1)
        logits = logits.masked_fill(hidden[:, None, None], -torch.inf)
    out = torch.einsum("shgt,thd->shgd", logits.softmax(-1), v.to(wide))
    return out.reshape(s, q_heads, dim).to(q.dtype), logits.logsumexp(-1).reshape(s, q_heads)
