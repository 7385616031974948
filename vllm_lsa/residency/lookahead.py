"""The lookahead scheduler: who keeps everything, who keeps a selected set, and when the sets change."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vllm_lsa.config import LsaConfig
from vllm_lsa.memory.geometry import PageGeometry
from vllm_lsa.memory.host_store import HostStore
from vllm_lsa.memory.slot_pool import SlotPool
from vllm_lsa.residency.plan import Row
from vllm_lsa.residency.requests import Request
from vllm_lsa.residency.resident_set import NO_SLOT, ResidentSet
from vllm_lsa.residency.shares import Shares
from vllm_lsa.residency.usage import Usage


class Selector(Protocol):
    """Chooses the chunks of a request for its next cycle."""

    def __call__(
        self, request: Request, row: int, num_chunks: int, budget_chunks: np.ndarray, cycle: int, usage: Usage | None
    ) -> np.ndarray:
        """bool [lanes, num_chunks], True for the full chunks to keep. budget_chunks: int64 [lanes]."""


Beginner = Callable[[Request, int, int, np.ndarray, int, Usage | None], Callable[[], np.ndarray]]
"""Starts what a `Selector` does, with the same arguments. What it returns gives the result, and waits if need be."""

READ_AFTER = 2
"""Decode steps after which a result that was begun is there: no more of them are under way at a time, so that the one
that began it is over when a step so much later is planned."""


class Fetcher(Protocol):
    """What brings pages into slots: `Transfers` on a CPU, `DeviceTransfers` on a CUDA device."""

    store: HostStore

    def fetch(self, pages: np.ndarray, slots: np.ndarray, ahead: bool = False) -> Any:
        """Copy host pages int64 [n] into slots int64 [n]; with `ahead`, they are there after `wait` for the ticket."""

    def wait(self, ticket: Any) -> None:
        """The pages of a ticket are there for what comes next."""


@dataclass
class LookaheadCounts:
    cycles: int = 0
    chunks_selected: int = 0
    chunks_missed: int = 0


@dataclass
class _Pending:
    """A set chosen ahead of its cycle; its chunks are on the way into slots that it already pins.

    whole: everything was kept because it fitted when this was chosen.
    """

    whole: bool
    mask: np.ndarray
    chunks: list[np.ndarray]
    slots: list[np.ndarray]
    ticket: Any


@dataclass
class _Begun:
    """A selection under way since the step of a request that followed num_computed tokens."""

    num_computed: int
    read: Callable[[], np.ndarray]


class _State:
    """Residency of one request. `whole` requests keep every chunk; the others what the last cycle selected."""

    def __init__(self, lanes: int, row: int) -> None:
        self.set = ResidentSet(lanes)
        self.row = row
        self.usage: Usage | None = None
        self.whole = True
        self.selected = False
        self.begun: _Begun | None = None
        self.pending: _Pending | None = None


class LookaheadScheduler:
    """Keeps every live request's resident set.

    While the chunks of all live requests fit in the pool, each keeps all of its own. Once they do not, the largest
    requests fall back to their budget, one after the other, until the rest fits. A request on a budget selects every
    `period` decode steps (paper section on lookahead; lsa.md §4). In between its set changes only by the new chunks it
    writes itself and, with demand, by those that a step's own query asks for in the place of the least used.
    """

    def __init__(
        self,
        config: LsaConfig,
        geometry: PageGeometry,
        pool: SlotPool,
        transfers: Fetcher,
        select: Selector,
        rows: int,
        layer_weights: Sequence[float] | None = None,
        agree: Callable[[bool], bool] = bool,
        demands: bool | None = None,
        single_prompt_tokens: bool = False,
        begin: Beginner | None = None,
    ) -> None:
        """layer_weights: how the budget is shared out over layers, mean 1; None for equal shares.
        agree: whether a value is true on all ranks, which call it together. demands: whether steps take chunks in and
        note usage; default: as config says. single_prompt_tokens: whether a prompt's token that comes alone attends to
        a resident set as well, as where one kernel serves all rows of one token. begin: where a selection would wait
        for a device: with a lead above READ_AFTER it begins the selections that are not for the step's own cycle, whose
        results are then read READ_AFTER steps later."""
        self._config = config
        self._geometry = geometry
        self._pool = pool
        self._transfers = transfers
        self._select = select
        self._agree = agree
        self._begin = begin if config.lead > READ_AFTER else None
        self._shares = Shares(config, geometry, pool.num_slots, layer_weights)
        self._demands = config.demand != "off" if demands is None else demands
        self._single_prompt_tokens = single_prompt_tokens
        self._free_rows = list(range(rows - 1, -1, -1))
        self._states: dict[Request, _State] = {}
        self.counts = LookaheadCounts()

    @property
    def num_resident(self) -> int:
        """Slots that the sets of live requests refer to, shared ones counted once per request."""
        return sum(state.set.num_resident for state in self._states.values())

    def __contains__(self, request: Request) -> bool:
        return request in self._states

    def resident(self, request: Request) -> ResidentSet:
        return self._states[request].set

    def row(self, request: Request) -> int:
        """The request's row in per-request device buffers."""
        return self._states[request].row

    def usage(self, request: Request) -> Usage | None:
        """What demand notes for a request on a budget; None for the others, which demand nothing."""
        state = self._states[request]
        return None if state.whole or not self._demands else state.usage

    def caps(self, request: Request) -> np.ndarray | None:
        """Chunks that each lane of a request on a budget may hold, int64 [lanes]; None for the others."""
        return None if self._states[request].whole else self._shares.caps(self._geometry.chunks(request.length))

    def leave(self, request: Request) -> None:
        """Give back everything a request holds."""
        state = self._states.pop(request, None)
        if state is not None:
            self._drop_pending(state)
            self._pool.release(state.set.all_slots())
            self._free_rows.append(state.row)

    def is_decode(self, request: Request) -> bool:
        """Whether this step's tokens of the request attend to a resident set.

        Tokens of the prompt always attend to the whole history, however they were cut into steps; so do several
        generated tokens at once (recomputed after a preemption).
        """
        return self._steps_alone(request) or (request.num_scheduled == 1 and self._states[request].whole)

    def prepare(self, rows: list[Row]) -> None:
        """Bring every row's resident set to where this step needs it."""
        for row in rows:
            if row.request not in self._states:
                self._states[row.request] = _State(self._geometry.num_lanes, self._free_rows.pop())
        self._settle()
        # Tails first: a tail without a slot is read from the host at every step.
        for row in sorted(rows, key=lambda r: r.length):
            self._grow(row.request)
        for row in rows:
            if self._steps_alone(row.request):
                self._cycle(row.request)

    def _steps_alone(self, request: Request) -> bool:
        """Whether the request's one token of this step goes by a selected set."""
        generates = request.num_computed >= request.num_prompt
        return request.num_scheduled == 1 and (generates or self._single_prompt_tokens)

    # -- who keeps everything ---------------------------------------------------------------------------------------

    def _settle(self) -> None:
        wholes = {request: state.whole for request, state in self._states.items()}
        for request in self._shares.overdrawn(wholes):
            state = self._states[request]
            state.whole = False
            state.selected = False
            state.usage = state.usage or Usage(self._geometry.num_lanes)
            # What it gives back stays cached: its next selection finds what nobody took in between.
            self._keep_tail_only(state)

    def _fits_whole(self, request: Request) -> bool:
        return self._shares.fits_whole(request, {r: s.whole for r, s in self._states.items()})

    def _keep_tail_only(self, state: _State) -> None:
        old = state.set
        state.set = ResidentSet(self._geometry.num_lanes)
        if old.tail >= 0:
            state.set.extend(np.array([old.tail]), old.slots[:, :1])
            old.place((slice(None), 0), NO_SLOT)
        self._pool.release(old.all_slots())

    # -- chunks that a step writes ----------------------------------------------------------------------------------

    def _grow(self, request: Request) -> None:
        state = self._states[request]
        last = self._geometry.chunks(request.length) - 1
        if last == state.set.tail:
            return
        follows = request.num_computed >= request.num_prompt or self._steps_alone(request)
        if state.whole or (state.set.tail >= 0 and follows):
            first = state.set.tail + 1
        else:
            # Prefill of a request on a budget: its history is read from the host store, only the tail stays.
            first = last
            # A set chosen before lacks what this step writes.
            self._drop_pending(state)
            self._pool.release(state.set.all_slots())
            state.set = ResidentSet(self._geometry.num_lanes)
            state.selected = False
        chunks = np.arange(first, last + 1)
        state.set.extend(chunks, self._acquire(request, chunks))

    def _acquire(self, request: Request, chunks: np.ndarray) -> np.ndarray:
        """Slots int64 [lanes, n] for chunks of all lanes; those with tokens from earlier steps are fetched."""
        pages = self._pages(request, chunks)
        slots, fresh = self._pool.acquire(pages.reshape(-1))
        written = np.broadcast_to(chunks * self._geometry.chunk_tokens < request.num_computed, pages.shape).reshape(-1)
        wanted = fresh & written
        if wanted.any():
            self._transfers.fetch(pages.reshape(-1)[wanted], slots[wanted])
        self.counts.chunks_missed += int((slots < 0).sum())
        return slots.reshape(pages.shape)

    def _pages(self, request: Request, chunks: np.ndarray) -> np.ndarray:
        store = self._transfers.store
        return store.page_ids(request.blocks, chunks)[None, :] + store.lane_offset[:, None]

    # -- cycles -----------------------------------------------------------------------------------------------------

    def _cycle(self, request: Request) -> None:
        state = self._states[request]
        step = request.num_computed - request.num_prompt
        starts = step % self._config.period == 0
        if state.whole:
            if starts and state.set.missing:
                self._refill(request, state.set)
            return
        cycle = step // self._config.period
        if not state.selected or starts:
            if state.pending and state.pending.whole and not self._fits_whole(request):
                self._drop_pending(state)
            pending = state.pending or self._choose(request, state, cycle)
            self._apply(request, state, pending)
        elif self._config.lead and (step + self._config.lead) % self._config.period == 0:
            self._choose_ahead(request, state, cycle + 1)
        elif state.begun is not None and request.num_computed >= state.begun.num_computed + READ_AFTER:
            mask, state.begun = state.begun.read(), None
            state.pending = self._take(request, state, mask, whole=False, ahead=True)

    def _choose_ahead(self, request: Request, state: _State, cycle: int) -> None:
        if self._begin is None or self._fits_whole(request):
            state.pending = self._choose(request, state, cycle, ahead=True)
            return
        full = request.num_computed // self._geometry.chunk_tokens
        read = self._begin(request, state.row, full, self._shares.selected(full), cycle, state.usage)
        state.begun = _Begun(request.num_computed, read)

    def _choose(self, request: Request, state: _State, cycle: int, ahead: bool = False) -> _Pending:
        """Select a set and start fetching what it lacks, see `_take`."""
        full = request.num_computed // self._geometry.chunk_tokens
        whole = self._fits_whole(request)
        if whole:
            mask = np.ones((self._geometry.num_lanes, full), bool)
        else:
            budget = self._shares.selected(full)
            mask = self._select(request, state.row, full, budget, cycle, state.usage)
        return self._take(request, state, mask, whole, ahead)

    def _take(self, request: Request, state: _State, mask: np.ndarray, whole: bool, ahead: bool) -> _Pending:
        """Start fetching what a selected set lacks. When not `ahead`, the old set is given back first."""
        lanes, chunks = np.nonzero(mask)
        pages = self._transfers.store.page_ids(request.blocks, chunks, lanes)
        slots = self._pool.retain(pages)
        if not ahead:
            self._release_full(state)
        lacking = np.flatnonzero(slots < 0)
        slots[lacking], fresh = self._pool.acquire(pages[lacking])
        fetched = lacking[fresh]
        ticket = self._transfers.fetch(pages[fetched], slots[fetched], ahead)
        self.counts.cycles += 1
        self.counts.chunks_selected += len(chunks)
        self.counts.chunks_missed += int((slots < 0).sum())
        ends = np.cumsum(mask.sum(1))[:-1]
        return _Pending(whole, mask, np.split(chunks, ends), np.split(slots, ends), ticket)

    def _apply(self, request: Request, state: _State, pending: _Pending) -> None:
        """Make a chosen set the resident one: tail, chosen chunks, and what became full since the choice."""
        old = state.set
        since = np.arange(pending.mask.shape[1], old.tail)
        new = ResidentSet(self._geometry.num_lanes, int(pending.mask.sum(1).max(initial=0)) + len(since) + 2)
        new.extend(np.array([old.tail]), old.slots[:, :1])
        old.place((slice(None), 0), NO_SLOT)
        for lane in range(self._geometry.num_lanes):
            new.append(lane, pending.chunks[lane], pending.slots[lane])
            if len(since):
                chunks, slots = old.lane(lane)
                # With demand, a chunk written since may have left again.
                entries = np.flatnonzero(np.isin(chunks, since))
                new.append(lane, chunks[entries], slots[entries])
                old.place((lane, entries), NO_SLOT)
        self._release_full(state)
        self._transfers.wait(pending.ticket)
        state.set = new
        state.begun = state.pending = None
        state.selected = True
        # Who is whole is all that ranks must agree on: lengths, caps and pool sizes are the same everywhere.
        state.whole = self._fits_whole(request) and self._agree(bool((new.counts == new.tail + 1).all()))

    def _refill(self, request: Request, resident: ResidentSet) -> None:
        """Give slots to kept chunks that had none, as far as the pool has become free."""
        used = np.arange(resident.slots.shape[1]) < resident.counts[:, None]
        lanes, entries = np.nonzero(used & (resident.slots < 0))
        chunks = resident.chunks[lanes, entries]
        pages = self._transfers.store.page_ids(request.blocks, chunks, lanes)
        slots, fresh = self._pool.acquire(pages)
        self._transfers.fetch(pages[fresh], slots[fresh])
        resident.place((lanes, entries), slots)

    def _release_full(self, state: _State) -> None:
        """Give back all slots of the set but the tail's. The entries stay, without slots."""
        slots = state.set.all_slots()
        kept = state.set.slots[:, 0].copy()
        self._pool.release(slots[~np.isin(slots, kept)])
        state.set.place((slice(None), slice(1, None)), NO_SLOT)

    def _drop_pending(self, state: _State) -> None:
        state.begun = None
        if state.pending is not None:
            # The copy writes into slots that the pool may hand out again as soon as they are released.
            self._transfers.wait(state.pending.ticket)
            self._pool.release(np.concatenate(state.pending.slots))
            state.pending = None
