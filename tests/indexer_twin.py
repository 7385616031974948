"""The scorer of the memory indexer written out in float64, sharing no code with the package, and random checkpoints."""

import functools
import math
from collections.abc import Mapping

import numpy as np
import torch

Weights = Mapping[str, torch.Tensor]


def decode_packed(packed: torch.Tensor) -> np.ndarray:
    """Keys [..., D] of packed [..., D + 4], bit by bit: e4m3 has 1 sign, 4 exponent (bias 7) and 3 mantissa bits."""
    raw = packed.numpy()
    byte = raw[..., :-4].astype(np.int64)
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    scale = np.ascontiguousarray(raw[..., -4:]).view("<f4").astype(np.float64)
    return np.where(sign == 1, -value, value) * scale


@functools.cache
def hadamard(dim: int) -> np.ndarray:
    """Entry (i, j) is the parity of the bits that i and j share."""
    signs = [[(-1) ** bin(i & j).count("1") for j in range(dim)] for i in range(dim)]
    return np.array(signs, dtype=np.float64) / math.sqrt(dim)


def published_speeds() -> list[float]:
    """YaRN with base 160000, factor 16, original length 65536: the ramp between the pairs goes from 15 to 25."""
    speeds = []
    for i in range(32):
        plain = 160000.0 ** (-2 * i / 64)
        slowed = min(max((i - 15) / (25 - 15), 0), 1)
        speeds.append(plain * (1 - slowed) + plain / 16 * slowed)
    return speeds


def turn(q: np.ndarray, position: int, speeds: list[float], style: str, first: int) -> np.ndarray:
    """One head [D] at one position."""
    out = q.copy()
    for i, speed in enumerate(speeds):
        a, b = (2 * i, 2 * i + 1) if style == "interleaved" else (i, i + len(speeds))
        a, b = first + a, first + b
        cos, sin = math.cos(position * speed), math.sin(position * speed)
        out[a], out[b] = q[a] * cos - q[b] * sin, q[a] * sin + q[b] * cos
    return out


def logits(
    w: Weights,
    hidden: torch.Tensor,
    keys: np.ndarray,
    positions: torch.Tensor,
    speeds: list[float],
    style: str,
    first: int,
    rotated: bool,
) -> np.ndarray:
    """[B, N]. w: tensors of one layer by the end of their names. keys: [B, N, kv_heads, D] in float64."""
    wq_a, wq_b, norm, proj = (
        w[name].double().numpy() for name in ("wq_a.weight", "wq_b.weight", "q_norm_weight", "weights_proj.weight")
    )
    heads = proj.shape[0]
    dim = wq_b.shape[0] // heads
    bias = float(w["bias"]) if "bias" in w else 0.0
    out = np.zeros((len(hidden), keys.shape[1]))
    for row, x in enumerate(hidden.double().numpy()):
        y = wq_a @ x
        y = y / math.sqrt((y**2).mean() + 1e-6) * norm
        q = (wq_b @ y).reshape(heads, dim)
        weight = (proj @ x) / math.sqrt(dim) / math.sqrt(heads)
        for head in range(heads):
            query = turn(q[head], int(positions[row]), speeds, style, first)
            if rotated:
                query = hadamard(dim) @ query
            products = keys[row, :, head // (heads // keys.shape[2])] @ query
            out[row] += np.maximum(products, 0) * weight[head]
    return out + bias


def random_layer(heads: int, dim: int, rank: int, hidden_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of one layer, fp32, with activations of order 1."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    return {
        "wq_a.weight": randn(rank, hidden_size) * hidden_size**-0.5,
        "wq_b.weight": randn(heads * dim, rank) * rank**-0.5,
        "q_norm_weight": 1 + 0.1 * randn(rank),
        "weights_proj.weight": randn(heads, hidden_size) * hidden_size**-0.5,
    }


def published_tensors(layers: Mapping[int, Weights]) -> dict[str, torch.Tensor]:
    """The names of a joint file."""
    return {f"retrievers.l{layer}.{name}": x for layer, w in layers.items() for name, x in w.items()}
