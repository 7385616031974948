"""Fallbacks that write V4's caches: sliding window, compressor states, compressed keys and values, index keys."""

import torch

from tests.v4.operators import fallback
from tests.v4.pages import (
    FP8_MAX,
    NOPE,
    ROPE,
    power_of_two_above,
    rotate,
    to_fp8,
    write_index_keys,
    write_mla,
)


@fallback(
    "(Tensor q, Tensor kv, Tensor positions, Tensor(a!) swa_kv_cache_2d, Tensor slot_mapping, Tensor cos_sin_cache, "
    "int q_head_padded, float eps, int cache_block_size) -> Tensor"
)
def fused_qnorm_rope_kv_insert_cpu(
    q: torch.Tensor,
    kv: torch.Tensor,
    positions: torch.Tensor,
    swa_kv_cache_2d: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    q_head_padded: int,
    eps: float,
    cache_block_size: int,
) -> torch.Tensor:
    """q bf16 [T, H, 512], normed per head and rotated -> [T, padded H, 512]; kv bf16 [>= N, 512] to the window cache.

    positions int64 [T], slot_mapping int64 [N] (-1: skip), pages uint8 [B, stride]. store_cache.cpp
    `qnorm_rope_kv_insert_impl`.
    """
    wide = q.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    out = q.new_zeros(q.shape[0], q_head_padded, q.shape[2])
    out[:, : q.shape[1]] = rotate(wide, positions, cos_sin_cache).to(q.dtype)

    rows = (slot_mapping >= 0).nonzero().squeeze(-1)
    turned = rotate(kv[rows].float(), positions[rows], cos_sin_cache).bfloat16()
    write_mla(swa_kv_cache_2d, cache_block_size, slot_mapping[rows], turned[:, :NOPE], turned[:, NOPE:], flush=True)
    return out


