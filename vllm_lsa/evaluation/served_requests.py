"""The requests of an evaluation to a running server: a document forced upon it token by token, a task answered."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any

from vllm_lsa.errors import LsaError
from vllm_lsa.evaluation.suite import Task
from vllm_lsa.serving.client import read_metrics, stream_completion
from vllm_lsa.serving.server import Server

_SCRAPE = 64  # tokens between two looks at the metrics, whose gauges are those of live requests


@contextmanager
def _asking(server: Server) -> Iterator[None]:
    try:
        yield
    except (OSError, HTTPException, RuntimeError) as error:
        raise LsaError(f"a request to the server failed ({error}); the server's log is {server.log}") from None


def forced_document(server: Server, prompt: Sequence[int], forced: Sequence[int], lanes: int) -> dict[str, Any]:
    """What the model says of the tokens that follow a prompt, decoded one by one.

    forced: the tokens; the first is predicted by the prefill, each other by a decode step. lanes: resident sets of a
    request. Returns nll (of each token, nats) and best (the id of each most likely one); resident, index and footprint
    (device bytes over KV bytes, by the server's metrics after its last whole period; 1, 0, 1 without LSA), demanded and
    missed (chunks of a lane per decode step that came on demand, or were kept without a slot and so are not in
    resident). Raises LsaError if the server fails.
    """
    tokens, gauges = [], {}
    with _asking(server):
        before = read_metrics(server.url)
        for token in stream_completion(server.url, server.model, prompt, len(forced), forced):
            tokens.append(token)
            if not len(tokens) % _SCRAPE and len(tokens) < len(forced):
                gauges = read_metrics(server.url)
        after = read_metrics(server.url)
    if [token.id for token in tokens] != list(forced):
        raise LsaError(f"the server did not take the tokens that were forced; its log is {server.log}")
    result = {
        "nll": [-token.logprob for token in tokens],
        "best": [token.best for token in tokens],
        "resident": 1.0,
        "index": 0.0,
        "footprint": 1.0,
        "demanded": 0.0,
        "missed": 0.0,
    }
    if gauges:
        total = gauges["vllm_lsa:kv_bytes_total"]
        if not total:
            raise LsaError(f"the server's metrics knew of no request while it answered one; its log is {server.log}")
        result["resident"] = gauges["vllm_lsa:kv_bytes_resident"] / total
        result["index"] = gauges["vllm_lsa:index_bytes"] / total
        result["footprint"] = gauges["vllm_lsa:footprint_ratio"]
        for name in ("demanded", "missed"):
            counter = f"vllm_lsa:chunks_{name}_total"
            result[name] = (after[counter] - before[counter]) / lanes / (len(forced) - 1)
    return result


def answered_task(server: Server, task: Task, start: int, tokenizer: Any) -> dict[str, Any]:
    """Whether a task is answered, greedily and freely, with as many tokens as its answer has.

    start: how much of the prompt is prefilled; the rest is forced upon the server by decode steps. Returns right and
    text. Raises LsaError if the server fails.
    """
    prompt, forced = task.prompt_tokens[:start], task.prompt_tokens[start:]
    count = len(forced) + len(task.answer_tokens)
    with _asking(server):
        tokens = [token.id for token in stream_completion(server.url, server.model, prompt, count, forced)]
    if tokens[: len(forced)] != forced:
        raise LsaError(f"the server did not take the tokens that were forced; its log is {server.log}")
    text = tokenizer.decode(tokens[len(forced) :], clean_up_tokenization_spaces=False)
    return {"right": task.is_answered(text), "text": text}
