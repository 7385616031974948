"""K and V as e4m3 bytes, vLLM's `--kv-cache-dtype fp8`: a value is what its byte says as e4m3, times a scale.

In pages bytes are uint8, so that poison, copies and indexed assignment need no form of their own.
"""

from functools import cache
from typing import NamedTuple

import torch

LARGEST = 448.0
"""Of e4m3, which has no infinity."""


class KVScales(NamedTuple):
    """Of a layer's K and V, one each. Nothing is read from the device for them: vLLM has them as numbers too."""

    k: float = 1.0
    v: float = 1.0


UNSCALED = KVScales()


@cache
def has_e4m3(device: torch.device) -> bool:
    """Whether a device converts and multiplies e4m3: CUDA's from compute capability 8.9."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def quantise(x: torch.Tensor, scale: float) -> torch.Tensor:
    """The bytes nearest to x / scale, uint8 in x's shape. x: any float dtype.

    Ties go to even. What is larger than 448 becomes 448, infinity too; NaN stays NaN.
    """
    # By the reciprocal, like the kernel: their quotients would differ in the last bit.
    return (x.float() * (1.0 / scale)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)


def unscaled(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What pages hold, in `dtype` and without scale: e4m3 of uint8, which fp16, bf16 and fp32 hold exactly, else x."""
    return (x.view(torch.float8_e4m3fn) if x.dtype == torch.uint8 else x).to(dtype)
