"""The memory indexer: scores chunks of the past by how much the next cycle will attend to them (arXiv 2606.09079).

A dual encoder: keys are the backbone's own and frozen, only the query side here is trained.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from vllm_lsa.errors import LsaError
from vllm_lsa.indexer.checkpoint import read_checkpoint, write_checkpoint
from vllm_lsa.indexer.hadamard import hadamard_transform
from vllm_lsa.indexer.indexer_config import IndexerConfig
from vllm_lsa.indexer.packed_keys import unpack_keys
from vllm_lsa.indexer.rotary import rotate
from vllm_lsa.ops.native import require

_EPS = 1e-6
# Values of q·k that are held at a time, so that memory does not grow with a million tokens of past times the heads.
_AT_ONCE = 1 << 24
# Parameters with a row, or D of them, for each head.
_BY_HEAD = {"wq_b.weight", "weights_proj.weight", "weights_bias", "usage_gain", "usage_floor", "age_gain"}


class LayerIndexer(nn.Module):
    """The scorer of one layer: H heads, keys of D dimensions, rank R; all weights fp32.

    ``logit_n = Σ_h relu(q_h · k_n) w_h + bias`` with ``q = rope(norm(x wq_aᵀ) wq_bᵀ)`` and ``w = x weights_projᵀ
    D^-½ H^-½``; with config.weights_bias, w has a learned constant more. ``head_logits`` is the same for each KV head
    alone, and knows usage and age of the chunks.
    """

    inv_freq: torch.Tensor

    def __init__(self, config: IndexerConfig, inv_freq: torch.Tensor) -> None:
        """inv_freq: radians per token of each pair of dimensions that turns, [config.rope.dims / 2]."""
        super().__init__()
        require(
            inv_freq.shape == (config.rope.dims // 2,),
            f"inv_freq must be [{config.rope.dims // 2}], got {list(inv_freq.shape)}",
        )
        self.config = config
        self.wq_a = nn.Linear(config.hidden_size, config.rank, bias=False, dtype=torch.float32)
        self.wq_b = nn.Linear(config.rank, config.heads * config.head_dim, bias=False, dtype=torch.float32)
        self.q_norm_weight = nn.Parameter(torch.ones(config.rank, dtype=torch.float32))
        self.weights_proj = nn.Linear(config.hidden_size, config.heads, bias=False, dtype=torch.float32)
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float32)) if config.bias else None

        def constants(count: int, value: float, present: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.full((count,), value, dtype=torch.float32)) if present else None

        self.weights_bias = constants(config.heads, 0.0, config.weights_bias)
        self.usage_gain = constants(config.kv_heads, 0.7, config.usage)
        self.usage_floor = constants(config.kv_heads, math.log(1e-4), config.usage)  # its natural logarithm
        self.age_gain = constants(config.kv_heads, 0.0, config.usage)
        for linear in (self.wq_a, self.wq_b, self.weights_proj):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        self.register_buffer("inv_freq", inv_freq.to(torch.float64, copy=True))

    def query(
        self, hidden: torch.Tensor, positions: torch.Tensor, rotated: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [B, H, D] and weights of the heads [B, H], fp32. Arguments: see `forward`."""
        config = self.config
        require(
            hidden.dim() == 2 and hidden.shape[1] == config.hidden_size and hidden.is_floating_point(),
            f"hidden must be floating point [B, {config.hidden_size}], got {hidden.dtype} {list(hidden.shape)}",
        )
        require(
            positions.shape == hidden.shape[:1] and not positions.is_floating_point(),
            f"positions must be integers [{hidden.shape[0]}], got {positions.dtype} {list(positions.shape)}",
        )
        hidden = hidden.float()
        y = self.wq_a(hidden).float()  # under autocast it may not be
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + _EPS) * self.q_norm_weight
        q = self.wq_b(y).float().unflatten(-1, (config.heads, config.head_dim))
        if config.published_rounding:
            q = rotate(q.bfloat16(), positions, self.inv_freq, config.rope).float()
        else:
            q = rotate(q, positions, self.inv_freq, config.rope)
        if config.rotated_keys if rotated is None else rotated:
            q = hadamard_transform(q)
        weights = self.weights_proj(hidden) * (config.head_dim * config.heads) ** -0.5
        return q, weights if self.weights_bias is None else weights + self.weights_bias

    def forward(
        self, hidden: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, rotated: bool | None = None
    ) -> torch.Tensor:
        """Logits fp32 [B, N]; differentiable in the weights and hidden.

        hidden: [B, hidden_size], any float dtype; what it is, config.input says. keys: any float dtype, [N, D] or
        [B, N, D]; [N, kv_heads, D] or [B, N, kv_heads, D] with several KV heads; or packed uint8 [N, D + 4] or
        [B, N, D + 4]. positions: [B], integers. rotated: whether keys carry the Hadamard rotation; default:
        config.rotated_keys. Raises ValueError on a bad shape or dtype.
        """
        self._require_keys(keys, hidden.shape[0])
        q, weights = self.query(hidden, positions, rotated)
        chunk_dim = keys.dim() - 2 if self.config.kv_heads == 1 else keys.dim() - 3
        block = max(1, _AT_ONCE // max(1, q.shape[0] * q.shape[1]))
        logits = [self._score(q, weights, part) for part in keys.split(block, dim=chunk_dim)]
        out = logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)
        return out if self.bias is None else out + self.bias

    def head_logits(
        self,
        hidden: torch.Tensor,
        keys: torch.Tensor,
        positions: torch.Tensor,
        usage: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits fp32 [B, kv_heads, N] of the chunks for each KV head alone, for sets that are chosen per KV head.

        ``Σ_h relu(q_h · k_n) w_h + bias`` over the head's group, and with usage ``+ usage_gain · log(usage_n + floor)
        - age_gain · log(counts - n)``, where an age is at least 1; chunks from counts on are not meant to be chosen.

        hidden, positions: see `forward`. keys: any float dtype, [N, kv_heads, D] or [B, N, kv_heads, D]. usage:
        [B, kv_heads, N], the share of the last period's attention mass that the chunk had, mean over steps and heads.
        counts: whole chunks that the past has, integers [B]. Both are used only with config.usage. Raises ValueError
        on a bad shape or dtype, or if only one of the two is given.
        """
        config, rows = self.config, hidden.shape[0]
        if config.kv_heads == 1 and keys.dim() > 2 and keys.shape[-2] == 1:
            keys = keys.squeeze(-2)
        require(keys.is_floating_point(), f"keys must be floating point, got {keys.dtype}")
        self._require_keys(keys, rows)
        keys = keys.unsqueeze(-2) if config.kv_heads == 1 else keys
        q, weights = self.query(hidden, positions)
        group = config.heads // config.kv_heads
        q, weights = q.unflatten(1, (config.kv_heads, group)), weights.unflatten(1, (config.kv_heads, group))
        if keys.dim() == 3:  # one product for all rows
            rows_of_heads = q.transpose(0, 1).flatten(1, 2)  # [kv_heads, B·group, D]
            products = (rows_of_heads @ keys.float().permute(1, 2, 0)).unflatten(1, (rows, group)).transpose(0, 1)
        else:
            products = q @ keys.float().permute(0, 2, 3, 1)
        out = (weights.unsqueeze(-2) @ products.relu()).squeeze(-2)
        if self.bias is not None:
            out = out + self.bias
        require((usage is None) == (counts is None), "usage and counts must be given together")
        if usage is None or counts is None or self.usage_gain is None:
            return out
        assert self.usage_floor is not None and self.age_gain is not None
        require(usage.shape == out.shape, f"usage must be {list(out.shape)}, got {list(usage.shape)}")
        require(counts.shape == (rows,), f"counts must be [{rows}], got {list(counts.shape)}")
        ages = (counts.unsqueeze(1) - torch.arange(out.shape[-1], device=out.device)).clamp(min=1).float().log()
        used = (usage.float() + self.usage_floor.exp().unsqueeze(1)).log()
        return out + self.usage_gain.unsqueeze(1) * used - self.age_gain.unsqueeze(1) * ages.unsqueeze(1)

    def _require_keys(self, keys: torch.Tensor, rows: int) -> None:
        config = self.config
        packed = keys.dtype == torch.uint8 and config.kv_heads == 1
        tail: tuple[int, ...] = (config.head_dim + 4,) if packed else (config.head_dim,)
        if config.kv_heads > 1:
            tail = (config.kv_heads, config.head_dim)
        leading = keys.shape[: keys.dim() - len(tail)]
        require(
            (packed or keys.is_floating_point())
            and keys.shape[len(leading) :] == tail
            and (len(leading) == 1 or (len(leading) == 2 and leading[0] == rows)),
            f"keys must be [N, {', '.join(map(str, tail))}] or [{rows}, N, …], floating point"
            f"{' or packed uint8' if config.kv_heads == 1 else ''}, got {keys.dtype} {list(keys.shape)}",
        )

    def _score(self, q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Logits [B, n] of queries [B, H, D], weights [B, H] and some of the keys."""
        keys = unpack_keys(keys) if keys.dtype == torch.uint8 else keys.float()
        kv_heads, group = self.config.kv_heads, self.config.heads // self.config.kv_heads
        if kv_heads == 1:
            keys = keys.unsqueeze(-2)
        q, weights = q.unflatten(1, (kv_heads, group)), weights.unflatten(1, (kv_heads, group))
        total = torch.zeros((), device=q.device)
        for head in range(kv_heads):
            k = keys[..., head, :].transpose(-1, -2)
            if keys.dim() == 3:  # one product for all rows
                products = (q[:, head].flatten(0, 1) @ k).unflatten(0, (q.shape[0], group))
            else:
                products = q[:, head] @ k
            total = total + (weights[:, head].unsqueeze(1) @ products.relu()).squeeze(1)
        return total


class MemoryIndexer(nn.Module):
    """The scorers of several layers, how they combine, and what they were trained for. Knows nothing of vLLM."""

    def __init__(self, config: IndexerConfig, inv_freq: torch.Tensor) -> None:
        """An untrained indexer. inv_freq: [rope.dims / 2], or [layers, rope.dims / 2] where layers differ (0: no RoPE).

        Raises ValueError on another shape.
        """
        super().__init__()
        self.config = config
        self.source: str | Path = "the memory indexer"
        shape = (len(config.layers), config.rope.dims // 2)
        require(inv_freq.shape in (shape, shape[1:]), f"inv_freq must be {list(shape)}, got {list(inv_freq.shape)}")
        speeds = inv_freq.expand(shape)
        # Named so that the state dict has the names of the published checkpoint.
        self.retrievers = nn.ModuleDict(
            {f"l{layer}": LayerIndexer(config, speed) for layer, speed in zip(config.layers, speeds, strict=True)}
        )

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "MemoryIndexer":
        """The indexer in a checkpoint folder, or in a published joint .pt or .safetensors file; weights fp32, frozen.

        Raises LsaError in one line that names the path, what is wrong with it and the remedy.
        """
        checkpoint = read_checkpoint(path)
        config = checkpoint.config
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
            indexer = cls(config, torch.zeros(config.rope.dims // 2))
        state = {
            name: x.to(device, torch.float64 if name.endswith(".inv_freq") else torch.float32)
            for name, x in checkpoint.tensors.items()
        }
        indexer.load_state_dict(state, assign=True)
        indexer.source = checkpoint.path
        return indexer.requires_grad_(False).eval()

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a checkpoint folder: config.json, model.safetensors and a model card. dtype: of the weights in it."""
        state = {name: x if name.endswith(".inv_freq") else x.to(dtype) for name, x in self.state_dict().items()}
        write_checkpoint(folder, self.config, state)

    def part(self, rank: int, ranks: int) -> "MemoryIndexer":
        """The scorers of one of `ranks` equal parts of the KV heads, which `ranks` must divide; frozen.

        They read the whole input and the part's keys. `head_logits` are those of the part's heads; kind="shared": the
        parts' `forward` add up to the whole's.
        """
        config = self.config
        require(config.kv_heads % ranks == 0, f"{ranks} ranks do not divide {config.kv_heads} KV heads")
        small = config.model_copy(update={"heads": config.heads // ranks, "kv_heads": config.kv_heads // ranks})
        with torch.device("meta"):
            part = MemoryIndexer(small, torch.zeros(config.rope.dims // 2))

        def own(name: str, x: torch.Tensor) -> torch.Tensor:
            field = name.split(".", 2)[2]  # after retrievers.l<layer>
            if field == "weights_proj.weight":
                x = x * ranks**-0.5  # the scorer divides by the root of how many heads it has
            if field == "bias" and config.kind == "shared":
                x = x / ranks
            return x.chunk(ranks)[rank].contiguous() if field in _BY_HEAD else x

        part.load_state_dict({name: own(name, x) for name, x in self.state_dict().items()}, assign=True)
        part.source = self.source
        return part.requires_grad_(False).eval()

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a scorer, ascending."""
        return self.config.layers

    def layer(self, layer: int) -> LayerIndexer:
        """The scorer of a layer. Raises LsaError if it has none."""
        if layer not in self.layers:
            raise LsaError(
                f"layer {layer} has no scorer in {self.source}: use one of {', '.join(map(str, self.layers))}"
            )
        scorer = self.retrievers[f"l{layer}"]
        assert isinstance(scorer, LayerIndexer)
        return scorer

    def require_backbone(self, fingerprint: str) -> None:
        """Raises LsaError if it was trained for a model with another fingerprint (`fingerprint_of` its folder)."""
        self.config.require_backbone(fingerprint, self.source)

    @torch.no_grad()
    def logits(
        self,
        layer: int,
        hidden: torch.Tensor,
        keys: torch.Tensor,
        positions: torch.Tensor,
        rotated: bool | None = None,
    ) -> torch.Tensor:
        """Logits fp32 [B, N] of one layer, without gradients. Arguments and errors: `LayerIndexer.forward`.

        rotated defaults to what the checkpoint says: True for the published one, False for those trained here.
        """
        return self.layer(layer)(hidden, keys, positions, rotated)

    def ensemble(self, logits: Mapping[int, torch.Tensor], mode: Literal["or", "mean"] | None = None) -> torch.Tensor:
        """Scores [B, N] in [0, 1] of logits [B, N] per layer: ``sigmoid(logit + logit_offset)``, combined over layers.

        mode: "or" is the maximum, "mean" the mean; default: the checkpoint's. Raises LsaError on a layer without a
        scorer, another mode, or no logits.
        """
        mode = mode or self.config.ensemble
        if mode not in ("or", "mean"):
            raise LsaError(f"mode={mode!r} is not a way to combine layers: use or, or mean")
        if not logits:
            raise LsaError("there are no logits to combine: give those of at least one layer")
        for layer in logits:
            self.layer(layer)
        scores = torch.stack([(x.float() + self.config.logit_offset).sigmoid() for x in logits.values()])
        return scores.amax(0) if mode == "or" else scores.mean(0)
