"""`python -m tests.generate SPEC OUT`: run scenarios on one engine and write the tokens they gave.

SPEC: {"llm": arguments of LLM, "scenarios": [...]}. A scenario is {"name", "prompts": [token ids, …], "max_tokens",
"together": all in one batch or one after the other, "abort": {prompt index: after so many tokens}}.
OUT: {name: [tokens, …]} and "counts" of the LSA engine.
"""

import json
import sys
from typing import Any

from vllm import LLM, SamplingParams

from tests.paths import MODEL


def run_batch(llm: LLM, scenario: dict[str, Any]) -> list[list[int]]:
    """All prompts at once, stepping the engine by hand so that requests can be aborted on the way."""
    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=scenario["max_tokens"], ignore_eos=True)
    abort = {f"{scenario['name']}-{index}": after for index, after in scenario.get("abort", {}).items()}
    tokens: dict[str, list[int]] = {}
    for index, prompt in enumerate(scenario["prompts"]):
        engine.add_request(f"{scenario['name']}-{index}", {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
            if len(tokens[output.request_id]) >= abort.get(output.request_id, 10**9):
                engine.abort_request([output.request_id])
                abort.pop(output.request_id)
    return [tokens[f"{scenario['name']}-{index}"] for index in range(len(scenario["prompts"]))]


def main() -> None:
    spec = json.load(open(sys.argv[1]))
    defaults = dict(
        dtype="float32",
        enforce_eager=True,
        gpu_memory_utilization=0.4,
        max_model_len=8192,
        max_num_seqs=8,
        kv_cache_memory_bytes=2 << 30,
        seed=0,
        disable_log_stats=False,
    )
    llm = LLM(str(MODEL), **{**defaults, **spec["llm"]})
    result: dict[str, Any] = {}
    for scenario in spec["scenarios"]:
        if scenario["together"]:
            result[scenario["name"]] = run_batch(llm, scenario)
        else:
            singles = [
                {**scenario, "name": f"{scenario['name']}-{i}", "prompts": [p]}
                for i, p in enumerate(scenario["prompts"])
            ]
            result[scenario["name"]] = [run_batch(llm, single)[0] for single in singles]
    metrics = {metric.name: metric for metric in llm.llm_engine.get_metrics()}
    result["preemptions"] = int(metrics["vllm:num_preemptions"].value)
    if spec["llm"].get("attention_backend") == "LSA":
        from vllm_lsa.plugin.runtime import Runtime

        engine = Runtime.latest().engine
        llm.llm_engine.step()
        counted = engine.counted()
        result["counts"] = {
            "pinned": engine.pool.num_pinned,
            "live": len(engine.mirror.requests),
            "cycles": counted["cycles"],
            "streamed": counted["bytes_streamed"],
            "fetched": counted["bytes_fetched"],
            "demanded": counted["chunks_demanded"],
            "missed": counted["chunks_missed"],
        }
    json.dump(result, open(sys.argv[2], "w"))


if __name__ == "__main__":
    main()
