"""The CUDA C++ kernels on a CPU, as device.h runs them."""

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from vllm_lsa.ops import build, cuda_native

FOLDER = Path(__file__).parent
FLAGS = ["-std=c++17", "-O1", "-w", "-ffp-contract=off", "-x", "c++", "-include", str(FOLDER / "device.h")]
ORDERS = [0, 1, 2]
"""In which a block's warps and their lanes run: rising, falling, at random. Results that differ lack a barrier."""


@cache
def library() -> ctypes.CDLL:
    """All kernels. Their arithmetic and indices, what they read and write, and that their threads meet."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernels.so"
        sources = [str(path) for path in sorted(build.CUDA_SOURCES.glob("*.cu"))]
        command = [*build._compiler(), *FLAGS, "-fPIC", "-shared", *sources, "-o", str(target)]
        subprocess.run(command, check=True, timeout=300)
        return cuda_native.load(target)


def set_device(memory: torch.Tensor | None, multiprocessors: int, order: int = 0, wide: bool = True) -> None:
    """memory: where kernels may copy from asynchronously is the tensor's whole storage. wide: with clusters of 16."""
    storage = None if memory is None else memory.untyped_storage()
    begin, end = (storage.data_ptr(), storage.data_ptr() + storage.nbytes()) if storage else (None, None)
    library().cpu_set(ctypes.c_void_p(begin), ctypes.c_void_p(end), multiprocessors)
    library().cpu_order(order)
    library().cpu_wide(wide)
