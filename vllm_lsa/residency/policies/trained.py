"""Lookahead by a trained memory indexer (arXiv 2606.09079), mixed with what was used lately."""

import torch

from vllm_lsa.indexer.mean_key import MeanKeyIndex
from vllm_lsa.indexer.product import ProductIndex
from vllm_lsa.indexer.rotary import rotate
from vllm_lsa.indexer.trained import Trained
from vllm_lsa.residency.policies.base import LookaheadPolicy, ScoreInput
from vllm_lsa.residency.policies.usage import UsagePolicy


class TrainedPolicy(LookaheadPolicy):
    """Score: the share of attention mass that the indexer expects of a chunk over the next cycle.

    Each KV head's shares are a softmax over the chunks. Layers for which training kept no scorer go by their usage.
    A checkpoint for one set for all layers scores by its ensemble instead, the same for every lane (lsa.md §3).
    """

    name = "trained"
    needs_query = True

    def __init__(self, chunk_tokens: int, head_dim: int, dtype: torch.dtype, trained: Trained) -> None:
        super().__init__(chunk_tokens, head_dim, dtype)
        self.index: ProductIndex | MeanKeyIndex
        if trained.tables is None:
            self.index = MeanKeyIndex(chunk_tokens, head_dim, dtype)
        else:
            self.index = ProductIndex(chunk_tokens, head_dim, dtype, trained.tables)
        self._indexer = trained.indexer
        self._rest = UsagePolicy(chunk_tokens, head_dim, dtype)

    def score(self, x: ScoreInput) -> torch.Tensor:
        assert x.query is not None
        every_query = x.peers.concatenate(x.query, 1)  # a scorer reads the queries of all heads of its layer
        if self._indexer.config.kind == "shared":
            parts = []
            for layer in self._indexer.layers:
                query, keys, position = self._input(x, every_query, layer)
                parts.append(self._indexer.logits(layer, query, keys, position))
            logits = x.peers.total(torch.stack(parts))
            return self._indexer.ensemble(dict(zip(self._indexer.layers, logits, strict=True))).repeat(x.num_lanes, 1)
        scores = self._rest.score(x).unflatten(0, (x.num_layers, x.layer_lanes))
        usage = None if x.usage is None else x.usage.unflatten(0, (x.num_layers, x.layer_lanes))
        counts = None if usage is None else torch.tensor([x.num_chunks], device=x.device)
        for layer in self._indexer.layers:
            query, keys, position = self._input(x, every_query, layer)
            seen = None if usage is None else usage[layer].expand(self._indexer.config.kv_heads, -1)[None]
            head_logits = self._indexer.layer(layer).head_logits(query, keys, position, seen, counts)
            shares = head_logits[0].softmax(-1).unflatten(0, (x.layer_lanes, -1))
            scores[layer] = shares.amax(1) if x.mode == "or" else shares.mean(1)
        return scores.flatten(0, 1)

    def _input(
        self, x: ScoreInput, every_query: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of a scorer: query without RoPE [1, Hq · D], mean keys [N, Hkv, D] ([N, D] of one head), position [1].

        every_query: [L, Hq, D], all ranks' heads; the keys are of this rank's.
        """
        assert x.cells is not None
        scorer, config = self._indexer.layer(layer), self._indexer.config
        last = torch.tensor([x.position - 1], device=x.device)
        query = every_query[layer][None].float() / config.attention_scaling
        query = rotate(query, last, scorer.inv_freq, config.rope, inverse=True).flatten(1)
        keys = self.index.mean_keys(x.cells[layer, : x.num_chunks], layer)
        # Aimed at the middle of the cycle.
        return query, keys.squeeze(1) if config.kv_heads == 1 else keys, last + 1 + config.period // 2
