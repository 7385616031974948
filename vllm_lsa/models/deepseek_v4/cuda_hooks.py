"""Where vLLM's DeepSeek-V4 on a CUDA device meets the engine: c4 layers of a model served with LSA get another class.

As `hooks` does for a CPU. The index keys stay vLLM's; attention of rows of one token reads the pool through the slots
of the blocks that the indexer was shown, and prompts read the host store through the device's view of it.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.models.deepseek_v4.attention import DeepseekV4IndexerCache
from vllm.models.deepseek_v4.nvidia import model as nvidia_model
from vllm.models.deepseek_v4.nvidia.flashmla import DeepseekV4FlashMLAAttention
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.mla import indexer as vllm_indexer
from vllm.v1.attention.backends.mla.indexer import (
    DeepseekV4IndexerBackend,
    DeepseekV32IndexerMetadata,
    DeepseekV32IndexerMetadataBuilder,
)

from vllm_lsa.errors import LsaError
from vllm_lsa.models.deepseek_v4 import host_keys
from vllm_lsa.models.deepseek_v4.c4_layer import C4Layer, IndexKeys
from vllm_lsa.models.deepseek_v4.device_engine import DeepseekV4DeviceEngine
from vllm_lsa.models.deepseek_v4.engine import EntryPlan
from vllm_lsa.models.deepseek_v4.runtime import DeepseekV4Runtime
from vllm_lsa.models.deepseek_v4.specs import C4_TOKENS
from vllm_lsa.plugin.backend_name import is_lsa


@dataclass
class LsaIndexerMetadata(DeepseekV32IndexerMetadata):
    """plan: of the open step; None in dummy and capture runs. It is the c4 cache's too, which has the same blocks."""

    plan: EntryPlan | None = None
    block_size: int = 0


