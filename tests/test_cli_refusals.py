"""What `vllm serve --attention-backend LSA` refuses: at start-up, in one line, with nothing left running."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests import tiny_models
from tests.cli import Ended, run_forked, run_programs
from tests.paths import MODEL

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


class Case(NamedTuple):
    """A command line that is refused. says: setting, value and remedy, as the line has them. model: of tiny_models."""

    arguments: Sequence[str]
    says: Sequence[str]
    model: str | None = None


def lsa(says: Sequence[str], *arguments: str, **settings: Any) -> Case:
    return Case(["--max-model-len", "2048", *arguments, "--additional-config", json.dumps({"lsa": settings})], says)


def option(arguments: Sequence[str], value: str) -> Case:
    return Case(arguments, [arguments[0], value, "does not work with --attention-backend LSA", "drop it"])


def model(name: str, what: str) -> Case:
    return Case([], ["--model", name, what, "choose another model or backend"], name)


CASES = {
    "unknown-key": lsa(["lsa.budgett=0.1", "use one of budget, period"], budgett=0.1),
    "bad-value": lsa(["lsa.budget=2", "less than or equal to 1"], budget=2),
    "bad-type": lsa(["lsa.period='often'", "valid integer"], period="often"),
    "bad-choice": lsa(["lsa.sets='some'", "'per_layer' or 'shared'"], sets="some"),
    "not-an-object": Case(["--additional-config", '{"lsa": 3}'], ["lsa=3", "not an object", "pass --additional"]),
    "lead-not-below-period": lsa(["lsa.lead=8", "lsa.period=8", "lower lead or raise period"], lead=8, period=8),
    "both-pool-settings": lsa(
        ["lsa.device_pool_gib=0.5", "lsa.device_pool_fraction=0.5", "set one of them"],
        device_pool_gib=0.5, device_pool_fraction=0.5,
    ),
    "small-pool": lsa(["lsa.device_pool_gib=0.001", "sink_tokens=16", "raise the pool"], device_pool_gib=0.001),
    "small-pool-fraction": lsa(
        ["lsa.device_pool_fraction=0.01", "recency_tokens=128", "raise the pool"], device_pool_fraction=0.01
    ),
    "small-host-store": lsa(
        ["lsa.host_memory_gib=0.03", "max_model_len=2048", "raise host_memory_gib to at least", "--max-model-len"],
        host_memory_gib=0.03,
    ),
    "large-host-store": lsa(
        ["lsa.host_memory_gib=5000", "GiB of host memory that are free", "lower"], host_memory_gib=5e3
    ),
    "chunk-not-dividing-block": lsa(
        ["lsa.chunk_tokens=48", "--block-size 128", "choose a divisor"], "--block-size", "128",
        chunk_tokens=48, sink_tokens=48, recency_tokens=144,
    ),
    "sink-not-whole-chunks": lsa(["lsa.sink_tokens=20", "lsa.chunk_tokens=16", "round it up"], sink_tokens=20),
    "keys-of-another-model": lsa(["lsa.index_keys='host'", "DeepSeek-V4", "leave it out"], index_keys="host"),
    "unknown-indexer": lsa(["lsa.indexer='oracle'", "use one of"], indexer="oracle"),
    "speculative-decoding": option(
        ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}'], "ngram"
    ),
    "decode-context-parallel": option(["--decode-context-parallel-size", "2", "-tp", "2"], "2"),
    "prefill-context-parallel": option(["--prefill-context-parallel-size", "2"], "2"),
    "sleep-mode": option(["--enable-sleep-mode"], "True"),
    "dual-batch-overlap": option(["--enable-dbo"], "True"),
    "kv-connector": option(
        ["--kv-transfer-config", '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}'], "OffloadingConnector"
    ),
    "kv-offloading": option(["--kv-offloading-size", "1"], "1"),
    "fp8-on-a-cpu": Case(["--kv-cache-dtype", "fp8"], ["--kv-cache-dtype fp8", "no fp8 on a CPU", "use auto"]),
    "quantised-kv": Case(["--kv-cache-dtype", "fp8_e5m2"], ["--kv-cache-dtype fp8_e5m2", "use auto or fp8"]),
    "another-cache-dtype": Case(
        ["--kv-cache-dtype", "float16", "--dtype", "bfloat16"],
        ["--kv-cache-dtype float16", "torch.bfloat16", "use auto or fp8"],
    ),
    "layers-in-another-dtype": option(["--kv-cache-dtype-skip-layers", "3"], "3"),
    "sliding-window": model("mistral_window", "sliding-window attention"),
    "soft-capping": model("gemma2_softcap", "soft-capping"),
    "attention-sinks": model("gpt_oss_sinks", "attention sinks"),
    "latent-attention": model("deepseek_mla", "MLA"),
    "encoder-only": model("bert_encoder", "encoder-only"),
    "encoder-decoder": model("whisper_encoder_decoder", "encoder-decoder"),
    "alibi": model("bloom_alibi", "ALiBi"),
    "alibi-by-setting": model("falcon_alibi", "ALiBi"),
    "layers-with-windows": model("gemma2_layer_types", "sliding-window attention"),
}  # fmt: skip

# These also run as the installed program, which has to print the same.
AS_PROGRAM = ["unknown-key", "sliding-window"]
# Only the layer tells that this model has sinks: its worker refuses it.
FAILING_WORKER = "granite_sinks"


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("models")
    paths = {name: str(tiny_models.write(name, folder)) for name in {c.model for c in CASES.values() if c.model}}
    return {
        name: [paths[case.model] if case.model else str(MODEL), "--attention-backend", "LSA", *case.arguments]
        for name, case in CASES.items()
    }


@pytest.fixture(scope="module")
def refusals(commands, tmp_path_factory) -> dict[str, Ended]:
    return run_forked(commands, tmp_path_factory.mktemp("forked"), timeout=180)


@pytest.fixture(scope="module")
def programs(commands, tmp_path_factory) -> dict[str, Ended]:
    folder = tmp_path_factory.mktemp("programs")
    chosen = {name: commands[name] for name in AS_PROGRAM}
    chosen[FAILING_WORKER] = [
        str(tiny_models.write(FAILING_WORKER, folder)), "--attention-backend", "LSA", "--load-format", "dummy",
        "--gpu-memory-utilization", "0.1", "--port", "0",
    ]  # fmt: skip
    return run_programs(chosen, folder, timeout=300)


def error_lines(ended: Ended) -> list[str]:
    return [line for line in ended.stderr.splitlines() if line.startswith("vllm-lsa: ")]


def check(ended: Ended, case: Case) -> None:
    everything = ended.stdout + ended.stderr
    assert ended.code not in (0, None), everything
    assert "Traceback" not in everything, everything
    lines = error_lines(ended)
    assert len(lines) == 1, everything
    for part in case.says:
        assert part in lines[0]
    assert ended.left == []


@pytest.mark.parametrize("name", CASES)
def test_refused_in_one_line(refusals, name):
    check(refusals[name], CASES[name])


@pytest.mark.parametrize("name", AS_PROGRAM)
def test_the_installed_program_says_the_same(refusals, programs, name):
    check(programs[name], CASES[name])
    assert programs[name].code == refusals[name].code
    assert error_lines(programs[name]) == error_lines(refusals[name])


def test_a_worker_that_fails_ends_the_server(programs):
    ended = programs[FAILING_WORKER]
    everything = ended.stdout + ended.stderr
    assert ended.code not in (0, None), everything
    assert "LsaError: --attention-backend LSA cannot serve this layer: attention sinks" in everything, everything
    assert ended.left == []


def accepted(folder: Path, **arguments: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(str(folder), attention_backend="LSA", **arguments).create_engine_config()


def test_fp8_is_taken_on_a_gpu_and_counted_in_bytes(tmp_path):
    from vllm_lsa.plugin import validate

    settings = {"lsa": {"host_memory_gib": 0.25}}
    folder = tiny_models.write("qwen2_unused_window", tmp_path)
    config = accepted(folder, additional_config=settings, kv_cache_dtype="bfloat16", dtype="bfloat16")
    before = validate.geometry_of(config, validate.check(config))
    # As on a machine with a GPU.
    config.device_config.device_type, config.cache_config.cache_dtype = "cuda", "fp8"
    lsa = validate.check(config)
    half = validate.geometry_of(config, lsa)
    assert before.dtype == before.compute_dtype == half.compute_dtype == torch.bfloat16 and half.quantised
    assert before.page_bytes == 2 * half.page_bytes
    blocks = validate.host_blocks(config, lsa, half)
    assert blocks - 2 * validate.host_blocks(config, lsa, before) in (0, 1)
    assert blocks * half.block_bytes <= 2**28 < (blocks + 1) * half.block_bytes


def test_a_window_that_the_model_does_not_use_is_no_reason(tmp_path):
    from vllm_lsa.plugin import validate

    config = accepted(tiny_models.write("qwen2_unused_window", tmp_path), additional_config={"lsa": {"budget": 0.5}})
    assert validate.check(config).budget == 0.5
