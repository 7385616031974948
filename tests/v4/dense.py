"""Fallbacks without a cache: hyper-connections, expert routing, and the output projection."""

import torch
import torch.nn.functional as F
from vllm.model_executor.kernels.mhc.torch import mhc_post_torch, mhc_pre_torch

from tests.v4.operators import fallback
from tests.v4.pages import rotate
from tests.v4.rows import padded, product


@fallback(
    "(Tensor x, Tensor hc_fn, Tensor hc_scale, Tensor hc_base, int hc_mult, int sinkhorn_iters, float rms_eps, "
    "float hc_eps) -> (Tensor, Tensor, Tensor)"
)
def hc_pre_fused_cpu(
    x: torch.Tensor,
    hc_fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    hc_mult: int,
    sinkhorn_iters: int,
    rms_eps: float,
    hc_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x bf16 [T, m, d] -> layer input bf16 [T, d], post fp32 [T, m], comb fp32 [T, m, m]: vLLM's own `mhc_pre_torch`.

    mhc.cpp `hc_pre_fuse_impl`.
    """
    post, comb, layer_input = mhc_pre_torch(
        padded(x),
        hc_fn,
        hc_scale,
        hc_base,
        rms_eps,
        hc_eps,
        hc_eps,
        hc_post_mult_value=2.0,
        sinkhorn_repeat=sinkhorn_iters,
    )
    return layer_input[: len(x)], post[: len(x)].squeeze(-1), comb[: len(x)]


@fallback("(Tensor x, Tensor residual, Tensor post, Tensor comb) -> Tensor")
def hc_post_fused_cpu(x: torch.Tensor, residual: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """x bf16 [T, d], residual bf16 [T, m, d], post fp32 [T, m], comb fp32 [T, m, m] -> bf16 [T, m, d].

    vLLM's own `mhc_post_torch`; mhc.cpp `hc_post_fuse_impl`.
    """
    return mhc_post_torch(x, residual, post.unsqueeze(-1), comb)


@fallback("(Tensor x, Tensor hc_fn, Tensor hc_scale, Tensor hc_base, float hc_eps, float norm_eps) -> Tensor")
def hc_head_fused_cpu(
    x: torch.Tensor,
    hc_fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    hc_eps: float,
    norm_eps: float,
) -> torch.Tensor:
    """Streams x bf16 [T, m, d] -> their gated sum bf16 [T, d]; hc_fn fp32 [m, m d]. mhc.cpp `hc_head_fuse_impl`."""
    flat = x.flatten(1).float()
    mixes = product(flat, hc_fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    gates = torch.sigmoid(mixes * hc_scale + hc_base) + hc_eps
    return (gates.unsqueeze(-1) * x.float()).sum(dim=1).to(x.dtype)


def _scores(logits: torch.Tensor, scoring_func: str) -> torch.Tensor:
    assert scoring_func == "sqrtsoftplus", scoring_func
    return F.softplus(logits.float()).sqrt()


@fallback(
    "(Tensor hidden_states, Tensor gating_output, Tensor correction_bias, int topk, bool renormalize, "
    "str scoring_func, int num_fused_shared_experts, float? routed_scaling_factor, "
    "bool apply_routed_scaling_factor_on_output) -> (Tensor, Tensor)",
    always=True,
)
def biased_topk_cpu(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    correction_bias: torch.Tensor,
    topk: int,
    renormalize: bool,
    scoring_func: str,
    num_fused_shared_experts: int,
    routed_scaling_factor: float | None,
    apply_routed_scaling_factor_on_output: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """gating_output fp32 [T, E], correction_bias fp32 [E] -> weights fp32, experts int32 [T, topk].

    The bias counts for the choice alone. topk.cpp `biased_topk_kernel_impl`.
    """
    assert num_fused_shared_experts == 0
    scores = _scores(gating_output, scoring_func)
    experts = (scores + correction_bias.float()).topk(topk, dim=-1).indices
    weights = scores.gather(1, experts)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
        if apply_routed_scaling_factor_on_output:
            weights = weights * (routed_scaling_factor or 0.0)
    return weights, experts.int()


@fallback(
    "(Tensor gating_output, Tensor tid2eid, int topk, str scoring_func, int num_fused_shared_experts, "
    "int num_experts, float routed_scaling_factor) -> (Tensor, Tensor)",
    always=True,
)
def hash_topk_cpu(
    gating_output: torch.Tensor,
    tid2eid: torch.Tensor,
    topk: int,
    scoring_func: str,
    num_fused_shared_experts: int,
    num_experts: int,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """gating_output fp32 [T, E], tid2eid int32 [T, topk] (the experts of each token) -> weights fp32, experts int32.

    topk.cpp `hash_topk_kernel_impl`.
    """
    assert num_fused_shared_experts == 0
    weights = _scores(gating_output, scoring_func).gather(1, tid2eid.long())
    return weights / weights.sum(-1, keepdim=True) * routed_scaling_factor, tid2eid.clone()


@fallback("(Tensor o, Tensor positions, Tensor cos_sin_cache, int rope_dim) -> Tensor")
def inverse_gptj_rope_o_proj_cpu(
    o: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, rope_dim: int
) -> torch.Tensor:
    """o bf16 [T, H, 512] -> fp32, turned back by positions int64 [T]. store_cache.cpp, function of the same name."""
    assert rope_dim == cos_sin_cache.shape[1]
    return rotate(o.float(), positions, cos_sin_cache, inverse=True)


@fallback("(Tensor weight) -> Tensor")
def convert_weight_packed(weight: torch.Tensor) -> torch.Tensor:
    """The order in memory that AMX wants; `bmm_cpu` below takes weights as they are. gemm.cpp."""
    return weight.clone()


@fallback("(Tensor(a!) out, Tensor mat1, Tensor mat2, bool is_vnni, Tensor? scale) -> ()")
def bmm_cpu(
    out: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, is_vnni: bool, scale: torch.Tensor | None = None
) -> None:
    """out bf16 [G, T, N] = mat1 bf16 [G, T, K] @ mat2 bf16 [G, N, K] transposed, summed in fp32. bmm.cpp."""
    assert scale is None
    rows = padded(mat1.float().transpose(0, 1)).transpose(0, 1)
    out.copy_(torch.bmm(rows, mat2.float().transpose(1, 2))[:, : mat1.shape[1]])
