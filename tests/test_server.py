"""A real server under many streaming clients at once: no error, no leak, the answers that each prompt gets alone."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import prompts
from tests.cli import ENVIRONMENT
from tests.paths import MODEL, ROOT
from vllm_lsa.demo.server import free_port

pytestmark = pytest.mark.vllm
CLIENTS, TOKENS = 16, 24
GAUGES = ["slots_used", "live_requests", "kv_bytes_total", "kv_bytes_resident", "index_bytes"]


class LsaServer:
    """`vllm serve --attention-backend LSA` in float32 with the given settings."""

    def __init__(self, log: Path, lsa: dict[str, Any], *more: str) -> None:
        port = free_port()
        self.url, self.log = f"http://127.0.0.1:{port}", log
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(MODEL), "--port", str(port)]
        command += ["--host", "127.0.0.1", "--served-model-name", "m", "--dtype", "float32", "--enforce-eager"]
        command += ["--gpu-memory-utilization", "0.4", "--max-model-len", "2048", "--max-num-seqs", "16"]
        command += ["--attention-backend", "LSA", "--additional-config", json.dumps({"lsa": lsa}), *more]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, cwd=ROOT, start_new_session=True,
                env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "2"},
            )  # fmt: skip
        deadline = time.monotonic() + 300
        while True:
            assert self.process.poll() is None and time.monotonic() < deadline, self.tail()
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def metrics(self) -> dict[str, float]:
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        return {name: float(value) for name, value in re.findall(r"^vllm_lsa:(\w+) ([-+.\deE]+)$", text, re.MULTILINE)}

    def wait_until_idle(self) -> dict[str, float]:
        deadline = time.monotonic() + 30
        while any((found := self.metrics())[name] for name in GAUGES) and time.monotonic() < deadline:
            time.sleep(0.5)
        return found

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


def request(index: int) -> tuple[str, dict[str, Any]]:
    """Path and body of a client's request: chat and completions, 1 to about 1,400 tokens, some with shared prefixes."""
    lengths = [1, 3, 17, 60, 128, 200, 350, 500, 700, 900, 1100, 1400]
    text = prompts.document()
    body: dict[str, Any] = {
        "model": "m", "temperature": 0, "max_tokens": TOKENS, "stream": True, "ignore_eos": True
    }  # fmt: skip
    if index % 4 == 3:
        content = f"Question {index}: what is a ray of light? " * (1 + index)
        return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": content}]}
    start = 0 if index % 2 else 40 * index
    return "/v1/completions", {**body, "prompt": text[start : start + lengths[index % len(lengths)]]}


async def answer(client: httpx.AsyncClient, index: int, stop_after: int | None = None) -> str:
    """The streamed answer, cut short by closing the connection after so many pieces."""
    path, body = request(index)
    pieces: list[str] = []
    async with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            data = json.loads(line[6:])
            assert "error" not in data, data
            choice = data["choices"][0]
            pieces.append(choice["text"] if "text" in choice else choice["delta"].get("content") or "")
            if stop_after is not None and len(pieces) >= stop_after:
                break
    return "".join(pieces)


async def storm(server: LsaServer) -> tuple[dict[int, str], list[dict[str, float]]]:
    """All clients at once, every third cancelled half-way; the answers of the others and metrics seen meanwhile."""
    seen: list[dict[str, float]] = []

    async def watch() -> None:
        while True:
            seen.append(await asyncio.to_thread(server.metrics))
            await asyncio.sleep(0.5)

    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=httpx.Limits(max_connections=64)) as client:
        watcher = asyncio.create_task(watch())
        jobs = [answer(client, i, TOKENS // 2 if i % 3 == 1 else None) for i in range(CLIENTS)]
        texts = await asyncio.gather(*jobs)
        watcher.cancel()
    return {i: text for i, text in enumerate(texts) if i % 3 != 1}, seen


async def alone(server: LsaServer, which: list[int]) -> dict[int, str]:
    async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
        return {i: await answer(client, i) for i in which}


@pytest.fixture(scope="module")
def small_pool(tmp_path_factory) -> Iterator[LsaServer]:
    """Keeps everything in a pool that the storm does not fit in: answers must not depend on the load."""
    settings = {"budget": 1.0, "device_pool_fraction": 0.05, "check": "assert"}
    server = LsaServer(tmp_path_factory.mktemp("small") / "log", settings)
    yield server
    assert server.stop() == 0, server.tail()


def test_answers_under_load_are_those_given_alone_and_nothing_leaks(small_pool):
    texts, seen = asyncio.run(storm(small_pool))
    idle = small_pool.wait_until_idle()
    assert {name: idle[name] for name in GAUGES} == dict.fromkeys(GAUGES, 0.0)
    assert idle["bytes_streamed_total"] > 0
    assert max(sample["live_requests"] for sample in seen) > 4
    busy = [sample["footprint_ratio"] for sample in seen if sample["kv_bytes_total"]]
    assert busy and all(0 <= ratio <= 1.2 for ratio in busy)
    assert texts == asyncio.run(alone(small_pool, list(texts)))
    assert "Traceback" not in small_pool.log.read_text(errors="replace")


def test_a_sparse_server_under_load_selects_demands_and_gives_everything_back(tmp_path):
    settings = {"budget": 0.1, "device_pool_gib": 0.04, "period": 8, "lead": 2, "check": "assert"}
    server = LsaServer(tmp_path / "log", settings)
    texts, _ = asyncio.run(storm(server))
    assert all(texts.values())
    idle = server.wait_until_idle()
    assert {name: idle[name] for name in GAUGES} == dict.fromkeys(GAUGES, 0.0)
    for counter in ("cycles", "chunks_demanded", "chunks_selected", "bytes_fetched", "bytes_written_back"):
        assert idle[f"{counter}_total"] > 0, counter
    assert "Traceback" not in server.log.read_text(errors="replace")
    assert server.stop() == 0, server.tail()
