"""LSA of one rank without vLLM: what the engines of a CPU and of a CUDA device have in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
import torch

from vllm_lsa.config import LsaConfig
from vllm_lsa.errors import LsaError
from vllm_lsa.indexer.layout import IndexLayout
from vllm_lsa.indexer.trained import Trained, find, load
from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.memory.host_store import HostStore
from vllm_lsa.memory.slot_pool import SlotPool
from vllm_lsa.metrics import PER_GROUP, MetricsWriter
from vllm_lsa.ops.native import gather_cells
from vllm_lsa.residency.demand import make_demand
from vllm_lsa.residency.peers import Peers
from vllm_lsa.residency.policies import make_policy
from vllm_lsa.residency.policies.base import ScoreInput
from vllm_lsa.residency.requests import Request, RequestMirror, StepUpdate
from vllm_lsa.residency.selection import select

P = TypeVar("P")


def load_trained(config: LsaConfig, device: torch.device, rank: int = 0, ranks: int = 1) -> Trained | None:
    """The checkpoint that `indexer` names, None if it names a policy: the heads of one rank of a tensor-parallel group.

    Raises LsaError in one line if it cannot be read, or if its scorers cannot be divided over so many ranks.
    """
    folder = find(config.indexer)
    if folder is None:
        return None
    trained = load(folder, str(device), rank, ranks)
    if config.lookahead == "indexer" and ranks > 1 and not trained.indexer_is_divided:
        raise LsaError(
            f"lsa.indexer={config.indexer!r} has scorers for {trained.config.kv_heads} KV heads, which "
            f"--tensor-parallel-size {ranks} does not divide: use fewer ranks, or lsa.lookahead='usage'"
        )
    return trained


def index_layout(
    config: LsaConfig, chunk_tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device, rank: int = 0,
    ranks: int = 1,
) -> IndexLayout:  # fmt: skip
    """The index cell that the configured policy and demand need, shared where they use the same index."""
    trained = load_trained(config, device, rank, ranks)
    policy = make_policy(config.policy, chunk_tokens, head_dim, dtype, trained)
    demand = make_demand(config.demand, chunk_tokens, head_dim, dtype, trained)
    return IndexLayout([index for index in (policy.index, demand.index) if index is not None])


class LsaEngine(ABC, Generic[P]):
    """The two tiers, and what decides which chunks to keep. P: the plan of a step.

    The device pool is there from the start, the host store once `attach` says how many blocks there are.

    A step is `open_step` (what the scheduler decided), `plan` (the rows of the batch), `attend` for each layer, and
    `close_step`.
    """

    def __init__(
        self,
        config: LsaConfig,
        geometry: KVGeometry,
        scale: float,
        num_slots: int,
        max_requests: int,
        device: torch.device,
        metrics: MetricsWriter | None = None,
    ) -> None:
        self.config = config
        self.geometry = geometry
        # The plugin says before `attach` who they are.
        self.peers = Peers()
        self.mirror = RequestMirror(geometry.block_tokens)
        self._scale = scale
        self._device = device
        self._metrics = metrics
        self._prompts: dict[str, int] = {}
        self._max_requests = max_requests
        self._poison = config.check == "poison"
        kind = (geometry.chunk_tokens, geometry.head_dim, geometry.dtype)
        trained = load_trained(config, device, geometry.rank, geometry.ranks)
        self._policy = make_policy(config.policy, *kind, trained)
        self._demand = make_demand(config.demand, *kind, trained)
        self._layer_weights = None if trained is None else trained.config.layer_weights
        self.layout = index_layout(config, *kind, device, geometry.rank, geometry.ranks)
        self.pool = SlotPool(geometry, num_slots, self._staging_pages(), device, self._poison)
        self._queries = torch.zeros(
            max_requests,
            geometry.num_layers,
            geometry.num_q_heads,
            geometry.head_dim,
            dtype=geometry.dtype,
            device=device,
        )
        self.store: HostStore | None = None
        self._cells: list[torch.Tensor] = []

    @abstractmethod
    def _staging_pages(self) -> int:
        """Pages beside the pool's slots, for what passes through."""

    @abstractmethod
    def attach(self, num_blocks: int, cells: Sequence[torch.Tensor]) -> None:
        """Allocate the host store for `num_blocks` blocks and take over the index cells of every layer.

        cells: one tensor a layer, uint8 [num_blocks, Hkv, chunks_per_block, cell_bytes].
        """

    @property
    def _set_peers(self) -> Peers:
        """The ranks that hold heads of the same sets."""
        return Peers() if self.config.sets == "per_head" else self.peers

    def _attach_store(self, num_blocks: int) -> None:
        self.store = HostStore(self.geometry, num_blocks, pin=self._device.type == "cuda")
        if self._poison:
            self.store.pages.fill_(float("nan"))
        self.pool.bind(self.store.num_pages)

    def open_step(self, update: StepUpdate) -> None:
        """Apply what the scheduler decided, before any work of the step."""
        assert self.store is not None
        for request in self.mirror.leave(update):
            self._leave(request)
        for name in update.finished:
            self._prompts.pop(name, None)
        self._prompts.update((new.id, new.num_prompt) for new in update.new)
        fresh = self.mirror.enter(update, self._prompts)
        targets = np.array([target for _, target in update.block_copies], np.int32)
        changed = np.union1d(fresh, targets)
        self.pool.invalidate(self.store.block_pages(changed))
        if (self._poison and len(changed)) or update.block_copies:
            self._quiesce()
        if self._poison and len(changed):
            self.store.poison(changed)
        for source, target in update.block_copies:
            self.store.copy_block(source, target)

    @abstractmethod
    def _leave(self, request: Request) -> None:
        """Give back what a request holds, once nothing is on its way to it."""

    @abstractmethod
    def _quiesce(self) -> None:
        """Wait until nothing writes to the host store but the host."""

    @abstractmethod
    def plan(self, rows: Sequence[tuple[str, int]]) -> P:
        """Decide the resident sets of a step and lay it out. rows: (request id, tokens) in the order of the batch."""

    @abstractmethod
    def attend(self, plan: P, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
        """Attention of one layer. q, out: [t, Hq, D]; k, v: [t, Hkv, D], RoPE applied. Writes out."""

    def footprint(self) -> tuple[int, int, int]:
        """Bytes of live requests' K and V in whole chunks: all, those in resident sets, and the index beside them."""
        geometry = self.geometry
        chunks = sum(geometry.chunks(request.length) for request in self.mirror.requests.values())
        cell = geometry.num_layers * geometry.num_kv_heads * self.layout.cell_bytes
        return (
            chunks * geometry.num_lanes * geometry.page_bytes,
            self._num_resident() * geometry.page_bytes,
            chunks * cell,
        )

    @abstractmethod
    def _num_resident(self) -> int:
        """Pages in resident sets."""

    def close_step(self) -> None:
        """Publish the metrics."""
        if self._metrics is None or self.store is None:
            return
        total, resident, index = self.footprint()
        values = {
            "kv_bytes_total": total,
            "kv_bytes_resident": resident,
            "index_bytes": index,
            "pool_slots": self.pool.num_slots,
            "slots_used": self.pool.num_pinned,
            "slots_cached": self.pool.num_cached,
            "live_requests": len(self.mirror.requests),
            "host_blocks": self.store.num_blocks,
            "evictions": self.pool.evictions,
            **self.counted(),
        }
        if self.geometry.rank:
            values |= dict.fromkeys(PER_GROUP, 0)
        for name, value in values.items():
            self._metrics.set(name, value)

    @abstractmethod
    def counted(self) -> dict[str, float]:
        """Metrics that only grow, less the pool's."""

    @abstractmethod
    def close(self) -> None:
        """End what runs beside the steps and withdraw the metrics."""

    def _choose(
        self,
        request: Request,
        row: int,
        num_chunks: int,
        budget_chunks: np.ndarray,
        cycle: int,
        usage: torch.Tensor | None,
    ) -> torch.Tensor:
        """The full chunks to keep, bool [lanes, num_chunks] on the device. row: of the buffer of last queries.
        budget_chunks: int64 [lanes]. usage: fp32 [lanes, num_chunks], None without demand."""
        config = self.config
        x = ScoreInput(
            query=None,
            cells=None,
            usage=usage,
            num_chunks=num_chunks,
            num_layers=self.geometry.num_layers,
            layer_lanes=self.geometry.layer_lanes,
            position=request.num_computed,
            scale=self._scale,
            mode=config.mode,
            request_seed=request.seed,
            cycle=cycle,
            device=self._device,
            peers=self.peers,
        )
        scores = self._set_peers.combine(self._score(request, row, x), config.mode)
        return select(
            scores,
            budget_chunks=torch.from_numpy(budget_chunks).to(self._device, non_blocking=True),
            threshold=config.threshold,
            sink_chunks=config.sink_chunks,
            recency_chunks=config.recency_chunks,
            shared=config.sets == "shared",
            mode=config.mode,
        )

    def _score(self, request: Request, row: int, x: ScoreInput) -> torch.Tensor:
        """The policy's scores fp32 [lanes, N]. row: of the buffer of last queries. x: without query and cells."""
        policy = self._policy
        if policy.index is not None:
            blocks = torch.from_numpy(request.blocks.astype(np.int64)).to(self._device, non_blocking=True)
            of_layers = [self.layout.part(cells, policy.index) for cells in self._cells]
            x.cells = torch.stack([gather_cells(part, blocks, x.num_chunks) for part in of_layers])
            x.query = self._queries[row]
        return policy.score(x)
