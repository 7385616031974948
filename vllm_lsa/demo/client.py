"""What the demo asks of the server: a streamed chat answer, and the counters of its /metrics page."""

import json
import re
import urllib.request
from collections.abc import Iterator
from typing import NamedTuple

SAMPLE = re.compile(r"^(vllm_lsa:\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


class Piece(NamedTuple):
    """A piece of the answer as it arrives: its text, and the token counts so far."""

    text: str
    prompt_tokens: int
    answer_tokens: int


def read_metrics(url: str) -> dict[str, float]:
    """The server's ``vllm_lsa:`` metrics by name, added up over their labels; empty if the backend has none."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    values: dict[str, float] = {}
    for name, value in SAMPLE.findall(text):
        values[name] = values.get(name, 0.0) + float(value)
    return values


def stream_chat(url: str, model: str, prompt: str, max_tokens: int) -> Iterator[Piece]:
    """Asks greedily and yields the answer as it arrives. Raises RuntimeError if the server answers with an error."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise RuntimeError(f"the server answered {event['error']}")
            text = event["choices"][0]["delta"].get("content") if event["choices"] else None
            yield Piece(text or "", event["usage"]["prompt_tokens"], event["usage"]["completion_tokens"])
