"""Prompt attention by vLLM's own kernels: FlashAttention and its merge of attention states."""

import torch
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

from vllm_lsa.device.prefill import State


class FlashPrefill:
    """For bf16 and fp16 on a CUDA device. The log-sum-exp is [Hq, s], as FlashAttention has it."""

    def __init__(self, head_dim: int) -> None:
        self._version = get_flash_attn_version(head_size=head_dim)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool) -> State:
        s, t = len(q), len(k)
        out, lse = flash_attn_varlen_func(
            q=q,
            k=k,
            v=v,
            max_seqlen_q=s,
            cu_seqlens_q=self._ends(s, q.device),
            max_seqlen_k=t,
            cu_seqlens_k=self._ends(t, q.device),
            softmax_scale=scale,
            causal=causal,
            return_softmax_lse=True,
            fa_version=self._version,
        )
        return out, lse

    def merge(self, a: State, b: State) -> State:
        out, lse = torch.empty_like(a[0]), torch.empty_like(a[1])
        merge_attn_states(out, *a, *b, output_lse=lse)
        return out, lse

    @staticmethod
    def _ends(length: int, device: torch.device) -> torch.Tensor:
        # Made on the device: a copy from the host would wait for it.
        return torch.arange(2, dtype=torch.int32, device=device) * length
