"""Loads the CUDA kernels, where they were built, and holds their C signatures."""

import ctypes
import logging
from collections.abc import Sequence
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Literal

import torch  # noqa: F401 - loaded first: the kernels run in its context

from vllm_lsa.errors import LsaError
from vllm_lsa.ops.native import require

logger = logging.getLogger("vllm_lsa")
Form = Literal["cuda", "triton"]
"""Kernels that there are in CUDA C++ and, for where that was not built or does not run, in Triton."""
_SETS = [*[c_void_p] * 3, c_int64, *[c_void_p] * 8, *[c_int] * 6]
_SIGNATURES: dict[str, tuple[type, Sequence[type]]] = {
    "lsa_product_score_rows": (
        c_int,
        [c_void_p, c_int64, c_int64, c_int, *[c_void_p] * 3, *[c_int64] * 3, c_int, *[c_void_p] * 4, c_int64]
        + [c_void_p, c_int64, c_void_p, c_void_p, *[c_int] * 7, c_float, c_void_p],
    ),
    "lsa_demand": (
        c_int,
        [*_SETS, c_void_p, c_int64, *[c_void_p] * 5, *[c_int64] * 2, *[c_int] * 4, *[c_float] * 2, c_void_p],
    ),
    "lsa_settle": (c_int, [*_SETS, c_void_p]),
    "lsa_cuda_error": (c_char_p, [c_int]),
}


def load(path: Path) -> ctypes.CDLL:
    """The library at `path` with argument types set. Raises OSError or AttributeError if it is missing or stale."""
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@cache
def cuda_library() -> ctypes.CDLL | None:
    """The CUDA kernels, or None where they were not built; says so once."""
    path = Path(__file__).with_name("_cuda.so")
    remedy = "put nvcc on the PATH and run 'python -m vllm_lsa.ops.build'"
    try:
        if path.exists():
            return load(path)
        reason = f"{path} is missing (nvcc was not found, or failed, when vllm-lsa was built)"
    except (OSError, AttributeError) as error:
        reason = f"{path} does not load ({error})"
    logger.warning(
        "LSA's slower Triton kernels serve in place of the CUDA ones, since %s; for these %s", reason, remedy
    )
    return None


def built_library() -> ctypes.CDLL:
    """The CUDA kernels. Raises ValueError where they were not built."""
    library = cuda_library()
    require(library is not None, "form='cuda' needs the CUDA kernels: build them with 'python -m vllm_lsa.ops.build'")
    assert library is not None
    return library


def launch(library: ctypes.CDLL, name: str, *arguments: object) -> None:
    """Calls a kernel's C function on torch's current stream. Raises LsaError if CUDA refuses the launch."""
    error = getattr(library, name)(*arguments, torch.cuda.current_stream().cuda_stream)
    if error:
        raise LsaError(f"launching {name} failed: {library.lsa_cuda_error(error).decode()} (CUDA error {error})")
