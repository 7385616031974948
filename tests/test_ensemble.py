"""The shared form in parts: labels, choice of layers and mode, the policy, settings that contradict it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from indexer_training import ensemble, train
from indexer_training.distributed import Group
from indexer_training.label import Union, counts_of, forced_of, union
from indexer_training.masses import Masses, dense, sparse
from indexer_training.settings import Settings
from indexer_training.train import Batch
from indexer_training.workspace import Workspace, write_json, write_tensors
from tests import random_checkpoint, test_engine
from vllm_lsa.config import LsaConfig
from vllm_lsa.errors import LsaError
from vllm_lsa.evaluation.rule import SelectionRule
from vllm_lsa.indexer import IndexerConfig, MemoryIndexer
from vllm_lsa.indexer.rotary import RopeConfig, inverse_frequencies, rotate
from vllm_lsa.indexer.trained import Trained
from vllm_lsa.residency.policies import make_policy
from vllm_lsa.residency.policies.base import ScoreInput

LAYERS, HEADS, KV_HEADS, DIM = 3, 4, 2, 16
WIDTH = HEADS * DIM


def settings_of(folder: Path, **changes: Any) -> Settings:
    fields: dict[str, Any] = {
        "model": str(folder / "model"), "text": "t", "context": 1024, "documents": 16, "heldout": "",
        "heldout_documents": 1, "dtype": "float32", "window": 64, "first": 128, "rank": WIDTH, "steps": 120,
        "measure_every": 1, "evaluate_budgets": (0.1,), "kept": 64, "recency_tokens": 16, "sink_tokens": 8,
        "budget": 0.3, "learning_rate": 4e-3, "hard_weight": 1.0, "form": "shared", "golden_layers": 1, "layers": 3,
        "min_gain": 0.01,
    }  # fmt: skip
    return Settings.model_validate({**fields, **changes})


def make_indexer(kv_heads: int = KV_HEADS, **changes: Any) -> MemoryIndexer:
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "kind": "shared", "backbone": "tiny", "layers": tuple(range(LAYERS)), "hidden_size": WIDTH, "heads": HEADS,
        "kv_heads": kv_heads, "head_dim": DIM, "rank": 8, "rope": RopeConfig(style="halves", dims=DIM),
        "input": "query", "chunk_tokens": 8, "bias": True,
    }  # fmt: skip
    return MemoryIndexer(IndexerConfig(**{**fields, **changes}), inverse_frequencies(DIM, 1e4)).requires_grad_(False)


def random_masses(counts: torch.Tensor, chunks: int, kept: int, seed: int) -> Masses:
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(LAYERS, len(counts), KV_HEADS, chunks, generator=g)
    mass = logits.masked_fill(torch.arange(chunks) >= counts[:, None, None], -torch.inf).softmax(-1)
    each = [sparse(x, kept, chunks - 1, counts) for x in mass]
    return Masses(*(torch.stack(parts) for parts in zip(*each, strict=True)))


@pytest.mark.parametrize("golden_layers", [1, 2, 3])
def test_union_labels(golden_layers: int, tmp_path: Path) -> None:
    """Against loops over layers, cycles, heads and chunks."""
    s = settings_of(tmp_path, context=320, golden_layers=golden_layers, top_p=0.6)
    counts, fixed = counts_of(s), forced_of(s, counts_of(s))
    upcoming, last = (random_masses(counts, s.chunks, 12, seed) for seed in (0, 1))
    found = union(upcoming, last, counts, fixed, s)

    def golden(masses: Masses, cycle: int) -> set[int]:
        hits = [0] * s.chunks
        for layer in range(LAYERS):
            hit = set()
            for head in range(KV_HEADS):
                of_head = Masses(*(x[layer, cycle, head] for x in masses))
                free = {
                    c: m for c, m in zip(of_head.chunk.tolist(), of_head.mass.tolist(), strict=True)
                    if not fixed[cycle, c] and m > 0
                }  # fmt: skip
                total, held = sum(free.values()) + float(of_head.rest), 0.0
                for c in sorted(free, key=free.__getitem__, reverse=True):
                    if held >= 0.6 * total:
                        break
                    hit.add(c)
                    held += free[c]
            for c in hit:
                hits[c] += 1
        return {c for c in range(s.chunks) if hits[c] >= golden_layers}

    for i in range(len(counts)):
        want = golden(upcoming, i)
        assert set(found.golden[i].nonzero().flatten().tolist()) == want
        assert set(found.hard[i].nonzero().flatten().tolist()) == golden(last, i) - want
        for masses, got in ((upcoming, found.mass), (last, found.usage)):
            each = [dense(Masses(*(x[layer] for x in masses)), counts, s.chunks) for layer in range(LAYERS)]
            n = int(counts[i])
            torch.testing.assert_close(got[i, :n], torch.stack(each).mean((0, 2))[i, :n])
            assert abs(float(got[i, :n].sum()) - 1) < 1e-2


def world(folder: Path, s: Settings) -> Workspace:
    """Captured windows in which the queries of layers 0 and 2 say half each of what is attended to, layer 1 nothing."""
    (folder / "model").mkdir()
    write_json(folder / "model" / "config.json", {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": LAYERS, "hidden_size": WIDTH, "head_dim": DIM,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    })  # fmt: skip
    (folder / "model" / "model.safetensors").touch()
    work = Workspace(folder, s)
    write_tensors(
        work.folder("capture") / "model.safetensors", {"inv_freq": torch.zeros(LAYERS, DIM // 2)},
        {"rotary": json.dumps({"scaling": 1.0, "style": "halves", "dims": DIM})},
    )  # fmt: skip
    counts, fixed = counts_of(s), forced_of(s, counts_of(s))
    g = torch.Generator().manual_seed(0)
    later = torch.arange(s.chunks) >= counts[:, None]
    skew = torch.randn(LAYERS, WIDTH, WIDTH, generator=g) * 0.04
    hidden_maps = torch.matrix_exp(skew - skew.transpose(1, 2))
    for i in range(s.documents):
        x = torch.randn(LAYERS, len(counts), WIDTH, generator=g)
        keys = torch.randn(LAYERS, s.chunks, KV_HEADS, DIM, generator=g)
        q = (x @ hidden_maps).view(LAYERS, len(counts), KV_HEADS, -1, DIM)
        logits = torch.einsum("lshgd,lnhd->lshgn", q, keys).relu().sum((2, 3)) * 0.5
        shares = logits.masked_fill(later, -torch.inf).softmax(-1)
        mass = (shares[0] + shares[2]) / 2
        free = mass.masked_fill(fixed, 0)
        golden = free > 2 / counts[:, None]
        usage = torch.rand(len(counts), s.chunks, generator=g).masked_fill(later, 0)
        write_tensors(work.shard("capture", i), {
            "query": x.half(), "keys": keys.half(),
            **{name: torch.zeros(1) for name in ("query_moment", "key_sum", "key_sample")},
        })  # fmt: skip
        labels = {"mass": mass, "usage": usage, "golden": golden.byte(), "hard": torch.zeros_like(golden).byte()}
        write_tensors(work.shard("label", i), labels)
    return work


@pytest.mark.parametrize("loss", ["soft", "bce"])
def test_layers_are_chosen_by_what_the_deployed_ensemble_gains(loss: str, tmp_path: Path) -> None:
    s = settings_of(tmp_path, loss=loss)
    work = world(tmp_path, s)
    facts = train.run(work, Group("train", "cpu"))
    indexer, about = train.read_trained(work)
    assert about["layers"] == [0, 2] and facts["layers"] == 2 and min(about["gains"]) > s.min_gain
    recall = {name: values[0] for name, values in about["recall"].items()}
    assert max(about["alone"]) + 0.05 < recall["trained"] < recall["oracle"]
    assert recall["trained"] > recall["usage"] + 0.3
    assert recall["usage"] + sum(about["gains"]) == pytest.approx(recall["trained"], abs=1e-4)
    # What was measured is the ensemble that is deployed: the same number from the public functions alone.
    windows, caught, total = train.Windows(work, "cpu"), 0.0, 0.0
    for window in s.validation:
        batch = windows.batch(window, torch.arange(len(s.starts)))
        assert batch.union is not None
        logits = {
            layer: indexer.logits(layer, batch.query[layer], batch.keys[layer], batch.positions)
            for layer in about["layers"]
        }
        scores = indexer.ensemble(logits, about["ensemble"])
        for i, count in enumerate(batch.counts.tolist()):
            free = [c for c in range(count) if not batch.fixed[i, c]]
            room = int(s.budget * count) - (count - len(free)) - s.period // s.chunk_tokens
            best = sorted(free, key=lambda c, i=i: -float(scores[i, c]))[: max(1, room)]  # type: ignore[misc]
            caught += float(batch.union.mass[i, best].sum())
            total += float(batch.union.mass[i, free].sum())
    assert caught / total == pytest.approx(recall["trained"], abs=1e-4)
    other = {mode: way[-1][1] for mode, way in about["ways"].items()}
    assert recall["trained"] == max(other.values()) == other[about["ensemble"]]
    if loss == "soft":  # levelled: each layer alone says yes to as much as the budget has room for
        for layer in indexer.layers:
            scorer = indexer.layer(layer)
            cut = ensemble.cuts(lambda batch: batch.logits(scorer, layer), [s.budget], windows)  # noqa: B023
            assert cut[0] == pytest.approx(0, abs=1e-4)


def test_greedy_stops() -> None:
    def recall_of(layers: Any) -> float:
        assert list(layers) == sorted(layers)
        return {(5,): 0.5, (2,): 0.4, (7,): 0.3, (2, 5): 0.52, (5, 7): 0.6, (2, 5, 7): 0.605}[tuple(layers)]

    assert ensemble.greedy(recall_of, (2, 5, 7), 3, 0.002) == [(5, 0.5), (7, 0.6), (2, 0.605)]
    assert ensemble.greedy(recall_of, (2, 5, 7), 3, 0.01) == [(5, 0.5), (7, 0.6)]
    assert ensemble.greedy(recall_of, (2, 5, 7), 1, 0.01) == ensemble.greedy(recall_of, (2, 5, 7), 9, 1.0) == [(5, 0.5)]
    assert ensemble.greedy(lambda _: 0.1, (2, 5), 9, -1.0) == [(2, 0.1), (5, 0.1)]


@pytest.mark.parametrize("best", ["or", "mean"])
def test_the_mode_is_chosen_by_measurement(best: Literal["or", "mean"], tmp_path: Path) -> None:
    """Chunk 10 is what one layer is sure of and the others are against, chunk 11 what all find likely."""
    s = settings_of(tmp_path, context=320, documents=1, budget=0.01, min_gain=-1.0)
    table = {layer: torch.full((1, s.chunks), -9.0) for layer in range(LAYERS)}
    for layer in range(LAYERS):
        table[layer][0, 11] = 1.0 + 0.1 * layer
    table[1][0, 10] = 4.0
    mass = torch.zeros(1, s.chunks)
    mass[0, 10 if best == "or" else 11], mass[0, 11 if best == "or" else 10] = 0.9, 0.1

    class Known(Batch):
        def logits(self, scorer: Any, layer: int) -> torch.Tensor:
            return table[layer].unsqueeze(1)

    none: Any = None
    fixed, counts = torch.zeros(1, s.chunks, dtype=torch.bool), torch.tensor([s.chunks])
    labels = Union(mass, mass, mass > 0, mass < 0)
    batch = Known(none, none, none, none, none, none, counts, counts, fixed, labels)
    windows: Any = SimpleNamespace(work=SimpleNamespace(settings=s), batch=lambda window, cycles: batch)
    found = {"usage": [0.0] * LAYERS, "trained": [0.1] * LAYERS, "oracle": [1.0] * LAYERS}
    # All three layers are taken whatever they add, so that the modes differ.
    choice = ensemble.choose(make_indexer(), windows, found)
    assert (choice["ensemble"], choice["layers"]) == (best, [0, 1, 2])
    assert choice["recall"] == {"usage": [0.0], "trained": [0.9], "oracle": [1.0]}


# -- serving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, KV_HEADS])
@pytest.mark.parametrize("mode", ["or", "mean"])
def test_policy_scores_by_the_ensemble(kv_heads: int, mode: Literal["or", "mean"]) -> None:
    indexer = make_indexer(kv_heads, ensemble=mode, layers=(1, 3), attention_scaling=1.3)
    trained = Trained(Path("none"), indexer, None)
    policy = make_policy("checkpoint", 8, DIM, torch.float32, trained)
    assert policy.index is not None
    query, keys = torch.randn(5, HEADS, DIM), torch.randn(5, 21, kv_heads, 8, DIM)
    speeds, rope, last = inverse_frequencies(DIM, 1e4), indexer.config.rope, torch.full((5,), 170)
    given = ScoreInput(
        query=1.3 * rotate(query, last, speeds, rope), cells=torch.stack([policy.index.encode(k) for k in keys]),
        usage=torch.rand(5, 20), num_chunks=20, num_layers=5, layer_lanes=1, position=171, scale=DIM**-0.5, mode="or",
        request_seed=0, cycle=0, device=torch.device("cpu"),
    )  # fmt: skip
    found = policy.score(given)
    assert found.shape == (5, 20)
    each = []
    for layer in (1, 3):
        of_heads = keys[layer, :20].mean(2)
        logits = indexer.logits(
            layer, query[layer].reshape(1, -1), of_heads if kv_heads > 1 else of_heads[:, 0], torch.tensor([203])
        )
        each.append(logits[0].sigmoid())
    want = torch.stack(each).amax(0) if mode == "or" else torch.stack(each).mean(0)
    torch.testing.assert_close(found, want.expand(5, -1), atol=1e-4, rtol=1e-4)


def test_settings_that_contradict_a_shared_checkpoint(tmp_path: Path) -> None:
    folder = random_checkpoint.write(tmp_path, LAYERS, HEADS, KV_HEADS, DIM, 8, scorers=(0, 2), ensemble="mean")

    def parse(**settings: Any) -> LsaConfig:
        return LsaConfig.parse({"lsa": {"indexer": str(folder), **settings}})

    assert (parse().sets, parse().mode, parse().demand) == ("shared", "mean", "product")
    assert parse(sets="shared", mode="mean", threshold=0.5).sets == "shared"
    assert parse(lookahead="usage").sets == "per_head"  # then it only lends its demand index
    for setting, value in (("sets", "per_head"), ("sets", "per_layer"), ("mode", "or")):
        with pytest.raises(LsaError) as caught:
            parse(**{setting: value})
        message = str(caught.value)
        assert f"lsa.{setting}='{value}' contradicts lsa.indexer=" in message and f"leave lsa.{setting} out" in message
        assert "\n" not in message
    with pytest.raises(LsaError, match="sets='per_head' contradicts the indexer"):
        SelectionRule(lookahead=MemoryIndexer.load(folder), sets="per_head")


@pytest.mark.parametrize("demand", ["product", "off"])
@pytest.mark.parametrize("mode", ["or", "mean"])
def test_engine_serves_one_set_for_all_layers(tmp_path: Path, mode: Literal["or", "mean"], demand: str) -> None:
    layers, heads, kv_heads, dim = test_engine.LAYERS, test_engine.HQ, test_engine.HKV, test_engine.DIM
    folder = random_checkpoint.write(tmp_path, layers, heads, kv_heads, dim, 8, scorers=(0, 2), ensemble=mode)
    given = {"indexer": str(folder), "demand": demand, "budget": 0.3, "demand_chunks": 1, "check": "poison"}
    settings = LsaConfig.parse({"lsa": {**given, "sink_tokens": 8, "recency_tokens": 16}})
    assert (settings.sets, settings.mode) == ("shared", mode)
    simulation = test_engine.Simulation(settings, slots=layers * 45, seed=6)
    same = compare_lanes(simulation)
    test_engine.run(simulation, 100)
    assert simulation.sparse_decodes > 100
    assert len(same) > 200 and all(same) == (demand == "off")  # what a layer's own query demands comes on top
    simulation.leak_check()


def compare_lanes(simulation: test_engine.Simulation) -> list[bool]:
    """For each lane but the first, of each row and step, whether its set is the first one's; filled by later steps."""
    same: list[bool] = []
    first: dict[str, set[int]] = {}
    trace = simulation.engine.attention.tracer
    assert trace is not None

    def compare(lane: int, request: Any, chunks: Any) -> None:
        trace(lane, request, chunks)
        if lane == 0:
            first[request.id] = set(chunks.tolist())
        else:
            same.append(set(chunks.tolist()) == first[request.id])

    simulation.engine.attention.tracer = compare
    return same
