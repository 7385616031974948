"""What a training run is told: one model of settings for all steps, stored in the run's folder."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_lsa.errors import LsaError

STEPS = ("data", "capture", "label", "train", "calibrate", "evaluate", "export")
LAYOUT = 2  # of the files in OUT/work; raise it when older ones can no longer be read


def _field(step: str, description: str, default: Any = None, **limits: Any) -> Any:
    """A setting that matters from `step` on. Default None: worked out from the model and device."""
    return Field(default=default, description=description, json_schema_extra={"step": step}, **limits)


class Settings(BaseModel):
    """All settings of a run, resolved. Their order is that of the steps; each belongs to the first that it changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = _field("data", "folder of the Hugging Face model", ...)
    text: str = _field("data", "folder of documents: .txt, .md, .jsonl, Hugging Face datasets", ...)
    device: str = _field("", "cpu, cuda or auto", "auto")
    seed: int = _field("data", "decides every choice that is made at random", 0)
    context: int = _field("data", "tokens of a window (default: 8192 on a GPU, else 4096, or the model's)", ge=64)
    documents: int = _field("data", "windows to train with (default: 48 on a GPU, else 16)", ge=1)
    retrieval_share: float = _field("data", "share of the windows that are synthetic retrieval text", 0.3, ge=0, le=1)
    heldout: str = _field("data", "folder of documents to evaluate on (default: documents of --text that are not used)")
    heldout_documents: int = _field("data", "windows to evaluate on (default: 4 on a GPU, else 3)", ge=1)

    dtype: Literal["float32", "bfloat16"] = _field(
        "capture", "of the backbone (default: bfloat16 on a GPU for models of more than 1 GiB, else float32)"
    )
    chunk_tokens: int = _field("capture", "tokens of a chunk", 8, ge=1)
    period: int = _field("capture", "decode steps that a selection is for", 64, ge=1)
    window: int = _field("capture", "tokens after a cycle's end whose attention is learned (default: period)", ge=1)
    first: int = _field("capture", "tokens before the first cycle (default: 512, or a quarter of the context)", ge=1)
    kept: int = _field(
        "capture",
        "chunks per cycle and KV head whose attention mass is stored one by one (DeepSeek-V4: 4096)",
        192,
        ge=1,
    )
    usage_decay: float = _field(
        "capture", "share of its usage that a chunk keeps per step; 1 takes the mean over a period", 0.7, gt=0, le=1
    )
    key_sample: int = _field("capture", "keys per layer and KV head that the demand index is fitted to", 24000, ge=256)

    candidates: tuple[int, ...] = _field(
        "capture",
        "DeepSeek-V4: layers that may get a scorer, counted among c4 layers from 0 (default: 10 12 20 of the 21 of "
        "V4-Flash, else all)",
    )
    native_top_p: float = _field(
        "capture",
        "DeepSeek-V4: share of the softmax over a token's native top-k that its golden entries hold; 1 takes the whole "
        "top-k (default: 0.6)",
        gt=0,
        le=1,
    )
    engine: str = _field("", "DeepSeek-V4: further arguments of vllm.LLM for the capture, a JSON object")

    form: Literal["per_layer", "shared"] = _field(
        "label",
        "per_layer: layers and KV heads have sets of their own; shared: one set for all layers, chosen by the ensemble "
        "of a few (the paper's form)",
        "per_layer",
    )
    top_p: float = _field("label", "share of the attention mass that positives hold together", 0.9, gt=0, le=1)
    sink_tokens: int = _field("label", "first tokens, which are always kept and so not learned", 16, ge=0)
    recency_tokens: int = _field("label", "newest tokens, likewise", 32, ge=0)

    golden_layers: int = _field(
        "label",
        "shared: a chunk is a positive if it is one in so many layers (default: a seventh of them, the paper's share)",
        ge=1,
    )

    loss: Literal["soft", "bce", "focal"] = _field(
        "train", "soft: cross-entropy with the attention mass; bce, focal: with the positives", "soft"
    )
    rank: int = _field(
        "train", "width of the query side (default: 4 heads' width, at least 256; DeepSeek-V4: twice the native)", ge=1
    )
    heads: int = _field("train", "DeepSeek-V4: scoring heads (default: twice the native indexer's)", ge=1)
    weight_decay: float = _field("train", "DeepSeek-V4: AdamW's (default: 0.01; other models: none)", ge=0)
    steps: int = _field("train", "optimiser steps (default: 480 on a GPU, else 240)", ge=1)
    cycles: int = _field("train", "cycles per step", 48, ge=1)
    learning_rate: float = _field("train", "the highest one; it falls along a cosine", 1e-3, gt=0)
    hard_weight: float = _field("train", "weight of hard negatives: used last, not next", 1.5, ge=1)
    save_every: int = _field("", "optimiser steps between two saved states", 50, ge=1)
    budget: float = _field("train", "share of chunks kept where layers' gains are measured", 0.1, gt=0, le=1)
    layers: int = _field("train", "shared: most layers of the ensemble (default: 3)", ge=1)
    min_gain: float = _field(
        "train", "gain in recall that a layer must bring: over usage alone; shared: to the ensemble", 0.002
    )

    subspaces: int = _field("calibrate", "bytes per token and KV head of the demand index", 8, ge=1)
    budgets: tuple[float, ...] = _field(
        "calibrate", "shares of chunks to calibrate for", (0.05, 0.075, 0.1, 0.135, 0.16, 0.2), min_length=1
    )
    damage: bool = _field("calibrate", "spread the budget over layers by the damage that each does alone", True)
    damage_power: float = _field("calibrate", "power of the damage in a layer's weight", 0.4, ge=0)
    damage_budget: float = _field("calibrate", "share of chunks at which the damage is measured", 0.05, gt=0, le=1)
    damage_windows: int = _field("calibrate", "windows that it is measured on", 2, ge=1)
    demand_chunks: int = _field("calibrate", "chunks that each step may demand per KV head, in measurements", 8, ge=1)
    measure_every: int = _field(
        "calibrate", "of so many periods of a window, one is measured (default: 2 on a GPU, else 4)", ge=1
    )

    evaluate: bool = _field("evaluate", "measure quality on held-out documents", True)
    evaluate_budgets: tuple[float, ...] = _field(
        "evaluate", "shares of chunks to measure at (default: 0.075 and 0.135 on a GPU, else 0.1)", min_length=1
    )

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        for name, unit in (("period", "chunk_tokens"), ("window", "period"), ("first", "period")):
            if getattr(self, name) % getattr(self, unit):
                raise ValueError(f"{name}={getattr(self, name)} is not a multiple of {unit}={getattr(self, unit)}")
        if self.context % self.chunk_tokens:
            raise ValueError(f"context={self.context} is not a multiple of chunk_tokens={self.chunk_tokens}")
        if self.first < self.period:
            raise ValueError(f"first={self.first} is less than period={self.period}")
        if self.first + self.window > self.context:
            raise ValueError(
                f"context={self.context} has no room for a cycle after first={self.first} with window={self.window}"
            )
        return self

    @property
    def shared(self) -> bool:
        """Whether one set is for all layers."""
        return self.form == "shared"

    @property
    def v4(self) -> bool:
        """Whether the model is a DeepSeek-V4."""
        return self.candidates is not None

    @property
    def starts(self) -> range:
        """Tokens at which cycles start: the last query before one is seen, the window from there on is learned."""
        return range(self.first, self.context - self.window + 1, self.period)

    @property
    def chunks(self) -> int:
        """Chunks of a window of text."""
        return self.context // self.chunk_tokens

    @property
    def validation(self) -> list[int]:
        """Windows that are not trained on but measured on: every eighth, the last one of fewer, the only one too."""
        return list(range(7, self.documents, 8)) or [self.documents - 1]

    @property
    def training(self) -> list[int]:
        """Windows that are trained on."""
        return [i for i in range(self.documents) if i not in self.validation] or [0]

    @property
    def captured(self) -> int:
        """Windows that are captured and labelled: with V4 those to evaluate on too, behind those to train with."""
        return self.documents + (self.heldout_documents if self.v4 else 0)

    def torch_device(self) -> str:
        """ "cpu" or "cuda", that of this process's rank."""
        if resolve_device(self.device) == "cpu":
            return "cpu"
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"

    def hash_of(self, step: str) -> str:
        """Of everything that decides what `step` makes: its own settings and those of the steps before it."""
        steps = STEPS[: STEPS.index(step) + 1]
        # Settings that a model does not have are None, and no part of it: runs outlive new ones.
        told = {name: getattr(self, name) for name in type(self).model_fields if step_of(name) in steps}
        facts = {name: value for name, value in told.items() if value is not None}
        return hashlib.sha256(json.dumps({"layout": LAYOUT, **facts}, sort_keys=True).encode()).hexdigest()[:16]


