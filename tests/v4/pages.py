"""Byte formats of DeepSeek-V4's caches, row by row, and the rotation that all of them share.

fp8_ds_mla page of n states (sliding window, c4 and c128 main caches; flash_mla.cpp `kV4Meta`):

    n x 576 bytes: 448 fp8 e4m3 (7 blocks of 64) | 64 bf16, rotated
    n x 8 bytes:   7 exponents, value 2^(byte - 127), one for each block | 0

Index key page of n states (paged_mqa_logits.cpp): n x 128 fp8 e4m3 | n x fp32 scale.

A page may be longer than that, and pages lie `stride(0)` bytes apart: vLLM packs several layers into one block.
The C++ sources named in this package are vLLM's, in csrc/cpu/sgl-kernels.
"""

from dataclasses import dataclass

import torch

NOPE, ROPE, HEAD = 448, 64, 512
QUANT_BLOCK = 64
DATA_BYTES, SCALE_BYTES = NOPE + 2 * ROPE, NOPE // QUANT_BLOCK + 1
INDEX_HEAD = 128
FP8_MAX = 448.0
_SMALLEST_NORMAL = 2.0**-6


@dataclass(frozen=True)
class Pages:
    """Views of uint8 pages [B, >= n * (wide + narrow)] of n states: data [B, n, wide], scales [B, n, narrow]."""

    data: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of(cls, pages: torch.Tensor, states: int, wide: int, narrow: int) -> "Pages":
        count, stride, start = pages.shape[0], pages.stride(0), pages.storage_offset()
        return cls(
            pages.as_strided((count, states, wide), (stride, wide, 1), start),
            pages.as_strided((count, states, narrow), (stride, narrow, 1), start + states * wide),
        )

    def locate(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.data.shape[1]
        return slots // states, slots % states


def state_bytes(pages: torch.Tensor, states: int, page: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 584]: data, then scales, of fp8_ds_mla states `place` int64 [n] of pages `page` int64 [n] of uint8
    pages [B, stride], which have `states` each."""
    view = Pages.of(pages, states, DATA_BYTES, SCALE_BYTES)
    return torch.cat([view.data[page, place], view.scales[page, place]], dim=1)


def rotate(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """GPT-J rotation of the last 64 of x fp32 [T, ..., D] by positions [T]; cos_sin fp32 [P, 64], cosines first.

    compressor.cpp `apply_gptj_rope_inplace`; inverse: store_cache.cpp `inverse_gptj_rope_o_proj_cpu`.
    """
    cos, sin = cos_sin[positions].view(len(x), *[1] * (x.dim() - 2), ROPE).chunk(2, dim=-1)
    sin = -sin if inverse else sin
    even, odd = x[..., -ROPE::2], x[..., -ROPE + 1 :: 2]
    out = x.clone()
    out[..., -ROPE::2] = even * cos - odd * sin
    out[..., -ROPE + 1 :: 2] = even * sin + odd * cos
    return out


def power_of_two_above(x: torch.Tensor) -> torch.Tensor:
    """Exponent of the smallest power of two that is not below x fp32 > 0."""
    return torch.ceil(torch.log2(x))


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    """x fp32 -> e4m3, nearest even, clamped."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def write_mla(
    pages: torch.Tensor, states: int, slots: torch.Tensor, nope: torch.Tensor, rope: torch.Tensor, flush: bool
) -> None:
    """Quantize nope bf16 [N, 448] and put it with rope bf16 [N, 64] at slots int64 [N] of uint8 pages [B, stride].

    flush: values under the smallest normal become 0. compressor.cpp `quantize_tile_avx512`, and store_cache.cpp's,
    which flushes.
    """
    blocks = nope.float().view(-1, NOPE // QUANT_BLOCK, QUANT_BLOCK)
    exponent = power_of_two_above((blocks.abs().amax(-1) / FP8_MAX).clamp(min=1e-4))
    scaled = blocks * torch.exp2(-exponent).unsqueeze(-1)
    if flush:
        scaled = scaled.masked_fill(scaled.abs() < _SMALLEST_NORMAL, 0.0)
    data = torch.cat([to_fp8(scaled).view(torch.uint8).flatten(1), rope.contiguous().view(torch.uint8)], dim=1)
    scales = torch.nn.functional.pad((exponent + 127).to(torch.uint8), (0, 1))
    view = Pages.of(pages, states, DATA_BYTES, SCALE_BYTES)
    where = view.locate(slots)
    view.data[where] = data
    view.scales[where] = scales


def read_mla(pages: torch.Tensor, states: int, slots: torch.Tensor) -> torch.Tensor:
    """States at slots int64 [N] of uint8 pages [B, stride] -> fp32 [N, 512] of values that bf16 holds.

    flash_mla.cpp `load_fp8_kvcache_32_from_row`.
    """
    view = Pages.of(pages, states, DATA_BYTES, SCALE_BYTES)
    where = view.locate(slots)
    data, exponent = view.data[where], view.scales[where][:, : NOPE // QUANT_BLOCK]
    scale = torch.exp2(exponent.float() - 127).masked_fill(exponent == 0, 0.0).masked_fill(exponent == 255, torch.nan)
    out = torch.empty(len(slots), HEAD)
    nope = data[:, :NOPE].contiguous().view(torch.float8_e4m3fn).float()
    out[:, :NOPE] = (nope.view(-1, NOPE // QUANT_BLOCK, QUANT_BLOCK) * scale.unsqueeze(-1)).flatten(1)
    out[:, NOPE:] = data[:, NOPE:].contiguous().view(torch.bfloat16)
    return out


def write_index_keys(pages: torch.Tensor, states: int, slots: torch.Tensor, keys: torch.Tensor) -> None:
    """Quantize keys bf16 [N, 128] with a power of two each and put them at slots int64 [N] of uint8 pages [B, stride].

    compressor.cpp `compress_norm_rope_store_indexer_impl`.
    """
    keys = keys.float()
    scale = torch.exp2(power_of_two_above(keys.abs().amax(-1, keepdim=True).clamp(min=1e-4) / FP8_MAX))
    view = Pages.of(pages, states, INDEX_HEAD, 4)
    where = view.locate(slots)
    view.data[where] = to_fp8(keys / scale).view(torch.uint8)
    view.scales[where] = scale.view(torch.uint8)


def read_index_keys(pages: torch.Tensor, states: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index keys at slots int64 [N] of uint8 pages [B, stride] -> unscaled fp32 [N, 128], scales fp32 [N]."""
    view = Pages.of(pages, states, INDEX_HEAD, 4)
    where = view.locate(slots)
    return view.data[where].view(torch.float8_e4m3fn).float(), view.scales[where].view(torch.float32).squeeze(-1)
