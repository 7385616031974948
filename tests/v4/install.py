"""Makes stock vLLM's CPU build run DeepSeek-V4, in whichever process it starts a worker.

`environment(folder)` gives the variables for a process that is to have it: vLLM loads `register` by an entry point of
a distribution that is nothing but metadata in that folder.
"""

import os
from pathlib import Path
from typing import Any
from unittest import mock

_ROOT = Path(__file__).resolve().parents[2]
# Entry points: vLLM's name for a plugin, and the function here.
_FALLBACKS, _CHUNKS, _CUDA = "v4_cpu_fallbacks", "v4_cpu_chunks", "v4_cuda_parts"
# A variable that says `everywhere`.
_EVERYWHERE = "V4_FALLBACKS_EVERYWHERE"
_registered = False
_chunks = False


def environment(
    folder: Path,
    chunks: bool = False,
    plugins: tuple[str, ...] = (),
    everywhere: bool = False,
    device: str = "cpu",
) -> dict[str, str]:
    """Write the distribution into folder; returns the environment with it, in which no other plugin is loaded.

    chunks: prompts in chunks and prefix caching; stock vLLM allows V4 both where the CPU has AMX, and nowhere else.
    plugins: vLLM plugins to load besides, by name. everywhere: fallbacks also where the library has operators. device:
    "cuda" for what a GPU machine without DeepGEMM, tilelang and CuTeDSL lacks (`cuda.py`) instead.
    """
    info = folder / "v4_cpu_fallbacks-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: v4-cpu-fallbacks\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\n{_FALLBACKS} = {__name__}:register\n{_CHUNKS} = {__name__}:allow_chunks\n"
        f"{_CUDA} = {__package__}.cuda:register\n"
    )
    path = [str(folder), str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    stand_ins = [_CUDA] if device == "cuda" else [_FALLBACKS, *([_CHUNKS] if chunks else [])]
    names = [*stand_ins, *plugins]
    variables = {"PYTHONPATH": os.pathsep.join(path), "VLLM_PLUGINS": ",".join(names)}
    return variables | ({_EVERYWHERE: "1"} if everywhere else {})


def register() -> None:
    """The entry point. Workers replace Triton kernels before they build a model: that is when the rest comes in too."""
    global _registered
    from vllm.platforms.cpu import CpuPlatform

    if _registered:
        return
    _registered = True
    stock = CpuPlatform.register_triton_kernel_overrides

    check = CpuPlatform.check_and_update_config

    def register_triton_kernel_overrides(cls: type[CpuPlatform]) -> None:
        stock()
        _install()

    def check_and_update_config(cls: type[CpuPlatform], vllm_config: Any) -> None:
        # vllm/platforms/cpu.py:268 asks for AMX tiles, which the fallbacks do not need, and which not every CPU has.
        with mock.patch("torch.cpu._is_amx_tile_supported", return_value=_chunks):
            check(vllm_config)

    CpuPlatform.register_triton_kernel_overrides = classmethod(register_triton_kernel_overrides)
    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def allow_chunks() -> None:
    """The other entry point, loaded besides."""
    global _chunks
    _chunks = True


def _install() -> None:
    from vllm.triton_utils import HAS_TRITON
    from vllm.triton_utils.dispatcher import register_kernels

    from tests.v4 import attention, caches, dense, metadata, operators  # noqa: F401 - they collect operators

    operators.define(everywhere=_EVERYWHERE in os.environ)
    if not HAS_TRITON:
        register_kernels(metadata.KERNELS)
    _complete_layer_types()
    _without_small_tiles()


def _without_small_tiles() -> None:
    """vLLM's AMX kernel ends the process on weights of eight outputs, and its results depend on what is in a step."""
    from vllm.model_executor.kernels.linear.scaled_mm import cpu
    from vllm.model_executor.layers import utils

    for module in (utils, cpu):
        module.check_cpu_sgl_kernel = lambda n, k, dtype: False


def _complete_layer_types() -> None:
    """`build_tile_scheduler` of the CPU lacks two keys that vllm/v1/attention/backends/mla/sparse_swa.py:780 reads."""
    from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUSparseSWAMetadataBuilder
    from vllm.v1.attention.backends.mla import sparse_swa

    stock = DeepseekV4CPUSparseSWAMetadataBuilder.build_tile_scheduler

    def build_tile_scheduler(self: DeepseekV4CPUSparseSWAMetadataBuilder, num_decode_tokens: int) -> dict[str, None]:
        absent = {sparse_swa._LAYER_TYPE_C1A: None, sparse_swa._LAYER_TYPE_C2A: None}
        return {**absent, **stock(self, num_decode_tokens)}

    DeepseekV4CPUSparseSWAMetadataBuilder.build_tile_scheduler = build_tile_scheduler
