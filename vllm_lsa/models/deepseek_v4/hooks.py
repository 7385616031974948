"""Where vLLM's DeepSeek-V4 on a CPU meets the engine: c4 layers of a model that is served with LSA get another class.

V4 chooses its attention class itself, whatever backend is asked for. Where LSA is chosen, vLLM's model registry has
`DeepseekV4ForCausalLM` of this module in the place of its own (`registry.register`). It is the same class, and
importing it makes the layers of every model ask `_attention` for theirs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.models.deepseek_v4.cpu import model as cpu_model
from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUIndexerBackend, DeepseekV4CPUIndexerMetadataBuilder
from vllm.models.deepseek_v4.cpu.cpu_sparse import DeepseekV4CPUAttention, DeepseekV4CPUIndexerCache
from vllm.models.deepseek_v4.cpu.cpu_utils import map_local_to_global_slots_cpu
from vllm.v1.attention.backends.mla.indexer import DeepseekV32IndexerMetadata

from vllm_lsa.models.deepseek_v4 import host_keys
from vllm_lsa.models.deepseek_v4.c4_layer import C4Layer, IndexKeys
from vllm_lsa.models.deepseek_v4.engine import DeepseekV4Engine, EntryPlan
from vllm_lsa.models.deepseek_v4.runtime import DeepseekV4Runtime
from vllm_lsa.models.deepseek_v4.specs import C4_TOKENS
from vllm_lsa.plugin.backend_name import is_lsa


@dataclass
class LsaIndexerMetadata(DeepseekV32IndexerMetadata):
    """plan: of the open step; None in dummy runs, which must not touch any state."""

    plan: EntryPlan | None = None


class LsaIndexerMetadataBuilder(DeepseekV4CPUIndexerMetadataBuilder):
    """Plans the step, and shows the indexer's decode rows their resident blocks in place of all."""

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> LsaIndexerMetadata:
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        plan = DeepseekV4Runtime.of(self.vllm_config).plan_entries(common_attn_metadata)
        if plan is not None and stock.decode is not None:
            decodes = stock.num_decodes
            stock.decode.block_table = plan.table[:decodes]
            stock.decode.seq_lens = plan.entries[:decodes].view_as(stock.decode.seq_lens)
        return LsaIndexerMetadata(**vars(stock), plan=plan)


class LsaIndexerBackend(DeepseekV4CPUIndexerBackend):
    @staticmethod
    def get_name() -> str:
        return "LSA_CPU_V4_INDEXER"

    @staticmethod
    def get_builder_cls() -> type[LsaIndexerMetadataBuilder]:
        return LsaIndexerMetadataBuilder


class LsaIndexerCache(IndexKeys, DeepseekV4CPUIndexerCache):
    def get_attn_backend(self) -> type[LsaIndexerBackend]:
        return LsaIndexerBackend


