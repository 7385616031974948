"""A `vllm serve` of our own: started on a free local port, watched until it answers, ended with all its processes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_lsa.errors import LsaError
from vllm_lsa.serving.progress import Status

LOG_PREFIX = re.compile(r"^\(\w+ pid=\d+\) ")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def log_tail(log: Path, lines: int) -> list[str]:
    return [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-lines:]


@contextmanager
def signals_raise() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP raise SystemExit and SIGINT KeyboardInterrupt, so that a `Server` is ended with us.

    For the main thread alone.
    """

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    # A shell's background job starts with SIGINT ignored.
    wanted = {signal.SIGTERM: leave, signal.SIGHUP: leave, signal.SIGINT: signal.default_int_handler}
    before = {sign: signal.signal(sign, handler) for sign, handler in wanted.items()}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


class Server:
    """A context manager.

    model: a Hugging Face folder, served under its name. backend: of attention; None for vLLM's own choice. port: 0 =
    free. dtype: None for float32 on a CPU, else vLLM's choice. lsa: settings of the LSA backend. arguments,
    environment: what `vllm serve` gets besides.
    """

    def __init__(
        self,
        model: Path,
        backend: str | None,
        log: Path,
        max_model_len: int = 8192,
        port: int = 0,
        dtype: str | None = None,
        lsa: Mapping[str, Any] | None = None,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.model = model.name
        self.log = log
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model.resolve())]
        self._command += ["--served-model-name", self.model, "--host", "127.0.0.1", "--port", str(self.port)]
        self._command += ["--max-model-len", str(max_model_len)]
        if backend is not None:
            self._command += ["--attention-backend", backend]
        if lsa is not None:
            self._command += ["--additional-config", json.dumps({"lsa": dict(lsa)})]
        # Compiling would take longer than the demo; a small prefill chunk needs little working memory.
        self._command += ["--enforce-eager", "--max-num-batched-tokens", "1024"]
        self._environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        on_cpu = "cpu" in version("vllm")
        # Of a CPU's memory vLLM wants that much to be free when it starts, whatever it needs.
        self._command += ["--gpu-memory-utilization", "0.25" if on_cpu else "0.4"]
        if on_cpu:
            # The worker inside the engine process starts 30 s sooner, and threads without binding use every core:
            # vLLM's own choice keeps one for the server. Few CPUs multiply bf16 faster than fp32.
            self._command += ["--distributed-executor-backend", "uni"]
            dtype = dtype or "float32"
            self._environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            self._environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            self._environment.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        if dtype is not None:
            self._command += ["--dtype", dtype]
        self._command += arguments
        self._environment |= environment or {}

    def __enter__(self) -> "Server":
        """Starts the server and waits until it is healthy. Raises LsaError if it ends before that."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            # Its own process group: Ctrl-C reaches us alone, and we can end whatever it started.
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait(self) -> None:
        status = Status("starting the server")
        while not self.healthy():
            if self._process.poll() is not None:
                status.clear()
                print("\n".join(log_tail(self.log, 30)))
                raise LsaError(f"the server ended with status {self._process.returncode}; its whole log is {self.log}")
            status.show(LOG_PREFIX.sub("", next(iter(log_tail(self.log, 1)), "")))
            time.sleep(0.5)
        status.clear()
        print(f"server ready after {status.elapsed:.0f} s at {self.url} (log: {self.log})", flush=True)

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, TimeoutError, ConnectionError):  # not listening yet
            return False

    def wait_until_ended(self) -> None:
        """Raises LsaError when the server ends by itself."""
        status = self._process.wait()
        raise LsaError(f"the server ended with status {status}; its log is {self.log}")

    def stop(self) -> None:
        """Asks the server to end, then makes every process of its group end."""
        try:
            for sign, seconds in ((signal.SIGINT, 20), (signal.SIGTERM, 5)):
                if self._process.poll() is None:
                    self._process.send_signal(sign)
                    try:
                        self._process.wait(seconds)
                    except subprocess.TimeoutExpired:
                        continue
        finally:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:  # the usual case: nothing is left of the group
                pass
            self._process.wait()
