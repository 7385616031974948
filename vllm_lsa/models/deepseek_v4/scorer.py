"""The memory indexer over vLLM's own index keys of DeepSeek-V4: paged, fp8, without a Hadamard rotation (lsa.md §3).

Query side and weights are `LayerIndexer`'s. Here are what the cache adds: pages found through a block table, heads in
groups that DeepGEMM's logits kernel takes, and queries in fp8 as vLLM's own indexer makes them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch

from vllm_lsa.errors import LsaError
from vllm_lsa.indexer.memory_indexer import LayerIndexer, MemoryIndexer
from vllm_lsa.models.deepseek_v4.specs import C4_TOKENS, PAGE_ENTRIES
from vllm_lsa.ops.index_logits import KEY, PAGE_BYTES, index_logits, index_logits_naive
from vllm_lsa.ops.native import DTYPES, require

Precision = Literal["fp32", "bf16", "fp8"]
Mode = Literal["or", "mean"]
Query = tuple[torch.Tensor, torch.Tensor]

_E4M3_MAX = 448.0
_SMALLEST = 1e-4


def model_layers(c4_layers: Sequence[int], compress_ratios: Sequence[int]) -> dict[int, int]:
    """The model's layer of each of `c4_layers`, which count c4 layers from 0: {10: 22, 12: 26, 20: 42} of V4-Flash.

    compress_ratios: of the model's layers, from its config. Raises LsaError if it has fewer c4 layers.
    """
    c4 = [layer for layer, ratio in enumerate(compress_ratios) if ratio == C4_TOKENS]
    if max(c4_layers) >= len(c4):
        raise LsaError(
            f"the memory indexer scores c4 layer {max(c4_layers)}, and this model has {len(c4)}: give a checkpoint "
            "that was trained for this model"
        )
    return {layer: c4[layer] for layer in c4_layers}


def quantize_query(q: torch.Tensor, weights: torch.Tensor) -> Query:
    """Queries in e4m3 [B, H, 128] and weights fp32 [B, H] that hold their scales, as vLLM's indexer makes them.

    q: [B, H, 128], any float dtype, RoPE applied. weights: [B, H], D^-½ H^-½ included. One scale for each row and head,
    the least power of two not below the largest value / 448 (vllm/models/deepseek_v4/common/ops/fused_indexer_q.py).
    """
    q = q.float()
    largest = q.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST)
    scale = torch.exp2(torch.ceil(torch.log2(largest / _E4M3_MAX)))
    codes = (q / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return codes, weights.float() * scale.squeeze(-1)


def index_pages(cache: torch.Tensor) -> torch.Tensor:
    """The pages of an index-key cache, uint8 [num_blocks, 8448], a view; blocks keep their stride.

    cache: uint8 [num_blocks, 64, 132], as vLLM binds it, or [num_blocks, 8448 or more]; a page's bytes contiguous.
    Raises ValueError on another.
    """
    rows = (PAGE_ENTRIES, KEY + 4)
    bound = cache.dim() == 3 and cache.shape[1:] == rows and cache.stride()[1:] == (rows[1], 1)
    flat = cache.dim() == 2 and cache.shape[1] >= PAGE_BYTES and cache.stride(1) == 1
    require(
        cache.dtype == torch.uint8 and (bound or flat),
        f"index keys must be uint8 [num_blocks, {rows[0]}, {rows[1]}] or [num_blocks, {PAGE_BYTES}…], contiguous in a "
        f"block, got {cache.dtype} {list(cache.shape)} with strides {cache.stride()}",
    )
    return cache.flatten(1) if bound else cache[:, :PAGE_BYTES]


def paged_logits(
    q: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    entries: int,
) -> torch.Tensor:
    """Logits fp32 [B, entries], ``Σ_h relu(q_h · k_n) w_h``, -inf from each row's length on.

    q: [B, H, 128], a float dtype or e4m3. weights: fp32 [B, H], with every scale in them. cache: see `index_pages`.
    block_table: int32 or int64 [B, nb], block of each 64 entries; what lies behind the length is not read. lengths:
    integers [B], entries of each row that are written. entries: how many to score, at most 64 nb.

    Raises ValueError on another shape or dtype.
    """
    rows = q.shape[0]
    require(q.dim() == 3 and q.shape[2] == KEY, f"q must be [B, H, {KEY}], got {list(q.shape)}")
    require(weights.shape == q.shape[:2], f"weights must be {list(q.shape[:2])}, got {list(weights.shape)}")
    require(
        block_table.dim() == 2 and block_table.shape[0] == rows and block_table.dtype in (torch.int32, torch.int64),
        f"block_table must be int32 or int64 [{rows}, nb], got {block_table.dtype} {list(block_table.shape)}",
    )
    require(
        lengths.shape == (rows,) and not lengths.is_floating_point(),
        f"lengths must be integers [{rows}], got {lengths.dtype} {list(lengths.shape)}",
    )
    require(
        0 <= entries <= block_table.shape[1] * PAGE_ENTRIES,
        f"{entries} entries are not in {block_table.shape[1]} pages of {PAGE_ENTRIES}",
    )
    out = torch.empty(rows, entries, device=q.device)
    pages, weights = index_pages(cache), weights.float()
    if q.is_cuda and (q.dtype in DTYPES or q.dtype == torch.float8_e4m3fn):
        index_logits(
            q.contiguous(), weights.contiguous(), pages, block_table.contiguous(), lengths.int().contiguous(), out
        )
    else:
        index_logits_naive(q, weights, pages, block_table, lengths, out)
    return out


def combine_logits(logits: Sequence[torch.Tensor], mode: Mode = "or") -> torch.Tensor:
    """Several layers' logits [B, N] as one, for scorers that were not trained to give probabilities.

    Such logits only rank entries: choose by a budget, with a threshold of -inf, and not by a share of certainty. They
    stay logits because a sigmoid would make equals of all large ones. Raises LsaError on another mode or no logits.
    """
    if mode not in get_args(Mode):
        raise LsaError(f"mode={mode!r} is not a way to combine layers: use or, or mean")
    if not logits:
        raise LsaError("there are no logits to combine: give those of at least one layer")
    stacked = torch.stack([x.float() for x in logits])
    return stacked.amax(0) if mode == "or" else stacked.mean(0)


def native_scores(
    queries: Mapping[int, Query],
    caches: Mapping[int, torch.Tensor],
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    entries: int,
    mode: Mode = "or",
) -> torch.Tensor:
    """What scores without a checkpoint: the native indexers' queries. Logits fp32 [B, entries], see `combine_logits`.

    queries: per layer q [B, H, 128] and weights [B, H], as vLLM's indexer hands them to its logits kernel (e4m3, the
    scale in the weights). caches: index keys of the same layers. Others: see `paged_logits`.
    """
    return combine_logits(
        [paged_logits(*query, caches[layer], block_table, lengths, entries) for layer, query in queries.items()], mode
    )


class PagedScorer:
    """A memory indexer of the published form that reads vLLM's caches. Layers are counted among c4 layers."""

    def __init__(self, indexer: MemoryIndexer, precision: Precision = "fp8") -> None:
        """precision: fp32 throughout; bf16, weights and queries; or fp8, bf16 with the queries then in e4m3.

        Keys are what the cache holds in any case. Raises LsaError if the indexer was not made for V4's index keys or
        on another precision.
        """
        config = indexer.config
        if precision not in get_args(Precision):
            raise LsaError(f"precision={precision!r} is not one of {', '.join(get_args(Precision))}")
        if (config.kind, config.kv_heads, config.head_dim, config.input) != ("shared", 1, KEY, "hidden"):
            raise LsaError(
                f"{indexer.source} does not score index keys of DeepSeek-V4 (kind={config.kind!r}, "
                f"kv_heads={config.kv_heads}, head_dim={config.head_dim}, input={config.input!r}): give a checkpoint "
                "in the published form, or one that was trained for that model"
            )
        self.indexer, self.precision = indexer, precision
        rounding = config.model_copy(update={"published_rounding": precision != "fp32"})
        self._scorers: dict[int, LayerIndexer] = {}
        for layer in indexer.layers:
            state = indexer.layer(layer).state_dict()
            if precision != "fp32":
                state = {name: x if name == "inv_freq" else x.bfloat16() for name, x in state.items()}
            with torch.device("meta"):  # no memory for weights that are replaced
                scorer = LayerIndexer(rounding, torch.zeros(config.rope.dims // 2))
            scorer.load_state_dict(state, assign=True)
            self._scorers[layer] = scorer.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: str | Path, precision: Precision = "fp8", device: str | torch.device = "cpu") -> "PagedScorer":
        """The scorer in a published .pt or .safetensors file or a checkpoint folder. Raises LsaError in one line."""
        return cls(MemoryIndexer.load(path, device), precision)

    @property
    def layers(self) -> tuple[int, ...]:
        """The c4 layers that it scores, ascending."""
        return self.indexer.layers

    @torch.no_grad()
    def query(self, layer: int, hidden: torch.Tensor, positions: torch.Tensor) -> Query:
        """Queries [B, H, 128] (fp32, bf16 or e4m3) and weights fp32 [B, H] of one layer, as `paged_logits` takes them.

        hidden: [B, hidden_size], the attention module's input. positions: integers [B], in tokens. Raises LsaError on a
        layer without a scorer, ValueError on another shape or dtype.
        """
        self.indexer.layer(layer)  # says which there are
        scorer = self._scorers[layer]
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=self.precision != "fp32"):
            # vLLM's V4 rotates neither queries nor keys.
            q, weights = scorer.query(hidden, positions, rotated=False)
        if self.precision == "fp8":
            return quantize_query(q, weights)
        return q.bfloat16() if self.precision == "bf16" else q, weights.float()

    @torch.no_grad()
    def logits(
        self,
        layer: int,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        cache: torch.Tensor,
        block_table: torch.Tensor,
        lengths: torch.Tensor,
        entries: int,
    ) -> torch.Tensor:
        """Logits fp32 [B, entries] of one layer. Arguments and errors: `query` and `paged_logits`."""
        out = paged_logits(*self.query(layer, hidden, positions), cache, block_table, lengths, entries)
        bias = self._scorers[layer].bias
        return out if bias is None else out + bias.float()

    @torch.no_grad()
    def scores(
        self,
        hidden: Mapping[int, torch.Tensor],
        positions: torch.Tensor,
        caches: Mapping[int, torch.Tensor],
        block_table: torch.Tensor,
        lengths: torch.Tensor,
        entries: int,
        mode: Mode | None = None,
    ) -> torch.Tensor:
        """Scores fp32 [B, entries] in [0, 1] for `select_pages`, all layers together; 0 from each row's length on.

        hidden and caches: by layer, for each of `layers`. mode: "or", the maximum over layers, or "mean"; default: the
        checkpoint's. Others: see `logits`. Raises LsaError on a layer that is missing.
        """
        for layer in self.layers:
            if layer not in hidden or layer not in caches:
                raise LsaError(
                    f"layer {layer} has a scorer and no input: give hidden states and index keys of {self.layers}"
                )
        by_layer = {
            layer: self.logits(layer, hidden[layer], positions, caches[layer], block_table, lengths, entries)
            for layer in self.layers
        }
        return self.indexer.ensemble(by_layer, mode)
