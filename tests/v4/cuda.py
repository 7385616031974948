"""Makes stock vLLM run DeepSeek-V4 on a GPU whose machine has neither DeepGEMM, tilelang nor CuTeDSL.

`register` is the entry point of a plugin (`install.environment(folder, device="cuda")`). FlashMLA, the Triton kernels
of the compressors, top-k, experts and all metadata are vLLM's own; what stands in is for exactness, not for speed.
"""

import sys
from types import ModuleType
from typing import Any

import torch

_ROWS = 1024
"""Rows of a prompt that are scored at a time."""


def register() -> None:
    """The entry point: replaces names in vLLM's modules, before a model is built."""
    from vllm.model_executor.layers import sparse_attn_indexer as indexer
    from vllm.models.deepseek_v4.nvidia import model
    from vllm.v1.attention.backends.mla import indexer as metadata

    for module in (indexer, metadata):
        module.has_deep_gemm = lambda: True
    indexer.fp8_fp4_mqa_logits = mqa_logits
    indexer.fp8_fp4_paged_mqa_logits = paged_mqa_logits
    metadata.get_paged_mqa_logits_metadata = schedule
    model.mhc_pre_tilelang = mhc_pre
    model.mhc_pre_broadcast_tilelang = mhc_pre_broadcast
    model.mhc_post_tilelang = mhc_post
    model.mhc_fused_post_pre_tilelang = mhc_fused_post_pre
    model.hc_head_fused_kernel_tilelang = hc_head
    compressor = ModuleType("vllm.models.deepseek_v4.nvidia.ops.sparse_attn_compress_cutedsl")
    vars(compressor)["_SPARSE_ATTN_COMPRESSOR_CUTEDSL_KERNEL"] = compress
    sys.modules[compressor.__name__] = compressor


def schedule(context_lens: torch.Tensor, block_size: int, num_sms: int, indices: Any = None) -> torch.Tensor:
    """DeepGEMM's plan of a step, which `paged_mqa_logits` does without."""
    return torch.zeros(num_sms + 1, 2, dtype=torch.int32, device=context_lens.device)


def paged_mqa_logits(
    q: tuple[torch.Tensor, torch.Tensor | None],
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    schedule_metadata: torch.Tensor,
    max_model_len: int,
    clean_logits: bool,
    indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """q e4m3 [B, 1, H, 128], kv_cache uint8 [blocks, 64, 1, 132] -> fp32 [B, max_model_len], by our own kernel."""
    from vllm_lsa.models.deepseek_v4.scorer import index_pages
    from vllm_lsa.ops.index_logits import PER_PAGE, index_logits

    assert q[1] is None and indices is None and q[0].shape[1] == 1
    rows, entries = len(q[0]), min(max_model_len, block_tables.shape[1] * PER_PAGE)
    # Rows begin at multiples of 1 KiB, as DeepGEMM's do.
    out = torch.empty(rows, -(-max_model_len // 256) * 256, device=weights.device)
    pages = index_pages(kv_cache.squeeze(2))
    index_logits(
        q[0].squeeze(1), weights[:rows].float(), pages, block_tables[:rows], context_lens[:rows].reshape(-1),
        out[:, :entries],
    )  # fmt: skip
    return out[:, :max_model_len]


def mqa_logits(
    q: tuple[torch.Tensor, torch.Tensor | None],
    kv: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    cu_seqlen_ks: torch.Tensor,
    cu_seqlen_ke: torch.Tensor,
    clean_logits: bool,
) -> torch.Tensor:
    """q e4m3 [M, H, 128], keys e4m3 [N, 128] and their scales fp32 [N] -> fp32 [M, N]."""
    keys, scales = kv[0].view(torch.float8_e4m3fn).float(), kv[1].float()
    out = torch.empty(len(q[0]), len(keys), device=weights.device)
    for first in range(0, len(out), _ROWS):
        part = slice(first, first + _ROWS)
        total = torch.zeros_like(out[part])
        for head, w in zip(q[0][part].float().unbind(1), weights[part].float().unbind(1), strict=True):
            total += (head @ keys.T).relu_() * w[:, None]
        out[part] = total * scales
    return out


def _normed(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    if weight is None:
        return x
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def mhc_pre(
    residual: torch.Tensor, *args: Any, n_splits: int = 1, norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """vLLM's own `mhc_pre_torch`, then the norm that tilelang's kernel has in it."""
    from vllm.model_executor.kernels.mhc.torch import mhc_pre_torch

    post, comb, x = mhc_pre_torch(residual, *args)
    return post, comb, _normed(x, norm_weight, norm_eps)


def mhc_pre_broadcast(
    x: torch.Tensor, fn: torch.Tensor, *args: Any, fn_broadcast: torch.Tensor | None = None, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    residual = x.unsqueeze(1).expand(-1, fn.shape[1] // x.shape[1], -1).contiguous()
    return residual, *mhc_pre(residual, fn, *args, **kwargs)


def mhc_post(x: torch.Tensor, residual: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    from vllm.model_executor.kernels.mhc.torch import mhc_post_torch

    return mhc_post_torch(x, residual, post, comb)


def mhc_fused_post_pre(
    x: torch.Tensor, residual: torch.Tensor, post: torch.Tensor, comb: torch.Tensor, *args: Any, tile_n: int = 1,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    residual = mhc_post(x, residual, post, comb)
    return residual, *mhc_pre(residual, *args, **kwargs)


def hc_head(
    x: torch.Tensor, fn: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, rms_eps: float, eps: float
) -> torch.Tensor:
    """Streams bf16 [T, m, d] -> their gated sum bf16 [T, d]."""
    flat = x.flatten(1).float()
    mixes = (flat @ fn.T) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + rms_eps)
    gates = torch.sigmoid(mixes * scale + base) + eps
    return (gates.unsqueeze(-1) * x.float()).sum(dim=1).to(x.dtype)


def compress(*, store_full_kv: bool, store_full_fp8: bool, fp8_scale: Any = None, **kwargs: Any) -> None:
    """The Triton form of the compressor that vLLM has for other GPUs."""
    from vllm.models.deepseek_v4.common.ops.fused_compress_quant_cache import compress_norm_rope_store_triton

    assert not store_full_kv and not store_full_fp8
    compress_norm_rope_store_triton(**kwargs)
