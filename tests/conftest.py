"""Where pytest runs files side by side, each of its processes keeps to a core, engines that it starts included."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

_worker = os.environ.get("PYTEST_XDIST_WORKER")
if _worker:
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_worker.removeprefix("gw")) % len(_cores)]})

import tests.kernels  # noqa: E402, F401 - the first to import Triton, which it may have to interpret


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What is computed there is too small for more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four files to train on."""
    from tests.paths import DOCUMENT

    folder = tmp_path_factory.mktemp("text")
    whole = DOCUMENT.read_text(encoding="utf-8")
    for i in range(4):
        (folder / f"{i}.txt").write_text(whole[i * 6000 : (i + 1) * 6000], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def v4_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DeepSeek-V4, see tests/v4/README.md."""
    from tests.v4 import model

    return model.write(tmp_path_factory.mktemp("v4") / "model")


@pytest.fixture(scope="module")
def v4_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory indexer of the published form for all three c4 layers of `v4_path`, random."""
    from tests.v4_runs import scorers

    return scorers(tmp_path_factory.mktemp("indexer") / "joint.safetensors")
