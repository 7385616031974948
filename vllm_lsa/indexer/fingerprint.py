"""Fingerprints of backbones: whether an indexer was trained for this model."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_lsa.errors import LsaError
from vllm_lsa.indexer.indexer_config import first_line, read_json

_DIGITS = 12
_ROWS = 4
_QUERY_WEIGHT = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.\w+\.(?:q_proj|qkv_proj|query_key_value|c_attn)\.weight$")


def fingerprint(hf_config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> str:
    """A short stable hash of what decides whether an indexer suits a model.

    hf_config: its config.json; the same model saved by transformers 4 and 5 gives the same. tensors: sampled rows of
    its weights, any float dtype. Returns "ARCHITECTURE-WEIGHTS", 12 hexadecimal digits each, or the first part alone.
    """
    heads = hf_config.get("num_attention_heads")
    width = hf_config.get("hidden_size")
    rope = dict(hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", hf_config.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.pop("type", None)
    share = rope.pop("partial_rotary_factor", None) or hf_config.get("partial_rotary_factor") or 1
    facts = {
        "architecture": (hf_config.get("architectures") or [hf_config.get("model_type")])[0],
        "layers": hf_config.get("num_hidden_layers"),
        "hidden_size": width,
        "heads": heads,
        "kv_heads": hf_config.get("num_key_value_heads") or heads,
        "head_dim": hf_config.get("head_dim") or (width // heads if width and heads else None),
        "rope": {key: _plain(value) for key, value in rope.items()},
        "rotary_share": _plain(share),
        "vocab_size": hf_config.get("vocab_size"),
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    parts = [hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]]
    if tensors:
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(name.encode() + _rounded(tensors[name]).view(torch.uint8).numpy().tobytes())
        parts.append(digest.hexdigest()[:_DIGITS])
    return "-".join(parts)


def _plain(value: Any) -> Any:
    """Numbers as floats: a config may say 10000 or 10000.0."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _rounded(rows: torch.Tensor) -> torch.Tensor:
    """The same bf16 values whether the model was stored in fp32, bf16, or in fp16 after bf16.

    Values that fp16 holds as subnormals count as 0.
    """
    rows = rows.detach().cpu().to(torch.bfloat16).contiguous()
    return torch.where(rows.abs() < 2**-13, torch.zeros_like(rows), rows)


def fingerprint_of(folder: Path) -> str:
    """The fingerprint of a Hugging Face folder.

    The sampled rows are the first and last 4 of the query projections of the first and last layer. Without such a
    weight in safetensors the fingerprint has no part for the weights. Raises LsaError if a file is damaged or missing.
    """
    folder = Path(folder)
    hf_config = read_json(folder / "config.json")
    if not isinstance(hf_config, Mapping):
        raise LsaError(f"{folder / 'config.json'} is not a JSON object: give the folder of a Hugging Face model")
    files = _weight_files(folder)
    layers = {int(match[1]): name for name in files if (match := _QUERY_WEIGHT.search(name))}
    tensors = {}
    for layer in sorted({min(layers), max(layers)}) if layers else ():
        path = files[layers[layer]]
        try:
            with safe_open(path, framework="pt") as file:
                weight = file.get_slice(layers[layer])
                rows = weight.get_shape()[0]
                tensors[f"{layer}"] = torch.cat([weight[:_ROWS], weight[max(rows - _ROWS, 0) :]])
        except (OSError, SafetensorError) as error:
            raise LsaError(f"{path} is damaged ({first_line(error)}): download the model again") from None
    return fingerprint(hf_config, tensors)


def _weight_files(folder: Path) -> dict[str, Path]:
    """The file of each weight: by the index if there is one, else by looking into every file."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = read_json(index)
        names = listed.get("weight_map", {}) if isinstance(listed, Mapping) else {}
        return {name: folder / file for name, file in names.items()}
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                found.update(dict.fromkeys(file.keys(), path))
        except (OSError, SafetensorError) as error:
            raise LsaError(f"{path} is damaged ({first_line(error)}): download the model again") from None
    return found
