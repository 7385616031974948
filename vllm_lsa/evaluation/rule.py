"""Which chunks of the past each decode step may read: one rule for every method that is compared.

The serving engine (`vllm_lsa/residency`) follows the same rule one step at a time; here it is vectorised over blocks of
64 decode steps, each of which starts from a selection of its own.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from vllm_lsa.errors import LsaError
from vllm_lsa.evaluation.indexes import Exact, KeyIndex, MeanKey, Product, Quest
from vllm_lsa.indexer import MemoryIndexer
from vllm_lsa.residency.usage import DECAY

LOOKAHEADS = ("newest", "usage", "usage_mean", "random", "mean_key", "quest", "oracle", "none")


@dataclass(frozen=True)
class LookaheadInput:
    """What a lookahead may look at when it chooses the chunks of a block: P pasts with r blocks each, B = P r.

    queries: fp32 [P, Hkv, r, g, 64, D], RoPE applied, of the tokens before each block; query head h is [:, h // g, :,
    h % g]. hidden: [P, r, hidden size], the input of the attention module at the last of these tokens; None unless the
    past kept it. starts: [P, r], first position of each block. usage: [P, Hkv, r, N], what demand would have noted
    by then. keys: fp32
    [P, Hkv, N, D], the mean key of each chunk. valid: bool [P, r, N], full chunks before the block.
    """

    layer: int
    queries: torch.Tensor
    hidden: torch.Tensor | None
    starts: torch.Tensor
    usage: torch.Tensor
    keys: torch.Tensor
    valid: torch.Tensor


class Lookahead(Protocol):
    """A lookahead of one's own: shares of the coming attention mass, [P, 1 or Hkv, r, N]; -inf is never chosen."""

    def __call__(self, x: LookaheadInput) -> torch.Tensor: ...


