"""The product-quantised key index: its codec, and the scores of chunks against a query.

A key k of one KV head is mapped to ``y = (k - mean) @ to_code`` and cut into M subspaces of D / M dims; a token's code
in subspace m is the nearest of 256 centroids there. A query's dot product with the decoded key is then, up to a
constant, a sum of M look-ups: ``q·k ≈ q·mean + Σ_m T[m, code_m]``, ``T[m, c] = (to_query @ q)_m · centroids[m, c]``,
where to_query is the inverse of to_code.
"""

import math

import torch

from vllm_lsa.ops.native import gather_cells, kernel, require, require_blocks, unsupported

CENTROIDS = 256
_LANES = 4  # query heads that the kernel scores at once
_LOG2E = math.log2(math.e)
_TILE = 1 << 24  # differences to centroids that `encode_product` holds at a time without a kernel


def _require_tables(centroids: torch.Tensor, kv_heads: int, dim: int, others: dict[str, torch.Tensor]) -> int:
    """M. Raises ValueError unless all are fp32 on the device of centroids [Hkv, M, 256, D / M], contiguous.

    Of the others the mean must be [Hkv, D], the matrices [Hkv, D, D].
    """
    require(
        centroids.dim() == 4
        and centroids.shape[0] == kv_heads
        and centroids.shape[2] == CENTROIDS
        and centroids.shape[1] * centroids.shape[3] == dim,
        f"centroids must be [{kv_heads}, M, {CENTROIDS}, {dim} / M], got {list(centroids.shape)}",
    )
    require(centroids.dtype == torch.float32, f"centroids must be float32, got {centroids.dtype}")
    require(centroids.is_contiguous(), f"centroids must be contiguous, got strides {centroids.stride()}")
    for name, x in others.items():
        shape = [kv_heads, dim] if name == "mean" else [kv_heads, dim, dim]
        require(
            list(x.shape) == shape and x.dtype == torch.float32 and x.device == centroids.device,
            f"{name} must be float32 {shape} on {centroids.device}, got {x.dtype} {list(x.shape)} on {x.device}",
        )
    return centroids.shape[1]


