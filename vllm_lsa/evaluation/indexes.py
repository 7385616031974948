"""What an index kept on the device knows of the keys, for whole blocks of queries at a time.

The serving engine reads cells of bytes, one query at a time (`vllm_lsa/indexer/`); here the same estimates are made
from decoded keys with matrix products, for every token of many blocks.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from vllm_lsa.errors import LsaError
from vllm_lsa.indexer.product import ProductTables

KV_BYTES = 2  # of a value of K or V: quality is compared at 16 bits, whatever the evaluation computes in


class KeyIndex(ABC):
    """An index of one kind. Equal ones estimate the same."""

    name: str

    @abstractmethod
    def bytes_per_token(self, head_dim: int, chunk_tokens: int) -> float:
        """Device bytes for each token and KV head."""

    @abstractmethod
    def prepare(self, layer: int, keys: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
        """What `chunk_logits` reads, of a layer's keys fp32 [P, Hkv, n, D] with RoPE; n a multiple of chunk_tokens."""

    @abstractmethod
    def chunk_logits(
        self, prepared: torch.Tensor, queries: torch.Tensor, scale: float, chunk_tokens: int
    ) -> torch.Tensor:
        """Log of the estimated attention mass of every chunk, up to a constant per query: fp32 [P, Hkv, m, N].

        queries: fp32 [P, Hkv, m, D], any queries that use a KV head. scale: of q·k in the softmax.
        """

    def share(self, head_dim: int, chunk_tokens: int) -> float:
        """Index bytes over K and V bytes, the latter at 16 bits."""
        return self.bytes_per_token(head_dim, chunk_tokens) / (2 * head_dim * KV_BYTES)


class TokenIndex(KeyIndex):
    """Keeps something of every token: a chunk's logit is the logsumexp over its approximated keys."""

    @abstractmethod
    def approximate(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        """The keys as the index knows them, fp32 [P, Hkv, n, D], of the true ones."""

    def prepare(self, layer: int, keys: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
        return self.approximate(layer, keys)

    def chunk_logits(
        self, prepared: torch.Tensor, queries: torch.Tensor, scale: float, chunk_tokens: int
    ) -> torch.Tensor:
        return (queries * scale @ prepared.mT).unflatten(-1, (-1, chunk_tokens)).logsumexp(-1)


@dataclass(frozen=True)
class Exact(TokenIndex):
    """The keys themselves: no index, but what the best one could do. Takes no bytes, so it is no fair comparison."""

    name = "exact"

    def bytes_per_token(self, head_dim: int, chunk_tokens: int) -> float:
        return 0.0

    def approximate(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        return keys


@dataclass(frozen=True)
class FourBit(TokenIndex):
    """Every key at 4 bits between its least and largest value, these in fp16."""

    name = "four_bit"

    def bytes_per_token(self, head_dim: int, chunk_tokens: int) -> float:
        return head_dim / 2 + 4

    def approximate(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        low, high = keys.aminmax(dim=-1, keepdim=True)
        low, step = low.half().float(), ((high - low) / 15).half().float().clamp(min=torch.finfo(torch.float16).tiny)
        return low + ((keys - low) / step).round().clamp(0, 15) * step


@dataclass(frozen=True)
class Product(TokenIndex):
    """One byte per subspace of every key (`vllm_lsa.indexer.product`). tables: on the device of the keys."""

    tables: ProductTables
    name = "product"

    def bytes_per_token(self, head_dim: int, chunk_tokens: int) -> float:
        return float(self.tables.subspaces)

    def approximate(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        t = self.tables
        if (t.kv_heads, t.head_dim) != (keys.shape[1], keys.shape[3]) or layer >= t.layers:
            raise LsaError(
                f"{t.source} is for {t.layers} layers of {t.kv_heads} KV heads x {t.head_dim}, layer {layer} of this "
                f"model has {keys.shape[1]} x {keys.shape[3]}: fit the tables for this model"
            )
        mean, centroids = t.mean[layer].unsqueeze(1), t.centroids[layer]
        decoded = []
        for past in keys:  # one by one: the distances to 256 centroids are many times the keys
            parts = ((past - mean) @ t.to_code[layer]).unflatten(-1, (t.subspaces, -1)).transpose(1, 2)
            # Of the squared distance only what depends on the centroid.
            distance = centroids.square().sum(-1).unsqueeze(-2) - 2 * parts @ centroids.mT  # [Hkv, M, n, 256]
            code = distance.argmin(-1).unsqueeze(-1).expand(-1, -1, -1, centroids.shape[-1])
            decoded.append(centroids.gather(2, code).transpose(1, 2).flatten(2) @ t.to_query[layer] + mean)
        return torch.stack(decoded)


@dataclass(frozen=True)
class MeanKey(KeyIndex):
    """The mean key of a chunk, at 16 bits."""

    name = "mean_key"

    def bytes_per_token(self, head_dim: int, chunk_tokens: int) -> float:
        return KV_BYTES * head_dim / chunk_tokens

    def prepare(self, layer: int, keys: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
        return keys.unflatten(2, (-1, chunk_tokens)).mean(3)

    def chunk_logits(
        self, prepared: torch.Tensor, queries: torch.Tensor, scale: float, chunk_tokens: int
    ) -> torch.Tensor:
        return queries * scale @ prepared.mT + math.log(chunk_tokens)


@dataclass(frozen=True)
class Quest(KeyIndex):
    """The box around a chunk's keys, at 16 bits; its logit is an upper bound of each token's (arXiv 2406.10774)."""

    name = "quest"

    def bytes_per_token(self, head_dim: int, chunk_tokens: int) -> float:
        return 2 * KV_BYTES * head_dim / chunk_tokens

    def prepare(self, layer: int, keys: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
        low, high = keys.unflatten(2, (-1, chunk_tokens)).aminmax(dim=3)
        return torch.cat([low, high], -1)

    def chunk_logits(
        self, prepared: torch.Tensor, queries: torch.Tensor, scale: float, chunk_tokens: int
    ) -> torch.Tensor:
        queries = queries * scale
        return torch.cat([queries.clamp(max=0), queries.clamp(min=0)], -1) @ prepared.mT
