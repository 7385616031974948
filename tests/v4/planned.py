"""vLLM's own plan of DeepSeek-V4's caches as an engine on a GPU has it, made without one, and its scheduler's steps."""

import json
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig, set_current_vllm_config
from vllm.models.deepseek_v4.attention import DeepseekV4Attention, DeepseekV4IndexerCache
from vllm.models.deepseek_v4.compressor import CompressorStateCache
from vllm.sampling_params import SamplingParams
from vllm.v1.attention.backends.mla.sparse_swa import DeepseekV4SWACache
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.utils import customize_attention_spec

Specs = Mapping[str, KVCacheSpec]


def gpu_config(folder: Path, hf_config: Mapping[str, Any], max_model_len: int, chunk: int, **scheduler: Any) -> Any:
    """A VllmConfig. folder: gets the model's config.json. chunk: tokens of a step. scheduler: of SchedulerConfig."""
    (folder / "config.json").write_text(json.dumps(hf_config))
    made = VllmConfig(
        model_config=ModelConfig(str(folder), skip_tokenizer_init=True, max_model_len=max_model_len, dtype="bfloat16"),
        cache_config=CacheConfig(block_size=256, cache_dtype="fp8"),
        scheduler_config=SchedulerConfig.default_factory(max_model_len=max_model_len, **scheduler),
    )
    # What the attention backends and the GPU's engine core resolve; the CPU's would turn chunked prefill off.
    made.cache_config.cache_dtype = "fp8_ds_mla"
    made.cache_config.kv_cache_layout = "BLHNC"
    made.scheduler_config.max_num_batched_tokens = chunk
    made.scheduler_config.enable_chunked_prefill = True
    return made


def stock_specs(config: VllmConfig) -> Specs:
    """Every cache's spec as vLLM's own classes declare it, {name: KVCacheSpec}."""
    out: dict[str, KVCacheSpec] = {}
    assert config.model_config is not None

    def add(name: str, layer: Any) -> None:
        out[name] = customize_attention_spec(layer.get_attn_backend(), layer.get_kv_cache_spec(config))

    def add_state(name: str, head_dim: int, ratio: int) -> None:
        overlap = 2 if ratio == 4 else 1
        add(name, CompressorStateCache(2 * overlap * head_dim, torch.float32, ratio, name))

    with set_current_vllm_config(config):
        for layer, ratio in enumerate(config.model_config.hf_config.compress_ratios):
            name = f"model.layers.{layer}.attn"
            add(
                f"{name}.swa_cache", DeepseekV4SWACache(512, 128, torch.uint8, f"{name}.swa_cache", config.cache_config)
            )
            if not ratio:
                continue
            # The layer itself cannot be made without a GPU; its method reads four fields.
            attention = SimpleNamespace(
                compress_ratio=ratio, kv_cache_dtype="fp8_ds_mla", head_dim=512, kv_cache_torch_dtype=torch.uint8
            )
            spec = DeepseekV4Attention.get_kv_cache_spec(attention, config)  # type: ignore[arg-type]
            assert spec is not None
            out[name] = spec
            add_state(f"{name}.compressor.state_cache", 512, ratio)
            if ratio == 4:
                key = f"{name}.indexer.k_cache"
                add(key, DeepseekV4IndexerCache(132, torch.uint8, key, config.cache_config, compress_ratio=4))
                add_state(f"{name}.indexer.compressor.state_cache", 128, ratio)
    return out


def plan(config: VllmConfig, specs: Specs, memory: int) -> KVCacheConfig:
    """What vLLM makes of so many bytes. Raises ValueError if it would not start with them."""
    (made,) = kv_cache_utils.get_kv_cache_configs(config, [dict(specs)], [memory])
    return made


def scheduled(config: VllmConfig, made: KVCacheConfig, batch: Mapping[str, Any]) -> Iterator[SchedulerOutput]:
    """The steps in which vLLM's scheduler, with two under way, serves a batch as `tests.generate.run_batch` gives it:
    {"prompts", "max_tokens", "late", "priorities"}. Every token that a model would sample is 7."""
    blocks = kv_cache_utils.generate_scheduler_kv_cache_config([made])
    config.cache_config.num_gpu_blocks = made.num_blocks
    block, unit = kv_cache_utils.resolve_kv_cache_block_sizes(blocks, config)
    scheduler = AsyncScheduler(
        vllm_config=config, kv_cache_config=blocks, structured_output_manager=StructuredOutputManager(config),
        block_size=block, hash_block_size=unit,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=batch["max_tokens"], ignore_eos=True)
    late, under_way = batch["late"], deque[SchedulerOutput]()
    calls = 0
    while scheduler.has_requests() or under_way or calls <= max(late.values()):
        for index, prompt in enumerate(batch["prompts"]):
            if late.get(index, 0) == calls:
                priority = batch["priorities"][index]
                scheduler.add_request(Request(str(index), prompt, params, None, priority=priority, arrival_time=calls))
        calls += 1
        if scheduler.has_requests():
            under_way.append(scheduler.schedule())
            yield under_way[-1]
            if len(under_way) < config.max_concurrent_batches:
                continue
        if under_way:
            step = under_way.popleft()
            scheduler.update_from_output(step, _sampled(step, scheduler.requests))


def _sampled(step: SchedulerOutput, requests: Mapping[str, Request]) -> ModelRunnerOutput:
    """A token for each request that has come to the end of its tokens."""
    cached = step.scheduled_cached_reqs
    begin = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    begin |= {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
    names = list(step.num_scheduled_tokens)
    whole = {
        name: name in requests and begin[name] + step.num_scheduled_tokens[name] >= requests[name].num_tokens
        for name in names
    }
    return ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: index for index, name in enumerate(names)},
        sampled_token_ids=[[7] if whole[name] else [] for name in names],
    )
