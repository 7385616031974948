"""Registers the backend with vLLM and keeps it registered across spawned processes and the CPU platform."""

from typing import Any

from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_lsa.errors import LsaError
from vllm_lsa.models.deepseek_v4 import registry as deepseek_v4
from vllm_lsa.plugin import error_line, validate
from vllm_lsa.plugin import metrics as plugin_metrics

NAME = "LSA"
PATH = "vllm_lsa.plugin.backend.LsaBackend"


def register_lsa() -> None:
    """Register the backend and install the hooks of this process once."""
    if NAME in AttentionBackendEnum.__members__:
        return
    register_backend(NAME, PATH)
    # Enum members pickle by value, and a spawned engine unpickles its config before it loads plugins: the restorer
    # registers first.
    AttentionBackendEnum[NAME].__reduce_ex__ = lambda protocol: (lsa_member, ())
    _honour_choice_on_cpu()
    error_line.install()
    validate.install()
    plugin_metrics.install()


def lsa_member() -> AttentionBackendEnum:
    """The enum member of the backend, registered if need be: this process was given a configuration with LSA."""
    register_lsa()
    deepseek_v4.register()
    return AttentionBackendEnum[NAME]


def _honour_choice_on_cpu() -> None:
    """The CPU platform takes CPU_ATTN whatever was asked for; make it take LSA, or say why not."""
    original = CpuPlatform.get_attn_backend_cls.__func__

    def get_attn_backend_cls(cls: type, selected_backend: Any, attn_selector_config: Any, num_heads: Any = None) -> str:
        if selected_backend is not AttentionBackendEnum[NAME]:
            return original(cls, selected_backend, attn_selector_config, num_heads)
        reasons = selected_backend.get_class().validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if reasons:
            raise LsaError(f"--attention-backend LSA cannot serve this layer: {'; '.join(reasons)}")
        return PATH

    CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
