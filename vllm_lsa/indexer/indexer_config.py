"""What a memory indexer is, apart from its weights: the config.json of its checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_lsa.errors import LsaError
from vllm_lsa.indexer.rotary import RopeConfig

FORMAT_VERSION: Final = 1
KINDS = ("per_layer", "shared")
AGAIN = "copy the checkpoint again from where it was made, or export it again"


class DemandIndex(BaseModel):
    """The index by which a layer picks chunks with each step's own query, and the file that its tables are in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["product"] = Field(description="Name of the chunk index.")
    subspaces: int = Field(ge=1, description="Bytes that a token takes per KV head.")
    file: str = Field(pattern=r"^[\w-][\w.-]*\.safetensors$", description="Name of the file, beside config.json.")


class IndexerConfig(BaseModel):
    """Shapes, rules of use and measured quality of a memory indexer. `layers` orders every per-layer list."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format_version: Literal[1] = Field(default=FORMAT_VERSION, description="Version of this format.")
    kind: Literal["per_layer", "shared"] = Field(
        description="One resident set per layer, or one for all layers from the ensemble of a few (the paper's form)."
    )
    backbone: str = Field(description="Name of the model that it was trained for.")
    backbone_fingerprint: str | None = Field(
        default=None, description="`fingerprint_of` its folder; None if not known, then any model is accepted."
    )
    layers: tuple[int, ...] = Field(min_length=1, description="Layers that have a scorer, ascending.")
    hidden_size: int = Field(ge=1, description="Width of the scorers' input.")
    heads: int = Field(ge=1, description="Scoring heads, H.")
    kv_heads: int = Field(
        default=1, ge=1, description="Keys of a chunk; head h uses that of KV head h // (H / kv_heads)."
    )
    head_dim: int = Field(ge=1, description="Width of a key, D.")
    rank: int = Field(ge=1, description="Width between wq_a and wq_b, R.")
    rope: RopeConfig = Field(description="Dimensions of the scorers' queries that turn with their position.")
    input: Literal["hidden", "query"] = Field(
        default="hidden",
        description="What a scorer reads: the input of the attention module (after the norm), or the layer's own query "
        "vectors without RoPE, flattened.",
    )
    keys: str = Field(
        default="mean_key",
        description="What a key is: the name of a chunk index, or packed_e4m3 (DeepSeek-V4's index keys).",
    )
    rotated_keys: bool = Field(
        default=False, description="Whether keys carry the Hadamard rotation unless a caller says."
    )
    bias: bool = Field(
        default=False, description="Whether every layer has a learned scalar that is added to its logits."
    )
    weights_bias: bool = Field(
        default=False, description="Whether a learned constant is added to the weight of each head."
    )
    usage: bool = Field(
        default=False,
        description="Whether scores per KV head also weigh how much of the last period's attention a chunk had, and "
        "its age.",
    )
    attention_scaling: float = Field(
        default=1.0, gt=0, description="What RoPE multiplies queries and keys by (YaRN); input query is divided by it."
    )
    published_rounding: bool = Field(default=False, description="Round queries to bf16 before and after RoPE.")
    chunk_tokens: int = Field(default=16, ge=1, description="Tokens of a chunk.")
    period: int = Field(default=64, ge=1, description="Decode steps that a selection is for.")
    thresholds: dict[str, tuple[float, ...]] = Field(
        default={},
        description='Per budget ("0.135", or "default") the score that a chunk must exceed: one per layer, or one.',
    )
    budget_shares: dict[str, tuple[float, ...]] = Field(
        default={}, description="Per budget the share of its chunks that each layer keeps."
    )
    layer_weights: tuple[float, ...] | None = Field(
        default=None,
        description="Per layer of the backbone, with a scorer or not, how a budget is spread: 1 is the mean.",
    )
    layer_gains: tuple[float, ...] | None = Field(
        default=None,
        description="Per layer the measured gain over usage alone, in share of the next window's attention mass; with "
        "shared sets what it added to the ensemble, and the first one taken to usage.",
    )
    demand_index: DemandIndex | None = Field(default=None, description="Index for demand that comes with it.")
    ensemble: Literal["or", "mean"] = Field(
        default="or", description="How layers combine: maximum or mean of their scores."
    )
    logit_offset: float = Field(default=0.0, description="Added to logits before the sigmoid.")
    metrics: dict[str, Any] = Field(
        default={},
        description="Evaluation table: row to value, row to {column: value}, or row to a list of the latter.",
    )

    @model_validator(mode="after")
    def _check(self) -> "IndexerConfig":
        if list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"layers={list(self.layers)} must ascend from 0 or above")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if self.rope.first_dim + self.rope.dims > self.head_dim:
            raise ValueError(f"rope reaches past head_dim={self.head_dim}")
        if self.rotated_keys and self.head_dim & (self.head_dim - 1):
            raise ValueError(f"rotated_keys needs a power of two, not head_dim={self.head_dim}")
        for name, lists in (("thresholds", self.thresholds), ("budget_shares", self.budget_shares)):
            allowed = {len(self.layers)} | ({1} if name == "thresholds" else set())
            for budget, values in lists.items():
                if len(values) not in allowed:
                    raise ValueError(f"{name}[{budget!r}] has {len(values)} values for {len(self.layers)} layers")
        if self.layer_gains is not None and len(self.layer_gains) != len(self.layers):
            raise ValueError(f"layer_gains has {len(self.layer_gains)} values for {len(self.layers)} layers")
        weights = self.layer_weights
        if self.kind == "shared" and (self.usage or weights is not None):
            name = "usage" if self.usage else "layer_weights"
            raise ValueError(f"{name} is for sets of layers or heads, and kind='shared' has one set for all")
        if weights is not None and (len(weights) <= self.layers[-1] or min(weights) < 0):
            raise ValueError(f"layer_weights has {len(weights)} values, which must be 0 or more for every layer")
        return self

    @classmethod
    def parse(cls, raw: Any, path: Path) -> "IndexerConfig":
        """The config in the JSON value `raw` that was read from `path`. Raises LsaError in one line."""
        if not isinstance(raw, Mapping):
            raise LsaError(f"{path} is not a JSON object: {AGAIN}")
        version = raw.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise LsaError(f"{path} has format_version={version}, this is {FORMAT_VERSION}: upgrade vllm-lsa")
        if version is None or raw.get("kind") not in KINDS:
            named = f"kind={raw['kind']!r}" if version is not None and "kind" in raw else "no format_version and kind"
            raise LsaError(
                f"{path} has {named}, so it is not a memory indexer's (kinds: {', '.join(KINDS)}): give the folder "
                "that 'vllm-lsa train' wrote"
            )
        try:
            return cls.model_validate(dict(raw))
        except ValidationError as error:
            raise LsaError(f"{path}: {'; '.join(_explain(e) for e in error.errors())}: {AGAIN}") from None

    @classmethod
    def read(cls, path: Path) -> "IndexerConfig":
        """The config in a file. Raises LsaError in one line if it cannot be read or is not valid."""
        return cls.parse(read_json(path), path)

    def require_backbone(self, fingerprint: str, source: str | Path = "the memory indexer") -> None:
        """Raises LsaError if this was trained for a model with another fingerprint. source: the checkpoint.

        A fingerprint without a part for the weights (see `fingerprint`) is compared by what it has.
        """
        if self.backbone_fingerprint is None:
            return
        ours, theirs = self.backbone_fingerprint.split("-"), fingerprint.split("-")
        if any(a != b for a, b in zip(ours, theirs, strict=False)):
            other = "another architecture" if ours[0] != theirs[0] else "other weights"
            raise LsaError(
                f"{source} was trained for {self.backbone} (fingerprint {self.backbone_fingerprint}), and this model "
                f"has {other} (fingerprint {fingerprint}): serve that one, or train for this one with 'vllm-lsa train'"
            )


def read_json(path: Path) -> Any:
    """The JSON value in a file. Raises LsaError in one line if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LsaError(f"{path} does not exist: give a folder that holds it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise LsaError(f"{path} is not readable JSON ({first_line(error)}): {AGAIN}") from None


def first_line(error: BaseException) -> str:
    """What an exception says, in one line that is never empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{key} is not a field"
    if error["type"] == "missing":
        return f"{key} is missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}={repr(error['input'])[:60]}: {message}" if key else message
