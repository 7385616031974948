"""Keys by product quantisation in a space that queries shape."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_lsa.errors import LsaError
from vllm_lsa.indexer.base import ChunkIndex
from vllm_lsa.indexer.tensor_files import check_tensors, read_tensors
from vllm_lsa.ops import product_lse

_NAMES = ("to_code", "to_query", "mean", "centroids")
_REMEDY = "fit the tables for this model again"


@dataclass(frozen=True, eq=False)
class ProductTables:
    """What `ProductIndex` knows of a model's keys, layer by layer. Every tensor is fp32, on one device.

    Raises LsaError in one line if shapes do not fit together.
    """

    to_code: torch.Tensor = field(repr=False)
    """[L, Hkv, D, D]; ``(key - mean) @ to_code`` has subspace m in dims m·D/M and up."""
    to_query: torch.Tensor = field(repr=False)
    """[L, Hkv, D, D], the inverse of to_code; ``to_query @ query`` meets the coded key."""
    mean: torch.Tensor = field(repr=False)
    """[L, Hkv, D]"""
    centroids: torch.Tensor = field(repr=False)
    """[L, Hkv, M, 256, D / M]"""
    source: str = "the product tables"
    """Where they are from, for messages."""

    def __post_init__(self) -> None:
        tensors = self._tensors()
        for name, shape in _shapes(tensors, self.source).items():
            x = tensors[name]
            if tuple(x.shape) != shape or x.dtype != torch.float32:
                raise LsaError(
                    f"{self.source}: {name} is {x.dtype} {list(x.shape)}, not float32 {list(shape)}: {_REMEDY}"
                )

    @property
    def layers(self) -> int:
        return self.to_code.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.to_code.shape[1]

    @property
    def head_dim(self) -> int:
        return self.to_code.shape[2]

    @property
    def subspaces(self) -> int:
        """M, the bytes that a token takes per KV head."""
        return self.centroids.shape[2]

    def to(self, device: torch.device | str) -> "ProductTables":
        """The same tables on a device: self if they are there, else a copy, whose indexes are not equal to self's."""
        moved = {name: x.to(device) for name, x in self._tensors().items()}
        if all(moved[name] is x for name, x in self._tensors().items()):
            return self
        return ProductTables(**moved, source=self.source)

    def part(self, first: int, count: int) -> "ProductTables":
        """Those of KV heads first, first + 1, … of every layer."""
        heads = {name: x[:, first : first + count].contiguous() for name, x in self._tensors().items()}
        return ProductTables(**heads, source=self.source)

    @classmethod
    def load(cls, path: str | Path) -> "ProductTables":
        """Read a .safetensors file, onto the CPU. Raises LsaError in one line if it does not hold product tables."""
        path = Path(path)
        if path.suffix != ".safetensors" or not path.is_file():
            raise LsaError(f"{path} is not a .safetensors file: give the file that product tables were saved to")
        tensors = read_tensors(path)
        if tensors.keys() >= set(_NAMES):
            check_tensors(tensors, _shapes(tensors, str(path)), path)
        else:
            check_tensors(tensors, dict.fromkeys(_NAMES, ()), path)
        return cls(**{name: x.float() for name, x in tensors.items()}, source=str(path))

    def save(self, path: str | Path) -> None:
        """Write a .safetensors file in fp16; it appears whole or not at all. Raises LsaError if a value is too large.

        What is loaded again differs by the rounding, so cells belong to tables that were loaded, not to these.
        """
        path = Path(path)
        halves = {name: x.detach().cpu().half().contiguous() for name, x in self._tensors().items()}
        check_tensors(halves, _shapes(halves, str(path)), path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        save_file(halves, unfinished, metadata={"format": "pt"})
        os.replace(unfinished, path)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in _NAMES}


def _shapes(tensors: Mapping[str, torch.Tensor], source: str) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor as those of to_code and centroids say. Raises LsaError if these two say nothing."""
    square, centroids = tensors["to_code"].shape, tensors["centroids"].shape
    if len(square) != 4 or square[2] != square[3] or 0 in square:
        raise LsaError(f"{source}: to_code has shape {list(square)}, not [layers, heads, D, D]: {_REMEDY}")
    layers, heads, dim, _ = square
    if len(centroids) != 5 or centroids[2] < 1 or dim % centroids[2]:
        expected = [layers, heads, "M", product_lse.CENTROIDS, f"{dim} / M"]
        raise LsaError(f"{source}: centroids has shape {list(centroids)}, not {expected}: {_REMEDY}")
    subspaces = centroids[2]
    return {
        "to_code": (layers, heads, dim, dim),
        "to_query": (layers, heads, dim, dim),
        "mean": (layers, heads, dim),
        "centroids": (layers, heads, subspaces, product_lse.CENTROIDS, dim // subspaces),
    }


class ProductIndex(ChunkIndex):
    """Cell: M bytes per token; logit: logsumexp of the scaled q·k over the chunk's tokens, up to the error of codes.

    Equal to another one only if they share one `ProductTables` object, which must be on the device of the keys and
    cells. Raises LsaError if chunk_tokens is not a multiple of 8 or head_dim not that of the tables.
    """

    name = "product"

    def __init__(self, chunk_tokens: int, head_dim: int, dtype: torch.dtype, tables: ProductTables) -> None:
        super().__init__(chunk_tokens, head_dim, dtype)
        if chunk_tokens % 8:
            raise LsaError(f"lsa.chunk_tokens={chunk_tokens} does not suit product: use a multiple of 8, or mean_key")
        if tables.head_dim != head_dim:
            raise LsaError(
                f"{tables.source} is for heads of {tables.head_dim} dims, this model's have {head_dim}: {_REMEDY}"
            )
        self.tables = tables

    @property
    def _key(self) -> tuple[object, ...]:
        return (*super()._key, self.tables)

    @property
    def cell_bytes(self) -> int:
        return self.tables.subspaces * self.chunk_tokens

    def mean_keys(self, cells: torch.Tensor, layer: int) -> torch.Tensor:
        t = self.tables
        codes = cells.unflatten(-1, (t.subspaces, self.chunk_tokens)).long()  # [N, Hkv, M, C]
        heads = torch.arange(t.kv_heads, device=cells.device)[:, None, None]
        parts = t.centroids[layer][heads, torch.arange(t.subspaces, device=cells.device)[:, None], codes]
        coded = parts.mean(3).flatten(2)  # [N, Hkv, D]
        return torch.einsum("nhe,hde->nhd", coded, t.to_query[layer].transpose(1, 2)) + t.mean[layer]

    def encode(self, keys: torch.Tensor, layer: int = 0) -> torch.Tensor:
        t = self.tables
        return product_lse.encode_product(keys, t.to_code[layer], t.mean[layer], t.centroids[layer])

    def paged_logits(
        self,
        query: torch.Tensor,
        cells: torch.Tensor,
        blocks: torch.Tensor,
        num_chunks: int,
        scale: float,
        layer: int = 0,
    ) -> torch.Tensor:
        t = self.tables
        return product_lse.product_chunk_logits_paged(
            query, cells, blocks, num_chunks, t.to_query[layer], t.centroids[layer], self.chunk_tokens, scale
        )

    def _layer_logits(self, query: torch.Tensor, cells: torch.Tensor, scale: float, layer: int) -> torch.Tensor:
        t = self.tables
        return product_lse.product_chunk_logits(
            query, cells, t.to_query[layer], t.centroids[layer], self.chunk_tokens, scale
        )
