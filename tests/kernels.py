"""The Triton kernels for tests: on the GPU where there is one, else in Triton's interpreter on the CPU."""

import importlib
import os
from types import ModuleType

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(name: str) -> ModuleType:
    """`vllm_lsa.kernels.<name>`. Triton decides for good at a kernel's decoration whether it is interpreted."""
    if DEVICE.type == "cuda":
        return importlib.import_module(f"vllm_lsa.kernels.{name}")
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        return importlib.import_module(f"vllm_lsa.kernels.{name}")
    finally:
        # Not left on: vLLM in this process would see it as well.
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
