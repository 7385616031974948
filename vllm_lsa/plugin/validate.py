"""Refuses at start-up, in one line, what the LSA backend cannot do (yet)."""

from pathlib import Path
from typing import Any

import psutil
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

from vllm_lsa.config import GIB, LsaConfig
from vllm_lsa.device.support import require_supported
from vllm_lsa.engine import index_layout, load_trained
from vllm_lsa.errors import LsaError
from vllm_lsa.indexer.checkpoint import fingerprint, fingerprint_of
from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.models.deepseek_v4 import registry as deepseek_v4
from vllm_lsa.plugin import compat
from vllm_lsa.plugin import metrics as plugin_metrics
from vllm_lsa.plugin.backend_name import is_lsa

E4M3 = ("fp8", "fp8_e4m3")
CACHE_DTYPES = ("auto", "float16", "bfloat16", *E4M3)
_INSTEAD = "drop it, or use another --attention-backend"


def install() -> None:
    """Check every engine configuration that this process makes for LSA."""
    original = EngineArgs.create_engine_config

    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        chosen = is_lsa(self.attention_backend) or is_lsa(self.attention_config.backend)
        if chosen:
            compat.require_supported()
            _check_arguments(self)
            LsaConfig.parse(self.additional_config)
        vllm_config = original(self, *args, **kwargs)
        if chosen:
            if deepseek_v4.is_deepseek_v4(vllm_config) and self.kv_cache_dtype != "auto":
                raise LsaError(
                    f"--kv-cache-dtype {self.kv_cache_dtype}: DeepSeek-V4 with LSA has caches of its own: use auto"
                )
            check(vllm_config)
            plugin_metrics.serve()
        return vllm_config

    EngineArgs.create_engine_config = create_engine_config


def _check_arguments(args: EngineArgs) -> None:
    """What can be told from the command line, before the model's configuration is read."""
    settings = {
        "--speculative-config": args.speculative_config,
        "--decode-context-parallel-size": args.decode_context_parallel_size > 1 and args.decode_context_parallel_size,
        "--prefill-context-parallel-size": args.prefill_context_parallel_size > 1
        and args.prefill_context_parallel_size,
        "--enable-sleep-mode": args.enable_sleep_mode,
        "--enable-dbo": args.enable_dbo,
        "--kv-transfer-config": args.kv_transfer_config,
        "--kv-offloading-size": args.kv_offloading_size,
        "--num-gpu-blocks-override": args.num_gpu_blocks_override,
        "--data-parallel-size": args.data_parallel_size > 1 and args.data_parallel_size,
        "--kv-cache-dtype-skip-layers": args.kv_cache_dtype_skip_layers,
    }
    for name, value in settings.items():
        if value:
            raise LsaError(f"{name} ({_short(value)}) does not work with --attention-backend LSA yet: {_INSTEAD}")


def check(vllm_config: VllmConfig) -> LsaConfig:
    """Refuse models and sizes that cannot work. Raises LsaError; returns the parsed configuration."""
    if deepseek_v4.is_deepseek_v4(vllm_config):
        config = deepseek_v4.check(vllm_config)
        deepseek_v4.register()
        return config
    config = LsaConfig.parse(vllm_config.additional_config)
    if config.index_keys != "device":
        raise LsaError(f"lsa.index_keys={config.index_keys!r} is for DeepSeek-V4: leave it out with other models")
    model = vllm_config.model_config
    text = model.hf_text_config
    layer_types = set(getattr(text, "layer_types", None) or [])
    refusals = {
        "encoder-decoder models": model.is_encoder_decoder,
        "pooling and encoder-only models": model.runner_type != "generate",
        "multi-head latent attention (MLA)": model.use_mla,
        "hybrid and attention-free models": model.is_hybrid or model.is_attention_free,
        "sliding-window attention": model.get_sliding_window()
        or layer_types & {"sliding_attention", "chunked_attention"},
        "attention sinks": model.hf_config.model_type == "gpt_oss",
        "logit soft-capping in attention": getattr(text, "attn_logit_softcapping", None),
        "ALiBi positions": model.uses_alibi or model.hf_config.model_type == "step1",
        "KV connectors": vllm_config.kv_transfer_config is not None,
    }
    for what, present in refusals.items():
        if present:
            raise LsaError(
                f"--model {model.model}: {what} not supported by --attention-backend LSA yet: "
                "choose another model or backend"
            )
    check_cache_dtype(vllm_config.cache_config.cache_dtype, vllm_config)
    geometry = geometry_of(vllm_config, config)
    if geometry.head_dim % 16:
        raise LsaError(
            f"--model {model.model}: a head size of {geometry.head_dim} is not a multiple of 16, which the kernels of "
            "--attention-backend LSA need: choose another model or backend"
        )
    if vllm_config.device_config.device_type == "cuda":
        require_supported(config)
    _check_ranks(vllm_config, config)
    index_layout(config, geometry.chunk_tokens, geometry.head_dim, geometry.compute_dtype, torch.device("cpu"))
    _check_backbone(vllm_config, config, geometry)
    blocks = host_blocks(vllm_config, config, geometry)
    config.pool_slots(geometry, blocks)
    need = blocks * geometry.block_bytes * vllm_config.parallel_config.world_size / GIB
    free = psutil.virtual_memory().available / GIB
    if need > free:
        chosen = "the default of four requests of max_model_len" if config.host_memory_gib is None else "as set"
        raise LsaError(
            f"lsa.host_memory_gib={need:.2f} ({chosen}) is more than the {free:.2f} GiB of host memory that are free: "
            "set it lower, or lower --max-model-len"
        )
    return config


