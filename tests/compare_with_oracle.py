"""`python -m tests.compare_with_oracle SPEC OUT`: decode with several policies and replay each run in the oracle.

One engine serves all: its index cells hold every index, and policy and demand are exchanged between runs, so that the
prompts are prefilled once and found in the prefix cache afterwards. The prompts decode together.
SPEC: {"checkpoint": folder, "prompts": [token ids, …], "steps", "runs": [{"indexer", "demand", "sets", "mode", "lead"},
…], "lsa": settings}.
OUT: a list, one entry a run: {"worst": largest |logit difference|, "beyond": share of logits over 1e-4,
"steps", "cycles", "demanded", "widest": share, "seconds"}.
"""

import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from vllm import LLM, SamplingParams

from tests.oracle import Cache, Oracle
from tests.paths import MODEL
from vllm_lsa import engine as engine_module
from vllm_lsa.config import LsaConfig
from vllm_lsa.indexer.layout import IndexLayout
from vllm_lsa.indexer.trained import load
from vllm_lsa.plugin.runtime import Runtime
from vllm_lsa.residency.demand import make_demand
from vllm_lsa.residency.policies import make_policy

CHECKPOINT = Path()
TRAINED = "trained"  # an indexer of this name is the checkpoint that the spec names


def every_index(
    config: LsaConfig, chunk: int, dim: int, dtype: torch.dtype, device: torch.device, *rank: int
) -> IndexLayout:
    parts = [make_policy(n, chunk, dim, dtype).index for n in ("mean_key", "quest")]
    parts.append(make_demand("four_bit", chunk, dim, dtype).index)
    parts.append(make_demand("product", chunk, dim, dtype, load(CHECKPOINT, str(device))).index)
    return IndexLayout([part for part in parts if part is not None])


def exchange(engine, settings: dict) -> LsaConfig:
    """Give an idle engine another policy, demand and cycle."""
    assert not engine.mirror.requests
    if settings["indexer"] == TRAINED:
        settings = {**settings, "indexer": str(CHECKPOINT)}
    config = engine.config.model_copy(update=settings)
    g = engine.geometry
    engine.config = engine.lookahead._config = config
    kind = (g.chunk_tokens, g.head_dim, g.dtype)
    trained = engine_module.load_trained(config, engine._device)
    engine._policy = make_policy(config.policy, *kind, trained)
    engine._demand = engine.attention._demand = make_demand(config.demand, *kind, trained)
    weights = None if trained is None else trained.config.layer_weights
    engine.lookahead.__init__(config, g, engine.pool, engine.transfers, engine._select, engine._max_requests, weights)
    return config


def prefill(oracle: Oracle, prompts: list[list[int]]) -> list[Cache]:
    """The cache of every prompt; one that continues the prompt before it starts from that one's."""
    caches: list[Cache] = []
    for i, prompt in enumerate(prompts):
        before = prompts[i - 1] if i and prompt[: len(prompts[i - 1])] == prompts[i - 1] else []
        caches.append(oracle.prefill(prompt[len(before) :], caches[-1] if before else []))
    return caches


class Recorder:
    """What each decode row attended to and its logits, step by step, by the length of its prompt."""

    def __init__(self, engine) -> None:
        self.steps: dict[int, list[tuple[list[set[int]], torch.Tensor]]] = defaultdict(list)
        self._engine, self._rows, self._sets = engine, [], {}
        plan = engine.plan

        def planned(rows):
            self._rows, self._sets = [engine.mirror.requests[name].num_prompt for name, _ in rows], {}
            return plan(rows)

        engine.plan, engine.attention.tracer = planned, self._trace

    def _trace(self, lane, request, chunks) -> None:
        lanes = self._sets.setdefault(request.num_prompt, [set() for _ in range(self._engine.geometry.num_lanes)])
        lanes[lane] = set(chunks.tolist())

    def noting(self, compute):
        """compute_logits, noted down: it gives a row for each request of the batch, in its order."""

        def wrapped(*arguments, **more):
            logits = compute(*arguments, **more)
            for number, row in zip(self._rows, logits, strict=True) if self._sets else ():
                if number in self._sets:
                    self.steps[number].append((self._sets[number], row.clone()))
            return logits

        return wrapped


def main() -> None:
    global CHECKPOINT
    spec = json.load(open(sys.argv[1]))
    CHECKPOINT = Path(spec["checkpoint"]).resolve()
    engine_module.index_layout = every_index
    llm = LLM(
        str(MODEL),
        dtype="float32",
        enforce_eager=True,
        gpu_memory_utilization=0.4,
        max_model_len=8192,
        max_num_seqs=4,
        kv_cache_memory_bytes=4 << 30,
        attention_backend="LSA",
        additional_config={"lsa": spec["lsa"]},
    )
    engine = Runtime.latest().engine
    recorder = Recorder(engine)
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    model.compute_logits = recorder.noting(model.compute_logits)
    oracle = Oracle(MODEL, engine.geometry.chunk_tokens)
    caches = prefill(oracle, spec["prompts"])
    result = []
    for number, settings in enumerate(spec["runs"]):
        llm.llm_engine.step()  # tells the worker that the last request has finished
        config = exchange(engine, settings)
        before = engine.attention.chunks_demanded
        worst, beyond, widest, steps = 0.0, 0.0, 0.0, 0
        started = time.monotonic()
        params = SamplingParams(temperature=0, max_tokens=spec["steps"] + 1, ignore_eos=True)
        prompts = [{"prompt_token_ids": prompt} for prompt in spec["prompts"]]
        if number == 0:
            for prompt in prompts:  # one after the other, so that each finds the one before in the prefix cache
                llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        recorder.steps.clear()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        for prompt, output, cache in zip(spec["prompts"], outputs, caches, strict=True):
            sets, got = zip(*recorder.steps[len(prompt)], strict=True)
            assert len(sets) == spec["steps"]
            expected = oracle.decode(cache, list(output.outputs[0].token_ids)[:-1], list(sets))
            difference = (torch.stack(got) - expected).abs()
            worst = max(worst, difference.max().item())
            beyond += (difference > 1e-4).sum().item() / difference.numel() / len(caches)
            length = -(-len(prompt) // config.chunk_tokens)
            widest = max(widest, max(len(s) for step in sets for s in step) / length)
            steps += len(sets)
        result.append(
            {
                **settings,
                "worst": worst,
                "beyond": beyond,
                "steps": steps,
                "widest": widest,
                "cycles": engine.lookahead.counts.cycles,
                "demanded": engine.attention.chunks_demanded - before,
                "seconds": round(time.monotonic() - started),
            }
        )
        print(result[-1], flush=True)
    json.dump(result, open(sys.argv[2], "w"))


if __name__ == "__main__":
    main()