class LsaAttention(C4Layer, DeepseekV4CPUAttention):
    """A c4 layer whose compressed keys and values are in the engine's two tiers."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._join(vllm_config, LsaIndexerCache)

    @property
    def _engine(self) -> DeepseekV4Engine:
        assert self._runtime.engine is not None
        return self._runtime.engine

    def _plan(self) -> EntryPlan | None:
        metadata = get_forward_context().attn_metadata
        return self._runtime.index_metadata(metadata).plan if isinstance(metadata, dict) else None

    def _prepare_and_attn(
        self,
        hidden_states: torch.Tensor,
        qr: torch.Tensor,
        kv: torch.Tensor,
        qr_scale: torch.Tensor | None,
        kv_score: torch.Tensor,
        indexer_kv_score: torch.Tensor,
        indexer_weights: torch.Tensor,
        positions: torch.Tensor,
        o_padded: torch.Tensor,
    ) -> None:
        metadata = get_forward_context().attn_metadata
        if isinstance(metadata, dict):
            if self._plan() is None:
                o_padded.zero_()
                return
            # The compressors ask for the slots of their own caches: they are those of the index keys that vLLM pages.
            mine = self._runtime.index_metadata(metadata)
            metadata[self.prefix] = metadata[self.indexer.k_cache.prefix] = mine
        super()._prepare_and_attn(
            hidden_states, qr, kv, qr_scale, kv_score, indexer_kv_score, indexer_weights, positions, o_padded
        )

    def _sparse_indexer_and_attn(
        self,
        hidden_states: torch.Tensor,
        index_q: torch.Tensor | None,
        index_q_scale: torch.Tensor | None,
        index_weights: torch.Tensor | None,
        q: torch.Tensor,
        kv: torch.Tensor,
        positions: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        plan = self._plan()
        if plan is not None:
            engine = self._engine
            engine.write_through(plan, self._layer)
            engine.note_hidden(plan, self._layer, hidden_states)
            if index_q is not None and index_weights is not None:
                engine.note_queries(plan, self._layer, index_q, index_weights)
                if not self._keeps_keys:
                    self._score_host_keys(plan, hidden_states, index_q, index_weights)
                    self.forward_mqa(q, kv, positions, out)
                    return
        super()._sparse_indexer_and_attn(hidden_states, index_q, index_q_scale, index_weights, q, kv, positions, out)

    def _score_host_keys(
        self, plan: EntryPlan, hidden_states: torch.Tensor, q: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """Rows of one token score the pool's keys, unless one of them is shown more than that has: then all score the
        store's."""
        engine, metadata = self._engine, self._runtime.index_metadata(get_forward_context().attn_metadata)
        decodes = metadata.num_decodes
        keys, table = engine.store_keys(self._layer), plan.table[:decodes]
        if engine.exact is None and not any(row < decodes for row in plan.host_rows):
            keys = engine.geometry.key_pages(engine.pool_pages())
            table = plan.slots[self._layer, :decodes].clamp(min=0).int()
        host_keys.score(self, metadata, keys, table, hidden_states, q, weights)

    def forward_mqa(self, q: torch.Tensor, kv: torch.Tensor, positions: torch.Tensor, output: torch.Tensor) -> None:
        """q, output: bf16 [t, heads, 512]. As in the base class, but for where the compressed entries are read."""
        plan = self._plan()
        if plan is None:
            output.zero_()
            return
        swa = get_forward_context().attn_metadata[self.swa_cache_layer.prefix]
        window = self.swa_cache_layer.kv_cache
        window_slots = self._window_slots(positions, swa)
        engine = self._engine
        entries = engine.geometry.entries
        for read in engine.reads(plan, self._layer, self.topk_indices_buffer):
            chosen = self.topk_indices_buffer[read.tokens]
            out = torch.empty_like(output[read.tokens])
            torch.ops._C.flash_mla_with_kvcache_cpu(
                out,
                q[read.tokens],
                window.view(window.shape[0], -1),
                window_slots[read.tokens],
                swa.block_size,
                read.pages,
                map_local_to_global_slots_cpu(chosen, read.rows, read.table, entries),
                entries,
                self.attn_sink,
                self.scale,
            )
            output[read.tokens] = out

    def _window_slots(self, positions: torch.Tensor, swa: Any) -> torch.Tensor:
        """Slots int64 [t, window] of the tokens that each token's sliding window covers, -1 behind."""
        local = (positions - self.window_size + 1).clamp(min=0).unsqueeze(-1) + torch.arange(self.window_size)
        local = local.masked_fill(local > positions.unsqueeze(-1), -1)
        return map_local_to_global_slots_cpu(local, swa.token_to_req_indices, swa.block_table, swa.block_size)


def _attention(vllm_config: Any, prefix: str, *args: Any, **kwargs: Any) -> DeepseekV4CPUAttention:
    """The attention of one layer: c4 layers of a model that is served with LSA are ours."""
    ratios = vllm_config.model_config.hf_config.compress_ratios
    layer = extract_layer_index(prefix)
    ours = is_lsa(vllm_config.attention_config.backend) and ratios[layer] == C4_TOKENS
    return (LsaAttention if ours else DeepseekV4CPUAttention)(vllm_config, prefix, *args, **kwargs)


cpu_model.DeepseekV4CPUAttention = _attention
DeepseekV4ForCausalLM = cpu_model.DeepseekV4ForCausalLM
