"""The doctor's report, in a process of its own as a user runs it, with and without what it looks for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_lsa import cli, doctor
from vllm_lsa.doctor import Finding, verdict
from vllm_lsa.errors import LsaError

ROOT = Path(__file__).parents[1]
WITHOUT_VLLM = """
import importlib.metadata as metadata, sys
installed = metadata.Distribution.from_name
def from_name(name):
    if name.startswith("vllm"):
        raise metadata.PackageNotFoundError(name)
    return installed(name)
metadata.Distribution.from_name = from_name
sys.modules["vllm"] = None  # any import of it now fails
from vllm_lsa import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_without_vllm_it_says_so():
    done = run("-c", WITHOUT_VLLM, "doctor")
    last = done.stdout.splitlines()[-1]
    assert last.startswith("LSA cannot run: vLLM is not installed; install it with 'make venv'"), done.stderr
    assert done.returncode == 1
    assert "torch" in done.stdout and "host memory" in done.stdout


def test_installed_it_can_run():
    pytest.importorskip("vllm")
    done = run("-m", "vllm_lsa.cli", "doctor", "--json")
    report = json.loads(done.stdout)  # nothing but JSON, whatever vLLM prints
    assert report["verdict"] == "LSA can run", done.stderr
    assert report["can_run"] is True and done.returncode == 0
    assert "LsaBackend" in report["findings"]["backend"]["value"]


def test_verdict_names_the_first_problem():
    fine, first, second = Finding("a", "1"), Finding("b", "2", "b is old", "renew b"), Finding("c", "3", "x", "y")
    assert verdict([fine]) == "LSA can run"
    assert verdict([fine, first, second]) == "LSA cannot run: b is old; renew b"


def test_a_failing_import_is_a_finding():
    def check() -> Finding:
        raise ImportError("no libfoo.so\nsecond line")

    finding = doctor._guarded("plugin", check)
    assert finding.problem == "ImportError: no libfoo.so" and finding.remedy


def test_lsa_errors_are_one_line_and_status_2(monkeypatch, capsys):
    def fail() -> None:
        raise LsaError("lsa.budget=2 is too much: lower it")

    monkeypatch.setattr(doctor, "examine", fail)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "vllm-lsa: lsa.budget=2 is too much: lower it\n"


def test_unknown_command():
    done = run("-m", "vllm_lsa.cli", "fly")
    assert done.returncode == 2 and "invalid choice" in done.stderr
