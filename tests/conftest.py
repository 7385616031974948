"""Where pytest runs files side by side, each of its processes keeps to a core, engines that it starts included."""

import os

_worker = os.environ.get("PYTEST_XDIST_WORKER")
if _worker:
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_worker.removeprefix("gw")) % len(_cores)]})

import tests.kernels  # noqa: E402, F401 - the first to import Triton, which it may have to interpret
