"""Compiles csrc/cpu and, where nvcc is, csrc/cuda into shared libraries with a plain C interface.

``python -m vllm_lsa.ops.build`` does it in place.
"""

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
CUDA_LIBRARY = "_cuda.so"
SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cpu"
CUDA_SOURCES = SOURCES.with_name("cuda")
# Strict IEEE but for fused multiply-add: the kernels rely on NaN and infinity.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall"]
CUDA_FLAGS = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
CUDA_TARGETS = ["80", "90"]


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
    sources = _sources("CPU", SOURCES, "*.cpp")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    command = [*_compiler(), *FLAGS, *(["-march=x86-64-v3"] if x86 else []), *sources]
    return _build("CPU", command, Path(out_dir) / LIBRARY)


def nvcc() -> str | None:
    """CUDA's compiler: on the PATH, or below $CUDA_HOME or /usr/local/cuda."""
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    names = ["nvcc", *(str(Path(home, "bin", "nvcc")) for home in homes if home)]
    return next(filter(None, map(shutil.which, names)), None)


def build_cuda(out_dir: str | Path) -> Path:
    """Compiles the CUDA kernels to ``out_dir/_cuda.so``, for compute capability 8.0 and 9.0, and returns that path.

    Later ones run the code for 9.0 that the driver compiles. Raises LsaError if there is no nvcc, no source, or if the
    compiler fails.
    """
    compiler = nvcc()
    if compiler is None:
        raise LsaError("no nvcc found: install CUDA's compiler, or put it on the PATH")
    targets = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in CUDA_TARGETS]
    newest = CUDA_TARGETS[-1]
    targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    sources = _sources("CUDA", CUDA_SOURCES, "*.cu")
    return _build("CUDA", [compiler, *CUDA_FLAGS, *targets, *sources], Path(out_dir) / CUDA_LIBRARY)


def build_all(out_dir: str | Path) -> list[Path]:
    """The CPU kernels and, where that works, those for CUDA; else a line says why they are not built."""
    return [build_cpu(out_dir), *build_cuda_if_possible(out_dir)]


def build_cuda_if_possible(out_dir: str | Path) -> list[Path]:
    """The path of the CUDA kernels in a list; else an empty one, after a line that says why."""
    try:
        return [build_cuda(out_dir)]
    except LsaError as error:
        print(f"LSA's CUDA kernels are not built ({error}); on a GPU, slower Triton ones serve in their place")
        return []


def _sources(kind: str, folder: Path, pattern: str) -> list[str]:
    sources = sorted(map(str, folder.glob(pattern)))
    if not sources:
        raise LsaError(f"no {kind} source in {folder}: build from a source checkout of vllm-lsa")
    return sources


def _build(kind: str, command: list[str], target: Path) -> Path:
    """Runs a compiler. Raises LsaError if it fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # Built aside and renamed, so that a process that has the old library mapped keeps it whole.
    with tempfile.TemporaryDirectory(dir=target.parent) as aside:
        built = Path(aside) / target.name
        command = [*command, "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise LsaError(f"compiling the {kind} kernels failed: {shlex.join(command)}\n{done.stderr}")
        return built.replace(target)


if __name__ == "__main__":
    print(*build_all(Path(__file__).parent), sep="\n")
