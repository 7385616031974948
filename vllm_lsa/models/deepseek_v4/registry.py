"""Makes a process build DeepSeek-V4 with the layers of `hooks`, and refuses at start-up what LSA cannot do with it."""

from vllm.config import VllmConfig
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform

from vllm_lsa.config import LsaConfig
from vllm_lsa.errors import LsaError
from vllm_lsa.models.deepseek_v4.memory_indexer import load_scorer
from vllm_lsa.models.deepseek_v4.selection import TOP_K
from vllm_lsa.models.deepseek_v4.settings import for_deepseek_v4

ARCHITECTURE = "DeepseekV4ForCausalLM"


def is_deepseek_v4(vllm_config: VllmConfig) -> bool:
    return bool(vllm_config.model_config.hf_config.model_type == "deepseek_v4")


def register() -> None:
    """Replace vLLM's model class by name, so that nothing of V4 is imported before a V4 model is built."""
    hooks = "cuda_hooks" if current_platform.is_cuda() else "hooks"
    ModelRegistry.register_model(ARCHITECTURE, f"vllm_lsa.models.deepseek_v4.{hooks}:{ARCHITECTURE}")


def check(vllm_config: VllmConfig) -> LsaConfig:
    """Refuse what cannot work. Raises LsaError; returns the parsed configuration."""
    config = for_deepseek_v4(LsaConfig.parse(vllm_config.additional_config))
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    device = vllm_config.device_config.device_type
    if device not in ("cpu", "cuda"):
        raise LsaError(
            f"DeepSeek-V4 with LSA runs on CPU and CUDA devices: serve it with another --attention-backend on {device}"
        )
    refusals = {
        "an index cache in mxfp4 is": vllm_config.attention_config.resolve_indexer_kv_dtype("fp8") != "fp8",
        f"architectures {model.architectures} are": list(model.architectures) != [ARCHITECTURE],
        f"index_topk={getattr(model.hf_config, 'index_topk', None)} (other than {TOP_K}) is": getattr(
            model.hf_config, "index_topk", None
        )
        != TOP_K,
        "pipeline parallelism is": parallel.pipeline_parallel_size > 1,
        "speculative decoding (MTP) is": vllm_config.speculative_config is not None,
        "KV connectors are": vllm_config.kv_transfer_config is not None,
        "a model without c4 layers is": 4 not in getattr(model.hf_config, "compress_ratios", ()),
    }
    for what, present in refusals.items():
        if present:
            raise LsaError(f"DeepSeek-V4 with LSA: {what} not supported yet: use another --attention-backend")
    load_scorer(config, model)
    return config
