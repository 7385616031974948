"""`python -m tests.forced_logprobs SPEC OUT`: how likely an engine finds given texts, in decode steps.

SPEC: {"llm": arguments of LLM, "texts": [token ids, …], "prompt": tokens of each that are its prompt; the others are
forced upon the engine one by one, "whole_queries": leave out what a stock backend does to queries for a cache in fp8}.
OUT: {"logprobs": [that of each forced token, …], "counts" of the LSA engine}. Wants `ENVIRONMENT`.
"""

import json
import sys
from typing import Any

from vllm import LLM, SamplingParams

from tests import rank_state
from tests.generate import DEFAULTS
from vllm_lsa.serving.client import FORCED, FORCING

ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
"""The other runner's logits processors have another form."""


def keep_queries(worker: Any) -> None:
    """Stock backends quantise queries as well where the cache is in fp8; LSA does not. Outside graphs."""
    for module in worker.model_runner.model.modules():
        if getattr(module, "query_quant", None) is not None:
            module.query_quant = None


def main() -> None:
    spec = json.load(open(sys.argv[1]))
    short = {"max_model_len": 2048, "max_num_batched_tokens": 512, "kv_cache_memory_bytes": 1 << 30}
    llm = LLM(**{**DEFAULTS, **short, **spec["llm"]}, logits_processors=[FORCING])
    if spec.get("whole_queries"):
        llm.collective_rpc(keep_queries)
    cut = spec["prompt"]
    params = [
        SamplingParams(
            temperature=0, max_tokens=len(text) - cut, ignore_eos=True, logprobs=0, extra_args={FORCED: text[cut:]}
        )
        for text in spec["texts"]
    ]
    outputs = llm.generate([{"prompt_token_ids": text[:cut]} for text in spec["texts"]], params)
    result: dict[str, Any] = {"logprobs": []}
    for output, text in zip(outputs, spec["texts"], strict=True):
        completion = output.outputs[0]
        assert list(completion.token_ids) == text[cut:]
        steps = zip(completion.logprobs, completion.token_ids, strict=True)
        result["logprobs"].append([step[token].logprob for step, token in steps])
    if spec["llm"].get("attention_backend") == "LSA":
        result["counts"] = llm.collective_rpc(rank_state.report)[0]["counts"]
    json.dump(result, open(sys.argv[2], "w"))


if __name__ == "__main__":
    main()
