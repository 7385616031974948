"""What the tests of DeepSeek-V4 with LSA run: prompts, and stock vLLM or LSA on them in a process of its own."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.paths import run_module
from tests.v4 import install, model

TOKENS = 16
PAGE = 37440
LAYERS = 3
_random = random.Random(1)
KEEP_ALL = {"indexer": "keep_all", "budget": 1.0, "device_pool_fraction": 1.0}


def prompt(length: int) -> list[int]:
    return [_random.randrange(2, model.VOCABULARY) for _ in range(length)]


Batch = dict[str, Any]


def batch(*prompts: list[int], max_tokens: int = TOKENS, abort: dict[int, int] | None = None) -> Batch:
    """abort: after how many tokens which of the prompts is."""
    return {"prompts": list(prompts), "max_tokens": max_tokens, "abort": abort or {}, "together": True}


# 3,000 tokens are 750 entries and 12 pages: more than the 512 that the native indexer chooses.
BATCHES = [batch(prompt(40)), batch(prompt(700)), batch(prompt(3000)), batch(prompt(9000), max_tokens=4)]
MIXED = [prompt(2300), prompt(700), prompt(3000), prompt(40)]
BATCHES += [batch(*MIXED), batch(*MIXED, abort={0: 5, 2: 9})]
# A long request decodes when shorter ones come that go before it and grow until it has to leave.
GROWING = batch(MIXED[2], *(prompt(30) for _ in range(6)), max_tokens=110)
GROWING |= {"late": dict.fromkeys(range(1, 7), 60), "priorities": [1, *[0] * 6]}
FEW_BLOCKS = {"chunk": 64, "kv_cache_memory_bytes": 5120 << 10, "max_model_len": 3200, "max_num_seqs": 8}
FEW_BLOCKS |= {"scheduling_policy": "priority"}
LONG = prompt(4000)


def sparse(indexer: str, pages: int = 38, **settings: Any) -> dict[str, Any]:
    """Settings with so many pages of pool in each layer."""
    return {
        "indexer": indexer,
        "budget": 0.75,
        "period": 16,
        "recency_tokens": 1792,
        "device_pool_gib": pages * LAYERS * PAGE / 2**30,
        "check": "poison",
        **settings,
    }


def run(
    folder: Path, path: Path, batches: list[Batch], lsa: dict[str, Any] | None = None, chunk: int | None = None,
    fallbacks: bool = False, **arguments: Any,
) -> dict[str, Any]:  # fmt: skip
    """lsa: settings, None for stock vLLM. chunk: tokens of a prompt in a step, with prefix caching. fallbacks: those of
    tests/v4 even where vLLM's library has operators, so that results do not depend on what is in a step."""
    longest = max(len(given) for one in batches for given in one["prompts"])
    llm = {**model.ARGUMENTS, "model": str(path), "kv_cache_memory_bytes": (600 if longest > 4096 else 300) << 20}
    llm |= {"max_model_len": 9344 if longest > 4096 else 4352, "max_num_batched_tokens": chunk or 9344} | arguments
    if lsa is not None:
        llm |= {"attention_backend": "LSA", "additional_config": {"lsa": lsa}}
    spec = {"llm": llm, "batches": batches}
    env = install.environment(
        folder / "plugin", chunks=chunk is not None, plugins=() if lsa is None else ("lsa",), everywhere=fallbacks
    )
    return run_module("tests.v4_watched", spec, folder, 500, {**env, "OMP_NUM_THREADS": "1"})


def scorers(path: Path, layers: Sequence[int] = range(LAYERS), hidden: int = 256) -> Path:
    """weights_proj so that scores lie on both sides of 0.5."""
    generator = torch.Generator().manual_seed(5)
    heads, rank = 32, 64

    def randn(*shape: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * gain * shape[-1] ** -0.5

    tensors = {
        f"retrievers.l{layer}.{name}": x
        for layer in layers
        for name, x in {
            "wq_a.weight": randn(rank, hidden),
            "wq_b.weight": randn(heads * 128, rank),
            "q_norm_weight": torch.ones(rank),
            "weights_proj.weight": randn(heads, hidden, gain=3.0),
        }.items()
    }
    save_file(tensors, path)
    return path
