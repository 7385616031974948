"""Logits of DeepSeek-V4's paged index keys, as its lightning indexer and the memory indexer score them."""

import sys
from importlib import import_module

import torch

from vllm_lsa.ops.e4m3 import has_e4m3
from vllm_lsa.ops.native import DTYPES, require, require_tensor, unsupported

_KERNELS = "vllm_lsa.kernels.index_logits"
KEY = 128
PER_PAGE = 64
PAGE_BYTES = PER_PAGE * (KEY + 4)
"""Bytes of a page: 64 × 128 of e4m3, then 64 scales in fp32."""
HEAD_GROUP = 64
"""Heads that are scored at a time; the sums of the groups add up. DeepGEMM's kernel takes no more."""
# Values of q·k that the twin holds at a time, so that memory does not grow with the past.
_AT_ONCE = 1 << 24


def index_logits(
    q: torch.Tensor,
    weights: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    fp8: bool | None = None,
) -> None:
    """out[b, n] = scale_n ``Σ_h relu(q_h · k_n) w_h`` for n below the row's length, -inf from there on.

    q: [B, H, 128] in e4m3, fp32, bf16 or fp16, rows and heads may be strided. weights: fp32 [B, H], with q's scales in
    them. pages: uint8 [num_blocks, 8448], a multiple of 4 bytes apart, see `scorer.index_pages`. block_table: int32 or
    int64 [B, W], block of each 64 entries; what lies behind the length is not read, nor are keys. lengths: int32 or
    int64 [B]. out: fp32 [B, N], N up to 64 W; all of it is written. Rows of every operand may be strided.

    fp8: multiply in e4m3, which only devices with `has_e4m3` do and only for such q. Tensor cores of Hopper sum these
    products with fewer bits than fp32 has. False: in bf16, where products are exact too. None: in fp8 if possible.

    Nothing is allocated or read back: fit for a CUDA graph. On CPU tensors this is `index_logits_naive`, unless the
    kernel was loaded in Triton's interpreter. Raises ValueError on a bad shape, dtype, stride or address; what only the
    device knows is not checked.
    """
    kernels = sys.modules.get(_KERNELS)
    if q.device.type == "cpu":
        if kernels is None or not kernels.INTERPRETED:
            return index_logits_naive(q, weights, pages, block_table, lengths, out)
    elif q.device.type != "cuda":
        raise unsupported(q.device)
    _check(q, weights, pages, block_table, lengths, out)
    native, e4m3 = has_e4m3(q.device), q.dtype == torch.float8_e4m3fn
    fp8 = native and e4m3 if fp8 is None else fp8
    require(not fp8 or (native and e4m3), f"fp8 products need q in e4m3 and a device that has them, got {q.dtype}")
    if out.numel():
        kernels = kernels or import_module(_KERNELS)
        kernels.index_logits(q, weights, pages, block_table, lengths, out, PER_PAGE, native, fp8)


def _check(
    q: torch.Tensor,
    weights: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
) -> None:
    require(
        q.dim() == 3 and q.shape[2] == KEY and (q.dtype in DTYPES or q.dtype == torch.float8_e4m3fn),
        f"q must be e4m3, fp32, bf16 or fp16 [B, H, {KEY}], got {q.dtype} {list(q.shape)}",
    )
    require(q.stride(2) == 1, f"q: the last dimension must be contiguous, got strides {q.stride()}")
    rows, heads = q.shape[:2]
    require(heads > 0, "q has no heads")
    require(block_table.dim() == 2 and out.dim() == 2, "block_table and out must be [B, W] and [B, N]")
    integers, device = (torch.int32, torch.int64), q.device
    require(
        block_table.dtype in integers and lengths.dtype in integers,
        f"block_table and lengths must be int32 or int64, got {block_table.dtype} and {lengths.dtype}",
    )
    require_tensor("weights", weights, (rows, heads), torch.float32, device)
    require_tensor("pages", pages, (pages.shape[0], PAGE_BYTES), torch.uint8, device)
    require_tensor("block_table", block_table, (rows, block_table.shape[1]), block_table.dtype, device)
    require_tensor("lengths", lengths, (rows,), lengths.dtype, device)
    require_tensor("out", out, (rows, out.shape[1]), torch.float32, device)
    require(lengths.is_contiguous(), "lengths must be contiguous")
    require(
        out.shape[1] <= block_table.shape[1] * PER_PAGE,
        f"{out.shape[1]} entries are not in {block_table.shape[1]} pages of {PER_PAGE}",
    )
    require(
        pages.data_ptr() % 4 == 0 and pages.stride(0) % 4 == 0,
        f"pages must lie at multiples of 4 bytes, got strides {pages.stride()}",
    )


def index_logits_naive(
    q: torch.Tensor,
    weights: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Twin of `index_logits`, in fp32; some pages at a time."""
    (rows, entries), lengths = out.shape, lengths.long().unsqueeze(1)
    groups = list(zip(q.float().split(HEAD_GROUP, 1), weights.float().split(HEAD_GROUP, 1), strict=True))
    out.fill_(-torch.inf)
    step = max(1, _AT_ONCE // max(1, rows * min(HEAD_GROUP, q.shape[1]) * PER_PAGE))
    for begin in range(0, -(-entries // PER_PAGE), step):
        first = begin * PER_PAGE
        blocks = block_table[:, begin : min(begin + step, -(-entries // PER_PAGE))].long()
        page_first = first + PER_PAGE * torch.arange(blocks.shape[1], device=q.device)
        blocks = blocks.masked_fill(page_first >= lengths, 0)  # no block of this request
        packed = pages[blocks.flatten()]
        codes = packed[:, : PER_PAGE * KEY].reshape(-1, KEY).view(torch.float8_e4m3fn).float().unflatten(0, (rows, -1))
        scales = packed[:, PER_PAGE * KEY :].contiguous().view(torch.float32).view(rows, -1)
        total = torch.zeros_like(scales)
        for part, w in groups:
            total += (w.unsqueeze(1) @ (part @ codes.transpose(1, 2)).relu()).squeeze(1)
        total *= scales  # positive, so that it may come after relu, as in DeepGEMM's kernel
        here = torch.arange(first, first + total.shape[1], device=q.device)
        total = total.masked_fill(here >= lengths, -torch.inf)
        out[:, first : first + total.shape[1]] = total[:, : entries - first]
