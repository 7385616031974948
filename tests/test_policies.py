"""Lookahead policies and demand."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from vllm_lsa.errors import LsaError
from vllm_lsa.indexer.base import ChunkIndex
from vllm_lsa.residency.demand import make_demand
from vllm_lsa.residency.policies import make_policy
from vllm_lsa.residency.policies.base import ScoreInput

NAMES = ["mean_key", "quest", "usage", "recency", "random", "keep_all"]
QUERY_NAMES = NAMES[:2]
DIM, CHUNK, KV_HEADS, Q_HEADS = 24, 8, 3, 6
SCALE = DIM**-0.5


def make_input(index: ChunkIndex | None, layers: int, chunks: int, spare: int = 0) -> ScoreInput:
    """Random input; `spare` more chunks whose cells are NaN."""
    query = cells = None
    if index is not None:
        query = torch.randn(layers, Q_HEADS, DIM).to(index.dtype)
        keys = torch.randn(layers, chunks + spare, KV_HEADS, CHUNK, DIM).to(index.dtype)
        cells = torch.stack([index.encode(layer) for layer in keys])
        cells[:, chunks:] = 0xFF
    return ScoreInput(
        query=query, cells=cells, usage=None, num_chunks=chunks, num_layers=layers, layer_lanes=1, position=99,
        scale=SCALE, mode="or", request_seed=11, cycle=3, device=torch.device("cpu"),
    )  # fmt: skip


def head_shares(index: ChunkIndex, query: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Softmax over chunks per head [Hq, N], in float64."""
    return index.chunk_logits(query, cells, SCALE).double().softmax(-1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("layers", "chunks"), [(1, 1), (3, 63), (2, 111), (2, 0)])
def test_scores_are_shares(name: str, layers: int, chunks: int) -> None:
    torch.manual_seed(0)
    policy = make_policy(name, CHUNK, DIM, torch.bfloat16)
    assert policy.name == name and policy.needs_query == (policy.index is not None)
    scores = policy.score(make_input(policy.index, layers, chunks))
    assert scores.shape == (layers, chunks) and scores.dtype == torch.float32
    assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.parametrize("name", QUERY_NAMES)
@pytest.mark.parametrize("mode", ["or", "mean"])
@pytest.mark.parametrize("spare", [0, 5])
def test_query_policies_combine_heads(name: str, mode: Literal["or", "mean"], spare: int) -> None:
    torch.manual_seed(1)
    policy = make_policy(name, CHUNK, DIM, torch.float32)
    assert policy.index is not None
    x = replace(make_input(policy.index, 3, 37, spare), mode=mode)
    scores = policy.score(x)
    assert x.query is not None and x.cells is not None
    by_head = policy.score(replace(x, layer_lanes=KV_HEADS))
    assert by_head.shape == (3 * KV_HEADS, 37)
    for layer in range(3):
        shares = head_shares(policy.index, x.query[layer], x.cells[layer, :37])
        for chunk in range(37):
            heads = [float(share) for share in shares[:, chunk]]
            want = max(heads) if mode == "or" else sum(heads) / len(heads)
            assert float(scores[layer, chunk]) == pytest.approx(want, rel=1e-5)
            for lane in range(KV_HEADS):
                own = heads[2 * lane : 2 * lane + 2]
                want = max(own) if mode == "or" else sum(own) / 2
                assert float(by_head[layer * KV_HEADS + lane, chunk]) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", QUERY_NAMES)
def test_no_share_underflows_to_zero(name: str) -> None:
    torch.manual_seed(2)
    policy = make_policy(name, CHUNK, DIM, torch.float32)
    x = make_input(policy.index, 2, 50)
    assert x.query is not None
    assert (policy.score(replace(x, query=1000 * x.query)) > 0).all()


def test_mean_key_finds_the_chunk_that_looks_like_the_query() -> None:
    policy = make_policy("mean_key", CHUNK, DIM, torch.float32)
    assert policy.index is not None
    x = make_input(policy.index, 1, 20)
    keys = torch.zeros(20, KV_HEADS, CHUNK, DIM)
    keys[13] = 5.0
    x = replace(x, query=torch.ones(1, Q_HEADS, DIM), cells=policy.index.encode(keys)[None])
    assert policy.score(x).argmax() == 13


