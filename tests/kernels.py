"""The Triton kernels for tests: on the GPU where there is one, else in Triton's interpreter on the CPU."""

import importlib
import os
from types import ModuleType

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(name: str) -> ModuleType:
    """`vllm_lsa.kernels.<name>`. Triton decides for good at a function's decoration whether it is interpreted."""
    if DEVICE.type == "cuda":
        return importlib.import_module(f"vllm_lsa.kernels.{name}")
    return _interpreted(f"vllm_lsa.kernels.{name}")


def _interpreted(name: str) -> ModuleType:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        return importlib.import_module(name)
    finally:
        # Not left on: vLLM in this process, and servers that it starts, would see it as well.
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


if DEVICE.type == "cpu":
    # Triton's own functions as well, before anything else imports them; the second import is one that Triton puts off.
    _interpreted("triton")
    _interpreted("triton.experimental.gluon")
