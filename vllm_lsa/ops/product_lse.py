"""The product-quantised key index: its codec, and the scores of chunks against a query.

A key k of one KV head is mapped to ``y = (k - mean) @ to_code`` and cut into M subspaces of D / M dims; a token's code
in subspace m is the nearest of 256 centroids there. A query's dot product with the decoded key is then, up to a
constant, a sum of M look-ups: ``q·k ≈ q·mean + Σ_m T[m, code_m]``, ``T[m, c] = (to_query @ q)_m · centroids[m, c]``,
where to_query is the inverse of to_code.
"""

import torch

from vllm_lsa.ops.native import require

CENTROIDS = 256
# Distances to centroids that `encode_product` holds at a time: 4 MiB.
_TILE = 1 << 20


def _require_tables(centroids: torch.Tensor, kv_heads: int, dim: int, square: dict[str, torch.Tensor]) -> int:
    """M. Raises ValueError unless centroids is fp32 [Hkv, M, 256, D / M] and `square` fp32 [Hkv, D, D]."""
    require(
        centroids.dim() == 4
        and centroids.shape[0] == kv_heads
        and centroids.shape[2] == CENTROIDS
        and centroids.shape[1] * centroids.shape[3] == dim,
        f"centroids must be [{kv_heads}, M, {CENTROIDS}, {dim} / M], got {list(centroids.shape)}",
    )
    for name, x in square.items():
        require(x.shape == (kv_heads, dim, dim), f"{name} must be {[kv_heads, dim, dim]}, got {list(x.shape)}")
    return centroids.shape[1]


def encode_product(
    keys: torch.Tensor, to_code: torch.Tensor, mean: torch.Tensor, centroids: torch.Tensor
) -> torch.Tensor:
    """Cells of full chunks of keys, one byte per token and subspace.

    keys: [n, Hkv, C, D], any float dtype and strides. to_code: fp32 [Hkv, D, D]. mean: fp32 [Hkv, D]. centroids: fp32
    [Hkv, M, 256, D / M]. Returns uint8 [n, Hkv, M·C]; byte m·C + t is token t's code in subspace m. Any device; the
    memory for distances is bounded. Raises ValueError on a bad shape or dtype.
    """
    require(keys.dim() == 4 and keys.is_floating_point(), f"keys must be float [n, Hkv, C, D], got {list(keys.shape)}")
    _, kv_heads, _, dim = keys.shape
    _require_tables(centroids, kv_heads, dim, {"to_code": to_code})
    require(mean.shape == (kv_heads, dim), f"mean must be {[kv_heads, dim]}, got {list(mean.shape)}")
    return encode_product_naive(keys, to_code, mean, centroids)


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
    return product_chunk_logits_naive(q, cells, to_query, centroids, chunk, scale)


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
    return product_chunk_logits_paged_naive(q, cells, blocks, num_chunks, to_query, centroids, chunk, scale)


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
    count = -(-num_chunks // cells.shape[2])
    gathered = cells[blocks[:count].long()].transpose(1, 2).flatten(0, 1)[:num_chunks]
    return product_chunk_logits_naive(q, gathered, to_query, centroids, chunk, scale)
