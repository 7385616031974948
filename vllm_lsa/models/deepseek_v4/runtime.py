"""The engine of a worker that serves DeepSeek-V4: made when vLLM has its blocks, since only then sizes are known."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import psutil
import torch
from vllm.logger import init_logger
from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

from vllm_lsa.config import GIB
from vllm_lsa.errors import LsaError
from vllm_lsa.metrics import MetricsWriter
from vllm_lsa.models.deepseek_v4.device_engine import DeepseekV4DeviceEngine, entry_view
from vllm_lsa.models.deepseek_v4.engine import DeepseekV4Engine, EntryPlan
from vllm_lsa.models.deepseek_v4.geometry import EntryGeometry
from vllm_lsa.models.deepseek_v4.host_keys import key_layers
from vllm_lsa.models.deepseek_v4.memory_indexer import load_scorer
from vllm_lsa.models.deepseek_v4.scorer import PagedScorer, model_layers
from vllm_lsa.models.deepseek_v4.settings import for_deepseek_v4
from vllm_lsa.models.deepseek_v4.specs import (
    C4_TOKENS,
    PAGE_ENTRIES,
    block_width,
    layer_of,
    require_split,
    specs_of,
)
from vllm_lsa.plugin import metrics as plugin_metrics
from vllm_lsa.plugin.runtime import Runtime
from vllm_lsa.tiers import TieredEngine

logger = init_logger("vllm.lsa")

_ROW_BLOCKS = 64
"""Blocks of windows and states for each request that may run (V4-Flash's take 93 while it decodes)."""


class DeepseekV4Runtime(Runtime):
    """Owns the V4 engine of one vLLM worker and translates between the two."""

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        self.engine: DeepseekV4Engine | None = None
        self.config = for_deepseek_v4(self.config)
        # The c4 layers, in order: attention modules that register themselves.
        self._attentions: list[Any] = []
        self._planned: EntryPlan | None = None

    @cached_property
    def key_layers(self) -> frozenset[int] | None:
        """Layers of the model whose index keys vLLM keeps on the device; None for all."""
        if self.config.index_keys == "device":
            return None
        model = self.vllm_config.model_config
        return key_layers(load_scorer(self.config, model), model.hf_config.compress_ratios)

    def keeps_keys(self, attention: Any) -> bool:
        """Whether vLLM pages the index keys of this c4 layer; otherwise they are in the engine's pages."""
        return self.key_layers is None or layer_of(attention.prefix) in self.key_layers

    def index_metadata(self, metadata: Mapping[str, Any]) -> Any:
        """The metadata of a step's index keys, which is one for all c4 layers."""
        return metadata[self._anchor]

    @cached_property
    def _anchor(self) -> str:
        return next(str(each.indexer.k_cache.prefix) for each in self._attentions if self.keeps_keys(each))

    @property
    def _tiers(self) -> TieredEngine[Any, Any] | None:
        return self.engine

    def add_layer(self, attention: Any) -> int:
        """Number of a c4 layer, counted from 0."""
        self._attentions.append(attention)
        return len(self._attentions) - 1

    def cap_memory(self, available: int) -> int:
        """On a CUDA device: for no more blocks than the host store has room for, and with room left for the pool. What
        --kv-cache-memory-bytes says is for the blocks alone, as elsewhere in vLLM."""
        if self.device.type != "cuda":
            return available
        specs = get_kv_cache_spec(self.vllm_config)
        on_host, on_device = self._page_bytes(specs) * len(self._attentions), block_width(specs)
        blocks = self._host_blocks(on_host, specs)
        if self.vllm_config.cache_config.kv_cache_memory_bytes is None:
            fixed, share = self.config.pool_size()
            if self.config.indexer == "exact":
                pages = DeepseekV4DeviceEngine.staging_pages(self.vllm_config.scheduler_config.max_num_seqs)
                available -= pages * on_host // len(self._attentions)
            blocks = min(blocks, int((available - fixed * GIB) / (on_device + share * on_host)))
        return min(available, max(0, blocks) * on_device)

    def _host_blocks(self, block: int, specs: Mapping[str, Any]) -> int:
        """Blocks of so many bytes for which the host store has room: as set, or for four requests of max_model_len.

        Windows and states take blocks as well, which the store has rows for: those of the tokens under way most of all.
        """
        least = self._least_blocks(specs)
        if self.config.host_memory_gib is not None:
            blocks = int(self.config.host_memory_gib * GIB / self._ranks) // block
            if blocks < least:
                logger.warning(
                    "lsa.host_memory_gib=%g has room for %d blocks, and one request of max_model_len needs %d: raise "
                    "it to at least %.2f, or lower --max-model-len or --max-num-batched-tokens",
                    self.config.host_memory_gib,
                    blocks,
                    least,
                    least * block * self._ranks / GIB,
                )
            return blocks
        # One is read while the others decode.
        pages = -(-self.vllm_config.model_config.max_model_len // (PAGE_ENTRIES * C4_TOKENS))
        return least + 3 * pages + _ROW_BLOCKS * self.vllm_config.scheduler_config.max_num_seqs

    def _least_blocks(self, specs: Mapping[str, Any]) -> int:
        """Blocks without which vLLM refuses to start: of all that one request of max_model_len may hold while as many
        steps as vLLM has under way read it, and the one block that it gives to nobody."""
        groups = get_kv_cache_groups(self.vllm_config, dict(specs))
        most = {
            name: -(-spec.max_memory_usage_bytes(self.vllm_config) // spec.page_size_bytes)
            for name, spec in specs.items()
        }
        return 1 + sum(max(most[name] for name in group.layer_names) for group in groups)

    def _page_bytes(self, specs: Mapping[str, Any]) -> int:
        """Bytes of a page of one c4 layer in the host store. specs: {name: KVCacheSpec} of what vLLM keeps."""
        kept = [each.indexer.k_cache.prefix for each in self._attentions if self.keeps_keys(each)]
        # vLLM's own setting of the block size becomes that of the narrowest group.
        entries = self._attentions[0].c4_page_bytes(specs[kept[0]].block_size)
        every = len(kept) == len(self._attentions)
        return int(entries + (0 if every else specs[kept[0]].page_size_bytes))

    def attach(self, kv_cache_config: Any) -> None:
        """Make the engine: the host store has as many blocks as vLLM has made."""
        specs = specs_of(kv_cache_config.kv_cache_groups)
        require_split(specs, kv_cache_config.kv_cache_groups)
        layers, blocks = self._attentions, kv_cache_config.num_blocks
        kept = [each.indexer.k_cache for each in layers if self.keeps_keys(each)]
        self.group = _group_of([cache.prefix for cache in kept], kv_cache_config.kv_cache_groups)
        page_bytes, every = self._page_bytes(specs), len(kept) == len(layers)
        geometry = EntryGeometry(
            num_layers=len(layers),
            num_page_bytes=page_bytes,
            entries=PAGE_ENTRIES,
            entry_tokens=C4_TOKENS,
            index_bytes=kept[0].kv_cache[0].numel(),
            key_layers=len(kept),
            key_offset=None if every else page_bytes - specs[kept[0].prefix].page_size_bytes,
        )
        self._require_memory(blocks * geometry.block_bytes)
        scorer = load_scorer(self.config, self.vllm_config.model_config, self.device)
        cells = [each.indexer.k_cache.kv_cache if self.keeps_keys(each) else None for each in layers]
        self.engine = self._make_engine(geometry, self.config.pool_slots(geometry, blocks), scorer)
        if isinstance(self.engine, DeepseekV4DeviceEngine):
            self.engine.attach(blocks, cells, _seen_by_device)
        else:
            self.engine.attach(blocks, cells)
        self._bind(layers)
        logger.info(
            "LSA: DeepSeek-V4, %d c4 layers, host store %d blocks (%.2f GiB), device pool %d slots (%.2f GiB), "
            "index keys of %d layers on the device, budget %g, indexer %s",
            len(layers),
            blocks,
            blocks * geometry.block_bytes / GIB,
            self.engine.pool.num_slots,
            self.engine.pool.num_slots * geometry.page_bytes / GIB,
            len(kept),
            self.config.budget,
            self.config.indexer if scorer is None else f"{self.config.indexer} ({self._named(scorer)})",
        )

    def _make_engine(self, geometry: EntryGeometry, slots: int, scorer: PagedScorer | None) -> DeepseekV4Engine:
        name = f"{self.vllm_config.parallel_config.rank}-{self.vllm_config.instance_id}"
        writer = MetricsWriter(plugin_metrics.directory(), name)
        scheduler = self.vllm_config.scheduler_config
        if self.device.type != "cuda":
            return DeepseekV4Engine(self.config, geometry, slots, scheduler.max_num_seqs, writer, scorer)
        return DeepseekV4DeviceEngine(
            self.config,
            geometry,
            slots,
            scheduler.max_num_seqs,
            scheduler.max_num_batched_tokens,
            self.vllm_config.model_config.max_model_len,
            self._attentions[0].indexer.n_head,
            self.device,
            writer,
            scorer,
        )

    def _bind(self, layers: Sequence[Any]) -> None:
        """Give each layer its pages of the host store, [blocks, entries, bytes], as the compressor writes them."""
        engine = self.engine
        assert engine is not None
        geometry = engine.geometry
        for layer, attention in enumerate(layers):
            if isinstance(engine, DeepseekV4DeviceEngine):
                attention.kv_cache = entry_view(engine.store_view(layer), geometry.entries)
            else:
                pages = geometry.entry_pages(engine.layer_pages(layer))
                attention.kv_cache = pages.unflatten(1, (geometry.entries, -1))
            if not self.keeps_keys(attention):
                attention.indexer.k_cache.kv_cache = engine.store_keys(layer)

    def _named(self, scorer: PagedScorer) -> str:
        """What a memory indexer scores, for the log."""
        layers = model_layers(scorer.layers, self.vllm_config.model_config.hf_config.compress_ratios)
        scored = ", ".join(f"{layer} = c4 layer {number}" for number, layer in layers.items())
        return f"memory indexer of layers {scored}; mode {self.config.mode}"

    @property
    def _ranks(self) -> int:
        """Ranks of tensor parallelism, each of which holds all pages."""
        return int(self.vllm_config.parallel_config.tensor_parallel_size)

    def _require_memory(self, need: int) -> None:
        """Raises LsaError if the host store of this rank, in bytes, does not fit."""
        limit, named = psutil.virtual_memory().available / GIB, "GiB of host memory that are free"
        if self.config.host_memory_gib is not None and self.config.host_memory_gib / self._ranks < limit:
            limit, named = self.config.host_memory_gib / self._ranks, "GiB of lsa.host_memory_gib for each rank"
        if need / GIB > limit:
            raise LsaError(
                f"the KV cache blocks that vLLM has made need {need / GIB:.2f} GiB of host store on each rank, more "
                f"than the {limit:.2f} {named}: lower --kv-cache-memory-bytes (or VLLM_CPU_KVCACHE_SPACE), "
                "--max-num-batched-tokens or --max-model-len, or raise the limit"
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


def _seen_by_device(pages: torch.Tensor) -> torch.Tensor:
    """What a CUDA device sees of pinned memory. Raises LsaError if that is at another address."""
    view = get_accelerator_view_from_cpu_tensor(pages)
    if view.data_ptr() != pages.data_ptr():
        raise LsaError(
            "the GPU does not reach pinned host memory by the host's addresses, which LSA needs: serve without it on "
            "this machine"
        )
    return view


def _group_of(names: Sequence[str], groups: Sequence[Any]) -> int:
    """The KV cache group of all these layers. Raises LsaError if there is none, or several."""
    found = [number for number, group in enumerate(groups) if set(names) & set(group.layer_names)]
    if len(found) != 1 or not set(names) <= set(groups[found[0]].layer_names):
        raise LsaError(
            "vLLM gave the index keys of DeepSeek-V4 no common block table, which --attention-backend LSA needs: "
            "use another backend"
        )
    return found[0]
