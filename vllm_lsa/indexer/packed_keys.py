"""The published form of chunk keys: D values as e4m3 bytes and one fp32 scale for all of them (D = 128: 132 bytes)."""

import torch

from vllm_lsa.ops.native import require

PAGE_CHUNKS = 64
_SCALE_BYTES = 4
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def pack_keys(keys: torch.Tensor) -> torch.Tensor:
    """Packed uint8 [..., D + 4] of keys [..., D], any float dtype, finite; the scale maps the largest value to 448."""
    keys = keys.float()
    scale = (keys.abs().amax(-1, keepdim=True) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (keys / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return torch.cat([codes.view(torch.uint8), scale.view(torch.uint8)], dim=-1)


def unpack_keys(packed: torch.Tensor) -> torch.Tensor:
    """Keys fp32 [..., D] of packed uint8 [..., D + 4]: D bytes of e4m3, then one little-endian fp32 scale.

    Raises ValueError on another dtype or no values.
    """
    require(
        packed.dtype == torch.uint8 and packed.shape[-1] > _SCALE_BYTES,
        f"packed keys must be uint8 [..., D + {_SCALE_BYTES}], got {packed.dtype} {list(packed.shape)}",
    )
    codes, scale = packed[..., :-_SCALE_BYTES], packed[..., -_SCALE_BYTES:]
    # Copied, because a row of D + 4 bytes need not begin where an fp32 may.
    scale = scale.clone(memory_format=torch.contiguous_format).view(torch.float32)
    return codes.contiguous().view(torch.float8_e4m3fn).float() * scale


def keys_to_pages(packed: torch.Tensor) -> torch.Tensor:
    """Pages uint8 [P, 64 (D + 4)] of packed keys uint8 [N, D + 4], P = ⌈N / 64⌉.

    A page is the values of its 64 chunks, then their scales; what the last one lacks is 0.
    """
    n, size = packed.shape
    pages = -(-n // PAGE_CHUNKS)
    padded = packed.new_zeros(pages, PAGE_CHUNKS, size)
    padded.view(-1, size)[:n] = packed
    return torch.cat([padded[..., :-_SCALE_BYTES].flatten(1), padded[..., -_SCALE_BYTES:].flatten(1)], dim=1)


def keys_of_pages(pages: torch.Tensor) -> torch.Tensor:
    """Packed keys uint8 [64 P, D + 4] of pages uint8 [P, 64 (D + 4)]. Raises ValueError on another shape or dtype."""
    require(
        pages.dtype == torch.uint8 and pages.dim() == 2 and pages.shape[1] % PAGE_CHUNKS == 0,
        f"pages must be uint8 [P, {PAGE_CHUNKS} (D + {_SCALE_BYTES})], got {pages.dtype} {list(pages.shape)}",
    )
    codes, scales = pages.split([pages.shape[1] - PAGE_CHUNKS * _SCALE_BYTES, PAGE_CHUNKS * _SCALE_BYTES], dim=1)
    return torch.cat([x.unflatten(1, (PAGE_CHUNKS, -1)) for x in (codes, scales)], dim=-1).flatten(0, 1)