class LsaIndexerMetadataBuilder(DeepseekV32IndexerMetadataBuilder):
    """Plans the step, and shows the indexer's decode rows their resident blocks in place of all."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> LsaIndexerMetadata:
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        runtime = DeepseekV4Runtime.of(self.vllm_config)
        plan = runtime.plan_entries(common_attn_metadata)
        if isinstance(engine := runtime.engine, DeepseekV4DeviceEngine):
            if plan is None:
                engine.tables.clear()
            if stock.decode is not None:
                self._show_resident(stock, engine)
        return LsaIndexerMetadata(**vars(stock), plan=plan, block_size=self.kv_cache_spec.block_size)

    def _show_resident(self, stock: DeepseekV32IndexerMetadata, engine: DeepseekV4DeviceEngine) -> None:
        decodes = stock.num_decodes
        stock.decode.block_table = engine.tables.table[:decodes]
        stock.decode.seq_lens = engine.tables.entries[:decodes]
        schedule = vllm_indexer.get_paged_mqa_logits_metadata(
            stock.decode.seq_lens, self.kv_cache_spec.num_states, self.num_sms, indices=stock.decode.indices
        )
        stock.decode.schedule_metadata[: len(schedule)] = schedule


class LsaIndexerBackend(DeepseekV4IndexerBackend):
    @staticmethod
    def get_name() -> str:
        return "LSA_V4_INDEXER"

    @staticmethod
    def get_builder_cls() -> type[LsaIndexerMetadataBuilder]:
        return LsaIndexerMetadataBuilder


class LsaIndexerCache(IndexKeys, DeepseekV4IndexerCache):
    def get_attn_backend(self) -> type[LsaIndexerBackend]:
        return LsaIndexerBackend


class LsaAttention(C4Layer, DeepseekV4FlashMLAAttention):
    """A c4 layer whose compressed keys and values are in the engine's two tiers."""

    topk_indices_buffer: torch.Tensor

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._join(vllm_config, LsaIndexerCache)

    @property
    def _engine(self) -> DeepseekV4DeviceEngine:
        assert isinstance(self._runtime.engine, DeepseekV4DeviceEngine)
        return self._runtime.engine

    def _share_metadata(self) -> LsaIndexerMetadata | None:
        """The indexer's metadata, which is made known as this layer's too; None where vLLM profiles its memory."""
        metadata = get_forward_context().attn_metadata
        if not isinstance(metadata, dict):
            return None
        mine = self._runtime.index_metadata(metadata)
        metadata[self.prefix] = metadata[self.indexer.k_cache.prefix] = mine
        return mine

    def _prepare_and_attn(self, *args: Any, **kwargs: Any) -> None:
        # The compressor asks for the slots of its own cache: they are those of the index keys.
        self._share_metadata()
        super()._prepare_and_attn(*args, **kwargs)

    def forward_mqa(self, q: torch.Tensor, kv: torch.Tensor, positions: torch.Tensor, output: torch.Tensor) -> None:
        self._share_metadata()  # a graph in pieces comes here without `_prepare_and_attn`
        super().forward_mqa(q, kv, positions, output)

    # Outside graphs in pieces, as the stock method is: what it does depends on the step.
    @eager_break_during_capture
    def _sparse_indexer_and_attn(
        self,
        hidden_states: torch.Tensor,
        index_q: torch.Tensor | None,
        index_q_scale: torch.Tensor | None,
        index_weights: torch.Tensor | None,
        *args: Any,
    ) -> None:
        metadata = self._share_metadata()
        if metadata is not None:
            self._note(metadata.plan, hidden_states, index_q, index_weights)
            if index_q is not None and index_weights is not None and not self._keeps_keys:
                keys, table = self._engine.decode_keys(self._layer, metadata.num_decodes)
                host_keys.score(self, metadata, keys, table, hidden_states, index_q, index_weights)
                self.forward_mqa(*args)
                return
        super()._sparse_indexer_and_attn(hidden_states, index_q, index_q_scale, index_weights, *args)

    def _note(
        self,
        plan: EntryPlan | None,
        hidden_states: torch.Tensor,
        index_q: torch.Tensor | None,
        index_weights: torch.Tensor | None,
    ) -> None:
        """Write through, and keep what selections read. A graph of rows of one token is captured without a plan."""
        engine = self._engine
        rows = pages = min(len(hidden_states), engine.tables.rows)
        if plan is not None:
            rows, pages = len(plan.rows), len(plan.written_pages)
        engine.write_through_on_device(self._layer, pages)
        engine.note_on_device(self._layer, rows, hidden_states, index_q, index_weights)

    def _forward_decode(
        self, q: torch.Tensor, kv_cache: torch.Tensor | None, swa_metadata: Any, attn_metadata: Any, *args: Any,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        engine = self._engine
        resident = SimpleNamespace(
            block_table=engine.tables.slots[self._layer], block_size=engine.geometry.block_tokens
        )
        chosen = self.topk_indices_buffer
        if engine.exact is not None:
            self.topk_indices_buffer = engine.read_missing(self._layer, chosen[: swa_metadata.num_decode_tokens])
        try:
            super()._forward_decode(q, engine.pool_entries(), swa_metadata, resident, *args, **kwargs)
        finally:
            self.topk_indices_buffer = chosen


_stock_choice = nvidia_model._select_dsv4_attn_cls


def _choice(vllm_config: Any) -> Any:
    """vLLM's choice of a class for the layers, but for c4 layers of a model that is served with LSA."""
    if not is_lsa(vllm_config.attention_config.backend):
        return _stock_choice(vllm_config)
    if _stock_choice(vllm_config) is not DeepseekV4FlashMLAAttention:
        raise LsaError(
            "DeepSeek-V4 with LSA needs a GPU that vLLM serves by FlashMLA (compute capability 9.0 or 10.0): use "
            "another --attention-backend"
        )
    ratios = vllm_config.model_config.hf_config.compress_ratios

    def attention(config: Any, prefix: str, *args: Any, **kwargs: Any) -> DeepseekV4FlashMLAAttention:
        ours = ratios[extract_layer_index(prefix)] == C4_TOKENS
        return (LsaAttention if ours else DeepseekV4FlashMLAAttention)(config, prefix, *args, **kwargs)

    return attention


nvidia_model._select_dsv4_attn_cls = _choice
DeepseekV4ForCausalLM = nvidia_model.DeepseekV4ForCausalLM
