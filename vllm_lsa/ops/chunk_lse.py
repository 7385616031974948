"""The 4-bit key index: its codec, and the scores of chunks against a query."""

import torch

from vllm_lsa.ops.native import gather_cells, kernel, require, require_blocks, unsupported

_HALF_MAX = torch.finfo(torch.float16).max


def cell_bytes(chunk: int, dim: int) -> int:
    """Bytes of one index cell, that is of one chunk and kv head: ``chunk * dim / 2 + 4 * chunk``."""
    return chunk * dim // 2 + 4 * chunk


def encode_keys4(k: torch.Tensor) -> torch.Tensor:
    """Asymmetric 4-bit codes of keys, one range per token and kv head.

    k: [n, Hkv, C, D], any float dtype, D even, finite; clamped to the range of fp16. Returns cells [n, Hkv, b] uint8
    with b = cell_bytes(C, D): C·D/2 bytes of codes (token-major; the low nibble of byte j is dim 2j, the high one
    2j + 1), C fp16 minima, C fp16 steps. A value is minimum + code·step.

    The minimum is rounded down to fp16 and the step, (max - minimum) / 15, up, so that 15 steps reach the maximum.
    Hence |decoded - k| ≤ step / 2, and step < 1.002 (max - min + ulp) / 15 + 6e-8 with ulp fp16's spacing at the
    minimum. A row of one value that fp16 can hold has step 0 and is exact.
    """
    require(k.dim() == 4 and k.shape[3] % 2 == 0, f"k must be [n, Hkv, C, even D], got {list(k.shape)}")
    require(k.is_floating_point(), f"k must be floating point, got {k.dtype}")
    k = k.float().clamp(-_HALF_MAX, _HALF_MAX)
    low = _half(k.amin(-1), up=False)
    step = _half((k.amax(-1) - low.float()) / 15, up=True)
    codes = (k - low.float().unsqueeze(-1)) / step.float().unsqueeze(-1)
    codes = codes.nan_to_num(0).round().clamp(0, 15).to(torch.uint8)
    packed = (codes[..., 0::2] | (codes[..., 1::2] << 4)).flatten(2)
    return torch.cat([packed, low.view(torch.uint8), step.view(torch.uint8)], dim=-1)


def _half(x: torch.Tensor, up: bool) -> torch.Tensor:
    """x in fp16, rounded up or down."""
    half = x.half()
    if up:
        return torch.where(half.float() < x, torch.nextafter(half, torch.full_like(half, torch.inf)), half)
    return torch.where(half.float() > x, torch.nextafter(half, torch.full_like(half, -torch.inf)), half)


