"""A checkpoint with random weights: the machinery of a trained one, without its knowledge."""

from pathlib import Path
from typing import Literal

import torch

from vllm_lsa.indexer import IndexerConfig, MemoryIndexer
from vllm_lsa.indexer.product import ProductTables
from vllm_lsa.indexer.rotary import RopeConfig, inverse_frequencies


def tables(layers: int, kv_heads: int, dim: int, subspaces: int) -> ProductTables:
    """Orthogonal spaces, and centroids spread as standard normal keys are."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    to_code = torch.linalg.qr(normal(layers, kv_heads, dim, dim)).Q.contiguous()
    centroids = normal(layers, kv_heads, subspaces, 256, dim // subspaces)
    return ProductTables(to_code, to_code.transpose(2, 3).contiguous(), 0.1 * normal(layers, kv_heads, dim), centroids)


def write(
    folder: Path, layers: int, q_heads: int, kv_heads: int, dim: int, chunk: int, period: int = 16,
    scorers: tuple[int, ...] | None = None, weights: tuple[float, ...] | None = None,
    ensemble: Literal["or", "mean"] | None = None,
) -> Path:  # fmt: skip
    """A checkpoint folder for a backbone of these sizes. scorers: layers that have one, all by default.

    ensemble: how they combine, for one set for all layers; None for sets per layer.
    """
    torch.manual_seed(0)
    config = IndexerConfig(
        kind="shared" if ensemble else "per_layer", ensemble=ensemble or "or", backbone="random",
        layers=scorers or tuple(range(layers)), hidden_size=q_heads * dim,
        heads=q_heads, kv_heads=kv_heads, head_dim=dim, rank=8, rope=RopeConfig(style="halves", dims=dim),
        input="query", usage=ensemble is None, chunk_tokens=chunk, period=period, layer_weights=weights,
        demand_index={"kind": "product", "subspaces": 4, "file": "product.safetensors"},
    )  # fmt: skip
    MemoryIndexer(config, inverse_frequencies(dim, 10000.0)).save(folder)
    tables(layers, kv_heads, dim, 4).save(folder / "product.safetensors")
    return folder
