"""vLLM's view of LSA: the backend class, its metadata builder and the layer implementation."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVQuantMode

from vllm_lsa.device.plan import DevicePlan
from vllm_lsa.engine import index_layout
from vllm_lsa.errors import LsaError
from vllm_lsa.plugin.runtime import DenseRuntime, Runtime
from vllm_lsa.plugin.validate import CACHE_DTYPES, check_cache_dtype
from vllm_lsa.residency.plan import StepPlan


@dataclass
class LsaMetadata(AttentionMetadata):
    """One step's plan; None in dummy and profiling runs, which must not touch any state."""

    plan: StepPlan | DevicePlan | None


class LsaBackend(AttentionBackend):
    """Dense GQA/MHA decoder attention with the KV cache on the host. What vLLM pages on the device are index cells."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(CACHE_DTYPES)

    @staticmethod
    def get_name() -> str:
        return "LSA"

    @staticmethod
    def get_impl_cls() -> type["LsaImpl"]:
        return LsaImpl

    @staticmethod
    def get_builder_cls() -> type["LsaMetadataBuilder"]:
        return LsaMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Replace K and V by one index cell per chunk and KV head; the block count follows the host store."""
        if not isinstance(spec, FullAttentionSpec):
            raise LsaError(f"--attention-backend LSA cannot serve a {type(spec).__name__} cache: use another backend")
        runtime = Runtime.latest()
        config = runtime.config
        # Of the model's dtype, whatever K and V are stored in.
        dtype = runtime.vllm_config.model_config.dtype
        layout = index_layout(config, config.chunk_tokens, spec.head_size, dtype, runtime.device)
        return replace(
            spec,
            dtype=dtype,
            kv_quant_mode=KVQuantMode.NONE,
            tokens_per_state=config.chunk_tokens,
            state_content_bytes=layout.cell_bytes,
        )


class LsaMetadataBuilder(AttentionMetadataBuilder[LsaMetadata]):
    """Plans each step before its forward pass."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._runtime = DenseRuntime.of(vllm_config)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """Decode steps are captured whole on a CUDA device."""
        on_gpu = vllm_config.device_config.device_type == "cuda"
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if on_gpu else AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LsaMetadata:
        return LsaMetadata(self._runtime.plan(common_attn_metadata))

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> LsaMetadata:
        return LsaMetadata(self._runtime.plan_capture(common_attn_metadata.num_reqs))


class LsaImpl(AttentionImpl[LsaMetadata]):
    """Hands one layer's attention to the engine of this rank."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        refused = {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "logits_soft_cap": logits_soft_cap,
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
            **extra,
        }
        for name, value in refused.items():
            if value is not None:
                raise LsaError(
                    f"attention with {name} is not supported by --attention-backend LSA: use another backend"
                )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        vllm_config = get_current_vllm_config()
        # Some checkpoints ask for fp8 only when their layers are made.
        check_cache_dtype(kv_cache_dtype, vllm_config)
        self._runtime = DenseRuntime.of(vllm_config)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        # Before vLLM profiles the device, so that its memory accounting sees the pool.
        self._runtime.allocate_pool(self)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: LsaMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query: [t, Hq, D]; key, value: [t, Hkv, D]; kv_cache: index cells; output: [t, Hq, D], which is returned."""
        if output_scale is not None or output_block_scale is not None:
            raise LsaError(
                "fused output quantisation is not supported by --attention-backend LSA: turn that fusion off"
            )
        if attn_metadata is None or attn_metadata.plan is None:
            return output.zero_()
        self._runtime.attend(layer.layer_name, attn_metadata.plan, query, key, value, output)
        return output