def decode_keys4(cells: torch.Tensor, chunk: int, dim: int) -> torch.Tensor:
    """Keys [n, Hkv, C, D] fp32 of cells [n, Hkv, cell_bytes(C, D)] uint8."""
    _require_cells(cells, chunk, dim)
    codes, low, step = cells.split([chunk * dim // 2, 2 * chunk, 2 * chunk], dim=-1)
    codes = torch.stack([codes & 15, codes >> 4], dim=-1).reshape(*cells.shape[:2], chunk, dim)
    low, step = (x.contiguous().view(torch.float16).float().unsqueeze(-1) for x in (low, step))
    return low + codes * step


def _require_cells(cells: torch.Tensor, chunk: int, dim: int) -> None:
    require(
        cells.dim() == 3 and cells.shape[2] == cell_bytes(chunk, dim) and cells.dtype == torch.uint8,
        f"cells must be uint8 [N, Hkv, {cell_bytes(chunk, dim)}], got {cells.dtype} {list(cells.shape)}",
    )


def keys4_chunk_logits(q: torch.Tensor, cells: torch.Tensor, chunk: int, scale: float) -> torch.Tensor:
    """Log of the attention mass of each chunk: logsumexp over its tokens of scale·q·k̂, k̂ the decoded key.

    q: [Hq, D], any float dtype. cells: [N, Hkv, cell_bytes(C, D)] uint8, chunks and heads may be strided. chunk: C, a
    multiple of 8, as is D. Returns [Hq, N] fp32. The kernel decodes no key: q·k̂ = minimum Σq + step (q·codes).
    Raises ValueError on a bad shape, dtype or stride.
    """
    require(cells.dim() == 3, f"cells must be [N, Hkv, b], got {list(cells.shape)}")
    return _logits(q, cells.unsqueeze(2), None, len(cells), chunk, scale)


def keys4_chunk_logits_naive(q: torch.Tensor, cells: torch.Tensor, chunk: int, scale: float) -> torch.Tensor:
    """Twin of `keys4_chunk_logits`: decode, then logsumexp; float64 queries give float64 results."""
    q_heads, dim = q.shape
    q = q.to(torch.promote_types(q.dtype, torch.float32))
    keys = decode_keys4(cells, chunk, dim).to(q.dtype)
    logits = scale * torch.einsum("hgd,nhtd->hgnt", q.view(cells.shape[1], -1, dim), keys)
    return logits.logsumexp(-1).flatten(0, 1)


def keys4_chunk_logits_paged(
    q: torch.Tensor, cells: torch.Tensor, blocks: torch.Tensor, num_chunks: int, chunk: int, scale: float
) -> torch.Tensor:
    """`keys4_chunk_logits` of a request's first `num_chunks` chunks, found through its block table without a copy.

    cells: uint8 [num_blocks, Hkv, per_block, cell_bytes(C, D)], all but the last dimension may be strided. blocks:
    int32 or int64 [nb]; chunk i is blocks[i // per_block], i % per_block. Returns fp32 [Hq, num_chunks]. Raises
    ValueError also on too few blocks or one that does not exist.
    """
    return _logits(q, cells, require_blocks(blocks, num_chunks, cells), num_chunks, chunk, scale)


def keys4_chunk_logits_paged_naive(
    q: torch.Tensor, cells: torch.Tensor, blocks: torch.Tensor, num_chunks: int, chunk: int, scale: float
) -> torch.Tensor:
    """Twin of `keys4_chunk_logits_paged`: gather, then `keys4_chunk_logits_naive`."""
    return keys4_chunk_logits_naive(q, gather_cells(cells, blocks, num_chunks), chunk, scale)


def _logits(
    q: torch.Tensor, cells: torch.Tensor, blocks: torch.Tensor | None, n: int, chunk: int, scale: float
) -> torch.Tensor:
    """Both forms: the cells [num_blocks, Hkv, per_block, b] of a block table, or of all blocks in order."""
    if q.device.type != "cpu":
        raise unsupported(q.device, "cpu")
    require(q.dim() == 2, f"q must be [Hq, D], got {list(q.shape)}")
    (q_heads, dim) = q.shape
    require(dim % 8 == 0 and chunk % 8 == 0 and chunk > 0, f"D = {dim} and C = {chunk} must be multiples of 8")
    num_blocks, kv_heads, per_block, size = cells.shape
    require(
        size == cell_bytes(chunk, dim) and cells.dtype == torch.uint8 and cells.device == q.device,
        f"cells must be uint8 [.., {cell_bytes(chunk, dim)}] on {q.device}, "
        f"got {cells.dtype} {list(cells.shape)} on {cells.device}",
    )
    require(cells.stride(3) == 1, f"the bytes of a cell must be contiguous, got strides {cells.stride()}")
    require(kv_heads > 0 and q_heads % kv_heads == 0, f"{kv_heads} kv heads do not divide {q_heads} query heads")
    q = q.float().contiguous()
    out = torch.empty(q_heads, n, dtype=torch.float32)
    bad = kernel("lsa_keys4_chunk_logits")(
        q.data_ptr(), cells.data_ptr(), *cells.stride()[:3], None if blocks is None else blocks.data_ptr(),
        num_blocks, per_block, out.data_ptr(), n, kv_heads, q_heads // kv_heads, chunk, dim, scale,
        torch.get_num_threads(),
    )  # fmt: skip
    require(bad < 0, f"blocks[{bad}] is not one of {num_blocks} blocks")
    return out
