"""One line for every setting that cannot work."""

import pytest
import torch

from vllm_lsa.config import LsaConfig
from vllm_lsa.errors import LsaError
from vllm_lsa.memory.geometry import KVGeometry

GEOMETRY = KVGeometry(30, 9, 3, 64, torch.bfloat16, 128, 16)


@pytest.mark.parametrize(
    "setting, words",
    [
        ({"buget": 0.1}, ["lsa.buget=0.1", "is not a setting", "budget"]),
        ({"budget": 0}, ["lsa.budget=0", "greater than 0"]),
        ({"budget": 1.5}, ["lsa.budget=1.5", "less than or equal to 1"]),
        ({"period": 0}, ["lsa.period=0"]),
        ({"mode": "max"}, ["lsa.mode='max'", "'or' or 'mean'"]),
        ({"lead": 64}, ["lsa.lead=64", "lsa.period=64", "lower lead"]),
        ({"lookahead": "usage"}, ["lsa.lookahead='usage'", "lsa.indexer, which is 'mean_key'", "to 'usage' instead"]),
        ({"recency_tokens": 100}, ["lsa.recency_tokens=100", "lsa.chunk_tokens=16"]),
        ({"device_pool_gib": 1, "device_pool_fraction": 0.5}, ["lsa.device_pool_gib=1", "set one of them"]),
    ],
)
def test_bad_settings_are_named_with_value_and_remedy(setting, words):
    with pytest.raises(LsaError) as error:
        LsaConfig.parse({"lsa": setting})
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_lsa_must_be_an_object():
    with pytest.raises(LsaError, match="not an object"):
        LsaConfig.parse({"lsa": 3})


def test_other_additional_configuration_is_left_alone():
    assert LsaConfig.parse({"other": 1}) == LsaConfig()


def test_every_field_is_documented():
    assert all(field.description for field in LsaConfig.model_fields.values())


def test_host_store_must_hold_one_request():
    with pytest.raises(
        LsaError, match=r"lsa.host_memory_gib=0.1 .* max_model_len=8192 .* raise host_memory_gib to at least 0.17"
    ):
        LsaConfig(host_memory_gib=0.1).host_blocks(GEOMETRY, 8192, 1)
    assert LsaConfig(host_memory_gib=0.2).host_blocks(GEOMETRY, 8192, 1) > 64
    assert LsaConfig().host_blocks(GEOMETRY, 8192, 1) == 4 * 64 + 1


def test_host_memory_is_divided_over_the_ranks():
    half = KVGeometry(30, 6, 2, 64, torch.bfloat16, 128, 16)
    assert LsaConfig(host_memory_gib=1).host_blocks(half, 8192, 2) == int(2**29) // half.block_bytes


def test_pool_must_hold_the_forced_chunks():
    with pytest.raises(LsaError, match=r"lsa.device_pool_gib=0.001 .* raise the pool"):
        LsaConfig(device_pool_gib=0.001).pool_slots(GEOMETRY, 257)
    with pytest.raises(LsaError, match=r"lsa.device_pool_fraction=0.001 .* raise the pool"):
        LsaConfig(device_pool_fraction=0.001).pool_slots(GEOMETRY, 257)
    assert LsaConfig().pool_slots(GEOMETRY, 257) == int(257 * 8 * 30 * 0.16)
