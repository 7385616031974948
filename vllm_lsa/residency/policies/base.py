"""The contract of a lookahead policy."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from vllm_lsa.indexer.base import ChunkIndex
from vllm_lsa.residency.peers import Peers


@dataclass
class ScoreInput:
    """What a policy may look at: one request at the end of a cycle.

    query: [L, Hq, D], the last token's query per layer, RoPE applied; None unless the policy needs it.
    cells: uint8 [L, >= N, Hkv, b], cells of the policy's own index; None if it has none. Those past N are not read.
    usage: fp32 [lanes, N], what demand noted of each chunk lately (see `residency.usage`); None without demand, and all
    zeros before the first step.
    num_layers: L. layer_lanes: lanes of a layer, G; all lanes are L·G. num_chunks: N, the request's full chunks.
    position: tokens computed so far, that is the position of the next token. scale: of q·k in the softmax. mode:
    how heads combine.
    request_seed: the same for a request in every process. cycle: counts the request's selections. peers: the ranks that
    hold the other heads; what is said above of heads is of this rank's.
    """

    query: torch.Tensor | None
    cells: torch.Tensor | None
    usage: torch.Tensor | None
    num_chunks: int
    num_layers: int
    layer_lanes: int
    position: int
    scale: float
    mode: Literal["or", "mean"]
    request_seed: int
    cycle: int
    device: torch.device
    peers: Peers = field(default_factory=Peers)

    @property
    def num_lanes(self) -> int:
        return self.num_layers * self.layer_lanes


class LookaheadPolicy(ABC):
    """Scores chunks by how much the next cycle is expected to need them."""

    name: ClassVar[str]
    needs_query: ClassVar[bool] = False
    index_type: ClassVar[type[ChunkIndex] | None] = None

    def __init__(self, chunk_tokens: int, head_dim: int, dtype: torch.dtype) -> None:
        """chunk_tokens: C. head_dim: D. dtype: of the keys."""
        kind = self.index_type
        self.index: ChunkIndex | None = None if kind is None else kind(chunk_tokens, head_dim, dtype)

    @abstractmethod
    def score(self, x: ScoreInput) -> torch.Tensor:
        """Scores fp32 [lanes, N] in [0, 1] on x.device."""
