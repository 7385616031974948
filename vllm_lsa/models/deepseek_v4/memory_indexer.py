"""The trained memory indexer that `indexer` names: found, read, and checked against the model that it shall serve.

Layers of a checkpoint count c4 layers from 0, in published files (l10, l12, l20) and in folders alike. A folder says
how fast its queries turn; for a file, which does not, they turn as the model's index keys do.
"""

from pathlib import Path
from typing import Any

import torch

from vllm_lsa.config import LsaConfig
from vllm_lsa.errors import LsaError
from vllm_lsa.indexer.checkpoint import fingerprint, fingerprint_of
from vllm_lsa.indexer.memory_indexer import MemoryIndexer
from vllm_lsa.indexer.rotary import yarn_inverse_frequencies
from vllm_lsa.indexer.trained import find
from vllm_lsa.models.deepseek_v4.scorer import PagedScorer, model_layers

_CPU = torch.device("cpu")


def checkpoint_path(indexer: str) -> Path | None:
    """What `indexer` names: a published file, a folder, or a shipped checkpoint. None if it is the name of a policy."""
    path = find(indexer) or Path(indexer)
    return path if path.suffix in (".pt", ".safetensors") or path.is_dir() else None


def load_scorer(config: LsaConfig, model_config: Any, device: torch.device = _CPU) -> PagedScorer | None:
    """The memory indexer that `config` names, for the model of vLLM's ModelConfig; None if it names a policy.

    On a CPU in fp32, which has nothing that multiplies fp8; on a CUDA device as published, bf16 and fp8. Raises
    LsaError in one line if it cannot be read, was made for another model, or its layers or shapes do not fit.
    """
    path = checkpoint_path(config.indexer)
    if path is None:
        return None
    indexer, model = MemoryIndexer.load(path, device), model_config.hf_config
    if path.is_file():
        for layer in indexer.layers:
            indexer.layer(layer).inv_freq = key_speeds(model).to(device)
    scorer = PagedScorer(indexer, "fp8" if device.type == "cuda" else "fp32")
    model_layers(indexer.layers, model.compress_ratios)
    width = indexer.config.hidden_size
    if width != model.hidden_size:
        raise LsaError(
            f"lsa.indexer={config.indexer!r} reads hidden states of {width}, this model's have {model.hidden_size}: "
            "give a checkpoint that was trained for this model"
        )
    folder = Path(model_config.model)
    known = fingerprint_of(folder) if folder.is_dir() else fingerprint(model.to_dict())
    indexer.require_backbone(known)
    return scorer


def key_speeds(model: Any) -> torch.Tensor:
    """Radians per token of the RoPE in the index keys of a model, from its Hugging Face config; float64 [32]."""
    rope = model.rope_parameters
    rope = rope.get("compress", rope)
    return yarn_inverse_frequencies(
        model.qk_rope_head_dim,
        model.compress_rope_theta,
        rope.get("factor", 1.0),
        rope.get("original_max_position_embeddings", model.max_position_embeddings),
        rope.get("beta_fast", 32),
        rope.get("beta_slow", 1),
    )


def threshold_of(config: LsaConfig, scorer: PagedScorer | None) -> float:
    """The score that an entry must exceed: as set, else the checkpoint's for this budget, else that of `LsaConfig`."""
    if scorer is None or "threshold" in config.model_fields_set:
        return config.threshold
    known = scorer.indexer.config.thresholds
    values = known.get(f"{config.budget:g}", known.get("default", ()))
    # One for each layer is for sets of layers, and here is one set.
    return values[0] if len(values) == 1 else config.threshold
