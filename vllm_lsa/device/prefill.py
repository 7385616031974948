"""Attention of a prompt's tokens to a part of their keys, and the union of such parts."""

from typing import Protocol

import torch

from vllm_lsa.ops.dense import attend_with_lse
from vllm_lsa.ops.merge_states import merge_states

State = tuple[torch.Tensor, torch.Tensor]
"""Attention out [s, Hq, D] over some keys and its log-sum-exp, in the layout of whoever made it."""


class PrefillAttention(Protocol):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool) -> State:
        """q: [s, Hq, D]; k, v: [t, Hkv, D]. causal: needs s == t."""

    def merge(self, a: State, b: State) -> State:
        """Attention over the union of two disjoint sets of keys."""


class TorchPrefill:
    """By torch's fused kernels; the log-sum-exp is [s, Hq]."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool) -> State:
        return attend_with_lse(q, k, v, scale, causal)

    def merge(self, a: State, b: State) -> State:
        return merge_states(*a, *b)
