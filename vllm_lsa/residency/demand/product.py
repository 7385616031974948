"""Demand by product-quantised keys: trained tables, the most quality per byte (docs/log.md, 2026-11-24)."""

import torch

from vllm_lsa.indexer.product import ProductIndex, ProductTables
from vllm_lsa.residency.demand.base import IndexedDemand


class ProductDemand(IndexedDemand):
    name = "product"

    def __init__(self, chunk_tokens: int, head_dim: int, dtype: torch.dtype, tables: ProductTables) -> None:
        self.index = ProductIndex(chunk_tokens, head_dim, dtype, tables)