def step_of(name: str) -> str:
    """The first step that a setting changes; "" if it changes no result."""
    extra = Settings.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["step"])


def choices_of(name: str) -> tuple[str, ...] | None:
    """The values of a setting that has few."""
    annotation = Settings.model_fields[name].annotation
    return get_args(annotation) if get_origin(annotation) is Literal else None


def resolve_device(device: str) -> str:
    """ "cpu" or "cuda" for "auto". Raises LsaError on another name, or "cuda" where there is none."""
    if device not in ("auto", "cpu", "cuda"):
        raise LsaError(f"--device {device} is not known: use cpu, cuda or auto")
    if device == "cpu":
        return "cpu"
    # Asked through the driver: a process that has initialised CUDA cannot fork the steps.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise LsaError("--device cuda: torch sees no CUDA device here: use --device cpu")
    return "cpu"


def read_settings(out: Path) -> dict[str, Any]:
    """What the run in `out` was told; empty if there is none. Raises LsaError if its file is damaged."""
    path = out / "work" / "settings.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.pop("layout", None) != LAYOUT:
        raise LsaError(f"{path} is not of this version of 'vllm-lsa train': give another --out")
    return content


def resolve(out: Path, given: Mapping[str, Any]) -> Settings:
    """The settings of the run in `out`: those given now, else those of its earlier calls, else defaults.

    Raises LsaError in one line if a value is bad, the model or text is missing or unsuited, or a step that has begun
    was told something else.
    """
    given = dict(given)
    for name in ("model", "text", "heldout"):
        if given.get(name) is not None:
            given[name] = str(Path(given[name]).resolve())
    stored = read_settings(out)
    if not stored and out.is_dir() and any(path.name != "work" for path in out.iterdir()):
        raise LsaError(f"--out {out} is not empty and holds no run of 'vllm-lsa train': give another folder")
    for name, value in given.items():
        old = stored.get(name)
        if name in stored and step_of(name) and json.dumps(value) != json.dumps(old):
            begun = out / "work" / step_of(name)
            if begun.exists():
                flag = "--" + name.replace("_", "-")
                raise LsaError(f"--out {out} is of a run with {flag} {old}, not {value}: give that, or another --out")
    values = {**stored, **given}
    for name in ("model", "text"):
        if name not in values:
            raise LsaError(f"--out {out} holds no run yet: give --model and --text as well")
    _fill_v4(values, given)
    shared = values.get("form") == "shared"
    for name in ("layers", "golden_layers"):
        if name in given and not shared:
            flag = "--" + name.replace("_", "-")
            raise LsaError(f"{flag} is of --form shared alone: give that as well, or leave {flag} out")
    if shared and given.get("damage"):
        raise LsaError("--damage spreads a budget over layers, and --form shared has one set for all: leave it out")
    _fill(values)
    try:
        return Settings.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + str(first["loc"][0]).replace("_", "-") + f" {first['input']}: " if first["loc"] else ""
        raise LsaError(name + first["msg"].removeprefix("Value error, ")) from None


