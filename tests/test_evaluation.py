"""`vllm-lsa eval`: blocks against decoding token by token with explicit sets; bytes, resuming, the command."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config
from transformers.masking_utils import AttentionMaskInterface

from tests import random_checkpoint
from tests.paths import DOCUMENT, MODEL
from vllm_lsa import cli
from vllm_lsa.errors import LsaError
from vllm_lsa.evaluation import offline, report
from vllm_lsa.evaluation.indexes import Exact, FourBit, KeyIndex, MeanKey, Product, Quest
from vllm_lsa.evaluation.methods import at_total, make_rules, resident_share
from vllm_lsa.evaluation.offline import SparseModel, kl
from vllm_lsa.evaluation.quality import SuiteQuality, bootstrap, pair_tasks
from vllm_lsa.evaluation.rule import SelectionRule, demand_sets, start_set
from vllm_lsa.evaluation.suite import make_suite
from vllm_lsa.indexer import IndexerConfig, MemoryIndexer
from vllm_lsa.indexer.four_bit import FourBitIndex
from vllm_lsa.indexer.mean_key import MeanKeyIndex
from vllm_lsa.indexer.min_max import MinMaxIndex
from vllm_lsa.indexer.product import ProductIndex, ProductTables
from vllm_lsa.indexer.rotary import RopeConfig, inverse_frequencies, rotate

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.25,
}  # fmt: skip
CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}


def write_model(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """A random model; with wide weights, so that attention is peaked and sets matter."""
    torch.manual_seed(0)
    config = CONFIGS[kind](**{**SIZES, **changes})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> SparseModel:
    return SparseModel(folder)


def some_tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(seed))


def blocks_of(tokens: torch.Tensor, starts: torch.Tensor, width: int = 64) -> torch.Tensor:
    return tokens.unfold(0, width, 1)[starts]


# -- the naive twin ---------------------------------------------------------------------------------------------------


class Naive:
    """Decodes one block token by token through the model's own cache, with a Python set for every lane."""

    def __init__(self, folder: Path, rule: SelectionRule, start: int) -> None:
        self.rule, self.start = rule, start
        self.full = start // rule.chunk_tokens
        self.queries: dict[int, torch.Tensor] = {}
        self.sets: dict[tuple[int, int], set[int]] = {}
        self.usage: dict[tuple[int, int], list[float]] = {}
        self.largest = 0
        AttentionInterface.register("naive_twin", self.attention)
        AttentionMaskInterface.register("naive_twin", lambda *args, **kwargs: None)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="naive_twin")

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        past = self.model(tokens[None, : self.start], use_cache=True).past_key_values
        rows = []
        for token in tokens[self.start : self.start + self.rule.period]:
            out = self.model(token.view(1, 1), past_key_values=past, use_cache=True)
            past = out.past_key_values
            rows.append(out.logits[0, 0])
        return torch.stack(rows)

    def attention(self, module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float = 1.0, **_: Any) -> Any:
        if q.shape[2] > 1:
            self.queries[module.layer_idx] = q[0]
            group = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
            return out.transpose(1, 2), None
        return self.step(module.layer_idx, q[0, :, 0], k[0], v[0], scaling).view(1, 1, q.shape[1], -1), None

    def shares(self, index: KeyIndex, layer: int, q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
        """[Hkv, g, m, N] of queries [Hq, m, D] and the keys of N whole chunks."""
        c, kv_heads = self.rule.chunk_tokens, k.shape[0]
        grouped = q.reshape(1, kv_heads, -1, q.shape[-1])
        logits = index.chunk_logits(index.prepare(layer, k[None], c), grouped, scale, c)
        return logits[0].softmax(-1).unflatten(1, (-1, q.shape[1]))

    def of_lane(self, shares: torch.Tensor, lane: int) -> list[float]:
        return (shares[lane].mean(0) if self.rule.sets == "per_head" else shares.mean((0, 1)))[0].tolist()

    def noted(self, layer: int, lane: int, k: torch.Tensor, scale: float) -> list[float]:
        """Usage after the period before the block; a lane of several KV heads has the mean of theirs."""
        rule = self.rule
        if rule.demand is None:
            return [0.0] * self.full
        before = self.queries[layer][:, self.start - rule.period : self.start]
        past = k[:, : self.full * rule.chunk_tokens]
        shares = self.shares(rule.demand, layer, before, past, scale).mean(1).tolist()  # [Hkv][period][N]
        heads = []
        for head in [lane] if rule.sets == "per_head" else range(len(shares)):
            used = [0.0] * self.full
            for mass in shares[head]:
                used = [max(u * rule.decay, m) for u, m in zip(used, mass, strict=True)]
            heads.append(used)
        return [sum(x) / len(heads) for x in zip(*heads, strict=True)]

    def begin(self, layer: int, lane: int, k: torch.Tensor, scale: float) -> None:
        rule, n = self.rule, self.full
        used = self.noted(layer, lane, k, scale)
        score: list[float] = [float(i) for i in range(n)]
        if rule.lookahead == "usage":
            score = used
        elif rule.lookahead in ("mean_key", "quest"):
            index = rule.lookahead_index
            assert index is not None
            last = self.queries[layer][:, self.start - 1 : self.start]
            shares = self.shares(index, layer, last, k[:, : n * rule.chunk_tokens], scale)[:, :, 0]
            score = (shares[lane].amax(0) if rule.sets == "per_head" else shares.flatten(0, 1).amax(0)).tolist()
        forced = self.forced(n)
        order = sorted((i for i in range(n) if i not in forced), key=lambda i: -score[i])
        self.sets[layer, lane] = set(order[: self.room(layer, self.start)])
        self.usage[layer, lane] = used

    def forced(self, full: int) -> set[int]:
        c = self.rule.chunk_tokens
        recent = range(max(0, full - self.rule.recency_tokens // c), full)
        return {*range(min(full, self.rule.sink_tokens // c)), *recent}

    def room(self, layer: int, at: int) -> int:
        """As `LookaheadScheduler` and its `select` have it, at the step of the token at `at`."""
        rule, c = self.rule, self.rule.chunk_tokens
        weight = rule.layer_weights[layer] if rule.layer_weights else 1.0
        full = at // c
        forced = len(self.forced(full))
        growth = math.ceil(rule.period / c) if rule.demand is None else rule.demand_chunks
        least = rule.sink_tokens // c + rule.recency_tokens // c + 1 + growth
        spare = int(max(0, int(rule.budget * (full + 1)) - least) * weight)
        if rule.demand is None:
            return min(full - forced, spare)
        return min(full + 1, least + spare) - 1 - forced

    def step(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        rule, c, kv_heads = self.rule, self.rule.chunk_tokens, k.shape[0]
        at = k.shape[1] - 1
        full = at // c if rule.demand is not None else self.full
        forced = self.forced(full)
        out = []
        for lane in range(kv_heads if rule.sets == "per_head" else 1):
            if (layer, lane) not in self.sets:
                self.begin(layer, lane, k, scale)
            chosen, usage, room = self.sets[layer, lane], self.usage[layer, lane], self.room(layer, at)
            if rule.demand is not None:
                # What was among the newest, and is no more, is as any other chunk from here on.
                chosen |= self.forced((at - 1) // c) - forced if at > self.start else set()
                mass = self.of_lane(self.shares(rule.demand, layer, q.unsqueeze(1), k[:, : full * c], scale), lane)
                usage += [0.0] * (full - len(usage))
                outside = [i for i in range(full) if i not in chosen | forced]
                wanted = sorted((i for i in outside if mass[i] > rule.demand_threshold), key=lambda i: -mass[i])
                picked = wanted[: min(rule.demand_chunks, room)]
                usage[:] = [max(u * rule.decay, m) for u, m in zip(usage, mass, strict=True)]
                old = sorted(chosen, key=lambda i: usage[i])
                chosen |= set(picked)
                chosen -= set(old[: max(0, len(chosen) - room)])
            self.largest = max(self.largest, len(chosen | forced))
            keep = [i // c in chosen | forced or i >= full * c for i in range(k.shape[1])]
            heads = [lane] if rule.sets == "per_head" else range(kv_heads)
            for head in heads:
                scores = (q.view(kv_heads, -1, q.shape[-1])[head] @ k[head].T) * scale
                scores = scores.masked_fill(~torch.tensor(keep), -torch.inf)
                out.append(scores.softmax(-1) @ v[head])
        return torch.cat(out)


RULES = {
    "newest": SelectionRule(budget=0.45, recency_tokens=32),  # a whole block of 64; the others have shorter periods
    "per head, demand": SelectionRule(
        period=32, budget=0.4, chunk_tokens=8, sets="per_head", recency_tokens=16, demand=Exact(), demand_chunks=3
    ),
    "threshold, 4 bits, usage": SelectionRule(
        period=32, budget=0.45, sets="per_head", recency_tokens=32, demand=FourBit(), demand_chunks=4,
        demand_threshold=0.05, lookahead="usage",
    ),
    "per layer, demand, weights": SelectionRule(
        period=32, budget=0.5, chunk_tokens=8, recency_tokens=16, demand=Exact(), demand_chunks=2, lookahead="usage",
        layer_weights=(0.5, 1.5),
    ),
    "less room than demand": SelectionRule(
        period=32, budget=0.3, recency_tokens=32, demand=Exact(), demand_chunks=8
    ),
    "mean_key": SelectionRule(period=16, budget=0.4, recency_tokens=32, sets="per_head", lookahead="mean_key"),
    "quest": SelectionRule(period=16, budget=0.4, recency_tokens=32, lookahead="quest"),
}  # fmt: skip


def test_budget_one_is_the_dense_model(folder: Path, model: SparseModel) -> None:
    tokens = some_tokens(512)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens[None]).logits[0]
    past = model.prefill(tokens)
    for starts in (torch.arange(128, 512, 64), torch.tensor([65, 200, 333])):
        for rule in (None, SelectionRule(budget=1.0, demand=Exact())):
            logits = model.decode_blocks(past, blocks_of(tokens, starts), starts, rule)
            for row, start in zip(logits, starts.tolist(), strict=True):
                torch.testing.assert_close(row, expected[start : start + 64], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", RULES)
def test_blocks_equal_decoding_token_by_token(folder: Path, model: SparseModel, name: str) -> None:
    # One architecture decodes from a chunk's first token, the other from within a chunk.
    start = 256 if model.model.config.model_type == "llama" else 235
    rule, tokens = RULES[name], some_tokens(384, seed=1)
    naive = Naive(folder, rule, start)
    expected = naive.decode(tokens)
    past = model.prefill(tokens)
    starts = torch.tensor([192, start, 320])  # other blocks beside it, so that the past goes on after its start
    blocks = blocks_of(tokens, starts, rule.period)
    logits = model.decode_blocks(past, blocks, starts, rule)[1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    last = start if rule.demand is None else start + rule.period - 1
    rooms = rule.rooms(torch.tensor([last]), 1)
    own = int(rooms.own[0])
    assert naive.largest + own <= int(rooms.caps[0]) <= rooms.full[0] + own
    dense = model.decode_blocks(past, blocks, starts, None)[1]
    assert (dense - logits).abs().max() > 1e-2  # the rule does something


def test_sets_never_exceed_their_room() -> None:
    torch.manual_seed(0)
    lanes, n, steps = 40, 30, 64
    # Three chunks become eligible on the way.
    eligible = (torch.rand(1, 1, 1, lanes, n) < 0.8).repeat(steps, 1, 1, 1, 1)
    for step, chunk in ((5, 3), (6, 4), (40, 20)):
        eligible[:, ..., chunk] = torch.arange(steps).view(-1, 1, 1, 1) >= step
    room = torch.minimum(torch.randint(0, 12, (1, lanes)), eligible[0].sum(-1)[:, 0])
    for begin in (int(room.max()), 0):
        member = start_set(torch.rand(1, 1, lanes, n), eligible[0], room, begin)
        assert (member.sum(-1)[:, 0] == (room if begin else 0)).all()
        mass = torch.rand(steps, 1, 1, lanes, n).pow(4)
        rooms = room.expand(steps, 1, 1, lanes)
        keep, picked = demand_sets(
            mass, eligible, member, torch.zeros_like(member), rooms, chunks=5, threshold=0.01, decay=0.7
        )
        assert (keep.sum(-1) <= rooms).all()
        assert not (keep & ~eligible).any()
        assert (picked <= rooms.clamp(max=5)).all()
        assert int(picked.sum()) > 0
        assert (keep[-1].sum(-1) == rooms[-1]).all()


def test_batches_of_prompts_equal_single_ones(model: SparseModel) -> None:
    tokens = torch.stack([some_tokens(384, seed) for seed in range(3)])
    starts = torch.tensor([[300, 320], [256, 301], [192, 310]])
    for name in ("per head, demand", "quest"):
        width = RULES[name].period
        blocks = torch.stack([blocks_of(row, at, width) for row, at in zip(tokens, starts, strict=True)])
        together = model.decode_blocks(model.prefill(tokens, 64), blocks.flatten(0, 1), starts, RULES[name])
        for i in range(3):
            alone = model.decode_blocks(model.prefill(tokens[i]), blocks[i], starts[i], RULES[name])
            torch.testing.assert_close(together[2 * i : 2 * i + 2], alone, atol=1e-4, rtol=0)


def test_damage_is_of_one_layer(model: SparseModel) -> None:
    tokens, rule = some_tokens(512), SelectionRule(budget=0.3, recency_tokens=32)
    found = model.damage([tokens], rule)
    assert len(found) == 2 and min(found) > 0
    assert model.damage([tokens], rule, layers=[1]) == pytest.approx(found[1:])
    starts = torch.arange(256, 449, 128)
    past = model.prefill(tokens)
    dense = model.decode_blocks(past, blocks_of(tokens, starts), starts, None)
    sparse = model.decode_blocks(past, blocks_of(tokens, starts), starts, rule, sparse_layers=[0])
    assert found[0] == pytest.approx(float(kl(dense, sparse).mean()), rel=1e-3)


def test_refusals(model: SparseModel, tmp_path: Path) -> None:
    for bad in ({"budget": 0}, {"lookahead": "best"}, {"chunk_tokens": 24}, {"sets": "shared", "lookahead": "oracle"}):
        with pytest.raises(LsaError):
            SelectionRule(**bad)  # type: ignore[arg-type]
    tokens = some_tokens(256)
    with pytest.raises(LsaError, match="blocks may start from"):
        model.decode_blocks(model.prefill(tokens, 128), tokens[None, 128:192], torch.tensor([128]), SelectionRule())
    with pytest.raises(LsaError, match="config.json"):
        SparseModel(tmp_path)


# -- indexes and bytes ------------------------------------------------------------------------------------------------


def product_tables(layers: int, kv_heads: int, dim: int, subspaces: int) -> ProductTables:
    generator = torch.Generator().manual_seed(0)
    to_code = torch.linalg.qr(torch.randn(layers, kv_heads, dim, dim, generator=generator)).Q * 2
    centroids = torch.randn(layers, kv_heads, subspaces, 256, dim // subspaces, generator=generator)
    mean = torch.randn(layers, kv_heads, dim, generator=generator)
    return ProductTables(to_code, torch.linalg.inv(to_code), mean, centroids)


def test_indexes_estimate_as_the_servers_do() -> None:
    torch.manual_seed(0)
    tables, chunk, dim = product_tables(2, 2, 16, 4), 8, 16
    keys, queries = torch.randn(1, 2, 40, dim), torch.randn(4, dim)
    pairs = [
        (FourBit(), FourBitIndex(chunk, dim, torch.float32)),
        (Product(tables), ProductIndex(chunk, dim, torch.float32, tables)),
        (Quest(), MinMaxIndex(chunk, dim, torch.float32)),
        (MeanKey(), MeanKeyIndex(chunk, dim, torch.float32)),
    ]
    for ours, theirs in pairs:
        estimated = ours.chunk_logits(ours.prepare(1, keys, chunk), queries.view(1, 2, 2, dim), 0.25, chunk)[0]
        cells = theirs.encode(keys[0].unflatten(1, (-1, chunk)).transpose(0, 1).contiguous(), 1)
        served = theirs.chunk_logits(queries, cells, 0.25, 1).view(2, 2, -1)
        torch.testing.assert_close(estimated.softmax(-1), served.softmax(-1), atol=2e-3, rtol=0)
        if ours.name != "mean_key" and ours.name != "quest":
            assert ours.bytes_per_token(dim, chunk) * chunk == theirs.cell_bytes


def test_index_bytes() -> None:
    assert FourBit().share(64, 16) == 36 / 256
    assert MeanKey().share(64, 16) == 1 / 32 and Quest().share(128, 16) == 1 / 16
    assert Product(product_tables(1, 1, 64, 8)).share(64, 8) == 1 / 32
    rules = make_rules(["dense", "lsa", "demand", "recency", "quest"], None, {})
    assert "dense" not in rules
    share = 36 / 256
    lsa = at_total(rules["lsa"], 0.2, 64)
    assert lsa is not None and lsa.budget == pytest.approx(0.2 - share) and lsa.index_share(64) == share
    assert at_total(rules["lsa"], 0.1, 64) is None  # its index takes more
    recency = at_total(rules["recency"], 0.1, 64)
    assert recency is not None and recency.budget == 0.1
    quest = at_total(rules["quest"], 0.1, 64)
    assert quest is not None and quest.budget == pytest.approx(0.1 - 1 / 16)
    # Resident: what the caps say over all chunks at the end of a block.
    rule = SelectionRule(budget=0.25, recency_tokens=32)
    starts = torch.tensor([1024, 2048])
    caps = [15, 31]
    assert rule.rooms(starts, 0).caps.tolist() == caps
    assert resident_share(rule, starts, 1) == sum(caps) / (64 + 128 + 8)
    weighted = SelectionRule(budget=0.25, recency_tokens=32, layer_weights=(0.5, 100.0))
    assert weighted.rooms(starts, 0).caps.tolist() == [7 + 4, 7 + 12]
    assert weighted.rooms(starts, 1).caps.tolist() == [64 + 4, 128 + 4]
    with pytest.raises(LsaError, match="lookahead"):
        make_rules(["lookahead"], None, {})
    with pytest.raises(LsaError, match="not known"):
        make_rules(["best"], None, {})


def test_bootstrap() -> None:
    low, high = bootstrap([1.0, 2.0, 3.0, 4.0])
    assert 1 <= low < 2.5 < high <= 4
    assert bootstrap([2.0]) == (2.0, 2.0)


def make_indexer(**changes: Any) -> MemoryIndexer:
    torch.manual_seed(1)
    values: dict[str, Any] = {
        "kind": "per_layer", "backbone": "tiny", "layers": (0, 1), "hidden_size": 64, "heads": 4, "kv_heads": 2,
        "head_dim": 16, "rank": 8, "rope": RopeConfig(style="halves", dims=16), "input": "query", "chunk_tokens": 8,
        "usage": True,
    }  # fmt: skip
    config = IndexerConfig(**{**values, **changes})
    return MemoryIndexer(config, inverse_frequencies(16, 10000.0)).requires_grad_(False)


SHARED = {"kind": "shared", "usage": False, "ensemble": "mean"}


@pytest.mark.parametrize(
    "changes",
    [{}, {"usage": False}, {"input": "hidden", "hidden_size": 48}, {"layers": (1,)}, SHARED, SHARED | {"layers": (1,)}],
)
def test_trained_lookahead_and_recall(model: SparseModel, changes: dict[str, Any]) -> None:
    indexer, tokens = make_indexer(**changes), some_tokens(512)
    past = model.prefill(tokens, hidden=True)
    starts = torch.tensor([256, 384, 448])
    sets: Any = "shared" if "kind" in changes else "per_head"
    product = Product(product_tables(2, 2, 16, 4))
    base = {"chunk_tokens": 8, "recency_tokens": 16, "budget": 0.4, "sets": sets}
    for demand in (None, product):
        rule = SelectionRule(**base, lookahead=indexer, demand=demand)  # type: ignore[arg-type]
        assert rule.index_share(16) == (4 / 64 if demand else 1 / 16)
        logits = model.decode_blocks(past, blocks_of(tokens, starts), starts, rule)
        assert logits.isfinite().all()
    found = model.recall(past, starts, {"trained": rule, "newest": SelectionRule(**base)})  # type: ignore[arg-type]
    for name in ("trained", "newest"):
        for mass, best, chunks in zip(*(found[name][k] for k in ("mass", "oracle", "chunks")), strict=True):
            assert 0 <= mass <= best + 1e-6 <= 1 + 2e-6 and 0 <= chunks <= 1
    # Newest is known without a model: what the oracle catches is at least as much.
    assert found["trained"]["at_stake"] == pytest.approx(found["newest"]["at_stake"], rel=1e-4)


@pytest.mark.parametrize("mode", ["or", "mean"])
def test_shared_form_starts_from_the_scores_that_are_served(
    model: SparseModel, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexer, tokens = make_indexer(**{**SHARED, "ensemble": mode}), some_tokens(512)
    past, starts, seen = model.prefill(tokens), torch.tensor([256, 448]), []

    def noted(scores: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(scores)
        return start_set(scores, *rest)

    monkeypatch.setattr(offline, "start_set", noted)
    rule = SelectionRule(chunk_tokens=8, recency_tokens=16, budget=0.4, sets="shared", lookahead=indexer)
    model.decode_blocks(past, blocks_of(tokens, starts), starts, rule)
    assert len(seen) == 2 and all(torch.equal(scores, seen[0]) for scores in seen)
    for block, start in enumerate(starts.tolist()):
        last, each = torch.tensor([start - 1]), []
        for layer in (0, 1):
            query = past.queries[layer][0, :, start - 1 - past.queries_from]
            query = rotate(query[None], last, indexer.layer(layer).inv_freq, indexer.config.rope, inverse=True)
            keys = past.keys[layer][0, :, :start].unflatten(1, (-1, 8)).mean(2).transpose(0, 1)
            each.append(indexer.logits(layer, query.flatten(1), keys, last + 33)[0].sigmoid())
        want = torch.stack(each).amax(0) if mode == "or" else torch.stack(each).mean(0)
        torch.testing.assert_close(seen[0][0, 0, block, : start // 8], want, atol=1e-5, rtol=1e-4)


# -- the suite and the command ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a real tokenizer."""
    folder = write_model(tmp_path_factory.mktemp("spoken"), vocab_size=49152, hidden_size=16, num_hidden_layers=1)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


def test_suite_reads_the_models_predictions(spoken: Path) -> None:
    model = SparseModel(spoken)
    tokenizer = model.tokenizer()
    tasks = make_suite(0, tokenizer, 512, [DOCUMENT.read_text()], 1, ["single_needle", "multi_value"])
    pairs = pair_tasks(tasks)
    assert [len(pair) for pair in pairs] == [2, 2]
    quality = SuiteQuality(model, pairs, hidden=False)
    with torch.no_grad():
        predicted = model.decode_blocks(quality.past, quality.tokens.view(-1, 64), quality.starts, None).argmax(-1)
        tokens = torch.tensor([pair[0].tokens for pair in pairs])
        expected = AutoModelForCausalLM.from_pretrained(spoken, dtype=torch.float32)(tokens).logits.argmax(-1)
    for row, (pair, variant) in enumerate((p, v) for p in range(2) for v in range(2)):
        task = pairs[pair][variant]
        begin, end = task.answer_span
        at = slice(begin - 1 - task.window_start, end - 1 - task.window_start)
        assert predicted[row, at].tolist() == expected[pair, begin - 1 : end - 1].tolist()
    results = quality.measure(None)
    assert set(results[0]["right"]) == {"before", "inside"} and results[0]["resident"] == 1.0


def test_command(spoken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text", tmp_path / "out"
    text.mkdir()
    document = DOCUMENT.read_text()
    (text / "a.txt").write_text(document[:9000])
    (text / "b.txt").write_text(document[9000:20000])
    command = [
        "eval", "--model", str(spoken), "--text", str(text), "--out", str(out), "--contexts", "512", "--budgets",
        "0.6", "--methods", "dense,demand,recency", "--documents", "2", "--tasks", "1", "--recall", "1",
        "--device", "cpu",
    ]  # fmt: skip
    assert cli.main([*command, "--seconds", "0"]) == 0
    assert "nothing was measured" in capsys.readouterr().out
    assert cli.main(command) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["finished"] and results["versions"]["torch"] and results["date"] and "command" in results
    rows = {(row["method"], row["budget"]): row for row in results["quality"]}
    assert set(rows) == {("dense", 1.0), ("demand", 0.6), ("recency", 0.6)}
    assert rows["dense", 1.0]["dnll_percent"] == 0 and rows["recency", 0.6]["kl"] > 0
    assert rows["demand", 0.6]["documents"] == 2 and rows["demand", 0.6]["samples"] == 7
    assert rows["demand", 0.6]["demanded_bytes_per_step"] > 0
    with (out / "quality.csv").open() as file:
        assert file.readline().startswith("# 20")
        assert len(list(csv.DictReader(file))) == 3
    assert {row["lookahead"] for row in results["recall"]} == {"newest", "usage"}
    records = (out / "records.jsonl").read_text().splitlines()

    # The same again measures nothing; a torn line and what it held are done again.
    assert cli.main(command) == 0
    assert (out / "records.jsonl").read_text().splitlines() == records
    (out / "records.jsonl").write_text("\n".join(records[:-1]) + "\n" + records[-1][:50])
    assert cli.main(command) == 0
    again = json.loads((out / "results.json").read_text())
    for name in ("quality", "tasks", "recall"):
        assert again[name] == results[name]

    # A checkpoint: the rest is there, what it adds is measured.
    checkpoint = random_checkpoint.write(tmp_path / "checkpoint", 1, 4, 2, 16, 8, period=64)
    trained = ["--methods", "dense,lsa,lookahead", "--indexer", str(checkpoint), "--tasks", "0"]
    before = len((out / "records.jsonl").read_text().splitlines())
    assert cli.main([*command, *trained]) == 0
    added = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()[before:]]
    assert "dense" not in {record["method"] for record in added}
    results = json.loads((out / "results.json").read_text())
    index = {row["method"]: row["bytes_index"] for row in results["quality"]}
    assert index == {"dense": 0.0, "lsa": 4 / 64, "lookahead": 4 / 64}
    assert results["table_bytes"] > 0 and results["methods"]["lsa"]["demand"] == "product"
    assert {row["lookahead"] for row in results["recall"]} == {"newest", "usage", "trained"}
    capsys.readouterr()

    for bad, said in (
        (["--text", str(tmp_path / "none")], "not a folder"),
        (["--methods", "best"], "not known"),
        (["--contexts", "100"], "multiple of 64"),
        (["--contexts", "64000"], "at most"),
        (["--model", str(text)], "config.json"),
        (["--device", "tpu9"], "cannot be used"),
    ):
        assert cli.main([*command, *bad]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("vllm-lsa: ") and said in error


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    quality = [
        {
            "context": c,
            "budget": b,
            "method": m,
            "bytes_total": b,
            "dnll_percent": x,
            "dnll_low": x - 1,
            "dnll_high": x + 2,
        }
        for c in (512, 1024)
        for m, b, x in (("dense", 1.0, 0.0), ("lsa", 0.1, 3.0), ("lsa", 0.2, 3.0), ("quest", 0.1, 40.0))
    ]
    recall = [
        {"context": 512, "budget": b, "lookahead": "usage", "layer": i, "mass": 0.5, "oracle": 0.6}
        for b in (0.1, 0.2)
        for i in range(3)
    ]
    about = {"model": {"path": "m"}, "machine": {"device": "cpu"}, "date": "today"}
    assert report.draw(tmp_path, {"quality": quality, "recall": recall}, about) == ", quality.png, recall.png"
    assert (tmp_path / "quality.png").stat().st_size and (tmp_path / "recall.png").stat().st_size


def test_help_imports_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, argparse; from vllm_lsa.evaluation import command; p = argparse.ArgumentParser();"
        "command.add_command(p.add_subparsers()); assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
