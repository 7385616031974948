"""Ranks that hold some heads of every layer attend to the sets that one engine with all heads attends to."""

import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import random_checkpoint, tiny_models
from tests.divided import Comparison
from tests.paths import MODEL, ROOT, run_module
from tests.test_engine import CHUNK, DIM, HKV, HQ, LAYERS, config, run
from vllm_lsa.config import LsaConfig
from vllm_lsa.errors import LsaError
from vllm_lsa.metrics import PER_GROUP, MetricsWriter, read_all
from vllm_lsa.residency.peers import Peers

# -- without vLLM: threads for ranks ----------------------------------------------------------------------------------


def compare(settings: LsaConfig, ranks: int = 2, seed: int = 1, same_sets: bool = True) -> Comparison:
    """Run a random schedule. Every step and layer is compared, see `Divided`."""
    slots = LAYERS * 45 * settings.layer_lanes(HKV)
    simulation = Comparison(settings, slots=slots, ranks=ranks, seed=seed, same_sets=same_sets)
    run(simulation, 60)
    assert simulation.sparse_decodes > 20
    simulation.leak_check()
    return simulation


@pytest.mark.parametrize("indexer, demand", [("mean_key", "mean_key"), ("quest", "off"), ("usage", "four_bit")])
def test_sets_per_head_are_those_of_one_rank(indexer, demand):
    compare(config(indexer=indexer, demand=demand, budget=0.2))


@pytest.mark.parametrize(
    "ranks, sets, mode, lead, demand",
    [
        (2, "per_layer", "or", 5, "mean_key"),
        (2, "per_layer", "mean", 3, "off"),
        (2, "shared", "or", 0, "off"),
        (2, "shared", "mean", 5, "mean_key"),
        (6, "per_layer", "mean", 0, "mean_key"),  # two KV heads, each on three ranks
    ],
)
def test_common_sets_are_agreed(ranks, sets, mode, lead, demand):
    simulation = compare(config(sets=sets, mode=mode, lead=lead, demand=demand, budget=0.3), ranks)
    assert simulation.engine.gathers > 0


def test_more_ranks_than_kv_heads_have_sets_of_their_own():
    compare(config(budget=0.3, lead=2), ranks=6, same_sets=False)


@pytest.mark.parametrize(
    "sets, demand, lookahead",
    [("per_head", "product", "indexer"), ("per_layer", "off", "indexer"), ("per_head", "product", "usage")],
)
def test_a_checkpoint_is_divided(tmp_path, sets, demand, lookahead):
    folder = random_checkpoint.write(tmp_path, LAYERS, HQ, HKV, DIM, CHUNK, scorers=(0, 2), weights=(0.4, 1.6, 1.0))
    compare(config(indexer=str(folder), demand=demand, lookahead=lookahead, sets=sets, budget=0.3), seed=5)


@pytest.mark.parametrize("ensemble", ["or", "mean"])
def test_a_checkpoint_of_the_shared_form_is_divided(tmp_path, ensemble):
    folder = random_checkpoint.write(tmp_path, LAYERS, HQ, HKV, DIM, CHUNK, scorers=(0, 2), ensemble=ensemble)
    compare(config(indexer=str(folder), demand="product", sets="shared", mode=ensemble, budget=0.3))


def test_what_one_rank_denies_is_not_agreed():
    assert Peers().agree(True) and not Peers().agree(False)
    for others, agreed in ([1, 1], True), ([1, 0], False):
        extra = torch.tensor(others, dtype=torch.uint8)[:, None]
        assert Peers(lambda x, extra=extra: torch.cat([x[None], extra])).agree(True) == agreed


def test_what_ranks_share_is_counted_once(tmp_path):
    simulation = Comparison(config(), slots=LAYERS * 45 * HKV)
    engine = simulation.engine
    for rank, part in enumerate(engine.parts):
        part._metrics = MetricsWriter(tmp_path, rank)
    simulation.step({simulation.add(100, 120): 100})
    sums = read_all(tmp_path)
    assert [sums[name] for name in PER_GROUP] == [1, 60, 0]
    total, resident, index = engine.whole.footprint()
    assert (sums["kv_bytes_total"], sums["kv_bytes_resident"], sums["index_bytes"]) == (total, resident, index)
    assert sums["pool_slots"] == engine.whole.pool.num_slots


# -- with vLLM: two worker processes, gloo ----------------------------------------------------------------------------