@dataclass(frozen=True)
class SelectionRule:
    """What is resident in a block of `period` decode steps, and how it changes.

    Attributes
    ----------
    budget
        Resident share of a request's chunks, forced ones included; 1.0 keeps all.
    chunk_tokens
        Tokens of a chunk.
    period
        Decode steps between two selections, that is tokens of a block.
    sets
        One set for each layer, for each layer and KV head, or one that all layers start from. A set is a *lane*.
    sink_tokens, recency_tokens
        Tokens at the start and newest tokens that are always resident, in whole chunks.
    demand
        The index by which each step asks for chunks that are not resident; None for off.
    demand_chunks, demand_threshold
        A lane's step gets at most so many, those with the largest estimated share of its attention mass, if it is over
        the threshold.
    lookahead
        What a block starts from. newest; usage: what it was after the last `period` queries, by the demand index (the
        true keys without one); usage_mean: their mean share of mass instead; mean_key, quest: by these, for the last
        query; random; oracle: true shares of the block itself; none: forced chunks alone; a trained MemoryIndexer; or
        any `Lookahead`.
    lookahead_keys
        Of which a trained lookahead reads the mean keys; None for the demand index if that is a product index, else
        mean keys of its own.
    layer_weights
        A layer's share of the budget that forced chunks leave, against the mean; None for 1 everywhere.
    decay
        Of usage per step: a chunk's usage is the larger of its decayed usage and the step's share of mass. Least used
        chunks make room for demanded ones. 1 for the mean over the last period at the start of a block.
    carry_usage
        Whether usage at the start of a block is what the last period left, as when serving; else the lookahead's
        scores.
    """

    budget: float = 0.135
    chunk_tokens: int = 16
    period: int = 64
    sets: Literal["per_layer", "per_head", "shared"] = "per_layer"
    sink_tokens: int = 16
    recency_tokens: int = 128
    demand: KeyIndex | None = None
    demand_chunks: int = 4
    demand_threshold: float = 0.0
    lookahead: str | MemoryIndexer | Lookahead = "newest"
    lookahead_keys: KeyIndex | None = None
    layer_weights: tuple[float, ...] | None = None
    decay: float = DECAY
    carry_usage: bool = True

    def __post_init__(self) -> None:
        def need(good: bool, name: str, remedy: str) -> None:
            if not good:
                raise LsaError(f"rule: {name}={getattr(self, name)!r} {remedy}")

        need(0 < self.budget <= 1, "budget", "is not in (0, 1]")
        need(self.chunk_tokens >= 1, "chunk_tokens", "must be positive")
        need(self.period >= 1 and self.period % self.chunk_tokens == 0, "period", "is no multiple of chunk_tokens")
        need(self.sets in ("per_layer", "per_head", "shared"), "sets", "is not per_layer, per_head or shared")
        need(self.sink_tokens >= 0, "sink_tokens", "is negative")
        need(self.recency_tokens >= 0, "recency_tokens", "is negative")
        need(self.demand_chunks >= 1, "demand_chunks", "must be positive; demand=None turns demand off")
        named = not isinstance(self.lookahead, str) or self.lookahead in LOOKAHEADS
        need(named, "lookahead", f"is not known: use one of {', '.join(LOOKAHEADS)}, or a trained indexer")
        need(not (self.sets == "shared" and self.lookahead == "oracle"), "lookahead", "has no form for shared sets")
        one = isinstance(self.lookahead, MemoryIndexer) and self.lookahead.config.kind == "shared"
        need(self.sets == "shared" or not one, "sets", "contradicts the indexer, which has one set for all: use shared")
        need(self.layer_weights is None or min(self.layer_weights) >= 0, "layer_weights", "has a negative value")

    @property
    def lookahead_index(self) -> KeyIndex | None:
        """The index that the lookahead alone needs, and that takes device bytes for it."""
        if isinstance(self.lookahead, MemoryIndexer):
            return self.lookahead_keys or (self.demand if isinstance(self.demand, Product) else MeanKey())
        if self.lookahead in ("usage", "usage_mean"):
            return self.demand or Exact()
        named: dict[Any, KeyIndex] = {"mean_key": MeanKey(), "quest": Quest()}
        return named.get(self.lookahead)

    def index_share(self, head_dim: int) -> float:
        """Bytes of all its indexes over K and V bytes; equal indexes are stored once."""
        indexes = {i for i in (self.demand, self.lookahead_index) if i is not None}
        return sum(index.share(head_dim, self.chunk_tokens) for index in indexes)

    def rooms(self, at: torch.Tensor, layer: int) -> "Rooms":
        """Capacities of a layer's lanes, as `LookaheadScheduler` has them; at: int64, any shape, on the CPU.

        Without demand a set serves a whole period, and `at` is where blocks start: what a block writes stays resident
        beside it. With demand a lane takes in what it needs at every step, and what a block writes is as good as any
        other chunk once it is not among the newest: `at` is the position of any step's token.
        """
        c = self.chunk_tokens
        sinks, newest = self.sink_tokens // c, self.recency_tokens // c
        full = at // c
        sink = full.clamp(max=sinks)
        recency = (full - sink).clamp(max=newest)
        weight = 1.0 if self.layer_weights is None else self.layer_weights[layer]
        growth = -(-self.period // c) if self.demand is None else self.demand_chunks
        least = sinks + newest + 1 + growth
        room = ((self.budget * (full + 1).double()).long() - least).clamp(min=0)
        room = (room.double() * weight).long()
        if self.demand is None:
            own = -(-(at + self.period) // c) - full
        else:
            own = torch.ones_like(full)  # the chunk of the step's own token
            room = room + least - 1 - sink - recency
        room = room.minimum(full - sink - recency)
        if self.budget >= 1:
            room = full - sink - recency
        return Rooms(full, own, sink, recency, room)

    def describe(self) -> dict[str, Any]:
        """Every setting as JSON; what is trained is named by its source."""
        lookahead = self.lookahead
        if isinstance(lookahead, MemoryIndexer):
            name = "trained"
        else:
            name = lookahead if isinstance(lookahead, str) else getattr(lookahead, "__name__", type(lookahead).__name__)
        return {
            "budget": self.budget, "chunk_tokens": self.chunk_tokens, "period": self.period, "sets": self.sets,
            "sink_tokens": self.sink_tokens, "recency_tokens": self.recency_tokens,
            "demand": self.demand.name if self.demand else None, "demand_chunks": self.demand_chunks,
            "demand_threshold": self.demand_threshold, "lookahead": name,
            "layer_weights": None if self.layer_weights is None else list(self.layer_weights), "decay": self.decay,
            "carry_usage": self.carry_usage,
        }  # fmt: skip


@dataclass(frozen=True)
class Rooms:
    """Chunks of a lane, int64 of one shape on the CPU.

    full: whole chunks, of which sink + recency are forced and `room` may be chosen. own: besides them, resident as the
    block writes them.
    """

    full: torch.Tensor
    own: torch.Tensor
    sink: torch.Tensor
    recency: torch.Tensor
    room: torch.Tensor

    @property
    def caps(self) -> torch.Tensor:
        """Most chunks of a lane that are resident at a time."""
        return self.sink + self.recency + self.own + self.room


def start_set(scores: torch.Tensor, eligible: torch.Tensor, room: torch.Tensor, most: int) -> torch.Tensor:
    """The `room` best eligible chunks of every lane, as fp32 0 or 1.

    scores: [P, hs, r, N]. eligible: bool [P, 1, r, N], with at least `room` [P, r] chunks each; most: max of room.
    """
    member = torch.zeros_like(scores, dtype=torch.float32)
    if most:
        # The least finite score, not -inf: room is filled even if a lookahead rules chunks out.
        ranked = scores.clamp(min=torch.finfo(scores.dtype).min / 2).masked_fill(~eligible, -torch.inf)
        best = ranked.topk(most, dim=-1).indices
        inside = torch.arange(most, device=scores.device) < room[:, None, :, None]
        member.scatter_(-1, best, inside.expand_as(best).float())
    return member


def demand_sets(
    mass: torch.Tensor,
    eligible: torch.Tensor,
    member: torch.Tensor,
    usage: torch.Tensor,
    room: torch.Tensor,
    *,
    chunks: int,
    threshold: float,
    decay: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sets of every step of a block, the step's demanded chunks included.

    A chunk that becomes eligible during the block has been resident until then and is a member from there on. A step
    picks up to `chunks` chunks outside the set with the most mass, if that is over `threshold`; then usage
    becomes max(usage · decay, mass); then the least used chunks, but none just picked, leave until the set has `room`.

    mass: fp32 [T, lanes.., N], a step's share for each chunk; 0 for chunks that are not there. eligible: bool, its
    shape or one that expands to it, chunks that a set may hold: there, and not forced. member: fp32 [lanes.., N], 0 or
    1, the set at the start, changed in place. usage: fp32, its shape, changed in place. room: int64 [T, lanes..], never
    falling. Returns bool [T, lanes.., N] and the number of picked chunks [T, lanes..]. No step waits for the device.
    """
    steps, lanes, n = mass.shape[0], mass.shape[1:-1], mass.shape[-1]
    k = min(chunks, n)
    most = min(k + 1, n)  # a chunk may come of itself besides
    keep = torch.empty(mass.shape, dtype=torch.bool, device=mass.device)
    picks = torch.empty(steps, *lanes, k, dtype=torch.bool, device=mass.device)
    rank = torch.arange(most, device=mass.device)
    room = room.unsqueeze(-1)
    # A lane with less room than k picks no more than fits.
    least = torch.where(rank[:k] < room, max(threshold, 0.0), torch.inf)
    joining = (eligible[1:] & ~eligible[:-1]).float()
    size = member.sum(-1, keepdim=True)
    joined = joining.sum(-1, keepdim=True)
    infinite = torch.full((), torch.inf, device=mass.device)
    for t in range(steps):
        if t:
            member.add_(joining[t - 1])
            size = size + joined[t - 1]
        inside = member > 0
        best, index = torch.where(eligible[t] & ~inside, mass[t], -1.0).topk(k, dim=-1)
        picked = torch.gt(best, least[t], out=picks[t])
        torch.maximum(usage.mul_(decay), mass[t], out=usage)
        worst = torch.where(inside, usage, infinite).topk(most, dim=-1, largest=False).indices
        size = size + picked.sum(-1, keepdim=True)
        leave = rank < size - room[t]
        size = size.minimum(room[t])
        # Adding 0 leaves a chunk as it is, so that lanes with fewer picks need no other treatment.
        member.scatter_add_(-1, index, picked.float()).scatter_add_(-1, worst, -leave.float())
        torch.gt(member, 0, out=keep[t])
    return keep, picks.sum(-1)
