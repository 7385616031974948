"""How long a stream has waited, read after the fact: nobody waits for the answer."""

from collections import deque

import torch


class StallClock:
    """Adds up the time between `start` and `stop` on the current stream; on a CPU it stays at 0."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds = 0.0

    def start(self) -> None:
        if self._on_gpu:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            self._pending.append(events)

    def stop(self) -> None:
        if self._on_gpu:
            self._pending[-1][1].record()

    @property
    def seconds(self) -> float:
        """Of all waits that are over."""
        while self._pending and self._pending[0][1].query():
            first, last = self._pending.popleft()
            self._seconds += first.elapsed_time(last) / 1e3
        return self._seconds
