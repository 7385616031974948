"""What one asks of a server: a streamed chat answer, a streamed completion of tokens, the counters of its /metrics."""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

SAMPLE = re.compile(r"^(vllm_lsa:\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)
FORCED = "lsa_forced_tokens"
"""Of a request's `vllm_xargs`: see `stream_completion`."""
FORCING = "vllm_lsa.plugin.forced_tokens:ForcedTokens"
"""Value of `--logits-processors` with which a server knows `FORCED`."""


class Piece(NamedTuple):
    """A piece of the answer as it arrives: its text, and the token counts so far."""

    text: str
    prompt_tokens: int
    answer_tokens: int


class Token(NamedTuple):
    """A generated token: its id, the log-probability that the model gave it, and the id that the model would choose."""

    id: int
    logprob: float
    best: int


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
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    for event in _events(f"{url}/v1/chat/completions", body):
        text = event["choices"][0]["delta"].get("content") if event["choices"] else None
        yield Piece(text or "", event["usage"]["prompt_tokens"], event["usage"]["completion_tokens"])


def stream_completion(
    url: str, model: str, prompt: Sequence[int], max_tokens: int, forced: Sequence[int] = ()
) -> Iterator[Token]:
    """Completes a prompt of token ids greedily and yields the tokens as they arrive.

    forced: what the first tokens are to be, whatever the model would choose; for a server with `FORCING`. Their
    log-probabilities are the model's own. If all `max_tokens` are forced, an end-of-text token among them ends nothing.
    Raises RuntimeError if the server answers with an error.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
        "ignore_eos": len(forced) >= max_tokens,
    }
    if forced:
        body["vllm_xargs"] = {FORCED: list(forced)}
    for event in _events(f"{url}/v1/completions", body):
        logprobs = event["choices"][0].get("logprobs") if event["choices"] else None
        if logprobs is not None:
            for name, value, top in zip(
                logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
            ):
                yield Token(_id(name), value, _id(max(top, key=top.__getitem__)))


def _id(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def _events(url: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of a streamed answer. Raises RuntimeError if the server refuses, or an event says that it failed."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps({**body, "stream": True}).encode(), headers)
    try:
        answer = urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        said = error.read(500).decode(errors="replace").strip()
        raise RuntimeError(f"the server answered {error.code}: {said}") from None
    with answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise RuntimeError(f"the server answered {event['error']}")
            yield event
