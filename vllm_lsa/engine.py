"""LSA of one rank without vLLM: what the engines of a CPU and of a CUDA device have in common."""

from abc import abstractmethod
from typing import TypeVar

import numpy as np
import torch

from vllm_lsa.config import LsaConfig
from vllm_lsa.errors import LsaError
from vllm_lsa.indexer.layout import IndexLayout
from vllm_lsa.indexer.trained import Trained, find, load
from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.metrics import MetricsWriter
from vllm_lsa.ops.native import gather_cells
from vllm_lsa.residency.demand import make_demand
from vllm_lsa.residency.peers import Peers
from vllm_lsa.residency.policies import make_policy
from vllm_lsa.residency.policies.base import ScoreInput
from vllm_lsa.residency.requests import Request
from vllm_lsa.residency.selection import select
from vllm_lsa.tiers import TieredEngine

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


class LsaEngine(TieredEngine[P, KVGeometry]):
    """The two tiers of dense attention, and what decides which chunks to keep. P: the plan of a step."""

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
        super().__init__(config, geometry, num_slots, self._staging_pages(geometry), max_requests, device, metrics)
        self._scale = scale
        kind = (geometry.chunk_tokens, geometry.head_dim, geometry.compute_dtype)
        trained = load_trained(config, device, geometry.rank, geometry.ranks)
        self._policy = make_policy(config.policy, *kind, trained)
        self._demand = make_demand(config.demand, *kind, trained)
        self._layer_weights = None if trained is None else trained.config.layer_weights
        self.layout = index_layout(config, *kind, device, geometry.rank, geometry.ranks)
        self._queries = torch.zeros(
            max_requests,
            geometry.num_layers,
            geometry.num_q_heads,
            geometry.head_dim,
            dtype=geometry.compute_dtype,
            device=device,
        )
        self._cells: list[torch.Tensor] = []

    @staticmethod
    @abstractmethod
    def _staging_pages(geometry: KVGeometry) -> int:
        """Pages beside the pool's slots, for what passes through."""

    @property
    def _index_bytes(self) -> int:
        return self.geometry.num_layers * self.geometry.num_kv_heads * self.layout.cell_bytes

    @property
    def _set_peers(self) -> Peers:
        """The ranks that hold heads of the same sets."""
        return Peers() if self.config.sets == "per_head" else self.peers

    @abstractmethod
    def attend(self, plan: P, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
        """Attention of one layer. q, out: [t, Hq, D]; k, v: [t, Hkv, D], RoPE applied. Writes out."""

    def _choose(
        self,
        request: Request,
        row: int,
        num_chunks: int,
        budget_chunks: np.ndarray,
        cycle: int,
        usage: torch.Tensor | None,
    ) -> torch.Tensor:
        """The full chunks to keep, bool [lanes, num_chunks] on the device. budget_chunks: int64 [lanes]. The rest as
        for `_scores`."""
        config = self.config
        return select(
            self._scores(request, row, num_chunks, cycle, usage),
            budget_chunks=budget_chunks,
            threshold=config.threshold,
            sink_chunks=config.sink_chunks,
            recency_chunks=config.recency_chunks,
            shared=config.sets == "shared",
            mode=config.mode,
        )

    def _scores(
        self, request: Request, row: int, num_chunks: int, cycle: int, usage: torch.Tensor | None
    ) -> torch.Tensor:
        """What the full chunks score, fp32 [lanes, num_chunks] on the device, all ranks of one mind. row: of the buffer
        of last queries. usage: fp32 [lanes, num_chunks], None without demand."""
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
        return self._set_peers.combine(self._score(request, row, x), config.mode)

    def _score(self, request: Request, row: int, x: ScoreInput) -> torch.Tensor:
        """The policy's scores fp32 [lanes, N]. row: of the buffer of last queries. x: without query and cells."""
        policy = self._policy
        if policy.index is not None:
            blocks = torch.from_numpy(request.blocks.astype(np.int64)).to(self._device, non_blocking=True)
            of_layers = [self.layout.part(cells, policy.index) for cells in self._cells]
            x.cells = torch.stack([gather_cells(part, blocks, x.num_chunks) for part in of_layers])
            x.query = self._queries[row]
        return policy.score(x)
