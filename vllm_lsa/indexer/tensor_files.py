"""Tensors read from files that may be damaged or hostile."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_lsa.errors import LsaError
from vllm_lsa.indexer.indexer_config import AGAIN, first_line


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or .pt file, on the CPU. Raises LsaError in one line if it cannot be read.

    A .pt file is read without running code in it; tensors may be wrapped in {"model_state": …}. Tensors called
    freqs_cis, which old checkpoints hold, are left out.
    """
    if not path.exists():
        raise LsaError(f"{path} does not exist: give a checkpoint folder, or a joint .pt or .safetensors file")
    if path.suffix == ".pt":
        return {name: x for name, x in _read_pickle(path).items() if _is_weight(name)}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if _is_weight(name)}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise LsaError(f"{path} is not a readable safetensors file ({first_line(error)}): {AGAIN}") from None


def _is_weight(name: str) -> bool:
    return name.rpartition(".")[2] != "freqs_cis"


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what matters becomes the one line
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever an unpickler may raise on bytes that are not what they should be
        code = re.search(r"unsupported global:? GLOBAL (\S+)", str(error), re.IGNORECASE)
        reason = f"it holds code ({code[1]})" if code else f"it is damaged or holds code ({type(error).__name__})"
        raise LsaError(
            f"{path} does not load as plain weights, {reason}: save its tensors alone, best as .safetensors"
        ) from None
    if isinstance(content, Mapping) and isinstance(content.get("model_state"), Mapping):
        content = content["model_state"]
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in content.items()
    ):
        raise LsaError(f"{path} does not hold tensors by name: save a state dict")
    return dict(content)


def check_tensors(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raises LsaError in one line unless there are exactly these tensors, of these shapes, floating and finite."""
    for what, names in (("lacks", shapes.keys() - tensors.keys()), ("holds unknown", tensors.keys() - shapes.keys())):
        if names:
            first, more = min(names), f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise LsaError(f"{path} {what} {first}{more}: {AGAIN}")
    for name, shape in shapes.items():
        x = tensors[name]
        if tuple(x.shape) != shape:
            raise LsaError(f"{path}: {name} has shape {list(x.shape)}, not {list(shape)}: {AGAIN}")
        if not x.is_floating_point():
            raise LsaError(f"{path}: {name} is {x.dtype}, not floating point: {AGAIN}")
        if not x.float().isfinite().all():
            raise LsaError(f"{path}: {name} has values that are not finite: {AGAIN}")
