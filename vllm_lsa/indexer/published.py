"""The published joint checkpoint (FlashMemory-DeepSeek-V4): scorers of several layers in one file, no config."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from vllm_lsa.errors import LsaError
from vllm_lsa.indexer.indexer_config import AGAIN, IndexerConfig
from vllm_lsa.indexer.rotary import RopeConfig, yarn_inverse_frequencies

HEAD_DIM = 128
_ROPE = RopeConfig(style="interleaved", first_dim=64, dims=64)
_LAYER = re.compile(r"retrievers\.l(\d+)\.")


def inverse_frequencies() -> torch.Tensor:
    """DeepSeek-V4's, float64 [32]."""
    return yarn_inverse_frequencies(_ROPE.dims, base=160000, factor=16, original_length=65536)


def infer_config(tensors: Mapping[str, torch.Tensor], path: Path) -> IndexerConfig:
    """What the names and shapes of a joint file say. Raises LsaError in one line if it is no such file."""
    layers = sorted({int(match[1]) for name in tensors if (match := _LAYER.match(name))})
    if not layers:
        raise LsaError(f"{path} has no tensors retrievers.l…: give a joint checkpoint, or a folder with config.json")
    first = f"retrievers.l{layers[0]}"
    shapes = {}
    for name in ("wq_a.weight", "weights_proj.weight"):
        if f"{first}.{name}" not in tensors:
            raise LsaError(f"{path} lacks {first}.{name}: {AGAIN}")
        shape = tensors[f"{first}.{name}"].shape
        if len(shape) != 2 or 0 in shape:
            raise LsaError(f"{path}: {first}.{name} has shape {list(shape)}, not two dimensions: {AGAIN}")
        shapes[name] = shape
    rank, hidden_size = shapes["wq_a.weight"]
    return IndexerConfig(
        kind="shared",
        backbone="DeepSeek-V4-Flash",
        layers=tuple(layers),
        hidden_size=hidden_size,
        heads=shapes["weights_proj.weight"][0],
        head_dim=HEAD_DIM,
        rank=rank,
        rope=_ROPE,
        keys="packed_e4m3",
        rotated_keys=True,
        published_rounding=True,
        chunk_tokens=4,
        thresholds={"default": (0.5,)},
    )
