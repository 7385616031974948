"""What the host decides of sets that live on the device: who keeps everything, who owns what, when sets change.

The host knows which slots a request owns, never what the kernels keep in them, so it does not wait for the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_lsa.config import LsaConfig
from vllm_lsa.device.state import NEXT, PAGE, DeviceRefresh, DeviceSets
from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.memory.host_store import HostStore
from vllm_lsa.memory.slot_pool import SlotPool
from vllm_lsa.residency.plan import Row
from vllm_lsa.residency.requests import Request
from vllm_lsa.residency.shares import Shares

_LANE_SPARE = 64  # a lane has a slot for the background refresh per so many chunks of its cap
_LANE_ROOM = 8  # and one for what a step demands per so many, as far as that may bring chunks
_STRIDE = 37  # coprime to common periods: the cycles of requests that began together spread over the period


@dataclass
class _State:
    """row: of the buffer of last queries. slots: of a whole request's chunks, [lanes, n] each. tail: its last chunk
    that was looked after. set_row: of `DeviceSets`, -1 for none; owned: all of its slots; owned_counts, spare_counts:
    by lane, those of its list and those for what is on its way. resident: slots that it holds. refresh: decode steps
    for which its set is still brought nearer to the selected one.
    """

    row: int
    num_lanes: int
    whole: bool = True
    tail: int = -1
    slots: list[np.ndarray] = field(default_factory=list)
    set_row: int = -1
    pages: list[int] = field(default_factory=list)
    owned: list[np.ndarray] = field(default_factory=list)
    owned_counts: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    spare_counts: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    resident: int = 0
    refresh: int = 0
    chunks: int = 0
    short: bool = False
    selected: bool = False


@dataclass
class Selection:
    """A request whose set is to be chosen now. first: it had none, so that its tail has to be fetched as well."""

    request: Request
    row: int
    set_row: int
    cycle: int
    first: bool


@dataclass
class ControlCounts:
    cycles: int = 0
    chunks_missed: int = 0


class DeviceControl:
    """Keeps each live request either whole or on a budget; see `residency.lookahead` for the rule, which is the same.

    While the chunks of all live requests fit in the pool, each keeps all of its own. Once they do not, the largest fall
    back to their budget. A request on a budget selects at its first decode step and then once a period.
    """

    def __init__(
        self,
        config: LsaConfig,
        geometry: KVGeometry,
        pool: SlotPool,
        store: HostStore,
        sets: DeviceSets,
        refresh: DeviceRefresh,
        rows: int,
        fetch: Callable[[np.ndarray, np.ndarray], None],
        layer_weights: Sequence[float] | None = None,
    ) -> None:
        """fetch: copies host pages int64 [n] into slots int64 [n] before work that is submitted later."""
        self._config = config
        self._geometry = geometry
        self._pool = pool
        self._store = store
        self._sets = sets
        self._refresh = refresh
        self._fetch = fetch
        self._shares = Shares(
            config, geometry, pool.num_slots, layer_weights, lambda caps: beside(config, caps) + _spares(caps)
        )
        self._free_rows = list(range(rows - 1, -1, -1))
        self._free_sets = list(range(sets.counts.shape[0] - 1, -1, -1))
        self._free_pages = list(range(sets.chunk.shape[0] - 1, -1, -1))
        self._states: dict[Request, _State] = {}
        self.counts = ControlCounts()

    # -- what others ask --------------------------------------------------------------------------------------------

    @property
    def num_resident(self) -> int:
        """Slots that live requests own or refer to, shared ones counted once per request."""
        return sum(state.resident for state in self._states.values())

    def row(self, request: Request) -> int:
        return self._states[request].row

    def set_row(self, request: Request) -> int:
        """The request's row in `DeviceSets`; -1 while it is whole."""
        return self._states[request].set_row

    def refreshes(self, request: Request) -> bool:
        """Whether its set is being brought nearer to what was selected."""
        return self._states[request].refresh > 0

    def is_whole(self, request: Request) -> bool:
        return self._states[request].whole

    def owned(self, request: Request) -> np.ndarray:
        """Slots of each lane of a request on a budget, int64 [lanes]."""
        return self._states[request].owned_counts

    def selectable(self, request: Request) -> np.ndarray:
        """Full chunks that each lane may keep of a selection now, int64 [lanes]."""
        return self._shares.selected(request.num_computed // self._geometry.chunk_tokens)

    # -- steps ------------------------------------------------------------------------------------------------------

    def leave(self, request: Request) -> None:
        """Give back everything a request holds."""
        state = self._states.pop(request, None)
        if state is not None:
            self._drop(state)
            self._free_rows.append(state.row)

    def prepare(self, rows: list[Row]) -> list[Selection]:
        """Give every row the slots that this step needs. Returns whose sets are to be chosen."""
        for row in rows:
            if row.request not in self._states:
                self._states[row.request] = _State(self._free_rows.pop(), self._geometry.num_lanes)
        for request in self._shares.overdrawn(self._wholes()):
            state = self._states[request]
            self._drop(state)
            state.whole, state.selected = False, False
        selections = []
        # Tails first: a tail without a slot is read from the host at every step.
        for row in sorted(rows, key=lambda r: r.length):
            request, state = row.request, self._states[row.request]
            if not state.whole and request.num_scheduled == 1 and request.num_computed >= request.num_prompt:
                selections += self._on_budget(request, state)
            if state.whole:
                self._grow(request, state)
        return selections

    def _wholes(self) -> dict[Request, bool]:
        return {request: state.whole for request, state in self._states.items()}

    def _drop(self, state: _State) -> None:
        for slots in state.slots:
            self._pool.release(slots.reshape(-1))
        for slots in state.owned:
            self._pool.give_back(slots)
        if state.set_row >= 0:
            self._free_sets.append(state.set_row)
        self._free_pages += state.pages
        state.slots, state.owned, state.pages = [], [], []
        state.tail, state.set_row, state.chunks, state.short = -1, -1, 0, False
        state.resident = state.refresh = 0

    # -- whole requests ---------------------------------------------------------------------------------------------

    def _grow(self, request: Request, state: _State) -> None:
        """Slots for the chunks of a whole request that have none yet; those with earlier tokens are fetched."""
        last = self._geometry.chunks(request.length) - 1
        if last == state.tail:
            return
        chunks = np.arange(state.tail + 1, last + 1)
        pages = self._store.page_ids(request.blocks, chunks)[None, :] + self._store.lane_offset[:, None]
        slots, fresh = self._pool.acquire(pages.reshape(-1))
        written = np.broadcast_to(chunks * self._geometry.chunk_tokens < request.num_computed, pages.shape)
        wanted = fresh & written.reshape(-1)
        if wanted.any():
            self._fetch(pages.reshape(-1)[wanted], slots[wanted])
        missed = int((slots < 0).sum())
        self.counts.chunks_missed += missed
        state.resident += len(slots) - missed
        state.slots.append(slots.reshape(pages.shape))
        state.tail = last

    # -- requests on a budget ---------------------------------------------------------------------------------------

    def _on_budget(self, request: Request, state: _State) -> list[Selection]:
        period = self._config.period
        step = request.num_computed - request.num_prompt
        first = not state.selected
        starts = first or (step + state.set_row * _STRIDE) % period == 0
        if starts and (self._fits_whole(request) or not self._has_room(request, state)):
            # Everything fits again; or there is no room for a set, and it is read from the host store as it is.
            self._drop(state)
            state.whole, state.selected = True, False
            return []
        if starts and state.short:
            self._drop(state)  # the pool may have more to give by now: start over
            first = True
        if state.set_row < 0:
            self._found(request, state)
        self._extend(request, state)
        state.refresh = max(0, state.refresh - 1)
        if not starts:
            return []
        state.selected = True
        state.refresh = 0 if first else period // 2
        self.counts.cycles += 1
        return [Selection(request, state.row, state.set_row, step // period, first)]

    def _fits_whole(self, request: Request) -> bool:
        return self._shares.fits_whole(request, self._wholes())

    def _has_room(self, request: Request, state: _State) -> bool:
        need = state_pages(self._config, self._geometry.chunks(request.length)) - len(state.pages)
        return need <= len(self._free_pages)

    def _found(self, request: Request, state: _State) -> None:
        """A set that holds the tail alone, if that has begun, and otherwise nothing: the tail is then about to."""
        tail, offset = divmod(request.num_computed, self._geometry.chunk_tokens)
        state.set_row = self._free_sets.pop()
        state.owned_counts = np.zeros(self._geometry.num_lanes, np.int64)
        state.spare_counts = np.zeros(self._geometry.num_lanes, np.int64)
        state.chunks = 0
        self._refresh.chunk[state.set_row] = -1
        self._refresh.slot[state.set_row] = -1
        self._extend(request, state)
        self._sets.counts[state.set_row] = int(offset > 0)
        if offset:
            self._sets.chunk[state.pages[0], :, 0] = tail
            self._sets.held[state.pages[tail // PAGE], :, tail % PAGE] = 1

    def _extend(self, request: Request, state: _State) -> None:
        """State pages, caps and slots for the length that the request has by now."""
        chunks = self._geometry.chunks(request.length)
        if chunks == state.chunks:
            return
        state.chunks = chunks
        sets, lanes = self._sets, self._geometry.num_lanes
        more = state_pages(self._config, chunks) - len(state.pages)
        if more > 0:
            new = [self._free_pages.pop() for _ in range(more)]
            first = len(state.pages)
            state.pages += new
            sets.pages[state.set_row, first : first + more] = self._upload(np.array(new, np.int32))
            where = self._upload(np.array(new, np.int64))
            sets.held[where] = 0
            sets.usage[where] = 0
        caps = self._shares.caps(chunks)
        sets.caps[state.set_row] = self._upload(caps.astype(np.int32))
        sets.room[state.set_row] = self._upload(most_arrivals(self._config, caps).astype(np.int32))
        owned = caps + beside(self._config, caps)
        lane, entry = _more(state.owned_counts, owned)
        pages = np.array(state.pages, np.int64)
        at = (pages[entry // PAGE] * lanes + lane) * PAGE + entry % PAGE
        self._own(state, sets.slot, at)
        state.owned_counts = np.maximum(state.owned_counts, owned)
        lane, entry = _more(state.spare_counts, _spares(caps))
        self._own(state, self._refresh.slot, (state.set_row * lanes + lane) * NEXT + entry)
        state.spare_counts = np.maximum(state.spare_counts, _spares(caps))

    def _own(self, state: _State, buffer: torch.Tensor, at: np.ndarray) -> None:
        """Give a request a slot for each place int64 [n] of a buffer."""
        if not len(at):
            return
        slots = self._pool.reserve(len(at))
        missed = int((slots < 0).sum())
        if missed:
            state.short = True
            self.counts.chunks_missed += missed
        buffer.view(-1)[self._upload(at)] = self._upload(slots.astype(np.int32))
        state.owned.append(slots)
        state.resident += len(slots) - missed

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        # From pageable memory, which is read before the call returns, and without waiting for the device.
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._sets.counts.device, non_blocking=True)


def most_arrivals(config: LsaConfig, caps: np.ndarray) -> np.ndarray:
    """Chunks that the demand of a step may bring to each lane, int64 [lanes]."""
    if config.demand == "off":
        return np.zeros_like(caps)
    return np.clip(caps // _LANE_ROOM, 1, config.demand_chunks)


def beside(config: LsaConfig, caps: np.ndarray) -> np.ndarray:
    """Slots of each lane's list beyond its cap, int64 [lanes]: a new tail, and what a step demands, come before what
    makes room for them leaves."""
    return 1 + most_arrivals(config, caps)


def state_pages(config: LsaConfig, chunks: int) -> int:
    """State pages for a request of so many chunks, and for its lists."""
    return -(-(chunks + int(beside(config, np.array(chunks)))) // PAGE)


def _spares(caps: np.ndarray) -> np.ndarray:
    """Slots of each lane for what is on its way, int64 [lanes]."""
    return np.clip(caps // _LANE_SPARE, 1, NEXT)


def _more(have: np.ndarray, want: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(lane, number) int64 [n] of everything from have up to want, both int64 [lanes]."""
    extra = np.maximum(want - have, 0)
    lane = np.repeat(np.arange(len(extra)), extra)
    return lane, np.arange(len(lane)) - np.repeat(np.cumsum(extra) - extra, extra) + np.repeat(have, extra)
