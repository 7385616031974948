"""The model that an indexer is for: its shape from config.json alone, and loaded, with its attention handed to us."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_lsa.errors import LsaError

ATTENTION = "lsa_training"  # the name by which transformers knows ours
OTHER = "give a dense decoder with grouped-query attention, as Llama or Qwen are"


@dataclass(frozen=True)
class Shape:
    """What training needs to know of a model before it is loaded."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    max_context: int
    """Tokens; 0 if its config does not say."""
    weight_bytes: int
    name: str

    @classmethod
    def read(cls, folder: Path) -> "Shape":
        """Of a Hugging Face folder. Raises LsaError in one line if it is none, or of a model that this cannot train."""
        from vllm_lsa.indexer.indexer_config import read_json

        if not (folder / "config.json").is_file():
            raise LsaError(f"--model {folder} is not a model folder: it has no config.json")
        raw = read_json(folder / "config.json")
        if not isinstance(raw, Mapping):
            raise LsaError(f"--model {folder}: its config.json is not a JSON object")
        reason = unsuited(raw)
        if reason:
            raise LsaError(f"--model {folder}: {reason}: {OTHER}")
        weights = [path.stat().st_size for path in folder.glob("*.safetensors")]
        if not weights:
            raise LsaError(f"--model {folder} has no .safetensors weights: download or convert it again")
        heads, width = raw["num_attention_heads"], raw["hidden_size"]
        return cls(
            layers=raw["num_hidden_layers"],
            hidden_size=width,
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or width // heads,
            max_context=raw.get("max_position_embeddings") or 0,
            weight_bytes=sum(weights),
            name=folder.resolve().name,
        )


def unsuited(config: Mapping[str, Any]) -> str:
    """Why a model cannot be trained for, from its config.json; "" if it can."""
    missing = [key for key in ("num_hidden_layers", "hidden_size", "num_attention_heads") if not config.get(key)]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = set(config.get("layer_types") or [])
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    architecture = str((config.get("architectures") or [""])[0])
    reasons = {
        f"its config.json lacks {missing[0] if missing else ''}": bool(missing),
        "it is an encoder or encoder-decoder": bool(config.get("is_encoder_decoder"))
        or not architecture.endswith(("ForCausalLM", "LMHeadModel", "")),
        "it has multi-head latent attention": bool(config.get("kv_lora_rank")),
        "it has layers without full attention": bool(kinds - {"full_attention"}),
        "it has a sliding window": bool(window) and "full_attention" not in kinds,
        "it caps attention logits": bool(config.get("attn_logit_softcapping")),
        "it has attention sinks": config.get("model_type") == "gpt_oss",
        "it has ALiBi positions": bool(config.get("alibi")) or config.get("model_type") in ("bloom", "mpt", "step1"),
        "its RoPE changes with the length of the text": isinstance(rope, Mapping)
        and (rope.get("rope_type") or rope.get("type")) in ("dynamic", "longrope", "su"),
    }
    if not missing:
        heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
        reasons["its KV heads do not divide its heads"] = bool(kv_heads) and heads % int(kv_heads or 1) != 0
    return next((reason for reason, holds in reasons.items() if holds), "")


def quiet() -> None:
    """No bars and warnings of transformers between ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@dataclass(frozen=True)
class Rotary:
    """How a loaded model turns queries and keys."""

    inv_freq: Any
    """Radians per token, float64 [layers, dims / 2]; 0 in layers without RoPE."""
    scaling: float
    """What RoPE multiplies them by besides (YaRN)."""
    style: str
    dims: int


class Backbone:
    """A model without its language-model head, whose attention calls `attend`.

    attend: ``(layer, q [Hq, T, D], k [Hkv, T, D], v [Hkv, T, D], scale) -> [Hq, T, D]``, of one window.
    """

    def __init__(self, folder: Path, device: str, dtype: str) -> None:
        """Raises LsaError in one line if transformers cannot load it or rotates in a way that is not known here."""
        import torch
        from transformers import AttentionInterface, AutoModel

        quiet()
        AttentionInterface.register(ATTENTION, self._attention)
        try:
            self.model = AutoModel.from_pretrained(
                folder, dtype=getattr(torch, dtype), attn_implementation=ATTENTION, local_files_only=True
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise LsaError(f"--model {folder} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
        self.model = self.model.to(device).eval()
        self.device = device
        self.attend: Callable[..., Any] | None = None
        self.rotary = self._rotary(folder)

    def _attention(
        self, module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **_: Any
    ) -> tuple[Any, None]:
        assert self.attend is not None
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        out = self.attend(int(module.layer_idx), query[0], key[0], value[0], scale)
        return out.unsqueeze(0).transpose(1, 2), None

    def run(self, tokens: Any, attend: Callable[..., Any]) -> None:
        """One window of tokens [T] through all layers."""
        import torch

        self.attend = attend
        with torch.no_grad():
            self.model(input_ids=tokens.view(1, -1).long().to(self.device), use_cache=False)
        self.attend = None

    def _rotary(self, folder: Path) -> Rotary:
        import sys

        import torch

        from vllm_lsa.indexer.rotary import RopeConfig, rotate

        config = self.model.config
        layers = [m for m in self.model.modules() if hasattr(m, "layer_idx") and hasattr(m, "q_proj")]
        layers = layers or [m for m in self.model.modules() if hasattr(m, "layer_idx") and hasattr(m, "qkv_proj")]
        embedding = getattr(self.model, "rotary_emb", None)
        if embedding is None or len(layers) != config.num_hidden_layers:
            raise LsaError(f"--model {folder}: its attention or its RoPE is not of a kind that is known here: {OTHER}")
        inv_freq = embedding.inv_freq.detach().double().cpu()
        scaling = float(getattr(embedding, "attention_scaling", 1.0))
        dims = 2 * len(inv_freq)
        # The two ways to pair dimensions are told apart by the model's own function.
        apply = getattr(sys.modules[type(self.model).__module__], "apply_rotary_pos_emb", None)
        heads, head_dim = 2, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        positions = torch.tensor([[3, 70]])
        x = torch.randn(1, heads, 2, head_dim, generator=torch.Generator().manual_seed(0))
        cos, sin = (c.cpu().float() for c in embedding(x.to(self.device), positions.to(self.device)))
        try:
            turned = apply(x, x, cos, sin)[0] if apply is not None else None
        except (RuntimeError, TypeError):  # it turns some dims only, and is given these
            turned = None
        if turned is None and apply is not None and dims < head_dim:
            turned = torch.cat([apply(x[..., :dims], x[..., :dims], cos, sin)[0], x[..., dims:] * scaling], -1)
        for style in ("halves", "interleaved"):
            rope = RopeConfig.model_validate({"style": style, "dims": dims})
            ours = rotate(x[0].transpose(0, 1), positions[0], inv_freq, rope).transpose(0, 1) * scaling
            if turned is not None and torch.allclose(turned[0], ours, atol=1e-4):
                turning = [bool(getattr(layer, "use_rope", True)) for layer in layers]  # SmolLM3 has layers without
                speeds = [inv_freq * float(turns) for turns in turning]
                return Rotary(torch.stack(speeds), scaling, style, dims)
        raise LsaError(f"--model {folder}: its RoPE is of a kind that is not known here: {OTHER}")
