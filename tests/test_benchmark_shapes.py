"""Dummy models of the benchmarks: what vLLM, transformers and LSA read of them."""

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
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(model=str(model), hf_config=None))
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
