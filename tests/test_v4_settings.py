"""What DeepSeek-V4 takes and refuses, and what is kept of last tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.paths import ROOT
from tests.v4 import install
from tests.v4_runs import scorers
from vllm_lsa.config import LsaConfig
from vllm_lsa.errors import LsaError
from vllm_lsa.indexer import IndexerConfig, MemoryIndexer
from vllm_lsa.indexer.checkpoint import fingerprint_of
from vllm_lsa.indexer.rotary import RopeConfig
from vllm_lsa.models.deepseek_v4.memory_indexer import threshold_of
from vllm_lsa.models.deepseek_v4.native import LastHidden, LastQueries
from vllm_lsa.models.deepseek_v4.scorer import PagedScorer
from vllm_lsa.models.deepseek_v4.settings import for_deepseek_v4


def folder_of(folder: Path, **fields: Any) -> Path:
    """A checkpoint folder as training writes it."""
    config = IndexerConfig(
        kind="shared", backbone="small", layers=(0, 2), hidden_size=256, heads=16, head_dim=128, rank=32, period=32,
        rope=RopeConfig(style="interleaved", first_dim=64, dims=64), keys="packed_e4m3", chunk_tokens=4,
        thresholds={"default": (0.25,), "0.5": (0.125,)}, **fields,
    )  # fmt: skip
    MemoryIndexer(config, torch.ones(32)).save(folder)
    return folder


_REFUSALS = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
from vllm_lsa.errors import LsaError
said = []
for arguments in json.load(open(sys.argv[1])):
    try:
        EngineArgs(skip_tokenizer_init=True, attention_backend="LSA", **arguments).create_engine_config()
        said.append(None)
    except LsaError as error:
        said.append(str(error))
json.dump(said, open(sys.argv[2], "w"))
"""


