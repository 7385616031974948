"""A real server under many streaming clients at once: no error, no leak, the answers that each prompt gets alone."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import httpx
import pytest

from tests import prompts
from tests.cli import ENVIRONMENT, end_session
from tests.paths import MODEL, ROOT
from vllm_lsa.metrics import METRICS
from vllm_lsa.serving.server import free_port

pytestmark = pytest.mark.vllm
CLIENTS, TOKENS = 16, 24
GAUGES = ["slots_used", "live_requests", "kv_bytes_total", "kv_bytes_resident", "index_bytes"]
SHOWN = {"footprint_ratio", *(m.name if m.kind == "gauge" else f"{m.name}_total" for m in METRICS)}
# Logits of a request change by rounding with the batch around it: a lead smaller than this may turn into its opposite.
TIE = 1e-3


class Token(NamedTuple):
    """lead: by how much its log-probability exceeds that of the second best."""

    name: str
    lead: float


class LsaServer:
    """`vllm serve --attention-backend LSA` in float32 with the given settings; leaving it checks what it leaves."""

    def __init__(self, log: Path, lsa: dict[str, Any], *more: str) -> None:
        port = free_port()
        self.url, self.log = f"http://127.0.0.1:{port}", log
        # Its own folder for temporary files. Under /tmp, since names of sockets there may not be long.
        self.temporary = tempfile.TemporaryDirectory(prefix="lsa-test-")
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(MODEL), "--port", str(port)]
        command += ["--host", "127.0.0.1", "--served-model-name", "m", "--dtype", "float32", "--enforce-eager"]
        command += ["--gpu-memory-utilization", "0.25", "--max-model-len", "2048", "--max-num-seqs", "16"]
        command += ["--attention-backend", "LSA", "--additional-config", json.dumps({"lsa": lsa}), *more]
        environment = {**os.environ, **ENVIRONMENT, "TMPDIR": self.temporary.name}
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else every server of this machine takes the same core
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, cwd=ROOT, env=environment, start_new_session=True
            )

    def __enter__(self) -> "LsaServer":
        deadline = time.monotonic() + 300
        try:
            while not self.healthy():
                assert self.process.poll() is None and time.monotonic() < deadline, self.tail()
                time.sleep(0.2)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Read before the end: there vLLM's API servers may log that they lost the engine.
        said = self.log.read_text(errors="replace")
        code, processes, files = self.stop()
        if error is None:
            assert "Traceback" not in said, said
            assert (code, processes, files) == (0, [], []), self.tail()

    def healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def metrics(self) -> dict[str, float]:
        """A scrape, which has every metric once."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        found = re.findall(r"^vllm_lsa:(\w+) ([-+.\deE]+)$", text, re.MULTILINE)
        assert sorted(name for name, _ in found) == sorted(SHOWN)
        return {name: float(value) for name, value in found}

    def wait_until_idle(self) -> dict[str, float]:
        deadline = time.monotonic() + 30
        while any((found := self.metrics())[name] for name in GAUGES) and time.monotonic() < deadline:
            time.sleep(0.5)
        return found

    def stop(self) -> tuple[int | None, list[str], list[str]]:
        """SIGINT; exit status (None: it did not end), and processes and metrics files that it left."""
        self.process.send_signal(signal.SIGINT)
        try:
            code: int | None = self.process.wait(60)
        except subprocess.TimeoutExpired:
            code = None
        processes = end_session(self.process.pid, 10)
        files = [str(path) for path in Path(self.temporary.name).glob("vllm-lsa-*")]
        self.temporary.cleanup()
        return code, processes, files


def request(index: int) -> tuple[str, dict[str, Any]]:
    """Path and body of a client's request: chat and completions, 1 to about 1,400 tokens, some with shared prefixes."""
    lengths = [1, 3, 17, 60, 128, 200, 350, 500, 700, 900, 1100, 1400]
    text = prompts.document()
    body: dict[str, Any] = {
        "model": "m", "temperature": 0, "max_tokens": TOKENS, "stream": True, "ignore_eos": True,
        "return_tokens_as_token_ids": True,
    }  # fmt: skip
    if index % 4 == 3:
        content = f"Question {index}: what is a ray of light? " * (1 + index)
        messages = [{"role": "user", "content": content}]
        return "/v1/chat/completions", {**body, "messages": messages, "logprobs": True, "top_logprobs": 2}
    start = 0 if index % 2 else 40 * index
    prompt = text[start : start + lengths[index % len(lengths)]]
    return "/v1/completions", {**body, "prompt": prompt, "logprobs": 2}


