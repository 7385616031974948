"""Runs `vllm serve` command lines that end by themselves.

Either as the installed program, or many of them forked from one process that has done vLLM's imports (10 s of CPU each
time): a fork runs the same `main` and prints an uncaught error through the same hook.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import psutil

from tests.paths import ROOT

AT_ONCE = 2
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}


class Ended(NamedTuple):
    """How a command ended. code: exit status, negative for a signal, None when it had to be killed after its time.
    left: command lines of processes that it left behind."""

    code: int | None
    stdout: str
    stderr: str
    left: list[str]


def run_programs(commands: Mapping[str, Sequence[str]], folder: Path, timeout: float) -> dict[str, Ended]:
    """`vllm serve` with each list of arguments as a user runs it, all at the same time. folder: for what they print."""
    vllm = str(Path(sys.executable).with_name("vllm"))
    started = {}
    for name, arguments in commands.items():
        with _output(folder, name, "stdout").open("w") as out, _output(folder, name, "stderr").open("w") as err:
            environment = {**os.environ, **ENVIRONMENT}
            command = [vllm, "serve", *arguments]
            started[name] = subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True)
    deadline = time.monotonic() + timeout
    ended = {}
    for name, process in started.items():
        try:
            code: int | None = process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
        ended[name] = _ended(folder, name, process.pid, code)
        process.wait()
    return ended


def run_forked(commands: Mapping[str, Sequence[str]], folder: Path, timeout: float) -> dict[str, Ended]:
    """The same, each in a fork; timeout: seconds for one of them."""
    (folder / "commands.json").write_text(json.dumps({name: list(arguments) for name, arguments in commands.items()}))
    with (folder / "parent.log").open("w") as log:
        code = subprocess.call(
            [sys.executable, "-m", "tests.cli", str(folder), str(timeout)],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env={**os.environ, **ENVIRONMENT},
        )
    assert code == 0, (folder / "parent.log").read_text()
    return {name: Ended(*fields) for name, fields in json.loads((folder / "ended.json").read_text()).items()}


def _output(folder: Path, name: str, stream: str) -> Path:
    return folder / f"{name}.{stream}"


def _ended(folder: Path, name: str, session: int, code: int | None) -> Ended:
    """Collect the output and end what is left of the session."""
    left = end_session(session, 5 if code is not None else 0)
    texts = [_output(folder, name, stream).read_text(errors="replace") for stream in ("stdout", "stderr")]
    return Ended(code, *texts, left)


def end_session(session: int, patience: float) -> list[str]:
    """What is left of a session after so many seconds, in which helpers may follow their program; it is killed."""
    deadline = time.monotonic() + patience
    while (left := _members(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        process.kill()
    return [str(process) for process in left]


def _members(session: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def become(main: Callable[[], Any], arguments: Sequence[str], folder: Path, name: str) -> NoReturn:
    """Turn this fork into `vllm serve ARGUMENTS`. It ends without Python's teardown, which would copy the parent."""
    os.setsid()
    for stream, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(_output(folder, name, stream), os.O_CREAT | os.O_WRONLY), descriptor)
    sys.argv = ["vllm", "serve", *arguments]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """The parent of the forks."""
    from vllm.entrypoints.cli.main import main as vllm_main

    folder, timeout = Path(sys.argv[1]), float(sys.argv[2])
    waiting = list(json.loads((folder / "commands.json").read_text()).items())
    sys.argv = ["vllm", "--version"]
    try:
        vllm_main()  # imports all that the command line needs
    except SystemExit:
        pass
    ended: dict[str, Ended] = {}
    running: dict[int, tuple[str, float]] = {}
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            name, arguments = waiting.pop(0)
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                become(vllm_main, arguments, folder, name)
            running[pid] = name, time.monotonic() + timeout
        time.sleep(0.05)
        for pid, (name, deadline) in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ended[name] = _ended(folder, name, pid, os.waitstatus_to_exitcode(status))
            elif time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                ended[name] = _ended(folder, name, pid, None)
            else:
                continue
            del running[pid]
    (folder / "ended.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main()
