"""Work beside the step's own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """A stream that leaves the current one and comes back to it, also while a CUDA graph is captured. On a CPU, where
    there are none, all is done in the order of the calls.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._away = False

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Work submitted within comes after what the current stream has by now, and beside what it gets later."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        self._away = True
        with torch.cuda.stream(self._stream):
            yield

    @property
    def busy(self) -> bool:
        """Whether work that nothing has been joined with yet is still under way."""
        return self._stream is not None and self._away and not self._stream.query()

    def join(self) -> None:
        """What the current stream gets from here on comes after the work beside it, if there is some."""
        if self._stream is not None and self._away:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._away = False