def tokens_of(logprobs: dict[str, Any]) -> list[Token]:
    """The tokens of a streamed piece, from either API."""
    if "content" in logprobs:
        names = [entry["token"] for entry in logprobs["content"]]
        best = [[top["logprob"] for top in entry["top_logprobs"]] for entry in logprobs["content"]]
    else:
        names, best = logprobs["tokens"], [list(top.values()) for top in logprobs["top_logprobs"]]
    leads = [first - second for second, first in (sorted(values)[-2:] for values in best)]
    return [Token(*token) for token in zip(names, leads, strict=True)]


async def answer(client: httpx.AsyncClient, index: int, stop_after: int = TOKENS + 1) -> list[Token]:
    """The streamed answer, cut short by closing the connection after so many tokens."""
    path, body = request(index)
    tokens: list[Token] = []
    async with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            data = json.loads(line[6:])
            assert "error" not in data, data
            if logprobs := data["choices"][0].get("logprobs"):
                tokens += tokens_of(logprobs)
            if len(tokens) >= stop_after:
                break
    return tokens


async def storm(server: LsaServer) -> tuple[dict[int, list[Token]], list[dict[str, float]]]:
    """All clients at once, every third cancelled half-way; the answers of the others and metrics seen meanwhile."""
    seen: list[dict[str, float]] = []

    async def watch() -> None:
        while True:
            seen.append(await asyncio.to_thread(server.metrics))
            await asyncio.sleep(0.5)

    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=httpx.Limits(max_connections=64)) as client:
        watcher = asyncio.create_task(watch())
        jobs = [answer(client, i, TOKENS // 2 if i % 3 == 1 else TOKENS + 1) for i in range(CLIENTS)]
        answers = await asyncio.gather(*jobs)
        watcher.cancel()
    complete = {i: tokens for i, tokens in enumerate(answers) if i % 3 != 1}
    assert all(len(tokens) == TOKENS for tokens in complete.values())
    return complete, seen


async def alone(server: LsaServer, which: list[int]) -> dict[int, list[Token]]:
    async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
        return {i: await answer(client, i) for i in which}


def check_same(under_load: list[Token], alone: list[Token]) -> None:
    """The same tokens, up to one that was all but tied with another, after which the texts go different ways."""
    for ours, expected in zip(under_load, alone, strict=True):
        if ours.name != expected.name:
            assert max(ours.lead, expected.lead) < TIE, (under_load, alone)
            break


def test_answers_under_load_are_those_given_alone_and_nothing_leaks(tmp_path):
    """Keeps everything, in a pool that the storm does not fit in: answers must not depend on the load."""
    settings = {"budget": 1.0, "device_pool_fraction": 0.05, "check": "assert"}
    with LsaServer(tmp_path / "log", settings, "--api-server-count", "2") as server:
        start = server.metrics()
        assert start["pool_slots"] > 0 and start["host_blocks"] > 0
        answers, seen = asyncio.run(storm(server))
        idle = server.wait_until_idle()
        assert {name: idle[name] for name in GAUGES} == dict.fromkeys(GAUGES, 0.0)
        assert idle["bytes_streamed_total"] > 0
        assert max(sample["live_requests"] for sample in seen) > 4
        busy = [sample["footprint_ratio"] for sample in seen if sample["kv_bytes_total"]]
        assert busy and all(0 <= ratio <= 1.2 for ratio in busy)
        for index, tokens in asyncio.run(alone(server, list(answers))).items():
            check_same(answers[index], tokens)


def test_a_sparse_server_under_load_selects_demands_and_gives_everything_back(tmp_path):
    settings = {"budget": 0.1, "device_pool_gib": 0.04, "period": 8, "lead": 2, "check": "assert"}
    with LsaServer(tmp_path / "log", settings) as server:
        asyncio.run(storm(server))
        idle = server.wait_until_idle()
        assert {name: idle[name] for name in GAUGES} == dict.fromkeys(GAUGES, 0.0)
        for counter in ("cycles", "chunks_demanded", "chunks_selected", "bytes_fetched", "bytes_written_back"):
            assert idle[f"{counter}_total"] > 0, counter