def check_cache_dtype(chosen: str, vllm_config: VllmConfig) -> None:
    """Raises LsaError unless K and V are to be stored in the model's dtype or, on a CUDA device, in e4m3.

    chosen: as in --kv-cache-dtype, or as a checkpoint asks for.
    """
    model = vllm_config.model_config
    if chosen not in CACHE_DTYPES:
        raise LsaError(
            f"--kv-cache-dtype {chosen}: --attention-backend LSA stores K and V in the model's dtype or in fp8 (e4m3): "
            "use auto or fp8"
        )
    if chosen in E4M3:
        if vllm_config.device_config.device_type != "cuda":
            raise LsaError(
                f"--kv-cache-dtype {chosen}: --attention-backend LSA has no fp8 on a CPU: use auto, or "
                f"{str(model.dtype).removeprefix('torch.')} if it is the model's checkpoint that asks for fp8"
            )
    elif kv_cache_dtype_str_to_dtype(chosen, model) != model.dtype:
        raise LsaError(
            f"--kv-cache-dtype {chosen}: --attention-backend LSA stores K and V in the model's dtype, which is "
            f"{model.dtype}, or in fp8: use auto or fp8"
        )


def geometry_of(vllm_config: VllmConfig, config: LsaConfig) -> KVGeometry:
    """KV cache shape of one rank."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    block = vllm_config.cache_config.block_size
    if block % config.chunk_tokens:
        raise LsaError(
            f"lsa.chunk_tokens={config.chunk_tokens} does not divide --block-size {block}: choose a divisor of it"
        )
    heads = model.get_num_kv_heads(parallel)
    return KVGeometry(
        num_layers=model.get_num_layers(parallel),
        num_q_heads=model.get_num_attention_heads(parallel),
        num_kv_heads=heads,
        head_dim=model.get_head_size(),
        dtype=kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, model),
        block_tokens=block,
        chunk_tokens=config.chunk_tokens,
        layer_lanes=config.layer_lanes(heads),
        ranks=parallel.tensor_parallel_size,
        model_dtype=model.dtype,
    )


def _check_ranks(vllm_config: VllmConfig, config: LsaConfig) -> None:
    """Raises LsaError if KV heads or sets cannot be divided over the tensor-parallel ranks."""
    ranks = vllm_config.parallel_config.tensor_parallel_size
    heads = vllm_config.model_config.get_total_num_kv_heads()
    if heads % ranks and ranks % heads:
        raise LsaError(
            f"--tensor-parallel-size {ranks} neither divides the model's {heads} KV heads nor is a multiple of them: "
            "choose a divisor or a multiple"
        )
    on_gpu = vllm_config.device_config.device_type == "cuda"
    if on_gpu and ranks > 1 and config.sets != "per_head" and config.demand != "off":
        raise LsaError(
            f"lsa.sets={config.sets!r} with lsa.demand={config.demand!r} and --tensor-parallel-size {ranks} needs an "
            "exchange between GPUs in every layer and step, which is not there: use sets=per_head or demand=off"
        )


def _check_backbone(vllm_config: VllmConfig, config: LsaConfig, geometry: KVGeometry) -> None:
    """Raises LsaError if `indexer` is a checkpoint of another model, or if it cannot be divided over the ranks."""
    trained = load_trained(config, torch.device("cpu"))
    if trained is None:
        return
    model, folder = vllm_config.model_config, Path(vllm_config.model_config.model)
    known = fingerprint_of(folder) if folder.is_dir() else fingerprint(model.hf_config.to_dict())
    trained.indexer.require_backbone(known)
    if trained.config.input != "query":
        raise LsaError(
            f"lsa.indexer={config.indexer!r} reads {trained.config.input} states, which an attention backend does not "
            "see: train one that reads queries (vllm-lsa train)"
        )
    layers = geometry.num_layers if trained.tables is None else trained.tables.layers
    if trained.config.kv_heads != model.get_total_num_kv_heads() or layers != geometry.num_layers:
        raise LsaError(
            f"lsa.indexer={config.indexer!r} is for {layers} layers of {trained.config.kv_heads} KV heads, and a rank "
            f"has {geometry.num_layers} of {model.get_total_num_kv_heads()}: it does not work with pipeline "
            "parallelism or another model: use one stage, or a training-free indexer"
        )
    load_trained(config, torch.device("cpu"), 0, geometry.ranks)


def host_blocks(vllm_config: VllmConfig, config: LsaConfig, geometry: KVGeometry) -> int:
    """Blocks of one rank's host store."""
    return config.host_blocks(geometry, vllm_config.model_config.max_model_len, vllm_config.parallel_config.world_size)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
