import subprocess
import sys

from tests.paths import ROOT


def test_triton_kernels_compile_for_hopper():
    """In a process of its own: in this one Triton interprets them."""
    done = subprocess.run([sys.executable, "-m", "tests.compile_kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
