"""Decode attention over resident chunks in a slot pool."""

import torch

from vllm_lsa.ops.native import DTYPES, kernel, require, require_tensor, unsupported

_FAULTS = {
    1: "counts must lie in 0..{width}",
    2: "first_len must lie in 1..{chunk} where counts > 0",
    3: "table entries below counts must lie in 0..{slots} - 1",
}


def paged_decode_attention(
    q: torch.Tensor,
    pool: torch.Tensor,
    table: torch.Tensor,
    counts: torch.Tensor,
    first_len: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query token per row over the chunks that the row's table names, on a CPU.

    q: [n, Hq, D], rows may be strided; fp32, bf16 or fp16. pool: [S, 2, Hkv, C, D], same dtype, 0 = K, 1 = V; D a
    multiple of 16. table: [n, W] int32 slots, rows may be strided. counts: [n] int32, entries of each row in use.
    first_len: [n] int32, valid tokens (1..C) of entry 0, the tail chunk; the other entries are full. scale: factor on
    q·k. out: [n, Hq, D] like q, allocated if None.

    Returns out and lse [n, Hq] fp32, the natural log of the sum of exp(scale q·k). A row with count 0 gives out 0 and
    lse -inf. Entries from counts on and tokens from first_len on are never read. Sums are fp32, by online softmax
    (Milakov & Gimelshein 2018). Raises ValueError on a bad shape, dtype, stride or index.
    """
    if q.device.type != "cpu":
        raise unsupported(q.device, "cpu")

    require(q.dim() == 3 and pool.dim() == 5 and table.dim() == 2, "q must be 3-d, pool 5-d and table 2-d")
    (n, q_heads, dim), (slots, _, kv_heads, chunk, _) = q.shape, pool.shape
    width = table.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype) if out is None else out
    require(q.dtype in DTYPES, f"q: dtype {q.dtype} is none of float32, bfloat16, float16")
    require(dim % 16 == 0, f"head dimension {dim} is not a multiple of 16")
    require(kv_heads > 0 and q_heads % kv_heads == 0, f"{kv_heads} kv heads do not divide {q_heads} query heads")
    require_tensor("q", q, (n, q_heads, dim), q.dtype, q.device)
    require_tensor("out", out, (n, q_heads, dim), q.dtype, q.device)
    require_tensor("pool", pool, (slots, 2, kv_heads, chunk, dim), q.dtype, q.device)
    require_tensor("table", table, (n, width), torch.int32, q.device)
    for name, x in (("counts", counts), ("first_len", first_len)):
        require_tensor(name, x, (n,), torch.int32, q.device)
        require(x.is_contiguous(), f"{name} must be contiguous")
    lse = torch.empty(n, q_heads, dtype=torch.float32)
    fault = kernel("lsa_paged_decode")(
        DTYPES[q.dtype], q.data_ptr(), pool.data_ptr(), table.data_ptr(), counts.data_ptr(), first_len.data_ptr(),
        out.data_ptr(), lse.data_ptr(), q.stride(0), pool.stride(0), table.stride(0), out.stride(0),
        n, slots, width, kv_heads, q_heads // kv_heads, chunk, dim, scale, torch.get_num_threads(),
    )  # fmt: skip
    if fault:
        rule = _FAULTS[fault % 4].format(width=width, chunk=chunk, slots=slots)
        raise ValueError(f"row {fault // 4}: {rule} (counts {counts[fault // 4]}, first_len {first_len[fault // 4]})")
    return out, lse


def paged_decode_attention_naive(
    q: torch.Tensor,
    pool: torch.Tensor,
    table: torch.Tensor,
    counts: torch.Tensor,
    first_len: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of `paged_decode_attention`, row by row; float64 tensors give float64 results."""
    n, q_heads, dim = q.shape
    kv_heads, chunk = pool.shape[2:4]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(n, q_heads, dim)
    lse = torch.full((n, q_heads), -torch.inf, dtype=wide, device=q.device)
    for row, (count, first) in enumerate(zip(counts.tolist(), first_len.tolist(), strict=True)):
        if not count:
            continue
        kv = pool[table[row, :count].long()].permute(1, 2, 0, 3, 4).reshape(2, kv_heads, count * chunk, dim)
        keys, values = torch.cat([kv[:, :, :first], kv[:, :, chunk:]], dim=2).to(wide)
        logits = scale * torch.einsum("hgd,htd->hgt", q[row].to(wide).view(kv_heads, -1, dim), keys)
        weights = logits.softmax(-1)
        out[row] = torch.einsum("hgt,htd->hgd", weights, values).reshape(q_heads, dim).to(q.dtype)
        lse[row] = logits.logsumexp(-1).flatten()
    return out, lse
