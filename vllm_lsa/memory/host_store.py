"""The whole KV cache in host memory: one row per vLLM block id, all layers of a block contiguous."""

import math
import mmap
import os
import weakref

import numpy as np
import torch

from vllm_lsa.errors import LsaError
from vllm_lsa.memory.geometry import PageGeometry


class HostStore:
    """The pages of every block, ``pages`` of shape ``[num_blocks * lanes * chunks_per_block, *page_shape]``.

    The page of (block b, lane l, chunk c of the block) is row ``(b * lanes + l) * chunks_per_block + c``. With
    ``pin``, the memory is page-locked so that a CUDA device can copy from it asynchronously.
    """

    def __init__(self, geometry: PageGeometry, num_blocks: int, pin: bool = False) -> None:
        self.geometry = geometry
        self.num_blocks = num_blocks
        self.num_pages = num_blocks * geometry.num_lanes * geometry.chunks_per_block
        shape = (self.num_pages, *geometry.page_shape)
        self.pages = _huge(shape, geometry.dtype) if pin else torch.empty(shape, dtype=geometry.dtype)
        if pin:
            # Registered in place: torch's pinned allocator rounds up to a power of two. Memory that is freed while it
            # is registered cannot be registered by its next owner.
            runtime, address = torch.cuda.cudart(), self.pages.data_ptr()
            status = runtime.cudaHostRegister(address, self.pages.nbytes, 0)
            if int(status) != 0:
                raise LsaError(
                    f"lsa.host_memory_gib={self.pages.nbytes / 2**30:.2f}: the driver cannot pin that much host memory "
                    f"(CUDA error {int(status)}): lower it, or raise the memlock limit"
                )
            weakref.finalize(self, runtime.cudaHostUnregister, address)
        self._blocks = self.pages.view(num_blocks, -1)
        # Page of lane 0 plus this is the page of lane l.
        self.lane_offset = np.arange(geometry.num_lanes, dtype=np.int64) * geometry.chunks_per_block

    def page_ids(self, blocks: np.ndarray, chunks: np.ndarray, lanes: int | np.ndarray = 0) -> np.ndarray:
        """Pages of a request's chunks, each in the lane given for it (or all in one).

        blocks: int [num_blocks of the request], its block ids in order. chunks: int [n], chunk numbers in the request.
        lanes: a lane, or int [n]. Returns int64 [n]; for another lane add the difference in ``lane_offset``.
        """
        per_block = self.geometry.chunks_per_block
        block = blocks[chunks // per_block].astype(np.int64)
        return block * (self.geometry.num_lanes * per_block) + chunks % per_block + self.lane_offset[lanes]

    def block_pages(self, blocks: np.ndarray) -> np.ndarray:
        """All pages of the blocks, int64 [len(blocks) * lanes * chunks_per_block]."""
        per_row = self.geometry.num_lanes * self.geometry.chunks_per_block
        return (blocks.astype(np.int64)[:, None] * per_row + np.arange(per_row)).reshape(-1)

    def copy_block(self, source: int, target: int) -> None:
        """Repeat vLLM's copy-on-write of a block."""
        self._blocks[target].copy_(self._blocks[source])

    def poison(self, blocks: np.ndarray) -> None:
        """Fill blocks with poison (check mode): what is read there was never written for its new owner."""
        self._blocks[torch.from_numpy(blocks.astype(np.int64))] = self.geometry.poison


def _huge(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A zeroed tensor in huge pages where the system has them: page-locking small ones takes minutes for 100 GiB."""
    # Private: shared anonymous memory is a file in memory, which seldom gets huge pages.
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        tensor.zero_()  # every thread touches its part first: that is when memory is given
    finally:
        torch.set_num_threads(threads)
    return tensor.view(dtype).view(shape)
