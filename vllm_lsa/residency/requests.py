"""The mirror of the scheduler's requests: which blocks each owns, how far it is, which blocks have a new owner."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np


@dataclass
class NewRequest:
    """A request scheduled for the first time. Its first `num_computed` tokens are prefix-cache hits."""

    id: str
    blocks: list[int]
    num_computed: int
    num_prompt: int


@dataclass
class RequestUpdate:
    """A request known before. `resumed` means that `blocks` replaces its block list (after a preemption)."""

    id: str
    blocks: list[int]
    num_computed: int
    resumed: bool


@dataclass
class StepUpdate:
    """What the engine's scheduler decided for one step, in the order in which it has to be applied."""

    finished: Iterable[str] = ()
    preempted: Iterable[str] = ()
    new: list[NewRequest] = field(default_factory=list)
    cached: list[RequestUpdate] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    num_scheduled: dict[str, int] = field(default_factory=dict)


class Request:
    """One live request of the mirror.

    blocks: int32 [num_blocks], vLLM block ids in order. num_computed: tokens whose K/V was written before this step.
    num_scheduled: tokens of this step. num_prompt: tokens of the prompt; those are always attended to exactly.
    """

    def __init__(self, new: NewRequest) -> None:
        self.id = new.id
        self.num_prompt = new.num_prompt
        self.num_computed = new.num_computed
        self.num_scheduled = 0
        self.blocks = np.array(new.blocks, np.int32)
        # The same request draws the same random set in any process and after a restart.
        self.seed = zlib.crc32(new.id.encode())

    @property
    def length(self) -> int:
        """Tokens in the cache after this step."""
        return self.num_computed + self.num_scheduled


class RequestMirror:
    """Applies scheduler updates. What it returns tells the tiers which blocks changed hands and who left."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self.requests: dict[str, Request] = {}

    def leave(self, update: StepUpdate) -> list[Request]:
        """Take out requests that finished, were preempted or start over; the latter come back through `enter`."""
        again = [*(c.id for c in update.cached if c.resumed), *(n.id for n in update.new)]
        names = [*update.finished, *update.preempted, *again]
        return [self.requests.pop(name) for name in dict.fromkeys(names) if name in self.requests]

    def enter(self, update: StepUpdate, prompts: dict[str, int]) -> np.ndarray:
        """Add new and resumed requests, extend running ones, set the tokens of this step.

        prompts: prompt lengths of all requests seen and not finished, needed when a preempted one comes back.
        Returns int32 block ids that got a new owner: their old content is dead.
        """
        fresh: list[np.ndarray] = []
        for new in update.new:
            fresh.append(self._add(new))
        for cached in update.cached:
            if cached.id not in self.requests:
                fresh.append(self._add(NewRequest(cached.id, cached.blocks, cached.num_computed, prompts[cached.id])))
                continue
            request = self.requests[cached.id]
            request.num_computed = cached.num_computed
            if cached.blocks:
                added = np.array(cached.blocks, np.int32)
                request.blocks = np.concatenate([request.blocks, added])
                fresh.append(added)
        for request in self.requests.values():
            request.num_scheduled = update.num_scheduled.get(request.id, 0)
        return np.concatenate(fresh) if fresh else np.empty(0, np.int32)

    def _add(self, new: NewRequest) -> np.ndarray:
        request = Request(new)
        self.requests[new.id] = request
        hits = -(-new.num_computed // self._block_tokens)
        return request.blocks[hits:]

    def check(self, name: str, blocks: np.ndarray, length: int) -> None:
        """Compare one request with the engine's own block table (check mode). Raises RuntimeError on a difference."""
        request = self.requests[name]
        used = -(-request.length // self._block_tokens)
        if request.length != length or not np.array_equal(request.blocks[:used], blocks[:used]):
            raise RuntimeError(
                f"request mirror out of step for {name}: {request.length} tokens in {request.blocks[:used]}, "
                f"the engine has {length} in {blocks[:used]}"
            )
