"""Loads the CPU kernels and holds their C signatures."""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch  # loaded first, so that the kernels use the OpenMP runtime, and the bound threads, of torch

from vllm_lsa.errors import LsaError

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SIGNATURES: dict[str, tuple[type | None, Sequence[type]]] = {
    "lsa_paged_decode": (
        c_int64,
        [c_int, *[c_void_p] * 7, *[c_int64] * 4, *[c_int] * 7, c_float, c_int],
    ),
    "lsa_write_tokens": (
        c_int64,
        [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p]
        + [c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int, c_int, c_int64, c_int],
    ),
    "lsa_copy_pages": (
        c_int64,
        [c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int],
    ),
    "lsa_keys4_chunk_logits": (
        c_int64,
        [c_void_p, c_void_p, *[c_int64] * 3, c_void_p, c_int64, c_int, c_void_p, c_int64, *[c_int] * 4, c_float, c_int],
    ),
    "lsa_encode_product": (None, [c_void_p, c_void_p, c_void_p, c_int64, *[c_int] * 5]),
    "lsa_product_chunk_logits": (
        c_int64,
        [c_void_p, c_void_p, c_void_p, *[c_int64] * 3, c_void_p, c_int64, c_int, c_void_p, c_void_p, c_int64]
        + [c_int] * 6,
    ),
}


@cache
def kernel(name: str) -> Callable[..., int]:
    """The C function `name` with its argument types set. Raises LsaError if the library was not built or is stale."""
    path = Path(__file__).with_name("_cpu.so")
    remedy = "build it with 'python -m vllm_lsa.ops.build'"
    if not path.exists():
        raise LsaError(f"the CPU kernels {path} are missing: {remedy}")
    try:
        function = getattr(ctypes.CDLL(str(path)), name)
    except (OSError, AttributeError) as error:
        raise LsaError(f"the CPU kernels {path} do not load ({error}): {remedy}") from error
    function.restype, function.argtypes = _SIGNATURES[name]
    return function


def require(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_tensor(
    name: str, x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Raises ValueError unless `x` has this shape, dtype and device and rows (dims 1 and up) that are contiguous."""
    if x.shape != shape or x.dtype != dtype or x.device != device:
        raise ValueError(
            f"{name}: expected {dtype} {list(shape)} on {device}, got {x.dtype} {list(x.shape)} on {x.device}"
        )
    if not x.is_contiguous() and x.numel():
        inner = 1
        for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
            if size > 1 and stride != inner:
                raise ValueError(f"{name}: all but the first dimension must be contiguous, got strides {x.stride()}")
            inner *= size


def require_blocks(blocks: torch.Tensor, num_chunks: int, cells: torch.Tensor) -> torch.Tensor:
    """A request's block table, int32 or int64 [nb], as contiguous int64.

    Raises ValueError unless it is one on the device of cells [num_blocks, Hkv, per_block, b] and has num_chunks chunks.
    """
    require(cells.dim() == 4, f"cells must be [num_blocks, Hkv, per_block, b], got {list(cells.shape)}")
    require(
        blocks.dim() == 1 and blocks.dtype in (torch.int32, torch.int64) and blocks.device == cells.device,
        f"blocks must be int32 or int64 [nb] on {cells.device}, "
        f"got {blocks.dtype} {list(blocks.shape)} on {blocks.device}",
    )
    per_block = cells.shape[2]
    require(
        0 <= num_chunks <= len(blocks) * per_block,
        f"{num_chunks} chunks are not in {len(blocks)} blocks of {per_block}",
    )
    return blocks.to(torch.int64).contiguous()


def gather_cells(cells: torch.Tensor, blocks: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """Cells [num_chunks, Hkv, b] of a request's first chunks.

    cells: [num_blocks, Hkv, per_block, b]. blocks: int32 or int64 [nb]; chunk i is blocks[i // per_block],
    i % per_block.
    """
    count = -(-num_chunks // cells.shape[2])
    return cells[blocks[:count].long()].transpose(1, 2).flatten(0, 1)[:num_chunks]


def power_of_two(x: int) -> int:
    """The least power of two that is not below x: the size of a kernel's block for x elements."""
    return 1 << max(0, x - 1).bit_length()


def unsupported(device: torch.device, use: str = "cpu or cuda") -> LsaError:
    """The error for a device that has no kernel. use: those that have one."""
    return LsaError(f"device {device.type!r} has no LSA kernel for this: use {use}")
