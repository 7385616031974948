"""One status line that says how long something has been going on."""

import sys
import time


class Status:
    """Elapsed seconds and a detail: redrawn in place on a terminal, else a new line every ten seconds."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.started = time.monotonic()
        self._in_place = sys.stdout.isatty()
        self._next = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the status was made."""
        return time.monotonic() - self.started

    def show(self, detail: str = "") -> None:
        text = f"{self.what}: {self.elapsed:3.0f} s  {detail}"[:110]
        if self._in_place:
            print(f"\r\033[K{text}", end="", flush=True)
        elif self.elapsed >= self._next:
            self._next = self.elapsed + 10
            print(text, flush=True)

    def clear(self) -> None:
        """Takes the line off the terminal."""
        if self._in_place:
            print("\r\033[K", end="", flush=True)
