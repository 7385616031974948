"""The engine of a worker that serves DeepSeek-V4: made when vLLM has its blocks, since only then sizes are known."""

from collections.abc import Sequence
from typing import Any

import psutil
from vllm.logger import init_logger
from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_lsa.config import GIB
from vllm_lsa.errors import LsaError
from vllm_lsa.metrics import MetricsWriter
from vllm_lsa.models.deepseek_v4.device_engine import DeepseekV4DeviceEngine, entry_view
from vllm_lsa.models.deepseek_v4.engine import DeepseekV4Engine, EntryPlan
from vllm_lsa.models.deepseek_v4.geometry import EntryGeometry
from vllm_lsa.models.deepseek_v4.memory_indexer import load_scorer
from vllm_lsa.models.deepseek_v4.scorer import PagedScorer, model_layers
from vllm_lsa.models.deepseek_v4.settings import for_deepseek_v4
from vllm_lsa.models.deepseek_v4.specs import C4_TOKENS, PAGE_ENTRIES, require_split, specs_of
from vllm_lsa.plugin import metrics as plugin_metrics
from vllm_lsa.plugin.runtime import Runtime
from vllm_lsa.tiers import TieredEngine

logger = init_logger("vllm.lsa")


class DeepseekV4Runtime(Runtime):
    """Owns the V4 engine of one vLLM worker and translates between the two."""

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        self.engine: DeepseekV4Engine | None = None
        self.config = for_deepseek_v4(self.config)
        # The c4 layers, in order: attention modules that register themselves.
        self._attentions: list[Any] = []
        self._planned: EntryPlan | None = None

    @property
    def _tiers(self) -> TieredEngine[Any, Any] | None:
        return self.engine

    def add_layer(self, attention: Any) -> int:
        """Number of a c4 layer, counted from 0."""
        self._attentions.append(attention)
        return len(self._attentions) - 1

    def attach(self, kv_cache_config: Any) -> None:
        """Make the engine: the host store has as many blocks as vLLM has made."""
        specs = specs_of(kv_cache_config.kv_cache_groups)
        require_split(specs, kv_cache_config.kv_cache_groups)
        layers = self._attentions
        keys = [attention.indexer.k_cache for attention in layers]
        self.group = _group_of([cache.prefix for cache in keys], kv_cache_config.kv_cache_groups)
        geometry = EntryGeometry(
            num_layers=len(layers),
            # vLLM's own setting of the block size is that of the narrowest group by now.
            num_page_bytes=layers[0].c4_page_bytes(specs[keys[0].prefix].block_size),
            entries=PAGE_ENTRIES,
            entry_tokens=C4_TOKENS,
            index_bytes=keys[0].kv_cache[0].numel(),
        )
        blocks = kv_cache_config.num_blocks
        self._require_memory(blocks * geometry.block_bytes)
        slots = self.config.pool_slots(geometry, blocks)
        name = f"{self.vllm_config.parallel_config.rank}-{self.vllm_config.instance_id}"
        rows = self.vllm_config.scheduler_config.max_num_seqs
        writer = MetricsWriter(plugin_metrics.directory(), name)
        model, device = self.vllm_config.model_config, self.device
        scorer = load_scorer(self.config, model, device)
        if device.type == "cuda":
            tokens = self.vllm_config.scheduler_config.max_num_batched_tokens
            heads = layers[0].indexer.n_head
            self.engine = DeepseekV4DeviceEngine(
                self.config, geometry, slots, rows, tokens, model.max_model_len, heads, device, writer, scorer
            )
        else:
            self.engine = DeepseekV4Engine(self.config, geometry, slots, rows, writer, scorer)
        self.engine.attach(blocks, [cache.kv_cache for cache in keys])
        self._bind(layers)
        logger.info(
            "LSA: DeepSeek-V4, %d c4 layers, host store %d blocks (%.2f GiB), device pool %d slots (%.2f GiB), "
            "budget %g, indexer %s",
            len(layers),
            blocks,
            blocks * geometry.block_bytes / GIB,
            slots,
            slots * geometry.page_bytes / GIB,
            self.config.budget,
            self.config.indexer if scorer is None else f"{self.config.indexer} ({self._named(scorer)})",
        )

    def _bind(self, layers: Sequence[Any]) -> None:
        """Give each layer its pages of the host store, [blocks, entries, bytes], as the compressor writes them."""
        assert self.engine is not None and self.engine.store is not None
        entries = self.engine.geometry.entries
        for layer, attention in enumerate(layers):
            pages = self.engine.layer_pages(layer)
            if self.device.type == "cuda":
                view = get_accelerator_view_from_cpu_tensor(pages)
                if view.data_ptr() != pages.data_ptr():
                    raise LsaError(
                        "the GPU does not reach pinned host memory by the host's addresses, which LSA needs: serve "
                        "without it on this machine"
                    )
                attention.kv_cache = entry_view(view, entries)
            else:
                attention.kv_cache = pages.unflatten(1, (entries, -1))

    def _named(self, scorer: PagedScorer) -> str:
        """What a memory indexer scores, for the log."""
        layers = model_layers(scorer.layers, self.vllm_config.model_config.hf_config.compress_ratios)
        scored = ", ".join(f"{layer} = c4 layer {number}" for number, layer in layers.items())
        return f"memory indexer of layers {scored}; mode {self.config.mode}"

    def _require_memory(self, need: int) -> None:
        limit, named = psutil.virtual_memory().available / GIB, "GiB of host memory that are free"
        if self.config.host_memory_gib is not None and self.config.host_memory_gib < limit:
            limit, named = self.config.host_memory_gib, "GiB of lsa.host_memory_gib"
        if need / GIB > limit:
            raise LsaError(
                f"the KV cache blocks that vLLM has made need {need / GIB:.2f} GiB of host store, more than the "
                f"{limit:.2f} {named}: lower --kv-cache-memory-bytes (or VLLM_CPU_KVCACHE_SPACE), or raise the limit"
            )

    def open_step(self, runner: Any, scheduler_output: Any) -> None:
        self._planned = None
        super().open_step(runner, scheduler_output)

    def plan_entries(self, common: CommonAttentionMetadata) -> EntryPlan | None:
        """The plan of the open step, made once however many builders ask; None when there is none (dummy runs)."""
        if self.engine is None or self._runner is None:
            return None
        if self._planned is None:
            self._planned = self.engine.plan(self._rows(common))
        return self._planned


def _group_of(names: Sequence[str], groups: Sequence[Any]) -> int:
    """The KV cache group of all these layers. Raises LsaError if there is none, or several."""
    found = [number for number, group in enumerate(groups) if set(names) & set(group.layer_names)]
    if len(found) != 1 or not set(names) <= set(groups[found[0]].layer_names):
        raise LsaError(
            "vLLM gave the index keys of DeepSeek-V4 no common block table, which --attention-backend LSA needs: "
            "use another backend"
        )
    return found[0]