@fallback("(Tensor kv, Tensor score, Tensor ape, Tensor positions, Tensor(a!) state_cache, Tensor slot_mapping) -> ()")
def save_partial_states_cpu(
    kv: torch.Tensor,
    score: torch.Tensor,
    ape: torch.Tensor,
    positions: torch.Tensor,
    state_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Put kv | score + ape, fp32 [T, W] each, into state_cache fp32 [B, n, 2 W] at slot_mapping int64 [T] (-1: skip).

    ape fp32 [ratio, W] is added by position within the group. compressor.cpp `save_partial_states_impl`.
    """
    rows = (slot_mapping >= 0).nonzero().squeeze(-1)
    slots, size = slot_mapping[rows], state_cache.shape[1]
    scores = score[rows] + ape[positions[rows] % len(ape)]
    state_cache[slots // size, slots % size] = torch.cat([kv[rows], scores], dim=1)


def _compress(
    state_cache: torch.Tensor,
    gather_slots: torch.Tensor,
    positions: torch.Tensor,
    kv_slot_mapping: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    ratio: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool the windows that end at a group's last token and norm them -> token rows int64 [N], normed fp32 [N, D].

    Every channel has a softmax of its own over the window. With overlap (window 2 ratio) the older half of the window
    reads the first D channels of a state, the newer half the second. compressor.cpp `compress_norm_rope_store_impl`.
    """
    rows = (((positions + 1) % ratio == 0) & (kv_slot_mapping >= 0)).nonzero().squeeze(-1)
    dim, size = len(weight), state_cache.shape[1]
    width = state_cache.shape[2] // 2
    slots = gather_slots[rows]
    valid = (slots >= 0).unsqueeze(-1)
    states = state_cache[slots.clamp(min=0) // size, slots.clamp(min=0) % size]

    def channels(start: int) -> torch.Tensor:
        if width == dim:
            return states[..., start : start + dim]
        return torch.cat(
            [states[:, :ratio, start : start + dim], states[:, ratio:, start + dim : start + 2 * dim]], dim=1
        )

    shares = channels(width).masked_fill(~valid, -torch.inf).softmax(dim=1)
    # What an invalid slot points at may be anything, also NaN.
    pooled = (shares * channels(0).masked_fill(~valid, 0.0)).sum(dim=1)
    return rows, pooled * torch.rsqrt(pooled.square().mean(-1, keepdim=True) + eps) * weight


_STORE_SCHEMA = (
    "(Tensor state_cache, Tensor gather_slots, Tensor positions, Tensor kv_slot_mapping, Tensor rms_norm_weight, "
    "float rms_norm_eps, Tensor cos_sin_cache, Tensor(a!) kv_cache_2d, int kv_cache_block_size, int compress_ratio) "
    "-> ()"
)


@fallback(_STORE_SCHEMA)
def compress_norm_rope_store_cpu(
    state_cache: torch.Tensor,
    gather_slots: torch.Tensor,
    positions: torch.Tensor,
    kv_slot_mapping: torch.Tensor,
    rms_norm_weight: torch.Tensor,
    rms_norm_eps: float,
    cos_sin_cache: torch.Tensor,
    kv_cache_2d: torch.Tensor,
    kv_cache_block_size: int,
    compress_ratio: int,
) -> None:
    """Write the compressed state of every group that a token of this step completes to its fp8_ds_mla page.

    state_cache fp32 [B, n, 2 W]; gather_slots int64 [T, window] (-1: none), positions and kv_slot_mapping int64 [T];
    weight fp32 [512]; pages uint8 [B', stride]. compressor.cpp `compress_norm_rope_store_impl`.
    """
    rows, normed = _compress(
        state_cache, gather_slots, positions, kv_slot_mapping, rms_norm_weight, rms_norm_eps, compress_ratio
    )
    start = positions[rows] // compress_ratio * compress_ratio
    turned = rotate(normed, start, cos_sin_cache)
    write_mla(
        kv_cache_2d, kv_cache_block_size, kv_slot_mapping[rows], normed[:, :NOPE].bfloat16(),
        turned[:, NOPE:].bfloat16(), flush=False,
    )  # fmt: skip


@fallback(_STORE_SCHEMA)
def compress_norm_rope_store_indexer_cpu(
    state_cache: torch.Tensor,
    gather_slots: torch.Tensor,
    positions: torch.Tensor,
    kv_slot_mapping: torch.Tensor,
    rms_norm_weight: torch.Tensor,
    rms_norm_eps: float,
    cos_sin_cache: torch.Tensor,
    kv_cache_2d: torch.Tensor,
    kv_cache_block_size: int,
    compress_ratio: int,
) -> None:
    """The same for index keys: weight fp32 [128], pages of `write_index_keys`.

    compressor.cpp `compress_norm_rope_store_indexer_impl`.
    """
    rows, normed = _compress(
        state_cache, gather_slots, positions, kv_slot_mapping, rms_norm_weight, rms_norm_eps, compress_ratio
    )
    start = positions[rows] // compress_ratio * compress_ratio
    keys = rotate(normed, start, cos_sin_cache).bfloat16()
    write_index_keys(kv_cache_2d, kv_cache_block_size, kv_slot_mapping[rows], keys)


@fallback(
    "(Tensor positions, Tensor index_q, Tensor index_q_cos_sin_cache, Tensor(a!) index_q_fp8, Tensor index_weights, "
    "float index_weights_softmax_scale, float index_weights_head_scale, Tensor(b!) index_weights_out) -> ()"
)
def fused_indexer_q_rope_quant_cpu(
    positions: torch.Tensor,
    index_q: torch.Tensor,
    index_q_cos_sin_cache: torch.Tensor,
    index_q_fp8: torch.Tensor,
    index_weights: torch.Tensor,
    index_weights_softmax_scale: float,
    index_weights_head_scale: float,
    index_weights_out: torch.Tensor,
) -> None:
    """index_q fp32 [T, h, 128], rotated -> index_q_fp8 e4m3; its scales go into index_weights fp32 [T, h] -> _out.

    Only what was rotated passes through bf16. indexer.cpp `fused_indexer_q_rope_quant_impl`.
    """
    turned = rotate(index_q, positions, index_q_cos_sin_cache)
    turned[..., -ROPE:] = turned[..., -ROPE:].bfloat16().float()
    scale = torch.exp2(power_of_two_above(turned.abs().amax(-1).clamp(min=1e-4) / FP8_MAX))
    index_q_fp8.copy_(to_fp8(turned / scale.unsqueeze(-1)))
    index_weights_out.copy_(index_weights * scale * index_weights_softmax_scale * index_weights_head_scale)
