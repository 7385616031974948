"""Stock vLLM with a small DeepSeek-V4 on this CPU: the same tokens however a prompt is run. See tests/v4/README.md."""

import json
import random
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.amx import without_amx
from tests.paths import run_module
from tests.v4 import install, model
from vllm_lsa.serving.server import Server

pytestmark = pytest.mark.vllm
TOKENS = 16
# 3,000 tokens are 750 compressed states: more than the 512 that the indexer chooses.
LENGTHS = (40, 700, 3000)
_random = random.Random(0)


def prompt(length: int) -> list[int]:
    return [_random.randrange(2, model.VOCABULARY) for _ in range(length)]


PROMPTS = {length: [prompt(length), prompt(length)] for length in LENGTHS}


def scenario(name: str, prompts: list[list[int]], together: bool = True, max_tokens: int = TOKENS) -> dict[str, Any]:
    return {"name": name, "prompts": prompts, "max_tokens": max_tokens, "together": together}


def run(folder: Path, path: Path, scenarios: list[dict[str, Any]], chunk: int | None = None) -> dict[str, Any]:
    """chunk: tokens of a prompt in a step, with prefix caching; by default whole prompts without."""
    llm = {**model.ARGUMENTS, "model": str(path), **({"max_num_batched_tokens": chunk} if chunk else {})}
    env = {**install.environment(folder / "plugin", chunks=chunk is not None), "OMP_NUM_THREADS": "1"}
    return run_module("tests.generate", {"llm": llm, "scenarios": scenarios}, folder, 500, env)


@pytest.fixture(scope="module")
def stock(v4_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Pairs of prompts of each length together and alone, and one that differs in its first 1,000 tokens only."""
    scenarios = [scenario(f"pair-{length}", prompts) for length, prompts in PROMPTS.items()]
    scenarios += [scenario(f"alone-{length}", prompts, together=False) for length, prompts in PROMPTS.items()]
    scenarios.append(scenario("other-start", [prompt(1000) + PROMPTS[3000][0][1000:]]))
    return run(tmp_path_factory.mktemp("stock"), v4_path, scenarios)


def test_tokens_depend_on_the_prompt_and_its_far_past(stock):
    tokens = [row for length in LENGTHS for row in stock[f"pair-{length}"]]
    assert all(len(row) == TOKENS for row in tokens)
    assert len({tuple(row) for row in tokens}) == len(tokens)
    assert all(len(set(row)) > TOKENS // 2 for row in tokens), tokens
    assert stock["other-start"][0] != stock["pair-3000"][0]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_prompt_in_a_batch_gives_the_tokens_that_it_gives_alone(stock, length):
    assert stock[f"pair-{length}"] == stock[f"alone-{length}"]


@without_amx
def test_another_run_in_chunks_and_from_cached_prefixes_gives_the_same_tokens(stock, v4_path, tmp_path):
    # What was decoded before is now in the prompt: decode steps and prompts write and read the same states.
    half = TOKENS // 2
    longer = [given + told[:half] for given, told in zip(PROMPTS[700], stock["pair-700"], strict=True)]
    scenarios = [scenario(f"pair-{length}", prompts) for length, prompts in PROMPTS.items()]
    scenarios += [scenario("cached", PROMPTS[3000]), scenario("longer", longer, max_tokens=half)]
    again = run(tmp_path, v4_path, scenarios, chunk=500)
    for length in LENGTHS:
        assert again[f"pair-{length}"] == stock[f"pair-{length}"]
    assert again["cached"] == stock["pair-3000"]
    assert again["longer"] == [told[half:] for told in stock["pair-700"]]
    assert again["prefix_hits"] > 5000


def test_the_server_with_an_engine_process_of_its_own_gives_the_same_tokens(stock, v4_path, tmp_path):
    given = PROMPTS[40][0]
    arguments = ["--skip-tokenizer-init", "--max-num-seqs", "4", "--kv-cache-memory-bytes", str(1 << 30)]
    env = {**install.environment(tmp_path / "plugin"), "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    body = {"prompt": given, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    log = tmp_path / "log.txt"
    with Server(v4_path, None, log, 4096, dtype="bfloat16", arguments=arguments, environment=env) as up:
        call = urllib.request.Request(
            f"{up.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(call, timeout=120) as answer:
            tokens = json.load(answer)["choices"][0]["token_ids"]
    assert tokens == stock["pair-40"][0]
