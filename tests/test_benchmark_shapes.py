"""Dummy models of the benchmarks: what vLLM, transformers and LSA read of them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.shapes import SHAPES
from vllm_lsa.config import LsaConfig
from vllm_lsa.engine import index_layout, load_trained

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=SHAPES)
def made(request, tmp_path_factory):
    shape = SHAPES[request.param]
    model = shape.write(tmp_path_factory.mktemp("shapes") / shape.name, tokenizer=True)
    return shape, model, shape.checkpoint(model)


def quality(shape, folder):
    return LsaConfig.parse(
        {"lsa": {"indexer": str(folder), "lookahead": "usage", "demand": "product", "budget": shape.budgets[1]}}
    )


def test_transformers_reads_the_folder(made):
    from transformers import AutoConfig, AutoTokenizer

    shape, model, _ = made
    config = AutoConfig.from_pretrained(model)
    assert config.model_type == "llama" and config.num_hidden_layers == shape.layers
    assert config.head_dim == shape.head_dim and config.num_key_value_heads == shape.kv_heads
    tokens = shape.prompts(1, 100)[0]
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer(tokenizer.decode(tokens), add_special_tokens=False)["input_ids"] == tokens
    assert len(tokenizer) == shape.vocab


def test_checkpoint_is_of_this_model(made):
    shape, model, folder = made
    config = quality(shape, folder)
    trained = load_trained(config, CPU)
    assert trained.tables.layers == shape.layers and trained.tables.kv_heads == shape.kv_heads
    assert trained.tables.subspaces == shape.head_dim // 8
    assert (config.period, config.chunk_tokens, config.demand) == (64, 16, "product")
    validate = pytest.importorskip("vllm_lsa.plugin.validate")
    model_config = SimpleNamespace(model=str(model), hf_config=None, get_total_num_kv_heads=lambda: shape.kv_heads)
    vllm_config = SimpleNamespace(model_config=model_config, parallel_config=SimpleNamespace(world_size=1))
    validate._check_backbone(vllm_config, config, shape.geometry())


def test_bytes(made):
    shape, _, folder = made
    geometry = shape.geometry()
    token = 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim
    assert geometry.token_bytes == token == {"llama-8b": 131072, "llama-135m-1m": 23040}[shape.name]
    layout = index_layout(quality(shape, folder), 16, shape.head_dim, torch.bfloat16, CPU)
    index = layout.cell_bytes / geometry.page_bytes
    assert shape.budgets[1] + index <= 0.16
    assert {"llama-8b": 15.0e9, "llama-135m-1m": 0.269e9}[shape.name] == pytest.approx(shape.weight_bytes, rel=0.01)


def test_prompts_differ():
    shape = SHAPES["llama-8b"]
    one, other = shape.prompts(2, 50)
    assert one != other and shape.prompts(2, 50) == [one, other] and max(one) < shape.vocab


def test_memory_is_enough_for_the_sets(made):
    from benchmarks import engines

    shape, model, _ = made
    tokens = shape.max_positions
    loads = [engines.Load(2, tokens), engines.Load(16, 2048)]
    for name, base in engines.CONFIGURATIONS.items():
        if base is None:
            assert engines.stock_kv_bytes(shape, loads, tokens) >= 2 * tokens * shape.geometry().token_bytes
            continue
        settings = engines.lsa_settings(shape, name, loads, model, {}, tokens)
        config = LsaConfig.parse({"lsa": settings})
        geometry = shape.geometry()
        blocks = config.host_blocks(geometry, tokens, 1)
        assert blocks >= 2 * geometry.blocks(tokens) + 1
        share = config.pool_slots(geometry, blocks) / (2 * geometry.chunks(tokens) * geometry.num_lanes)
        whole = 16 * geometry.chunks(2048) / (2 * geometry.chunks(tokens))
        # As many blocks and slots of half the bytes.
        half = engines.lsa_settings(replace(shape, fp8=True), name, loads, model, {}, tokens)
        for key in {"host_memory_gib", "device_pool_gib"} & set(settings):
            assert half[key] == pytest.approx(settings[key] / 2)
        budget = max(shape.budgets[config.demand == "product"], whole)
        assert share >= 1 if name == "resident" else budget < share < 1.1 * budget


def test_cases_of_one_context_follow_each_other():
    from argparse import Namespace

    from benchmarks.gpu_decode import groups

    args = Namespace(cases=[(4, 131072), (1, 2048), (1, 131072)], skip=8, steps=100, profile=None)
    planned = groups(args)
    assert [(context, batches) for context, batches, _ in planned] == [(131072, [1, 4]), (2048, [1])]
    assert planned[0][2] >= 2 * 108 + 3 * 131072 // 8192


def test_most_together():
    from benchmarks.serve import most_together

    result = {"start_times": [0, 0, 5], "ttfts": [1, 2, 1], "itls": [[1, 1], [0.5, 3], []]}
    assert most_together(result) == 2
