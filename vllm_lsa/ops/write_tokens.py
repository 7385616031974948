"""Writing new tokens' keys and values into device slots and host pages."""

import torch

from vllm_lsa.ops.native import DTYPES, kernel, require, require_tensor, unsupported

_FAULTS = {1: "offset must lie in 0..C - 1", 2: "slot must be -1 or below S", 3: "host_page must be -1 or below M"}


def write_tokens(
    k: torch.Tensor,
    v: torch.Tensor,
    offset: torch.Tensor,
    pool: torch.Tensor,
    slot: torch.Tensor,
    host_pages: torch.Tensor,
    host_page: torch.Tensor,
) -> None:
    """Writes each token's K and V at its offset into its slot and into its host page, where it has one, on a CPU.

    k, v: [t, Hkv, D], rows may be strided. offset: [t] int32, position inside the chunk (0..C-1).
    pool: [S, 2, Hkv, C, D]. slot: [t] int32, -1 = none. host_pages: [M, 2, Hkv, C, D]. host_page: [t] int64,
    -1 = none. All of k's dtype (fp32, bf16 or fp16). No two tokens may have the same place.
    Raises ValueError on a bad shape, dtype, stride or index, with nothing written.
    """
    if k.device.type != "cpu":
        raise unsupported(k.device, "cpu")

    require(k.dim() == 3 and pool.dim() == 5 and host_pages.dim() == 5, "k must be 3-d, pool and host_pages 5-d")
    (tokens, kv_heads, dim), chunk = k.shape, pool.shape[3]
    require(k.dtype in DTYPES, f"k: dtype {k.dtype} is none of float32, bfloat16, float16")
    require_tensor("k", k, (tokens, kv_heads, dim), k.dtype, k.device)
    require_tensor("v", v, (tokens, kv_heads, dim), k.dtype, k.device)
    for name, x in (("pool", pool), ("host_pages", host_pages)):
        require_tensor(name, x, (x.shape[0], 2, kv_heads, chunk, dim), k.dtype, k.device)
    for name, x, dtype in (("offset", offset, torch.int32), ("slot", slot, torch.int32),
                           ("host_page", host_page, torch.int64)):  # fmt: skip
        require_tensor(name, x, (tokens,), dtype, k.device)
        require(x.is_contiguous(), f"{name} must be contiguous")
    size = k.element_size()
    fault = kernel("lsa_write_tokens")(
        k.data_ptr(), v.data_ptr(), k.stride(0) * size, v.stride(0) * size, offset.data_ptr(),
        pool.data_ptr(), pool.shape[0], pool.stride(0) * size, slot.data_ptr(),
        host_pages.data_ptr(), host_pages.shape[0], host_pages.stride(0) * size, host_page.data_ptr(),
        tokens, kv_heads, chunk, dim * size, torch.get_num_threads(),
    )  # fmt: skip
    if fault:
        at = fault // 4
        raise ValueError(
            f"token {at}: {_FAULTS[fault % 4]} (offset {offset[at]}, slot {slot[at]}, host_page {host_page[at]})"
        )


def write_tokens_naive(
    k: torch.Tensor,
    v: torch.Tensor,
    offset: torch.Tensor,
    pool: torch.Tensor,
    slot: torch.Tensor,
    host_pages: torch.Tensor,
    host_page: torch.Tensor,
) -> None:
    """Twin of `write_tokens`, by indexed assignment."""
    for pages, index in ((pool, slot), (host_pages, host_page)):
        here = (index >= 0).nonzero().flatten()
        page, at = index[here].long(), offset[here].long()
        for which, x in enumerate((k, v)):
            pages[page, which, :, at] = x[here]