TOKENS = 24
LENGTHS = [5, 100, 333, 700, 1100]
LAYERS_SERVED, Q_HEADS, KV_HEADS, HEAD = 4, 8, 4, 64
SPARSE = {"budget": 0.3, "period": 8, "recency_tokens": 32, "device_pool_fraction": 0.08, "check": "assert"}


def tokens(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(count)]


def checkpoint(folder: Path) -> str:
    """A random one for the model that is served here."""
    layers = dict(scorers=(0, 2), weights=(0.5, 1.5, 1, 1))
    return str(random_checkpoint.write(folder, LAYERS_SERVED, Q_HEADS, KV_HEADS, HEAD, 16, **layers))


# On GPUs in fp32, and not in the tf32 that Triton has for it: a random model makes much of a last bit.
GPU = {"TRITON_F32_DEFAULT": "ieee", "OMP_NUM_THREADS": "2"}
# vLLM gives every rank a NUMA node of its own and would refuse a machine with one; threads are for one core a rank.
CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def generate(
    folder: Path, model: Path, ranks: int, prompts: dict[str, list[list[int]]], lsa: dict[str, Any] | None,
    env: Mapping[str, str] = CPU, limit: float = 400, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """What an engine answers, with the sets of its ranks; of stock vLLM if there are no settings for LSA.

    prompts: by scenario; the prompts of "together" and "next" make one batch each. limit: seconds. more: arguments of
    `vllm.LLM`.
    """
    llm: dict[str, Any] = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "tensor_parallel_size": ranks,
        "max_model_len": 2048,
        "gpu_memory_utilization": 0.1,
        "kv_cache_memory_bytes": 1 << 28,
    }
    llm |= more
    if lsa is not None:
        llm |= {"attention_backend": "LSA", "additional_config": {"lsa": lsa}}
    scenarios = [
        {"name": name, "prompts": of, "max_tokens": TOKENS, "together": name in ("together", "next")}
        for name, of in prompts.items()
    ]
    spec = {"llm": llm, "scenarios": scenarios, "trace": lsa is not None}
    return run_module("tests.generate", spec, folder, limit, env)


def check_ranks(got: dict[str, Any], kv_heads: int) -> None:
    """Sizes and numbers of decisions are the same on both ranks, and nothing is left."""
    ranks = got["ranks"]
    assert [(r["rank"], r["ranks"], r["kv_heads"]) for r in ranks] == [(0, 2, kv_heads), (1, 2, kv_heads)]
    for name in ("host_blocks", "host_bytes", "pool_slots"):
        assert ranks[0][name] == ranks[1][name]
    assert ranks[0]["counts"]["cycles"] == ranks[1]["counts"]["cycles"] == got["metrics"]["cycles"]
    assert all(r["counts"]["pinned"] == r["counts"]["live"] == 0 for r in ranks)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return tiny_models.write_random(folder, LAYERS_SERVED, Q_HEADS, KV_HEADS, HEAD)


@pytest.mark.vllm
def test_what_cannot_be_divided_is_refused_in_one_line(tmp_path):
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import EngineArgs

    from vllm_lsa.plugin import validate

    def configure(model: Path, ranks: int, **lsa: Any) -> Any:
        return EngineArgs(
            str(model), attention_backend="LSA", tensor_parallel_size=ranks, skip_tokenizer_init=True, dtype="float32",
            max_model_len=2048, additional_config={"lsa": lsa},
        ).create_engine_config()  # fmt: skip

    one_head = tiny_models.write_random(tmp_path / "one", 2, 4, 1, 16)
    folder = str(random_checkpoint.write(tmp_path / "indexer", 2, 4, 1, 16, 16))
    with pytest.raises(LsaError, match="KV heads, which --tensor-parallel-size 2 does not divide: .*lookahead='usage'"):
        configure(one_head, 2, indexer=folder)
    assert validate.check(configure(one_head, 2, indexer=folder, lookahead="usage")).demand == "product"
    six_heads = tiny_models.write_random(tmp_path / "six", 2, 12, 6, 16)
    with pytest.raises(LsaError, match="--tensor-parallel-size 4 neither divides the model's 6 KV heads"):
        configure(six_heads, 4)
    agreed = configure(six_heads, 2, sets="shared")
    agreed.device_config.device_type = "cuda"
    with pytest.raises(LsaError, match="sets='shared' with lsa.demand='mean_key' .* use sets=per_head or demand=off"):
        validate.check(agreed)
    with pytest.raises(ValueError, match=r"attention heads \(9\) must be divisible by tensor parallel size"):
        configure(MODEL, 2)


