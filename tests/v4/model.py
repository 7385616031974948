"""A small DeepSeek-V4 with seeded random weights: real sizes of heads, caches and selection, small ones elsewhere."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# Layers without compression, with c4 (indexer, top-k) and with c128 (all states).
RATIOS = (0, 0, 4, 128, 4, 4)
VOCABULARY = 512
_HIDDEN, _HEADS, _Q_RANK, _O_RANK, _GROUPS = 256, 4, 128, 64, 2
_HEAD, _INDEX_HEAD, _INDEX_HEADS, _ROPE = 512, 128, 16, 64
_EXPERTS, _EXPERT_SIZE, _CHOSEN, _HASH_LAYERS = 8, 64, 2, 1
_STREAMS = 4

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_size": _HIDDEN,
    "num_hidden_layers": len(RATIOS),
    "num_attention_heads": _HEADS,
    "num_key_value_heads": 1,
    "head_dim": _HEAD,
    "qk_rope_head_dim": _ROPE,
    "q_lora_rank": _Q_RANK,
    "o_lora_rank": _O_RANK,
    "o_groups": _GROUPS,
    "sliding_window": 128,
    "compress_ratios": list(RATIOS),
    "compress_rope_theta": 160000,
    "rope_theta": 10000,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    },
    "max_position_embeddings": 16384,
    "index_n_heads": _INDEX_HEADS,
    "index_head_dim": _INDEX_HEAD,
    "index_topk": 512,
    "hc_mult": _STREAMS,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "moe_intermediate_size": _EXPERT_SIZE,
    "n_routed_experts": _EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": _CHOSEN,
    "num_hash_layers": _HASH_LAYERS,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
}  # fmt: skip

# What `vllm.LLM` and, with dashes, `vllm serve` have to be told about it.
ARGUMENTS: dict[str, Any] = {
    "dtype": "bfloat16",
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": 9344,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 1 << 30,
}


class _Weights:
    """Collects tensors by name, from one generator, so that the same seed gives the same checkpoint."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, torch.Tensor] = {}

    def normal(self, name: str, *shape: int, std: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> None:
        self.tensors[name] = (std * torch.randn(*shape, generator=self.generator)).to(dtype)

    def linear(self, name: str, inputs: int, outputs: int, gain: float = 1.0) -> None:
        """Keeps the variance of its input, times gain squared."""
        self.normal(f"{name}.weight", outputs, inputs, std=gain * inputs**-0.5)

    def constant(self, name: str, value: float, *shape: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.tensors[name] = torch.full(shape, value, dtype=dtype)


def _add_streams(weights: _Weights, name: str, mixes: int, scales: int) -> None:
    weights.normal(f"{name}_fn", mixes, _STREAMS * _HIDDEN, std=(_STREAMS * _HIDDEN) ** -0.5, dtype=torch.float32)
    weights.normal(f"{name}_base", mixes, dtype=torch.float32)
    weights.constant(f"{name}_scale", 1.0, scales, dtype=torch.float32)


def _add_compressor(weights: _Weights, name: str, ratio: int, head: int, norm: float) -> None:
    width = head * (2 if ratio == 4 else 1)
    weights.linear(f"{name}.wkv", _HIDDEN, width)
    weights.linear(f"{name}.wgate", _HIDDEN, width)
    weights.normal(f"{name}.ape", ratio, width, std=0.5, dtype=torch.float32)
    weights.constant(f"{name}.norm.weight", norm, head)


def _add_attention(weights: _Weights, name: str, ratio: int, sharpness: float) -> None:
    weights.linear(f"{name}.wq_a", _HIDDEN, _Q_RANK)
    weights.constant(f"{name}.q_norm.weight", 1.0, _Q_RANK)
    weights.linear(f"{name}.wq_b", _Q_RANK, _HEADS * _HEAD)
    weights.linear(f"{name}.wkv", _HIDDEN, _HEAD)
    # Queries have length sqrt(512) and are scaled by 1 / sqrt(512): the keys' norm is the logits' deviation.
    weights.constant(f"{name}.kv_norm.weight", sharpness, _HEAD)
    weights.normal(f"{name}.attn_sink", _HEADS, dtype=torch.float32)
    weights.linear(f"{name}.wo_a", _HEADS * _HEAD // _GROUPS, _GROUPS * _O_RANK)
    # Makes attention weigh as much as the rest in what a layer adds.
    weights.linear(f"{name}.wo_b", _GROUPS * _O_RANK, _HIDDEN)
    if ratio:
        _add_compressor(weights, f"{name}.compressor", ratio, _HEAD, sharpness)
    if ratio == 4:
        weights.linear(f"{name}.indexer.wq_b", _Q_RANK, _INDEX_HEADS * _INDEX_HEAD)
        weights.linear(f"{name}.indexer.weights_proj", _HIDDEN, _INDEX_HEADS)
        _add_compressor(weights, f"{name}.indexer.compressor", ratio, _INDEX_HEAD, 1.0)


def _add_expert(weights: _Weights, name: str) -> None:
    weights.linear(f"{name}.w1", _HIDDEN, _EXPERT_SIZE)
    weights.linear(f"{name}.w3", _HIDDEN, _EXPERT_SIZE)
    weights.linear(f"{name}.w2", _EXPERT_SIZE, _HIDDEN)


def _add_experts(weights: _Weights, name: str, hashed: bool) -> None:
    weights.linear(f"{name}.gate", _HIDDEN, _EXPERTS)
    if hashed:
        order = torch.rand(VOCABULARY, _EXPERTS, generator=weights.generator).argsort(dim=1)
        weights.tensors[f"{name}.gate.tid2eid"] = order[:, :_CHOSEN].int().contiguous()
    else:
        weights.normal(f"{name}.gate.bias", _EXPERTS, std=0.1, dtype=torch.float32)
    for expert in range(_EXPERTS):
        _add_expert(weights, f"{name}.experts.{expert}")
    _add_expert(weights, f"{name}.shared_experts")


def write(folder: Path, seed: int = 0, sharpness: float = 3.0) -> Path:
    """Write the model into folder, under the names of DeepSeek's checkpoints and without a tokenizer; returns folder.

    sharpness: deviation of attention's logits. At 3 a few states in a hundred have most of the mass.
    """
    weights = _Weights(seed)
    weights.normal("embed.weight", VOCABULARY, _HIDDEN)
    for layer, ratio in enumerate(RATIOS):
        name = f"layers.{layer}"
        _add_attention(weights, f"{name}.attn", ratio, sharpness)
        _add_experts(weights, f"{name}.ffn", layer < _HASH_LAYERS)
        for part in ("attn", "ffn"):
            weights.constant(f"{name}.{part}_norm.weight", 1.0, _HIDDEN)
            _add_streams(weights, f"{name}.hc_{part}", (2 + _STREAMS) * _STREAMS, 3)
    _add_streams(weights, "hc_head", _STREAMS, 1)
    weights.constant("norm.weight", 1.0, _HIDDEN)
    weights.linear("head", _HIDDEN, VOCABULARY, gain=3.0)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    save_file(weights.tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder
