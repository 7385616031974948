"""The engine of one worker process and the places where vLLM's worker touches it."""

import functools
from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeVar, cast

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu_worker import Worker

from vllm_lsa.config import GIB, LsaConfig
from vllm_lsa.device.engine import DeviceEngine
from vllm_lsa.device.plan import DevicePlan
from vllm_lsa.device.prefill import PrefillAttention, TorchPrefill
from vllm_lsa.errors import LsaError
from vllm_lsa.host_engine import HostEngine
from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.metrics import MetricsWriter
from vllm_lsa.ops.e4m3 import KVScales
from vllm_lsa.plugin import metrics as plugin_metrics
from vllm_lsa.plugin import tensor_parallel
from vllm_lsa.plugin.scheduler_output import step_update
from vllm_lsa.plugin.validate import host_blocks
from vllm_lsa.residency.plan import StepPlan
from vllm_lsa.tiers import TieredEngine

logger = init_logger("vllm.lsa")


R = TypeVar("R", bound="Runtime")


class Runtime(ABC):
    """Owns the engine of one vLLM worker and translates between the two: what holds for every model."""

    # By identity of the compilation config, which copies of a VllmConfig share; its instance_id changes on the way.
    _by_config: ClassVar[dict[int, "Runtime"]] = {}

    @classmethod
    def of(cls: type[R], vllm_config: VllmConfig) -> R:
        """The runtime of an engine instance in this process."""
        key = id(vllm_config.compilation_config)
        if key not in cls._by_config:
            cls._by_config[key] = cls(vllm_config)
            _hook_worker()
        return cast(R, cls._by_config[key])

    @classmethod
    def latest(cls) -> "Runtime":
        """The runtime made last: vLLM asks for cache specs, without saying for whom, right after it loads a model."""
        return next(reversed(cls._by_config.values()))

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.config = LsaConfig.parse(vllm_config.additional_config)
        self.vllm_config = vllm_config
        self.group = 0
        """The KV cache group whose block ids are rows of the host store."""
        self._runner: Any = None

    @property
    def device(self) -> torch.device:
        return torch.device(self.vllm_config.device_config.device or "cpu")

    @property
    @abstractmethod
    def _tiers(self) -> TieredEngine[Any, Any] | None:
        """The engine; None until it is made."""

    def cap_memory(self, available: int) -> int:
        """Device bytes that vLLM may take for its caches, out of those available."""
        return available

    @abstractmethod
    def attach(self, kv_cache_config: Any) -> None:
        """Allocate the host store; vLLM has just made its blocks."""

    def open_step(self, runner: Any, scheduler_output: Any) -> None:
        if self._tiers is not None:
            self._runner = runner
            self._tiers.open_step(step_update(scheduler_output, self.group))

    def close_step(self) -> None:
        if self._tiers is not None:
            self._runner = None
            self._tiers.close_step()

    def close(self) -> None:
        """The worker goes down: end threads, withdraw the metrics."""
        self._by_config.pop(id(self.vllm_config.compilation_config), None)
        if self._tiers is not None:
            self._tiers.close()

    def _rows(self, common: CommonAttentionMetadata) -> list[tuple[str, int]]:
        """(request id, tokens) in the order of the batch."""
        lengths = common.query_start_loc_cpu.diff().tolist()
        names = self._row_names(common)
        if self.config.check != "off":
            self._check(common, names)
        return list(zip(names, lengths, strict=False))

    def _row_names(self, common: CommonAttentionMetadata) -> list[str]:
        """Request ids in the order of the batch; both model runners keep one, in different places."""
        if common.req_idx is not None:
            names = self._runner.req_states.index_to_req_id
            return [names[int(i)] for i in common.req_idx]
        return list(self._runner.input_batch.req_ids)[: common.num_reqs]

    def _check(self, common: CommonAttentionMetadata, names: list[str]) -> None:
        assert self._tiers is not None
        lengths = common.seq_lens.tolist()
        tables = common.block_table_tensor.cpu().numpy()
        for i, name in enumerate(names):
            self._tiers.mirror.check(name, tables[i], lengths[i])


class DenseRuntime(Runtime):
    """Owns the engine of a worker whose model has dense attention."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        super().__init__(vllm_config)
        self.engine: HostEngine | DeviceEngine | None = None
        self.step_demands = True
        """Whether rows may ask for chunks, see `DevicePlan`: of the step that is planned or captured."""
        self.captured: set[bool] = set()
        """What that was in plans for captures, see `step_graphs.Steps`."""
        self.host_blocks = 0
        self._layers: dict[str, int] = {}

    @property
    def _tiers(self) -> TieredEngine[Any, Any] | None:
        return self.engine

    @property
    def of_two_kinds(self) -> bool:
        return isinstance(self.engine, DeviceEngine) and self.engine.demands and self.engine.store is not None

    def allocate_pool(self, impl: Any) -> None:
        """Allocate the device pool when the first layer's weights are ready: all layers exist by then."""
        if self.engine is not None:
            return
        context = self.vllm_config.compilation_config.static_forward_context
        layers = {name: layer for name, layer in context.items() if isinstance(layer, Attention)}
        shapes = {
            (a.num_heads, a.num_kv_heads, a.head_size, a.head_size_v, a.impl.scale, a.kv_cache_dtype)
            for a in layers.values()
        }
        if len(shapes) != 1 or impl.head_size != next(iter(layers.values())).head_size_v:
            raise LsaError(
                f"--attention-backend LSA needs layers of one shape with K and V alike, this model has {shapes}"
            )
        self._layers = {name: index for index, name in enumerate(layers)}
        rank, ranks = tensor_parallel.rank_and_size()
        geometry = KVGeometry(
            num_layers=len(layers),
            num_q_heads=impl.num_heads,
            num_kv_heads=impl.num_kv_heads,
            head_dim=impl.head_size,
            dtype=next(iter(layers.values())).kv_cache_torch_dtype,
            block_tokens=self.vllm_config.cache_config.block_size,
            chunk_tokens=self.config.chunk_tokens,
            layer_lanes=self.config.layer_lanes(impl.num_kv_heads),
            rank=rank,
            ranks=ranks,
            model_dtype=self.vllm_config.model_config.dtype,
        )
        self.host_blocks = host_blocks(self.vllm_config, self.config, geometry)
        slots = self.config.pool_slots(geometry, self.host_blocks)
        # One process may hold several engines, each with a worker of rank 0.
        name = f"{self.vllm_config.parallel_config.rank}-{self.vllm_config.instance_id}"
        arguments = (
            self.config,
            geometry,
            impl.scale,
            slots,
            self.vllm_config.scheduler_config.max_num_seqs,
            self.device,
            MetricsWriter(plugin_metrics.directory(), name),
        )
        if self.device.type == "cuda":
            self.engine = DeviceEngine(*arguments, self.vllm_config.model_config.max_model_len, prefill(geometry))
        else:
            self.engine = HostEngine(*arguments)
        self.engine.peers = tensor_parallel.peers()
        logger.info(
            "LSA: host store %d blocks (%.2f GiB), device pool %d slots (%.2f GiB), budget %g, indexer %s, "
            "lookahead %s, demand %s",
            self.host_blocks,
            self.host_blocks * geometry.block_bytes / GIB,
            slots,
            slots * geometry.page_bytes / GIB,
            self.config.budget,
            self.config.indexer,
            self.config.lookahead,
            self.config.demand,
        )

    def cap_memory(self, available: int) -> int:
        """Device bytes for index cells, so that vLLM makes as many blocks as the host store holds."""
        if self.engine is None:
            return available
        geometry = self.engine.geometry
        per_block = (
            geometry.num_layers * geometry.num_kv_heads * geometry.chunks_per_block * self.engine.layout.cell_bytes
        )
        return min(available, self.host_blocks * per_block)

    def attach(self, kv_cache_config: Any) -> None:
        """Allocate the host store; vLLM has just made its blocks."""
        if self.engine is None:
            return
        context = self.vllm_config.compilation_config.static_forward_context
        if isinstance(self.engine, DeviceEngine) and self.engine.geometry.quantised:
            # Not before: with dummy weights the first layers' scales are noise while the pool is allocated.
            of_layers = [context[name] for name in self._layers]
            self.engine.kv_scales = [KVScales(layer._k_scale_float, layer._v_scale_float) for layer in of_layers]
        cells = [context[name].kv_cache.view(torch.uint8) for name in self._layers]
        self.engine.attach(cells[0].shape[0], cells)

    def plan_capture(self, num_rows: int) -> DevicePlan | None:
        """A plan to capture a CUDA graph with; None while vLLM only measures what capturing takes."""
        if isinstance(self.engine, DeviceEngine) and self.engine.store is not None:
            self.captured.add(self.step_demands)
            return self.engine.plan_capture(num_rows, self.step_demands)
        return None

    def plan(self, common: CommonAttentionMetadata) -> StepPlan | DevicePlan | None:
        """Plan the open step; None when there is none (dummy and capture runs)."""
        if self.engine is None or self._runner is None:
            return None
        rows = self._rows(common)
        if isinstance(self.engine, DeviceEngine):
            # One token each: a full CUDA graph may run the step, with as many rows as it was captured for.
            padded = common.num_reqs if common.max_query_len == 1 else 0
            plan = self.engine.plan(rows, common.block_table_tensor, padded)
            self.step_demands = plan.demands
            return plan
        return self.engine.plan(rows)

    def attend(
        self, layer_name: str, plan: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        assert self.engine is not None
        self.engine.attend(plan, self._layers[layer_name], q, k, v, out)


def prefill(geometry: KVGeometry) -> PrefillAttention:
    """vLLM's FlashAttention where it takes the dtype, else torch's kernels."""
    if geometry.compute_dtype == torch.float32:
        return TorchPrefill()
    from vllm_lsa.plugin.prefill import FlashPrefill

    return FlashPrefill(geometry.head_dim)


def _steps_of(vllm_config: VllmConfig) -> DenseRuntime | None:
    found = Runtime._by_config.get(id(vllm_config.compilation_config))
    return found if isinstance(found, DenseRuntime) else None


def _hook_worker() -> None:
    """Wrap the worker methods that LSA has to know of. Only workers get here, and only once a process."""
    if hasattr(Worker, "_lsa_hooked"):
        return
    Worker._lsa_hooked = True
    from vllm.platforms import current_platform

    owners = [Worker]
    if current_platform.is_cuda():
        from vllm_lsa.plugin import step_graphs

        step_graphs.hook(_steps_of)
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        owners.append(CPUWorker)

    def wrap(name: str, make: Any) -> None:
        for owner in owners:
            if name in vars(owner):
                setattr(owner, name, functools.wraps(vars(owner)[name])(make(vars(owner)[name])))

    def runtime(worker: Any) -> Runtime | None:
        return Runtime._by_config.get(id(worker.vllm_config.compilation_config))

    def determine_available_memory(original: Any) -> Any:
        def wrapped(self: Any) -> int:
            available = original(self)
            mine = runtime(self)
            return mine.cap_memory(available) if mine else available

        return wrapped

    def initialize_from_config(original: Any) -> Any:
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            if mine := runtime(self):
                mine.attach(*args, **kwargs)
            return result

        return wrapped

    def execute_model(original: Any) -> Any:
        def wrapped(self: Any, scheduler_output: Any) -> Any:
            mine = runtime(self)
            if mine is None:
                return original(self, scheduler_output)
            mine.open_step(self.model_runner, scheduler_output)
            try:
                return original(self, scheduler_output)
            finally:
                mine.close_step()

        return wrapped

    def shutdown(original: Any) -> Any:
        def wrapped(self: Any) -> Any:
            if mine := runtime(self):
                mine.close()
            return original(self)

        return wrapped

    wrap("determine_available_memory", determine_available_memory)
    wrap("initialize_from_config", initialize_from_config)
    wrap("execute_model", execute_model)
    wrap("shutdown", shutdown)
