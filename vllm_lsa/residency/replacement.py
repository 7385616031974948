"""Which chunks a lane takes in for the query of a step, and which leave to make room."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Replacement:
    """One rule for all lanes.

    most: chunks a lane takes in per step. threshold: share of the lane's attention mass that a chunk must exceed.
    sink, recency: chunks at the start and before the tail that never leave.
    """

    most: int
    threshold: float
    sink: int
    recency: int

    def choose(
        self, chunks: np.ndarray, mass: np.ndarray, usage: np.ndarray, cap: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Decide for one lane.

        chunks: int [n], what the lane holds, tail first. mass: float32 [N], this step's share of each full chunk.
        usage: float32 [N], see `Usage`. cap: most chunks the lane may hold.
        Returns (entries int64 [e] of `chunks` that leave, least used first; picked int64 [p] chunks that come, most
        mass first) with n - e + p <= cap wherever what never leaves allows it.
        """
        full = len(mass)
        held = np.zeros(full, bool)
        inside = chunks[chunks < full]
        held[inside] = True
        wanted = np.flatnonzero((mass > self.threshold) & ~held)
        if len(wanted) > self.most:
            wanted = wanted[np.argpartition(mass[wanted], -self.most)[-self.most :]]
        picked = wanted[np.argsort(-mass[wanted], kind="stable")]
        over = len(chunks) + len(picked) - cap
        if over <= 0:
            return np.empty(0, np.int64), picked
        tail = chunks[0]
        may_leave = np.flatnonzero((chunks >= self.sink) & (chunks < tail - self.recency) & (chunks < full))
        if over < len(may_leave):
            order = np.argpartition(usage[chunks[may_leave]], over)[:over]
            may_leave = may_leave[order]
        elif over > len(may_leave):
            picked = picked[: max(0, len(picked) - (over - len(may_leave)))]
        return may_leave, picked