@pytest.mark.vllm
def test_what_cannot_work_is_refused_in_one_line(v4_path, v4_checkpoint, tmp_path):
    env = {**install.environment(tmp_path / "plugin", plugins=("lsa",)), "OMP_NUM_THREADS": "1"}
    weights = load_file(v4_checkpoint)
    torch.save({"model_state": weights, "epoch": 1}, tmp_path / "wrapped.pt")
    (tmp_path / "damaged.safetensors").write_bytes(b"no tensors")
    save_file({name: x for name, x in weights.items() if "l1.wq_b" not in name}, tmp_path / "incomplete.safetensors")
    flash = scorers(tmp_path / "flash.safetensors", (10, 12, 20))
    wide = scorers(tmp_path / "wide.safetensors", hidden=128)
    ours, others = folder_of(tmp_path / "ours", backbone_fingerprint=fingerprint_of(v4_path)), tmp_path / "others"
    folder_of(others, backbone_fingerprint="0123456789ab-0123456789ab")
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"tensor_parallel_size": 2}, None),
        ({"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}, "--speculative-config"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "--kv-transfer-config"),
    ]
    for lsa, named in [
        ({"demand": "mean_key"}, "lsa.demand='mean_key' does not work with DeepSeek-V4: use 'off'"),
        ({"indexer": "quest"}, "or a memory indexer's .pt, .safetensors or folder"),
        ({"indexer": str(flash)}, "scores c4 layer 20, and this model has 3: give a checkpoint that was trained for"),
        ({"indexer": str(wide)}, "reads hidden states of 128, this model's have 256: give a checkpoint that was"),
        ({"indexer": "/nowhere/joint.pt"}, "/nowhere/joint.pt does not exist: give"),
        ({"indexer": str(tmp_path / "damaged.safetensors")}, "damaged.safetensors is not a readable safetensors file"),
        ({"indexer": str(tmp_path / "incomplete.safetensors")}, "lacks retrievers.l1.wq_b.weight"),
        ({"indexer": str(others)}, "others was trained for small"),
        ({"indexer": "exact", "lookahead": "usage"}, "lsa.lookahead='usage' needs a checkpoint"),
        ({"indexer": str(ours), "lookahead": "usage"}, "lsa.lookahead='usage' does not work with DeepSeek-V4"),
        ({"indexer": str(tmp_path / "wrapped.pt")}, None),
        ({"indexer": str(ours)}, None),
    ]:
        cases.append(({"additional_config": {"lsa": lsa}}, named))
    given = [{"model": str(v4_path), "max_model_len": 4096, **arguments} for arguments, _ in cases]
    (tmp_path / "in.json").write_text(json.dumps(given))
    subprocess.run(
        [sys.executable, "-c", _REFUSALS, str(tmp_path / "in.json"), str(tmp_path / "out.json")], cwd=ROOT,
        env={**os.environ, **env}, check=True, timeout=200,
    )  # fmt: skip
    for said, (arguments, named) in zip(json.loads((tmp_path / "out.json").read_text()), cases, strict=True):
        assert (said is None) == (named is None), (said, arguments)
        assert named is None or (named in said and "\n" not in said), (said, arguments)


def test_settings_take_defaults_of_v4_and_refuse_what_has_no_meaning():
    config = for_deepseek_v4(LsaConfig())
    assert (config.indexer, config.sets, config.demand, config.chunk_tokens) == ("native", "shared", "off", 256)
    assert config.sink_chunks + config.recency_chunks == 9
    for_deepseek_v4(LsaConfig(indexer="exact", recency_tokens=256, sink_tokens=0))
    for wrong, named in [
        ({"indexer": "quest"}, "lsa.indexer='quest'"),
        ({"sets": "per_head"}, "lsa.sets='per_head'"),
        ({"chunk_tokens": 16}, "lsa.chunk_tokens=16"),
        ({"chunk_tokens": 4}, "lsa.chunk_tokens=4"),
        ({"demand_chunks": 4}, "lsa.demand_chunks=4"),
        ({"recency_tokens": 1024}, "lsa.recency_tokens=1024"),
        ({"recency_tokens": 2064}, "lsa.recency_tokens=2064"),
    ]:
        with pytest.raises(LsaError, match=named) as raised:
            for_deepseek_v4(LsaConfig(**wrong))
        assert "\n" not in str(raised.value)


def test_a_memory_indexer_brings_its_defaults(v4_checkpoint, tmp_path):
    """Its period and threshold, from a folder; pages move all the same, and what was set counts."""

    def parsed(**lsa: Any) -> LsaConfig:
        return for_deepseek_v4(LsaConfig.parse({"lsa": lsa}))

    folder = str(folder_of(tmp_path / "folder"))
    config, scorer = parsed(indexer=folder), PagedScorer.load(folder, "fp32")
    assert (config.period, config.chunk_tokens, config.sets, config.mode) == (32, 256, "shared", "or")
    assert threshold_of(config, scorer) == 0.25
    assert threshold_of(parsed(indexer=folder, budget=0.5), scorer) == 0.125
    assert threshold_of(parsed(indexer=folder, threshold=0.0), scorer) == 0.0
    published = parsed(indexer=str(v4_checkpoint), mode="mean")
    assert (published.period, published.mode) == (64, "mean")
    assert threshold_of(published, PagedScorer.load(v4_checkpoint, "fp32")) == 0.5
    assert threshold_of(parsed(), None) == 0.0


def test_what_is_kept_of_last_tokens_is_forgotten_with_the_request():
    """In and outside of inference mode, as vLLM's forward pass and scheduler are."""
    queries, hidden = LastQueries(3, 2), LastHidden(3, (1, 4), 8)
    with torch.inference_mode():
        for layer in (0, 1):
            queries.note(torch.tensor([2, 0]), layer, torch.ones(2, 4, 128).to(torch.float8_e4m3fn), torch.ones(2, 4))
        for layer in (0, 1, 4):
            hidden.note(torch.tensor([2, 0]), layer, torch.full((2, 8), layer).bfloat16())
    assert {layer: x.unique().tolist() for layer, x in hidden.of(2).items()} == {1: [1.0], 4: [4.0]}
    queries.forget(2)
    hidden.forget(2)
    assert queries.queries is not None and queries.weights is not None
    assert queries.weights[2].eq(0).all() and queries.queries.float()[2].eq(0).all()
    assert queries.weights[0].eq(1).all() and hidden.states[0].ne(0).all() and hidden.states[2].eq(0).all()


def test_native_shares_follow_their_formula():
    generator = torch.Generator().manual_seed(0)
    pages, entries, heads, count = 5, 64, 4, 150
    keys = torch.randn(pages, entries, 128, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(pages, entries, generator=generator)
    flat = torch.full((pages, entries * 140), 0xFF, dtype=torch.uint8)
    flat[:, : entries * 128] = keys.view(torch.uint8).flatten(1)
    flat[:, entries * 128 : entries * 132] = scales.view(torch.uint8)
    q = torch.randn(heads, 128, generator=generator).to(torch.float8_e4m3fn)
    w = torch.rand(heads, generator=generator)
    blocks = torch.tensor([3, 0, 4])
    logits = torch.einsum("h,bnh->bn", w, torch.einsum("bnd,hd->bnh", keys.float(), q.float()).relu()) * scales
    last = LastQueries(2, 1)
    assert last.shares(0, [flat], blocks, count).tolist() == [[0.0] * count]
    last.note(torch.tensor([1]), 0, q[None], w[None])
    expected = logits[blocks].flatten()[:count].softmax(0)
    assert torch.allclose(last.shares(1, [flat], blocks, count)[0], expected, rtol=1e-4, atol=1e-6)
