"""What tests/cuda_on_cpu lets kernels do, and what not."""

import subprocess

import pytest

from tests.cuda_on_cpu import FLAGS, FOLDER, ORDERS
from vllm_lsa.ops import build

IN_VAIN = "threads wait for each other in vain"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    target = tmp_path_factory.mktemp("cuda") / "clusters"
    command = [*build._compiler(), *FLAGS, str(FOLDER / "clusters.cpp"), "-o", str(target)]
    subprocess.run(command, check=True, timeout=120)
    return target


def run(program, what, order):
    """Return code, and what was complained of."""
    result = subprocess.run([program, what, str(order)], capture_output=True, text=True, timeout=60)
    return result.returncode, result.stderr.removeprefix("kernel on a CPU: ").strip()


@pytest.mark.parametrize("order", ORDERS)
def test_a_cluster_adds_up(program, order):
    assert run(program, "as it should be", order) == (0, "")


@pytest.mark.parametrize(
    "what, complaint",
    [
        ("one block stays away", IN_VAIN),
        ("lanes stay away", IN_VAIN),
        ("arrived only", "a thread ends before it has awaited the cluster"),
        ("past the end", "a write past the end of shared memory"),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_faults_are_noticed(program, what, complaint, order):
    code, said = run(program, what, order)
    assert code < 0 and said == complaint


@pytest.mark.parametrize(
    "what, complaint",
    [
        ("no barrier", ""),  # wrong sums
        ("told before all have begun", "a write to a block not begun yet"),
        ("told late", "a write to a block that has ended"),
    ],
)
def test_races_show_in_some_order(program, what, complaint):
    results = [run(program, what, order) for order in ORDERS]
    assert any(code and said == complaint for code, said in results), results