def test_recency_prefers_newer() -> None:
    scores = make_policy("recency", CHUNK, DIM, torch.float32).score(make_input(None, 2, 9))
    assert (scores.diff(dim=1) > 0).all() and scores.min() > 0 and torch.equal(scores[0], scores[1])


def test_usage_goes_by_what_was_used_then_by_age() -> None:
    policy, x = make_policy("usage", CHUNK, DIM, torch.float32), make_input(None, 1, 5)
    used = torch.tensor([[0.0, 0.4, 0.0, 0.2, 0.0]])
    assert policy.score(replace(x, usage=used))[0].argsort(descending=True).tolist() == [1, 3, 4, 2, 0]
    assert policy.score(x)[0].argsort(descending=True).tolist() == [4, 3, 2, 1, 0]


def test_random_is_a_function_of_seed_and_cycle() -> None:
    policy, x = make_policy("random", CHUNK, DIM, torch.float32), make_input(None, 2, 40)
    scores = policy.score(x)
    torch.rand(3)
    assert torch.equal(scores, policy.score(x))
    assert not torch.equal(scores, policy.score(replace(x, cycle=4)))
    assert not torch.equal(scores, policy.score(replace(x, request_seed=12)))
    assert not torch.equal(scores[0], scores[1])
    policy.score(replace(x, request_seed=-(2**63)))
    code = (
        "import torch; from vllm_lsa.residency.policies import make_policy;"
        "from vllm_lsa.residency.policies.base import ScoreInput;"
        "x = ScoreInput(None, None, None, 40, 2, 1, 99, 1.0, 'or', 11, 3, torch.device('cpu'));"
        "print(make_policy('random', 8, 24, torch.float32).score(x).double().sum().item())"
    )
    root = Path(__file__).parent.parent
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    assert float(other) == scores.double().sum().item()


def test_unknown_indexers(tmp_path: Path) -> None:
    for name in ("best", str(tmp_path)):
        with pytest.raises(LsaError) as caught:
            make_policy(name, CHUNK, DIM, torch.float32)
        message = str(caught.value)
        assert f"lsa.indexer={name!r} is no policy" in message and ", ".join(NAMES) in message
        assert "\n" not in message


# -- demand ---------------------------------------------------------------------------------------------------------


def paged(cells: torch.Tensor, blocks: torch.Tensor, per_block: int, num_blocks: int) -> torch.Tensor:
    """Cells [n, Hkv, b] of a request at the places that its blocks say; 0xFF elsewhere."""
    memory = torch.full((num_blocks, cells.shape[1], per_block, cells.shape[2]), 0xFF, dtype=torch.uint8)
    for i, cell in enumerate(cells):
        memory[blocks[i // per_block], :, i % per_block] = cell
    return memory


@pytest.mark.parametrize("name", ["mean_key", "four_bit"])
@pytest.mark.parametrize("chunks", [1, 5, 63, 111])
@pytest.mark.parametrize("lanes", [1, KV_HEADS])
def test_demand_is_the_mean_share_of_the_heads_of_a_lane(name: str, chunks: int, lanes: int) -> None:
    torch.manual_seed(chunks)
    demand = make_demand(name, CHUNK, DIM, torch.float32)
    assert demand.name == name and demand.index is not None
    x = make_input(demand.index, 1, chunks)
    assert x.query is not None and x.cells is not None
    blocks = torch.randperm(40)[: -(-chunks // 4)]
    mass = demand.mass(x.query[0], paged(x.cells[0], blocks, 4, 40), blocks, chunks, SCALE, 0, lanes)
    want = head_shares(demand.index, x.query[0], x.cells[0]).view(lanes, -1, chunks).mean(1)
    torch.testing.assert_close(mass.double(), want, atol=1e-6, rtol=1e-4)


def test_no_demand() -> None:
    assert make_demand("off", CHUNK, DIM, torch.float32).index is None


def test_unknown_demand() -> None:
    with pytest.raises(LsaError, match="lsa.demand='best' is not known: use one of off, mean_key, four_bit, product"):
        make_demand("best", CHUNK, DIM, torch.float32)
    with pytest.raises(LsaError, match="lsa.demand='product' needs a trained index: set lsa.indexer"):
        make_demand("product", CHUNK, DIM, torch.float32)
