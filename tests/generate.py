"""`python -m tests.generate SPEC OUT`: run scenarios on one engine and write the tokens they gave.

SPEC: {"llm": arguments of LLM, "scenarios": [...], "trace": whether to keep checksums of the sets}. A scenario is
{"name", "prompts": [token ids, …], "max_tokens", "together": all in one batch or one after the other, "abort": {prompt
index: after so many tokens}, "late": {prompt index: comes after so many steps}, "priorities": of the prompts}.
OUT: {name: [tokens, …]}, "preemptions", "prefix_hits" (tokens), "counts" of the LSA engine (of rank 0), "ranks" with
the reports of all ranks, and "metrics", summed over them.
"""

import json
import sys
from typing import Any

from vllm import LLM, SamplingParams

from tests import rank_state
from tests.paths import MODEL
from vllm_lsa.metrics import read_all
from vllm_lsa.plugin import metrics as plugin_metrics

DEFAULTS: dict[str, Any] = dict(
    model=str(MODEL),
    dtype="float32",
    enforce_eager=True,
    gpu_memory_utilization=0.4,
    max_model_len=8192,
    max_num_seqs=8,
    kv_cache_memory_bytes=2 << 30,
    seed=0,
    disable_log_stats=False,
)
"""Arguments of LLM that a spec leaves out."""


def run_batch(llm: LLM, scenario: dict[str, Any]) -> list[list[int]]:
    """All prompts at once, stepping the engine by hand so that requests can be aborted on the way."""
    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=scenario["max_tokens"], ignore_eos=True, detokenize=False)
    abort = {f"{scenario['name']}-{index}": after for index, after in scenario.get("abort", {}).items()}
    late = {int(index): steps for index, steps in scenario.get("late", {}).items()}
    priorities = scenario.get("priorities", [0] * len(scenario["prompts"]))
    tokens: dict[str, list[int]] = {}
    step = 0
    while engine.has_unfinished_requests() or not step:
        for index, prompt in enumerate(scenario["prompts"]):
            if late.get(index, 0) == step:
                name = f"{scenario['name']}-{index}"
                engine.add_request(name, {"prompt_token_ids": prompt}, params, priority=priorities[index])
        step += 1
        for output in engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
            if len(tokens[output.request_id]) >= abort.get(output.request_id, 10**9):
                engine.abort_request([output.request_id])
                abort.pop(output.request_id)
    return [tokens[f"{scenario['name']}-{index}"] for index in range(len(scenario["prompts"]))]


def main() -> None:
    spec = json.load(open(sys.argv[1]))
    llm = LLM(**{**DEFAULTS, **spec["llm"]})
    if spec.get("trace"):
        llm.collective_rpc(rank_state.watch)
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
    result["prefix_hits"] = int(metrics["vllm:prefix_cache_hits"].value)
    if spec["llm"].get("attention_backend") == "LSA":
        llm.llm_engine.step()
        result["ranks"] = llm.collective_rpc(rank_state.report)
        result["counts"] = result["ranks"][0]["counts"]
        result["metrics"] = read_all(plugin_metrics.directory())
    json.dump(result, open(sys.argv[2], "w"))


if __name__ == "__main__":
    main()
