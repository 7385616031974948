"""How the pool's slots are shared out: who keeps every chunk, and how many the others may."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vllm_lsa.config import LsaConfig
from vllm_lsa.memory.geometry import PageGeometry
from vllm_lsa.residency.requests import Request


class Shares:
    """The arithmetic of budgets. `wholes` says for each live request whether it keeps every chunk."""

    def __init__(
        self,
        config: LsaConfig,
        geometry: PageGeometry,
        num_slots: int,
        layer_weights: Sequence[float] | None = None,
        beside: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        """layer_weights: how the budget is shared out over layers, mean 1; None for equal shares. beside: slots that a
        lane on a budget takes beside its cap, from int64 [lanes] to such."""
        self._beside = beside
        self._period = config.period
        self._geometry = geometry
        self._num_slots = num_slots
        self._budget = 1.0 if config.indexer == "keep_all" else config.budget
        self._demands = config.demand != "off"
        # Chunks a lane on a budget adds between two selections; with demand each makes room for itself.
        growth = -(-(config.period + config.lead) // geometry.chunk_tokens)
        self._growth = config.demand_chunks if self._demands else growth
        self._forced = config.sink_chunks + config.recency_chunks + 1 + self._growth
        weights = np.ones(geometry.num_layers) if layer_weights is None else np.array(layer_weights)
        self._weights = weights.repeat(geometry.layer_lanes)

    def caps(self, num_chunks: int) -> np.ndarray:
        """Chunks that each lane of a request of num_chunks may keep, int64 [lanes]: what is forced, and its share of
        what the budget leaves."""
        spare = max(0, int(self._budget * num_chunks) - self._forced)
        return np.minimum(num_chunks, self._forced + (spare * self._weights).astype(np.int64))

    def selected(self, full: int) -> np.ndarray:
        """Chunks that a selection out of `full` ones may keep, int64 [lanes]: less the tail and what comes later."""
        reserved = (1 if self._demands else 1 + self._growth) if self._budget < 1 else 0
        return np.maximum(self.caps(full + 1) - reserved, 0)

    def footprint(self, request: Request, whole: bool, ahead: int = 0) -> int:
        """Slots that a request may pin, `ahead` tokens from now."""
        chunks = self._geometry.chunks(request.length + ahead)
        if whole:
            return self._geometry.num_lanes * chunks
        caps = self.caps(chunks)
        return int(caps.sum()) + (0 if self._beside is None else int(self._beside(caps).sum()))

    def overdrawn(self, wholes: Mapping[Request, bool]) -> list[Request]:
        """Those of the whole requests, largest first, that have to fall back to their budget for all to fit."""
        if not any(wholes.values()):
            return []
        total = sum(self.footprint(request, whole) for request, whole in wholes.items())
        fallen: list[Request] = []
        for request in sorted(wholes, key=lambda r: -r.length):
            if total <= self._num_slots:
                break
            saved = self.footprint(request, True) - self.footprint(request, False) if wholes[request] else 0
            if saved > 0:
                fallen.append(request)
                total -= saved
        return fallen

    def fits_whole(self, request: Request, wholes: Mapping[Request, bool]) -> bool:
        """Whether a request could keep every chunk for another period beside the others."""
        others = sum(self.footprint(r, whole) for r, whole in wholes.items() if r is not request)
        return others + self.footprint(request, True, self._period) <= self._num_slots