def encode_product(
    keys: torch.Tensor, to_code: torch.Tensor, mean: torch.Tensor, centroids: torch.Tensor
) -> torch.Tensor:
    """Cells of full chunks of keys, one byte per token and subspace.

    keys: [n, Hkv, C, D], any float dtype and strides, finite; C a multiple of 8. to_code: fp32 [Hkv, D, D]. mean: fp32
    [Hkv, D]. centroids: fp32 [Hkv, M, 256, D / M]. Returns uint8 [n, Hkv, M·C]; byte m·C + t is token t's code in
    subspace m. Raises ValueError on a bad shape, dtype or device.
    """
    require(keys.dim() == 4 and keys.is_floating_point(), f"keys must be float [n, Hkv, C, D], got {list(keys.shape)}")
    n, kv_heads, chunk, dim = keys.shape
    subspaces = _require_tables(centroids, kv_heads, dim, {"to_code": to_code, "mean": mean})
    require(centroids.device == keys.device, f"keys are on {keys.device}, the tables on {centroids.device}")
    require(chunk % 8 == 0 and chunk > 0, f"C = {chunk} must be a multiple of 8")
    if keys.device.type == "cuda":
        tile = max(1, _TILE // (kv_heads * chunk * dim * CENTROIDS))
        cells = torch.empty(n, kv_heads, subspaces * chunk, dtype=torch.uint8, device=keys.device)
        for begin in range(0, n, tile):
            here = slice(begin, begin + tile)
            cells[here] = encode_product_naive(keys[here], to_code, mean, centroids)
        return cells
    if keys.device.type != "cpu":
        raise unsupported(keys.device)
    cells = torch.empty(n, kv_heads, subspaces * chunk, dtype=torch.uint8)
    rows = keys.transpose(0, 1).reshape(kv_heads, n * chunk, dim).float()
    y = torch.bmm(rows - mean.unsqueeze(1), to_code)
    kernel("lsa_encode_product")(
        y.data_ptr(), centroids.data_ptr(), cells.data_ptr(), n, kv_heads, chunk, subspaces, dim // subspaces,
        torch.get_num_threads(),
    )  # fmt: skip
    return cells


def encode_product_naive(
    keys: torch.Tensor, to_code: torch.Tensor, mean: torch.Tensor, centroids: torch.Tensor
) -> torch.Tensor:
    """Twin of `encode_product`: every distance; float64 tables give float64 distances."""
    centred = keys.to(mean.dtype) - mean.unsqueeze(1)
    y = (centred @ to_code).unflatten(-1, (centroids.shape[1], -1)).transpose(2, 3)  # [n, Hkv, M, C, D / M]
    distance = (y.unsqueeze(-2) - centroids.unsqueeze(2)).square().sum(-1)
    return distance.argmin(-1).to(torch.uint8).flatten(2)


def product_chunk_logits(
    q: torch.Tensor, cells: torch.Tensor, to_query: torch.Tensor, centroids: torch.Tensor, chunk: int, scale: float
) -> torch.Tensor:
    """Log of the attention mass of each chunk: logsumexp over its tokens of scale·Σ_m T[m, code_m].

    q: [Hq, D], any float dtype. cells: uint8 [N, Hkv, M·C], chunks and heads may be strided. to_query: fp32
    [Hkv, D, D]. centroids: fp32 [Hkv, M, 256, D / M]. chunk: C, a multiple of 8. Returns fp32 [Hq, N].
    Raises ValueError on a bad shape, dtype or stride.
    """
    require(cells.dim() == 3, f"cells must be [N, Hkv, M·C], got {list(cells.shape)}")
    return _logits(q, cells.unsqueeze(2), None, len(cells), to_query, centroids, chunk, scale)


def product_chunk_logits_naive(
    q: torch.Tensor, cells: torch.Tensor, to_query: torch.Tensor, centroids: torch.Tensor, chunk: int, scale: float
) -> torch.Tensor:
    """Twin of `product_chunk_logits`: one look-up per code; float64 queries give float64 results."""
    q = q.to(torch.promote_types(q.dtype, torch.float32))
    n, kv_heads, _ = cells.shape
    subspaces = centroids.shape[1]
    lifted = torch.einsum("hde,hge->hgd", to_query.to(q.dtype), q.unflatten(0, (kv_heads, -1)))
    lifted = lifted.unflatten(-1, (subspaces, -1))
    table = torch.einsum("hgms,hmcs->hgmc", lifted, centroids.to(q.dtype))
    codes = cells.long().permute(1, 2, 0).unflatten(1, (subspaces, chunk)).flatten(2)  # [Hkv, M, C·N]
    codes = codes.unsqueeze(1).expand(-1, table.shape[1], -1, -1)
    logits = scale * table.gather(-1, codes).sum(2)
    return logits.unflatten(-1, (chunk, n)).logsumexp(2).flatten(0, 1)


def product_chunk_logits_paged(
    q: torch.Tensor,
    cells: torch.Tensor,
    blocks: torch.Tensor,
    num_chunks: int,
    to_query: torch.Tensor,
    centroids: torch.Tensor,
    chunk: int,
    scale: float,
) -> torch.Tensor:
    """`product_chunk_logits` of a request's first `num_chunks` chunks, found through its block table without a copy.

    cells: uint8 [num_blocks, Hkv, per_block, M·C], all but the last dimension may be strided. blocks: int32 or int64
    [nb]; chunk i is blocks[i // per_block], i % per_block. Returns fp32 [Hq, num_chunks]. Raises ValueError also on too
    few blocks or one that does not exist.
    """
    blocks = require_blocks(blocks, num_chunks, cells)
    return _logits(q, cells, blocks, num_chunks, to_query, centroids, chunk, scale)


def _logits(
    q: torch.Tensor,
    cells: torch.Tensor,
    blocks: torch.Tensor | None,
    n: int,
    to_query: torch.Tensor,
    centroids: torch.Tensor,
    chunk: int,
    scale: float,
) -> torch.Tensor:
    """Both forms: the cells [num_blocks, Hkv, per_block, M·C] of a block table, or of all blocks in order."""
    if q.device.type != "cpu":
        raise unsupported(q.device, "cpu")
    require(q.dim() == 2 and q.is_floating_point(), f"q must be float [Hq, D], got {q.dtype} {list(q.shape)}")
    q_heads, dim = q.shape
    num_blocks, kv_heads, per_block, size = cells.shape
    require(kv_heads > 0 and q_heads % kv_heads == 0, f"{kv_heads} kv heads do not divide {q_heads} query heads")
    subspaces = _require_tables(centroids, kv_heads, dim, {"to_query": to_query})
    require(chunk % 8 == 0 and chunk > 0, f"C = {chunk} must be a multiple of 8")
    require(
        size == subspaces * chunk and cells.dtype == torch.uint8 and cells.device == q.device,
        f"cells must be uint8 [.., {subspaces} · {chunk}] on {q.device}, "
        f"got {cells.dtype} {list(cells.shape)} on {cells.device}",
    )
    require(cells.stride(3) == 1, f"the bytes of a cell must be contiguous, got strides {cells.stride()}")
    require(centroids.device == q.device, f"q is on {q.device}, the tables on {centroids.device}")
    group = q_heads // kv_heads
    passes = -(-group // _LANES)
    columns = torch.zeros(kv_heads, dim, passes * _LANES, dtype=torch.float32)
    columns[..., :group] = q.unflatten(0, (kv_heads, group)).transpose(1, 2)
    lifted = torch.bmm(to_query, columns).mul_(scale * _LOG2E).contiguous()
    table = torch.empty(kv_heads, passes, subspaces, CENTROIDS, _LANES, dtype=torch.float32)
    out = torch.empty(q_heads, n, dtype=torch.float32)
    bad = kernel("lsa_product_chunk_logits")(
        lifted.data_ptr(), centroids.data_ptr(), cells.data_ptr(), *cells.stride()[:3],
        None if blocks is None else blocks.data_ptr(), num_blocks, per_block, table.data_ptr(), out.data_ptr(),
        n, kv_heads, group, subspaces, dim // subspaces, chunk, torch.get_num_threads(),
    )  # fmt: skip
    require(bad < 0, f"blocks[{bad}] is not one of {num_blocks} blocks")
    return out


def product_chunk_logits_paged_naive(
    q: torch.Tensor,
    cells: torch.Tensor,
    blocks: torch.Tensor,
    num_chunks: int,
    to_query: torch.Tensor,
    centroids: torch.Tensor,
    chunk: int,
    scale: float,
) -> torch.Tensor:
    """Twin of `product_chunk_logits_paged`: gather, then `product_chunk_logits_naive`."""
    cells = gather_cells(cells, blocks, num_chunks)
    return product_chunk_logits_naive(q, cells, to_query, centroids, chunk, scale)