@pytest.mark.vllm
def test_requests_leave_in_one_order_on_all_ranks():
    """A rank is a process of its own, with hashes of its own, by which vLLM's sets of names are in order."""
    pytest.importorskip("vllm")
    code = """
from vllm.v1.core.sched.output import SchedulerOutput
from vllm_lsa.plugin.scheduler_output import step_update
output = SchedulerOutput.make_empty()
output.finished_req_ids, output.preempted_req_ids = ({f"{kind}-{i}" for i in range(20)} for kind in "fp")
update = step_update(output)
print(*update.finished, *update.preempted)
"""
    ranks = [
        subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": str(n)})
        for n in (1, 2)
    ]
    assert ranks[0].split()[-40:] == ranks[1].split()[-40:]


@pytest.mark.vllm
def test_everything_kept_gives_the_stock_tokens(model, tmp_path):
    """Alone, again after prefix hits, and in a batch; the pool holds a part, so the longer requests are streamed."""
    alone = [tokens(n, n) for n in LENGTHS]
    prompts = {"alone": alone, "again": [p + tokens(7, 1) for p in alone[-2:]], "together": alone}
    stock = generate(tmp_path / "stock", model, 1, prompts, None)
    # Divided over the ranks: 20 blocks of 4 layers, 2 heads, 128 tokens of 64 K and V in fp32 on each.
    gib = 2 * 20 * LAYERS_SERVED * 2 * 128 * 64 * 2 * 4 / 2**30
    settings = {"budget": 1.0, "check": "assert", "device_pool_fraction": 0.3, "host_memory_gib": gib}
    got = generate(tmp_path / "lsa", model, 2, prompts, settings)
    for name in prompts:
        assert got[name] == stock[name]
    check_ranks(got, KV_HEADS // 2)
    assert got["ranks"][0]["host_blocks"] == 20 and got["counts"]["streamed"] > 0
    assert got["prefix_hits"] >= 640 + 1024
    assert 2 * got["ranks"][0]["host_bytes"] == gib * 2**30


@pytest.mark.vllm
@pytest.mark.parametrize("case", ["checkpoint", "per_layer"])
def test_small_budgets_give_the_tokens_and_sets_of_one_rank(model, tmp_path, case):
    settings: dict[str, Any] = {**SPARSE, "sets": "per_layer", "lead": 3}
    if case == "checkpoint":
        settings = {**SPARSE, "indexer": checkpoint(tmp_path / "indexer")}
    prompts = {"together": [tokens(n, n) for n in LENGTHS], "alone": [tokens(1500, 2)]}
    one, two = (generate(tmp_path / str(n), model, n, prompts, settings) for n in (1, 2))
    assert one["counts"]["cycles"] > 0 and one["counts"]["demanded"] > 0
    for name in prompts:
        assert two[name] == one[name]
    check_ranks(two, KV_HEADS // 2)
    for name in ("cycles", "live_requests", "host_blocks", "kv_bytes_total", "bytes_written_back"):
        assert two["metrics"][name] == one["metrics"][name]
    whole, parts = one["ranks"][0]["sets"], [r["sets"] for r in two["ranks"]]
    if case == "per_layer":
        assert parts == [whole, whole]
    else:
        assert [first + second for first, second in zip(*parts, strict=True)] == whole


@pytest.mark.vllm
def test_fewer_kv_heads_than_ranks(tmp_path):
    """vLLM gives both ranks the one KV head; with everything kept the tokens are those of the model."""
    folder = tiny_models.write_random(tmp_path / "model", 2, 4, 1, HEAD)
    prompts = [tokens(n, n) for n in LENGTHS]
    got = generate(tmp_path / "lsa", folder, 2, {"together": prompts}, {"budget": 1.0, "check": "assert"})
    model = AutoModelForCausalLM.from_pretrained(folder)
    length = {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS, "eos_token_id": None, "pad_token_id": 0}
    for prompt, found in zip(prompts, got["together"], strict=True):
        expected = model.generate(torch.tensor([prompt]), do_sample=False, **length)
        assert found == expected[0, len(prompt) :].tolist()
    check_ranks(got, 1)
