"""Fits the tables of the product-quantised key index (`vllm_lsa.indexer.product`) to a model's keys and queries.

Errors of keys matter as far as queries see them. So keys are mapped to a space in which a query is equally likely to
point anywhere: by the square root of the queries' second moment. There they are rotated to their principal directions,
which are dealt to the subspaces so that each has about the same volume; k-means gives each 256 centroids.
"""

import torch

from vllm_lsa.ops.product_lse import CENTROIDS

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


def k_means(x: torch.Tensor, count: int, iterations: int, generator: torch.Generator) -> torch.Tensor:
    """Centroids [G, count, d] of points [G, n, d], n ≥ 1; those that no point is nearest to stay where they were."""
    groups, n, dim = x.shape
    first = torch.randperm(n, generator=generator)[:count].to(x.device)
    first = first.repeat(-(-count // len(first)))[:count]  # fewer points than centroids
    centroids = x[:, first].clone()
    ones = torch.ones(groups, n, 1, device=x.device)
    for _ in range(iterations):
        # |x|² is the same for all centroids
        distance = torch.baddbmm(centroids.square().sum(-1).unsqueeze(1), x, centroids.transpose(1, 2), alpha=-2)
        nearest = distance.argmin(-1)
        if x.device.type == "cpu":
            at = (nearest + count * torch.arange(groups).unsqueeze(1)).flatten()
            sums = torch.zeros(groups * count, dim + 1).index_add_(0, at, torch.cat([x, ones], -1).flatten(0, 1))
            sums = sums.view(groups, count, dim + 1)
        else:  # sums by index come in no fixed order there
            hot = torch.nn.functional.one_hot(nearest, count).to(x.dtype)
            sums = hot.transpose(1, 2) @ torch.cat([x, ones], -1)
        centroids = torch.where(sums[..., -1:] > 0, sums[..., :-1] / sums[..., -1:].clamp(min=1), centroids)
    return centroids


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
    kv_heads, dim = key_mean.shape
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
    points = ((keys.double() - mean.double().unsqueeze(1)) @ to_code).float()
    points = points.unflatten(-1, (subspaces, -1)).transpose(1, 2).flatten(0, 1).contiguous()
    generator = torch.Generator().manual_seed(seed)
    found = torch.cat([k_means(p, CENTROIDS, iterations, generator) for p in points.split(2 * subspaces)])
    return {
        "to_code": to_code.float(),
        "to_query": torch.linalg.inv(to_code).float(),
        "mean": mean,
        "centroids": found.view(kv_heads, subspaces, CENTROIDS, dim // subspaces),
    }
