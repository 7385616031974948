"""DeepSeek-V4 as training sees it: its shape from config.json, settings, and a scorer that begins as its own indexer.

Layers are counted among the model's c4 layers from 0, as in the published checkpoint.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_lsa.errors import LsaError

if TYPE_CHECKING:
    import torch

    from indexer_training.workspace import Workspace
    from vllm_lsa.indexer import MemoryIndexer

PUBLISHED = (10, 12, 20)
"""c4 layers of V4-Flash that the published memory indexer scores; candidates of a model with as many c4 layers."""
_PUBLISHED_OF = 21

ONLY = ("candidates", "native_top_p", "heads", "weight_decay", "engine")
"""Settings that no other model has."""
_WITHOUT_MEANING = (
    "usage_decay", "key_sample", "subspaces", "damage", "damage_power", "damage_budget", "damage_windows",
    "demand_chunks", "measure_every",
)  # fmt: skip
_DEFAULTS: dict[str, Any] = {
    "form": "shared",
    "dtype": "bfloat16",
    "chunk_tokens": 4,
    "period": 64,
    "native_top_p": 0.6,
    "top_p": 1.0,  # the union over the window
    "sink_tokens": 256,  # sink and recency as served
    "recency_tokens": 2048,
    "loss": "bce",
    "cycles": 64,
    "learning_rate": 1e-4,
    "weight_decay": 0.01,
    "budget": 0.2,  # of which sink and recency take half, at this length of text
    "evaluate_budgets": (0.135, 0.2, 0.3),
    "min_gain": -1.0,  # as many layers as asked for
}
_CONTEXT = {"cuda": 32768, "cpu": 4096}
_MOST_KEPT = 4096


@dataclass(frozen=True)
class V4Shape:
    """What training needs to know of a DeepSeek-V4; the fields that `backbone.Shape` has too mean the same."""

    layers: int
    """c4 layers."""
    hidden_size: int
    heads: int
    """Of the native indexer."""
    head_dim: int
    q_rank: int
    """Width between the native indexer's query matrices."""
    top_k: int
    """Entries that the native indexer chooses."""
    rope: tuple[float, float, int, float, float]
    """Base, factor, original length, β fast and slow of the c4 layers' RoPE."""
    max_context: int
    weight_bytes: int
    name: str

    @classmethod
    def read(cls, folder: Path) -> "V4Shape":
        """Of a Hugging Face folder of a DeepSeek-V4. Raises LsaError in one line if it cannot be trained for."""
        from vllm_lsa.indexer.indexer_config import read_json
        from vllm_lsa.indexer.published import HEAD_DIM
        from vllm_lsa.models.deepseek_v4.specs import C4_TOKENS

        raw = read_json(folder / "config.json")
        needed = ("num_hidden_layers", "hidden_size", "compress_ratios", "index_n_heads", "q_lora_rank", "index_topk")
        for key in (*needed, "compress_rope_theta", "max_position_embeddings"):
            if not raw.get(key):
                raise LsaError(f"--model {folder}: its config.json lacks {key}: give a whole DeepSeek-V4")
        layers = list(raw["compress_ratios"])[: raw["num_hidden_layers"]].count(C4_TOKENS)
        if not layers:
            raise LsaError(f"--model {folder} has no c4 layers (compress_ratios), so there is nothing to train for")
        for key, known in (("index_head_dim", HEAD_DIM), ("qk_rope_head_dim", 64)):
            if raw.get(key, known) != known:
                raise LsaError(f"--model {folder}: {key}={raw[key]} is not DeepSeek-V4's {known}: give another model")
        weights = [path.stat().st_size for path in folder.glob("*.safetensors")]
        if not weights:
            raise LsaError(f"--model {folder} has no .safetensors weights: download or convert it again")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        rope = rope.get("compress", rope)
        length = rope.get("original_max_position_embeddings", raw["max_position_embeddings"])
        return cls(
            layers=layers,
            hidden_size=raw["hidden_size"],
            heads=raw["index_n_heads"],
            head_dim=HEAD_DIM,
            q_rank=raw["q_lora_rank"],
            top_k=raw["index_topk"],
            rope=(
                raw["compress_rope_theta"],
                rope.get("factor", 1.0),
                length,
                rope.get("beta_fast", 32),
                rope.get("beta_slow", 1),
            ),
            # vLLM counts the token that it makes after the window.
            max_context=raw["max_position_embeddings"] - 1,
            weight_bytes=sum(weights),
            name=folder.resolve().name,
        )

    def inverse_frequencies(self) -> "torch.Tensor":
        """Radians per token of the c4 layers' RoPE, float64 [32]."""
        from vllm_lsa.indexer.rotary import yarn_inverse_frequencies

        base, factor, length, fast, slow = self.rope
        return yarn_inverse_frequencies(64, base, factor, length, fast, slow)


def is_v4(folder: Path) -> bool:
    """Whether a model folder is of DeepSeek-V4, from its config.json."""
    from vllm_lsa.indexer.indexer_config import read_json

    if not (folder / "config.json").is_file():
        return False
    raw = read_json(folder / "config.json")
    named = raw.get("architectures") or [] if isinstance(raw, Mapping) else []
    return isinstance(raw, Mapping) and (raw.get("model_type") == "deepseek_v4" or "DeepseekV4ForCausalLM" in named)


