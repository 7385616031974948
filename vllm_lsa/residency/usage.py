"""How much each chunk of a request was attended to lately, by the estimate that demand makes at every step."""

import numpy as np

# Share of its usage that a chunk keeps per decode step. Measured: 0.7 beats 0.9 and 0.98 (docs/log.md, 2026-11-24).
DECAY = 0.7


class Usage:
    """``usage ← max(DECAY · usage, mass)`` per lane and chunk; float32 [lanes, width], 0 for what was never seen."""

    def __init__(self, num_lanes: int) -> None:
        self._values = np.zeros((num_lanes, 256), np.float32)

    def note(self, lanes: slice, mass: np.ndarray) -> np.ndarray:
        """Take in one step's shares of attention mass, float32 [lanes, n]. Returns those chunks' usage, a view."""
        if mass.shape[1] > self._values.shape[1]:
            more = max(mass.shape[1], 2 * self._values.shape[1]) - self._values.shape[1]
            self._values = np.pad(self._values, ((0, 0), (0, more)))
        here = self._values[lanes, : mass.shape[1]]
        here *= DECAY
        np.maximum(here, mass, out=here)
        return here

    def of(self, num_chunks: int) -> np.ndarray:
        """Usage of the first chunks, float32 [lanes, num_chunks]."""
        have = self._values[:, :num_chunks]
        return np.pad(have, ((0, 0), (0, num_chunks - have.shape[1])))
