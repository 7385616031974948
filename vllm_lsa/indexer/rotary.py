"""Rotary position embeddings as data: which dimensions turn, how they pair up, and how fast each pair turns."""

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field


class RopeConfig(BaseModel):
    """Which dimensions of a head turn. The speed of each pair is a tensor, `inv_freq`, so any scaling can be said."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    style: Literal["interleaved", "halves"] = Field(
        description="Pairs (2i, 2i + 1), or (i, i + dims / 2) as Llama and Qwen have them."
    )
    first_dim: int = Field(default=0, ge=0, description="First dimension that turns.")
    dims: int = Field(ge=0, multiple_of=2, description="Dimensions that turn from there on; 0 for none.")


def inverse_frequencies(dims: int, base: float) -> torch.Tensor:
    """Radians per token of each pair, float64 [dims / 2]: ``base ** (-2 i / dims)``."""
    return base ** -(torch.arange(0, dims, 2, dtype=torch.float64) / dims)


def yarn_inverse_frequencies(
    dims: int, base: float, factor: float, original_length: int, beta_fast: float = 32, beta_slow: float = 1
) -> torch.Tensor:
    """The same after YaRN (arXiv 2309.00071), float64 [dims / 2].

    Pairs that turn more than beta_fast times within original_length tokens stay, those that turn less than beta_slow
    times are slowed by factor, with a ramp between.
    """

    def pair(turns: float) -> float:
        return dims * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(pair(beta_fast)), 0), min(math.ceil(pair(beta_slow)), dims - 1)
    slowed = ((torch.arange(dims // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    plain = inverse_frequencies(dims, base)
    return plain * (1 - slowed) + plain / factor * slowed


def rotate(
    x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, rope: RopeConfig, inverse: bool = False
) -> torch.Tensor:
    """x with RoPE applied, or, if inverse, taken off.

    x: [B, H, D], any float dtype, which the result has too; computed in at least fp32. positions: [B], integers.
    inv_freq: [dims / 2]. Angles are computed in float64: at a million tokens fp32 would be off by 0.06 radians.
    """
    if not rope.dims:
        return x
    angle = positions.double()[:, None, None] * inv_freq.double()
    exact = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angle.cos().to(exact), angle.sin().to(exact)
    if inverse:
        sin = -sin
    head, turning, tail = x.split([rope.first_dim, rope.dims, x.shape[-1] - rope.first_dim - rope.dims], dim=-1)
    dim = -1 if rope.style == "interleaved" else -2
    a, b = turning.to(exact).unflatten(-1, (-1, 2) if dim == -1 else (2, -1)).unbind(dim)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim).flatten(-2)
    return torch.cat([head, turned.to(x.dtype), tail], dim=-1)
