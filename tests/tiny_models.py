"""Hugging Face folders of two-layer models without weights: enough for vLLM to read what a model is."""

import json
import shutil
from pathlib import Path
from typing import Any

from tests.paths import MODEL

_SIZES: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
_FULL = ["full_attention"] * 2
_GEMMA2 = {"model_type": "gemma2", "head_dim": 16}

# name: (architecture, its configuration besides _SIZES)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral_window": ("MistralForCausalLM", {"model_type": "mistral", "sliding_window": 256}),
    "qwen2_unused_window": (
        "Qwen2ForCausalLM", {"model_type": "qwen2", "sliding_window": 256, "use_sliding_window": False},
    ),
    "gemma2_softcap": (
        "Gemma2ForCausalLM", {**_GEMMA2, "attn_logit_softcapping": 50.0, "sliding_window": None, "layer_types": _FULL},
    ),
    "gemma2_layer_types": (
        "Gemma2ForCausalLM", {**_GEMMA2, "sliding_window": 256, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt_oss_sinks": (
        "GptOssForCausalLM",
        {"model_type": "gpt_oss", "head_dim": 16, "sliding_window": None, "layer_types": _FULL, "num_local_experts": 4},
    ),
    # Its sinks show in no key that is common to models: only the layer tells.
    "granite_sinks": ("GraniteForCausalLM", {"model_type": "granite", "attention_sinks": True}),
    "deepseek_mla": (
        "DeepseekV2ForCausalLM",
        {
            "model_type": "deepseek_v2", "kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        },
    ),
    "bert_encoder": ("BertModel", {"model_type": "bert", "max_position_embeddings": 512}),
    "bloom_alibi": ("BloomForCausalLM", {"model_type": "bloom", "n_layer": 2, "n_head": 4}),
    "falcon_alibi": ("FalconForCausalLM", {"model_type": "falcon", "alibi": True}),
    "whisper_encoder_decoder": (
        "WhisperForConditionalGeneration",
        {
            "model_type": "whisper", "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_target_positions": 448,
        },
    ),
}  # fmt: skip


def write(name: str, folder: Path) -> Path:
    """Write the model of that name into folder/name, with SmolLM2's tokenizer; returns the path."""
    architecture, settings = MODELS[name]
    target = folder / name
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps({"architectures": [architecture], **_SIZES, **settings}, indent=1))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / file, target / file)
    return target


def write_random(folder: Path, layers: int = 4, q_heads: int = 8, kv_heads: int = 4, head_dim: int = 64) -> Path:
    """Write a Llama with seeded random fp32 weights, without a tokenizer (vocabulary: 512 token ids); returns folder.

    Its queries and keys are large enough for attention that is neither even nor on one token alone.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=32 * q_heads, intermediate_size=512, num_hidden_layers=layers, head_dim=head_dim,
        num_attention_heads=q_heads, num_key_value_heads=kv_heads, max_position_embeddings=8192,
        initializer_range=0.06, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 2
            layer.self_attn.k_proj.weight *= 2
    model.save_pretrained(folder)
    return folder
