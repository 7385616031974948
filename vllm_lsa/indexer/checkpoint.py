"""Checkpoints of memory indexers: a folder of config.json, model.safetensors and a model card, or a published file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from vllm_lsa.errors import LsaError
from vllm_lsa.indexer import published
from vllm_lsa.indexer.fingerprint import fingerprint, fingerprint_of
from vllm_lsa.indexer.indexer_config import IndexerConfig
from vllm_lsa.indexer.model_card import model_card
from vllm_lsa.indexer.tensor_files import check_tensors, read_tensors

__all__ = ["Checkpoint", "IndexerConfig", "fingerprint", "fingerprint_of", "read_checkpoint", "write_checkpoint"]

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


class Checkpoint(NamedTuple):
    """path: where it was read. layout: "folder" or "published". tensors: as `tensor_shapes` names them, any float."""

    path: Path
    layout: str
    config: IndexerConfig
    tensors: dict[str, torch.Tensor]


def prefix(layer: int) -> str:
    """What the names of a layer's tensors begin with, the same in both layouts."""
    return f"retrievers.l{layer}."


def layer_shapes(config: IndexerConfig) -> dict[str, tuple[int, ...]]:
    """The weights of one layer."""
    shapes: dict[str, tuple[int, ...]] = {
        "wq_a.weight": (config.rank, config.hidden_size),
        "wq_b.weight": (config.heads * config.head_dim, config.rank),
        "q_norm_weight": (config.rank,),
        "weights_proj.weight": (config.heads, config.hidden_size),
    }
    if config.weights_bias:
        shapes["weights_bias"] = (config.heads,)
    if config.usage:
        shapes |= dict.fromkeys(("usage_gain", "usage_floor", "age_gain"), (config.kv_heads,))
    return shapes | ({"bias": ()} if config.bias else {})


def tensor_shapes(config: IndexerConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint folder: each layer's weights and the speeds of its RoPE."""
    one = {**layer_shapes(config), "inv_freq": (config.rope.dims // 2,)}
    return {prefix(layer) + name: shape for layer in config.layers for name, shape in one.items()}


def read_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint folder or a published joint file (.pt, .safetensors), checked as a whole.

    Raises LsaError in one line if it is damaged, incomplete, foreign, too new or would run code.
    """
    path = Path(path)
    if path.is_dir():
        config = IndexerConfig.read(path / CONFIG)
        tensors = read_tensors(path / WEIGHTS)
        check_tensors(tensors, tensor_shapes(config), path / WEIGHTS)
        return Checkpoint(path, "folder", config, tensors)
    if path.exists() and path.suffix not in (".pt", ".safetensors"):
        raise LsaError(f"{path} is not a checkpoint: give a checkpoint folder, or a joint .pt or .safetensors file")
    tensors = read_tensors(path)
    config = published.infer_config(tensors, path)
    weights = {prefix(layer) + name: s for layer in config.layers for name, s in layer_shapes(config).items()}
    check_tensors(tensors, weights, path)
    for layer in config.layers:
        tensors[prefix(layer) + "inv_freq"] = published.inverse_frequencies()
    return Checkpoint(path, "published", config, tensors)


def write_checkpoint(folder: str | Path, config: IndexerConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a checkpoint folder. Each file appears whole or not at all, config.json last.

    tensors: as `tensor_shapes` says. Raises LsaError in one line if they are not.
    """
    folder = Path(folder)
    check_tensors(tensors, tensor_shapes(config), folder / WEIGHTS)
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    unfinished = folder / (WEIGHTS + ".unfinished")
    save_file(contiguous, unfinished, metadata={"format": "pt"})
    unfinished.chmod(0o644)  # safetensors makes files that only their owner may read
    os.replace(unfinished, folder / WEIGHTS)
    for name, text in ((CARD, model_card(config)), (CONFIG, config.model_dump_json(indent=1) + "\n")):
        unfinished = folder / (name + ".unfinished")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, folder / name)
