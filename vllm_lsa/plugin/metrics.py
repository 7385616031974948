"""Puts the workers' metrics on vLLM's `/metrics`."""

import atexit
import functools
import hashlib
import multiprocessing
import shutil
import tempfile
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, multiprocess

from vllm_lsa.metrics import LsaCollector

_collectors: list[LsaCollector] = []


def directory() -> Path:
    """Where the workers of one server leave their metrics: the same in all of its processes.

    They have nothing in common but the key that multiprocessing hands down: every API server makes a configuration of
    its own, with another instance id than the one the workers get.
    """
    server = hashlib.blake2b(multiprocessing.current_process().authkey, digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"vllm-lsa-{server}"


def serve() -> None:
    """Collect the metrics of this server in this process."""
    if _collectors:
        return
    _collectors.append(LsaCollector(directory()))
    REGISTRY.register(_collectors[0])
    if multiprocessing.parent_process() is None:
        # vLLM kills workers that are still busy with their own end, so their files are removed here; some may go
        # meanwhile.
        atexit.register(shutil.rmtree, directory(), ignore_errors=True)


def install() -> None:
    """With several API servers every scrape is answered from a new registry around a MultiProcessCollector: join it."""
    original = multiprocess.MultiProcessCollector.__init__

    @functools.wraps(original)
    def init(self: Any, registry: Any, path: str | None = None) -> None:
        original(self, registry, path)
        if registry is not None:
            for collector in _collectors:
                registry.register(collector)

    multiprocess.MultiProcessCollector.__init__ = init  # type: ignore[method-assign]
