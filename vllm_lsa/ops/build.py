"""Compiles csrc/cpu into one shared library with a plain C interface: ``python -m vllm_lsa.ops.build``."""

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from vllm_lsa.errors import LsaError

LIBRARY = "_cpu.so"
SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cpu"
# Strict IEEE but for fused multiply-add: the kernels rely on NaN and infinity.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall"]


def _compiler() -> list[str]:
    """The C++ compiler: $CXX, Python's own, c++ or g++, whichever exists first."""
    for name in (os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "c++", "g++"):
        command = shlex.split(name or "")
        if command and shutil.which(command[0]):
            return command
    raise LsaError("no C++ compiler found (CXX, c++, g++): install one, for example with 'apt-get install g++'")


def build_cpu(out_dir: str | Path) -> Path:
    """Compiles the CPU kernels to ``out_dir/_cpu.so`` and returns that path.

    On x86-64 the code needs AVX2, FMA and F16C (x86-64-v3). Raises LsaError if there is no compiler, no source (a
    wheel carries the library, not its source), or if the compiler fails.
    """
    sources = sorted(SOURCES.glob("*.cpp"))
    if not sources:
        raise LsaError(f"no C++ source in {SOURCES}: build from a source checkout of vllm-lsa")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    # Built aside and renamed, so that a process that has the old library mapped keeps it whole.
    with tempfile.TemporaryDirectory(dir=out_dir) as aside:
        built = Path(aside) / LIBRARY
        command = [*_compiler(), *FLAGS, *(["-march=x86-64-v3"] if x86 else []), *map(str, sources), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise LsaError(f"compiling the CPU kernels failed: {shlex.join(command)}\n{done.stderr}")
        return built.replace(out_dir / LIBRARY)


if __name__ == "__main__":
    print(build_cpu(Path(__file__).parent))
