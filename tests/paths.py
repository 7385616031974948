"""Where tests find the model and the text, and how they run engines: each in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / ".model" / "SmolLM2-135M-Instruct"
DOCUMENT = ROOT / "vllm_lsa" / "demo" / "document.txt"

# One process holds engine and worker, so that a test can look inside.
IN_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
}


def run_module(
    module: str, spec: dict[str, Any], folder: Path, timeout: float, env: Mapping[str, str] | None = None
) -> Any:
    """Run `python -m MODULE spec.json out.json` and return what it wrote; its log is shown when it fails.

    env: environment variables besides IN_PROCESS. After `timeout` seconds it fails, and what it started ends with it.
    """
    assert MODEL.exists(), f"{MODEL} is missing: run `make model`"
    folder.mkdir(parents=True, exist_ok=True)
    source, target, log = folder / "spec.json", folder / "out.json", folder / "log.txt"
    source.write_text(json.dumps(spec))
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(source), str(target)],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **IN_PROCESS, **(env or {})},
            start_new_session=True,
        )
        try:
            end = f"status {process.wait(timeout)}"
        except subprocess.TimeoutExpired:
            end = f"no end after {timeout:g} s"
        finally:
            if process.poll() is None:
                # With its workers, which may be waiting for one another.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert end == "status 0", f"{module} failed, {end}:\n{log.read_text()[-4000:]}"
    return json.loads(target.read_text())