def read_engine(text: str | None) -> dict[str, Any]:
    """Arguments of `vllm.LLM` from --engine. Raises LsaError if it is no JSON object."""
    try:
        given = json.loads(text or "{}")
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise LsaError(f"--engine {text} is no JSON object: give arguments of vllm.LLM as one")
    return given


def fill(values: dict[str, Any], given: Mapping[str, Any], device: str) -> None:
    """Work out, in place, what was not said and is different with V4. device: "cpu" or "cuda".

    Raises LsaError in one line on a setting that V4 cannot follow.
    """
    shape = V4Shape.read(Path(values["model"]))
    for name in _WITHOUT_MEANING:
        if name in given:
            flag = "--" + name.replace("_", "-")
            raise LsaError(
                f"{flag} has no meaning for DeepSeek-V4, which has no product tables or demand: leave it out"
            )

    read_engine(values.get("engine"))

    def default(name: str, value: Any) -> None:
        if values.get(name) is None:
            values[name] = value

    for name, value in _DEFAULTS.items():
        default(name, value)
    for name, known in (("form", "shared"), ("chunk_tokens", 4)):
        if values[name] != known:
            flag = "--" + name.replace("_", "-")
            raise LsaError(f"{flag} {values[name]} does not work with DeepSeek-V4: use {flag} {known}, or leave it out")
    if values["loss"] == "soft":
        raise LsaError("--loss soft needs a bias, which the published layout has not: use --loss bce or focal")
    default("candidates", PUBLISHED if shape.layers == _PUBLISHED_OF else tuple(range(shape.layers)))
    candidates = list(values["candidates"])
    if (
        not candidates
        or candidates != sorted(set(candidates))
        or not 0 <= candidates[0] <= candidates[-1] < shape.layers
    ):
        raise LsaError(
            f"--candidates {' '.join(map(str, candidates))}: name c4 layers of {values['model']}, which has "
            f"{shape.layers}, ascending from 0 to {shape.layers - 1}"
        )
    default("layers", min(3, len(candidates)))
    if values["layers"] > len(candidates):
        raise LsaError(f"--layers {values['layers']} is more than the {len(candidates)} of --candidates: use fewer")
    default("context", min(_CONTEXT[device], shape.max_context // 4 * 4))
    # Up to there the native indexer chooses everything.
    period, chosen = max(1, int(values["period"])), 4 * shape.top_k
    first = (chosen // period + 1) * period
    if first + (values.get("window") or period) <= values["context"]:
        default("first", first)
    default("kept", max(1, min(_MOST_KEPT, int(values["context"]) // 4)))
    # The published scorer is to V4-Flash as these are to another.
    default("rank", 2 * shape.q_rank)
    default("heads", 2 * shape.heads)


def untrained(work: "Workspace") -> "MemoryIndexer":
    """An indexer of the published layout with a scorer for each candidate, its weights random."""
    import torch

    from vllm_lsa.indexer import IndexerConfig, MemoryIndexer
    from vllm_lsa.indexer.rotary import RopeConfig

    s = work.settings
    shape = V4Shape.read(Path(s.model))
    config = IndexerConfig(
        kind="shared",
        backbone=shape.name,
        layers=s.candidates,
        hidden_size=shape.hidden_size,
        heads=s.heads,
        head_dim=shape.head_dim,
        rank=s.rank,
        rope=RopeConfig(style="interleaved", first_dim=shape.head_dim - 64, dims=64),
        keys="packed_e4m3",
        rotated_keys=False,  # vLLM's cache is not
        chunk_tokens=s.chunk_tokens,
        period=s.period,
    )
    torch.manual_seed(s.seed)
    return MemoryIndexer(config, shape.inverse_frequencies())


def initialise(indexer: "MemoryIndexer", work: "Workspace") -> str:
    """Make each scorer's logits those of the layer's native indexer, if it has no fewer heads and no less rank.

    Rows of wq_a are repeated, so that the norm over them is the native one, and repeats and further heads count
    nothing at first. A smaller scorer keeps its random weights. Returns which it is, for people.
    """
    import torch
    from safetensors.torch import load_file

    native = load_file(work.folder("capture") / "model.safetensors")
    config = indexer.config
    with torch.no_grad():
        for layer in config.layers:
            weights = {name: native[f"l{layer}.{name}"].float() for name in ("wq_a", "q_norm", "wq_b", "weights_proj")}
            rank, heads = len(weights["wq_a"]), len(weights["weights_proj"])
            if config.rank < rank or config.heads < heads:
                return f"random: {config.heads} heads of rank {config.rank} are fewer than the native {heads} of {rank}"
            scorer = indexer.layer(layer)
            rows = torch.arange(config.rank) % rank
            scorer.wq_a.weight.copy_(weights["wq_a"][rows])
            scorer.q_norm_weight.copy_(weights["q_norm"][rows])
            own = scorer.wq_b.weight[: heads * config.head_dim]
            own.zero_()
            own[:, :rank] = weights["wq_b"]
            scorer.weights_proj.weight.zero_()
            # The scorer divides by the root of how many heads it has.
            scorer.weights_proj.weight[:heads] = weights["weights_proj"] * (config.heads / heads) ** 0.5
    return "the native indexer's weights (wq_a, q_norm, wq_b, weights_proj)"
