"""Fits the tables of the product-quantised key index (`vllm_lsa.indexer.product`) to a model's keys and queries.

Errors of keys matter as far as queries see them. So keys are mapped to a space in which a query is equally likely to
point anywhere: by the square root of the queries' second moment. There they are rotated to their principal directions,
which are dealt to the subspaces so that each has about the same volume; k-means gives each 256 centroids.
"""

import torch

from vllm_lsa.ops.product_lse import CENTROIDS, encode_product

_LEAST = 1e-4  # of the largest eigenvalue: directions that no query looks in still need a scale


def deal(variances: list[float], subspaces: int) -> list[int]:
    """The order of dims, their variances descending, that puts dims of a subspace together.

    Each subspace gets as many; each dim goes to the subspace with room whose sum of log-variances is least so far.
    """
    logs = torch.tensor(variances, dtype=torch.float64).clamp(min=1e-12).log().tolist()
    size = len(logs) // subspaces
    loads: list[float] = [0.0] * subspaces
    dims: list[list[int]] = [[] for _ in range(subspaces)]
    for dim, value in enumerate(logs):
        m = min((m for m in range(subspaces) if len(dims[m]) < size), key=lambda m: loads[m])
        loads[m] += value - logs[-1] + 1e-3
        dims[m].append(dim)
    return [dim for group in dims for dim in group]


def nearest(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The nearest centroid of points [Hkv, n, D] in each subspace, int64 [Hkv, M, n]. centroids: [Hkv, M, 256, D / M].

    n is a multiple of 8.
    """
    kv_heads, n, dim = points.shape
    subspaces = centroids.shape[1]
    if points.device.type == "cpu":  # the index's own kernel is many times as fast
        eye, zero = torch.eye(dim).repeat(kv_heads, 1, 1), torch.zeros(kv_heads, dim)
        cells = encode_product(points.unflatten(1, (-1, 8)).transpose(0, 1), eye, zero, centroids.contiguous())
        return cells.view(-1, kv_heads, subspaces, 8).permute(1, 2, 0, 3).flatten(2).long()
    parts = points.unflatten(-1, (subspaces, -1)).transpose(1, 2)
    # Of the squared distance only what depends on the centroid.
    return torch.stack(
        [(c.square().sum(-1)[:, None] - 2 * p @ c.mT).argmin(-1) for p, c in zip(parts, centroids, strict=True)]
    )


def k_means(points: torch.Tensor, subspaces: int, iterations: int, generator: torch.Generator) -> torch.Tensor:
    """Centroids [Hkv, M, 256, D / M] of points [Hkv, n, D], n a multiple of 8, in each subspace.

    Those that no point is nearest to stay where they were.
    """
    kv_heads, n, _ = points.shape
    first = torch.randperm(n, generator=generator)[:CENTROIDS].to(points.device)
    first = first.repeat(-(-CENTROIDS // len(first)))[:CENTROIDS]  # fewer points than centroids
    parts = points.unflatten(-1, (subspaces, -1)).transpose(1, 2)  # [Hkv, M, n, D / M]
    weighed = torch.cat([parts, torch.ones_like(parts[..., :1])], -1).flatten(0, 1)
    centroids = parts[:, :, first].clone()
    for _ in range(iterations):
        code = nearest(points, centroids).flatten(0, 1)
        if points.device.type == "cpu":
            at = (code + CENTROIDS * torch.arange(len(code)).unsqueeze(1)).flatten()
            sums = torch.zeros(len(code) * CENTROIDS, weighed.shape[-1]).index_add_(0, at, weighed.flatten(0, 1))
        else:  # sums by index come in no fixed order there
            hot = (
                torch.nn.functional.one_hot(c, CENTROIDS).to(w.dtype).T @ w for c, w in zip(code, weighed, strict=True)
            )
            sums = torch.cat(list(hot))
        sums = sums.view(kv_heads, subspaces, CENTROIDS, -1)
        centroids = torch.where(sums[..., -1:] > 0, sums[..., :-1] / sums[..., -1:].clamp(min=1), centroids)
    return centroids.contiguous()


def fit_layer(
    query_moment: torch.Tensor,
    key_mean: torch.Tensor,
    keys: torch.Tensor,
    subspaces: int,
    seed: int = 0,
    iterations: int = 12,
) -> dict[str, torch.Tensor]:
    """The tables of one layer, by the names of `ProductTables`, fp32.

    query_moment: mean of q qᵀ, RoPE applied, [Hkv, D, D]. key_mean: [Hkv, D]. keys: a sample, RoPE applied,
    [Hkv, n, D]. subspaces divides D. Same arguments, same tables.
    """
    dim = key_mean.shape[1]
    values, vectors = torch.linalg.eigh(query_moment.double())
    values = values.clamp(min=_LEAST * values.amax(-1, keepdim=True).clamp(min=1e-12))
    # Only relative lengths matter; of volume 1 all numbers are moderate, as fp16 needs them.
    values = values / values.log().mean(-1, keepdim=True).exp()
    root = vectors @ torch.diag_embed(values.sqrt()) @ vectors.transpose(1, 2)
    centred = keys.double() - key_mean.double().unsqueeze(1)
    y = centred @ root
    variances, turn = torch.linalg.eigh(y.transpose(1, 2) @ y / y.shape[1])
    variances, turn = variances.flip(-1), turn.flip(-1)
    order = torch.tensor([deal(v.tolist(), subspaces) for v in variances], device=turn.device)
    to_code = (root @ turn).gather(2, order.unsqueeze(1).expand(-1, dim, -1))
    # As they will be stored: the rest is fitted to the rounded map.
    to_code, mean = to_code.half().double(), key_mean.half().float()
    keys = keys[:, : keys.shape[1] // 8 * 8]
    points = ((keys.double() - mean.double().unsqueeze(1)) @ to_code).float()
    return {
        "to_code": to_code.float(),
        "to_query": torch.linalg.inv(to_code).float(),
        "mean": mean,
        "centroids": k_means(points, subspaces, iterations, torch.Generator().manual_seed(seed)),
    }
