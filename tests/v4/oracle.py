"""One token of a c4 layer in float64, from bytes: what index logits and sparse attention must give.

Shares nothing with the fallbacks of this package or with `vllm_lsa`; the formats are described in `pages.py`.
"""

import math

import numpy as np
import torch


def _e4m3(code: int) -> float:
    sign, exponent, mantissa = -1 if code >> 7 else 1, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2 ** (exponent - 7))


E4M3 = np.array([_e4m3(code) for code in range(256)])


def states(pages: torch.Tensor, size: int, where: np.ndarray) -> np.ndarray:
    """float64 [n, 512] of the states numbered `where` int [n] in uint8 pages [M, bytes] of fp8_ds_mla with `size`."""
    page, place = where // size, (where % size)[:, None]
    held = pages.numpy()
    data = held[page[:, None], 576 * place + np.arange(576)]
    exponents = held[page[:, None], 576 * size + 8 * place + np.arange(7)].astype(np.int64)
    scales = np.where(exponents == 0, 0.0, 2.0 ** (exponents - 127.0))
    nope = (E4M3[data[:, :448]].reshape(-1, 7, 64) * scales[:, :, None]).reshape(-1, 448)
    rope = (data[:, 448:].copy().view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.concatenate([nope, rope], axis=1)


def index_keys(cache: torch.Tensor, blocks: np.ndarray, count: int) -> np.ndarray:
    """float64 [count, 128], the first keys of a request. cache: uint8 [num_blocks, 64, 132], as vLLM binds it."""
    out = np.zeros((count, 128))
    for first in range(0, count, 64):
        page = cache[int(blocks[first // 64])].reshape(-1).numpy()
        here = min(64, count - first)
        scales = page[8192 : 8192 + 4 * here].copy().view(np.float32).astype(np.float64)
        out[first : first + here] = E4M3[page[: 128 * here]].reshape(here, 128) * scales[:, None]
    return out


def logits(q: torch.Tensor, weights: torch.Tensor, keys: np.ndarray) -> np.ndarray:
    """float64 [n] of q e4m3 [h, 128] with weights fp32 [h] and keys float64 [n, 128]."""
    return weights.double().numpy() @ np.maximum(E4M3[q.view(torch.uint8).numpy()] @ keys.T, 0)


def attend(q: torch.Tensor, sink: torch.Tensor, scale: float, read: np.ndarray) -> np.ndarray:
    """float64 [H, 512] of q bf16 [H, 512] over states read [n, 512], with the logit sink fp32 [H] of nothing."""
    scores = q.double().numpy() @ read.T * scale
    top = np.maximum(scores.max(1), sink.double().numpy())[:, None]
    shares = np.exp(scores - top)
    return shares @ read / (shares.sum(1, keepdims=True) + np.exp(sink.double().numpy()[:, None] - top))