def _fill_v4(values: dict[str, Any], given: Mapping[str, Any]) -> None:
    """What is different with a DeepSeek-V4, or the refusal of its settings for another model."""
    from indexer_training import v4_model

    if v4_model.is_v4(Path(values["model"])):
        v4_model.fill(values, given, resolve_device(values.get("device", "auto")))
        return
    for name in v4_model.ONLY:
        if name in given:
            raise LsaError(f"--{name.replace('_', '-')} is of DeepSeek-V4 alone: leave it out")


def _fill(values: dict[str, Any]) -> None:
    """Work out, in place, what was not said."""
    from indexer_training.backbone import Shape
    from indexer_training.v4_model import V4Shape

    kind = Shape if values.get("candidates") is None else V4Shape
    shape: Shape | V4Shape = kind.read(Path(values["model"]))
    gpu = resolve_device(values.get("device", "auto")) == "cuda"
    fields = {name: field.default for name, field in Settings.model_fields.items() if not field.is_required()}
    for name, value in fields.items():
        values.setdefault(name, value)
    chunk, period = max(1, int(values["chunk_tokens"])), max(1, int(values["period"]))

    def default(name: str, value: Any) -> None:
        if values[name] is None:
            values[name] = value

    if values["context"] is None:
        context = 8192 if gpu else 4096
        values["context"] = min(context, shape.max_context or context) // chunk * chunk
    elif shape.max_context and values["context"] > shape.max_context:
        raise LsaError(
            f"--context {values['context']} is longer than the {shape.max_context} tokens of {values['model']}: "
            f"use --context {shape.max_context} or less"
        )
    default("documents", 48 if gpu else 16)
    default("heldout", "")
    default("heldout_documents", 4 if gpu else 3)
    default("dtype", "bfloat16" if gpu and shape.weight_bytes > 1 << 30 else "float32")
    default("window", period)
    default("first", max(min(512, values["context"] // 4) // period, 1) * period)
    default("rank", min(shape.heads * shape.head_dim, max(256, 4 * shape.head_dim)))
    default("golden_layers", max(1, round(shape.layers / 7)))
    default("layers", min(3, shape.layers))
    default("steps", 480 if gpu else 240)
    default("measure_every", 2 if gpu else 4)
    default("evaluate_budgets", (0.075, 0.135) if gpu else (0.1,))
    for name in ("layers", "golden_layers"):
        if values[name] > shape.layers:
            flag = "--" + name.replace("_", "-")
            raise LsaError(f"{flag} {values[name]} is more than the {shape.layers} layers of {values['model']}")
    if shape.head_dim % values["subspaces"]:
        raise LsaError(f"--subspaces {values['subspaces']} does not divide the model's head_dim={shape.head_dim}")


def write_settings(out: Path, settings: Settings) -> None:
    """Store them in the run's folder, whole or not at all."""
    path = out / "work" / "settings.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    content = {"layout": LAYOUT, **settings.model_dump(exclude_none=True)}
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
