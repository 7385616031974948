"""Copying whole pages between pools."""

import torch

from vllm_lsa.ops.native import kernel, require, require_tensor, unsupported


def copy_pages(dst: torch.Tensor, dst_index: torch.Tensor, src: torch.Tensor, src_index: torch.Tensor) -> None:
    """Copies page ``src[src_index[i]]`` to ``dst[dst_index[i]]`` for every i, on a CPU.

    dst, src: [M, 2, Hkv, C, D] and [N, 2, Hkv, C, D] of one dtype, not the same pages. dst_index, src_index: [n] int64;
    dst_index without repeats. Raises ValueError on a bad shape, dtype, stride or index, with nothing copied.
    """
    if dst.device.type != "cpu":
        raise unsupported(dst.device, "cpu")

    require(dst.dim() == 5 and dst_index.dim() == 1, "dst must be 5-d and dst_index 1-d")
    page, n = tuple(dst.shape[1:]), dst_index.shape[0]
    require_tensor("dst", dst, (dst.shape[0], *page), dst.dtype, dst.device)
    require_tensor("src", src, (src.shape[0], *page), dst.dtype, dst.device)
    for name, x in (("dst_index", dst_index), ("src_index", src_index)):
        require_tensor(name, x, (n,), torch.int64, dst.device)
        require(x.is_contiguous(), f"{name} must be contiguous")
    size = dst.element_size()
    page_bytes = size * page[0] * page[1] * page[2] * page[3]
    fault = kernel("lsa_copy_pages")(
        dst.data_ptr(), dst.shape[0], dst.stride(0) * size, dst_index.data_ptr(),
        src.data_ptr(), src.shape[0], src.stride(0) * size, src_index.data_ptr(),
        n, page_bytes, torch.get_num_threads(),
    )  # fmt: skip
    if fault:
        at, which = fault // 4, "dst" if fault % 4 == 1 else "src"
        index, pages = (dst_index, dst) if which == "dst" else (src_index, src)
        raise ValueError(f"{which}_index[{at}] = {index[at]} is outside 0..{pages.shape[0] - 1}")


def copy_pages_naive(dst: torch.Tensor, dst_index: torch.Tensor, src: torch.Tensor, src_index: torch.Tensor) -> None:
    """Twin of `copy_pages`, by indexed assignment. Raises ValueError where dst_index repeats an index."""
    require(dst_index.unique().numel() == dst_index.numel(), "dst_index repeats an index")
    dst[dst_index] = src[src_index]
