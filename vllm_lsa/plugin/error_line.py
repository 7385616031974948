"""An LsaError that nobody catches ends the program with one line instead of a traceback."""

import sys
from types import TracebackType

from vllm_lsa.errors import LsaError


def install() -> None:
    """Put this process's `sys.excepthook` behind one that knows LsaError."""
    original = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, LsaError):
            print(f"vllm-lsa: {error}", file=sys.stderr)
        else:
            original(kind, error, trace)

    sys.excepthook = hook
