"""The fallbacks of tests/v4 against loops over single rows, states and bytes."""

import math
from typing import Any

import pytest
import torch

from tests.v4 import attention, caches, metadata, pages

POISON = 0x7F  # NaN in e4m3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def paged(blocks: int, states: int, width: int) -> torch.Tensor:
    """uint8 pages, each a part of a longer row, as vLLM packs layers."""
    return torch.full((blocks, states * width + 100), POISON, dtype=torch.uint8)[:, : states * width]


def filled(blocks: int, states: int) -> torch.Tensor:
    """Pages of states that all were written."""
    cache = paged(blocks, states, 584)
    rows = torch.randn(blocks * states, pages.HEAD).bfloat16()
    pages.write_mla(cache, states, torch.arange(len(rows)), rows[:, : pages.NOPE], rows[:, pages.NOPE :], flush=False)
    return cache


def test_a_state_is_where_the_format_says():
    states, slot = 4, 6
    cache = paged(3, states, 584)
    row = 3 * torch.randn(1, pages.HEAD).bfloat16()
    row[0, :64] *= 100  # a block with a scale of its own
    pages.write_mla(cache, states, torch.tensor([slot]), row[:, : pages.NOPE], row[:, pages.NOPE :], flush=False)
    page, at = cache[slot // states], slot % states
    for block in range(7):
        exponent = int(page[states * 576 + at * 8 + block]) - 127
        amax = row[0, block * 64 : block * 64 + 64].float().abs().max().item()
        assert 224 * 2.0**exponent < amax <= 448 * 2.0**exponent
        stored = page[at * 576 + block * 64 : at * 576 + block * 64 + 64].view(torch.float8_e4m3fn).float()
        torch.testing.assert_close(
            stored * 2.0**exponent,
            row[0, block * 64 : block * 64 + 64].float(),
            rtol=1 / 16,
            atol=2.0 ** (exponent - 10),
        )
    assert torch.equal(page[at * 576 + 448 : at * 576 + 576].view(torch.bfloat16), row[0, pages.NOPE :])
    assert page[states * 576 + at * 8 + 7] == 0
    others = torch.ones_like(cache, dtype=torch.bool)
    others[slot // states, at * 576 : at * 576 + 576] = False
    others[slot // states, states * 576 + at * 8 : states * 576 + at * 8 + 8] = False
    assert (cache[others] == POISON).all()
    read = pages.read_mla(cache, states, torch.tensor([slot]))
    torch.testing.assert_close(read, row.float(), rtol=1 / 16, atol=0.02)
    assert torch.equal(read, read.bfloat16().float())


def test_attention_is_softmax_over_what_the_slots_name_and_the_sink():
    heads, window, compressed = 3, filled(3, 8), filled(5, 4)
    q = torch.randn(4, heads, pages.HEAD).bfloat16()
    sink = torch.tensor([0.5, -torch.inf, 3.0])
    # Two tokens of one request, one of another, and one with nothing to read.
    near = torch.tensor([[3, 4, -1, -1], [3, 4, 5, -1], [23, 0, 9, -1], [-1] * 4])
    far = torch.tensor([[19, -1], [19, 2], [-1, -1], [-1, -1]])
    out = torch.full_like(q, torch.nan)
    attention.flash_mla_with_kvcache_cpu(out, q, window, near, 8, compressed, far, 4, sink, 0.05)
    for row in range(3):
        states = torch.cat([
            pages.read_mla(window, 8, near[row][near[row] >= 0]), pages.read_mla(compressed, 4, far[row][far[row] >= 0])
        ]).double()  # fmt: skip
        for head in range(heads):
            weights = (states @ q[row, head].double() * 0.05).exp()
            expected = weights @ states / (weights.sum() + sink[head].double().exp())
            torch.testing.assert_close(out[row, head], expected.bfloat16(), rtol=0.01, atol=1e-3)
    assert (out[3] == 0).all()


def test_attention_of_a_token_does_not_depend_on_its_neighbours():
    states, tokens = 64, 300
    window, compressed = filled(8, states), filled(4, states)
    q = torch.randn(tokens, 2, pages.HEAD).bfloat16()
    near = torch.arange(tokens).unsqueeze(1) + torch.arange(128) - 127
    near = torch.stack([torch.cat([row[row >= 0], row[row < 0]]) for row in near]).clamp(min=-1)
    far = torch.stack([torch.randperm(4 * states)[:100] for _ in range(tokens)])
    sink, out = torch.zeros(2), torch.empty_like(q)
    attention.flash_mla_with_kvcache_cpu(out, q, window, near, states, compressed, far, states, sink, 0.04)
    for rows in (slice(0, 1), slice(41, 42), slice(37, 250), slice(200, 300)):
        some = torch.empty_like(q[rows])
        attention.flash_mla_with_kvcache_cpu(
            some, q[rows], window, near[rows], states, compressed, far[rows], states, sink, 0.04
        )
        assert torch.equal(some, out[rows])


def test_logits_are_weighted_relus_of_the_keys_in_the_page_table():
    states, heads = 4, 3
    cache = paged(6, states, 132)
    keys = torch.randn(6 * states, pages.INDEX_HEAD).bfloat16()
    pages.write_index_keys(cache, states, torch.arange(len(keys)), keys)
    q, weight = torch.randn(4, heads, pages.INDEX_HEAD).to(torch.float8_e4m3fn), torch.randn(4, heads)
    lengths, tables = torch.tensor([5, 6, 0, 9]), torch.tensor([[5, 1, 0], [5, 1, 0], [0, 0, 0], [2, 4, 3]])
    logits = attention.fp8_paged_mqa_logits_cpu(q, cache, weight, lengths, tables, states, 11)
    for row in range(4):
        for token in range(11):
            if token >= lengths[row]:
                assert logits[row, token] == -math.inf
                continue
            slot = int(tables[row, token // states]) * states + token % states
            unscaled, scale = pages.read_index_keys(cache, states, torch.tensor([slot]))
            torch.testing.assert_close(unscaled[0] * scale, keys[slot].float(), rtol=1 / 16, atol=0.01)
            expected = (
                sum(weight[row, h] * torch.relu(q[row, h].float() @ unscaled[0]) for h in range(heads)) * scale[0]
            )
            torch.testing.assert_close(logits[row, token], expected, rtol=1e-4, atol=1e-4)


def test_top_k_takes_the_highest_and_of_equal_ones_the_first():
    scores = torch.randint(0, 40, (3, 900)).float()
    lengths, tables = torch.tensor([900, 700, 30], dtype=torch.int32), torch.randperm(3 * 15).view(3, 15).int()
    physical, raw = torch.zeros(3, 512, dtype=torch.int32), torch.zeros(3, 512, dtype=torch.int32)
    attention.topk_transform_512_cpu(scores, lengths, tables, physical, 64, raw)
    for row, length in enumerate(lengths.tolist()):
        best = sorted(range(length), key=lambda i, row=row: (-scores[row, i].item(), i))[:512]
        assert raw[row].tolist() == sorted(best) + [-1] * (512 - len(best))
        assert physical[row].tolist() == [int(tables[row, i // 64]) * 64 + i % 64 for i in sorted(best)] + [-1] * (
            512 - len(best)
        )


@pytest.mark.parametrize("ratio", [4, 128])
def test_a_group_is_pooled_channel_by_channel_over_its_window(ratio):
    overlap = 2 if ratio == 4 else 1
    width, tokens, size = 128 * overlap, 2 * ratio, 8
    state = torch.full((tokens // size + 1, size, 2 * width), torch.nan)
    kv, score, ape = torch.randn(tokens, width), torch.randn(tokens, width), torch.randn(ratio, width)
    positions = torch.arange(tokens)
    slots = positions + size
    caches.save_partial_states_cpu(kv, score, ape, positions, state, slots)
    window = positions.unsqueeze(1) + torch.arange(overlap * ratio) - overlap * ratio + 1
    gather = (window + size).masked_fill(window < 0, -1)
    written = torch.full((tokens,), -1)
    written[ratio - 1 :: ratio] = torch.tensor([1, 2])
    weight = torch.rand(128) + 0.5
    rows, normed = caches._compress(state, gather, positions, written, weight, 1e-6, ratio)
    assert rows.tolist() == [ratio - 1, 2 * ratio - 1]
    for row, got in zip(rows.tolist(), normed, strict=True):
        pooled = torch.zeros(128)
        for channel in range(128):
            values, logits = [], []
            for back in range(overlap * ratio):
                position = row - back
                if position < 0:
                    continue
                # The newer half of an overlapping window reads the second half of the channels.
                at = channel + (128 if overlap == 2 and back < ratio else 0)
                values.append(kv[position, at].item())
                logits.append((score[position, at] + ape[position % ratio, at]).item())
            shares = torch.tensor(logits, dtype=torch.float64).softmax(0)
            pooled[channel] = float((shares * torch.tensor(values, dtype=torch.float64)).sum())
        torch.testing.assert_close(
            got, pooled * torch.rsqrt(pooled.square().mean() + 1e-6) * weight, rtol=1e-4, atol=1e-5
        )


def test_metadata_of_a_batch_with_a_decode_row_and_two_prompts():
    starts, lengths = torch.tensor([0, 1, 6, 9], dtype=torch.int32), torch.tensor([12, 5, 8], dtype=torch.int32)
    requests = torch.full((12,), 9, dtype=torch.int32)
    metadata.token_request_mapping(starts, requests, 3, 9, 11)
    assert requests.tolist() == [0, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0, 9]

    # Pages of two states: positions 11 | 0 to 4 | 5 to 7; the last token's own slot is padding.
    tables = torch.tensor([[7, 3], [5, 0], [4, 6]], dtype=torch.int32)
    own, slots = torch.tensor([0] * 8 + [-1]), torch.zeros(9, dtype=torch.int64)
    metadata.compressed_slot_mapping(slots, own, starts, lengths, tables, 2, 2, 1, 1, 4, -1, 1024)
    assert slots.tolist() == [3 * 2, -1, -1, -1, 5 * 2, -1, -1, -1, -1]

    # The prompts alone: 1 and 2 compressed states.
    first, last, owner = (torch.zeros(n, dtype=torch.int32) for n in (8, 8, 3))
    bounds = torch.tensor([0, 1, 3], dtype=torch.int32)
    metadata.prefill_chunk(starts[1:] - 1, lengths[1:], bounds, bounds, owner, first, last, 0, 8, 0, 1, 1, 1024, 4)
    assert first.tolist() == [0] * 5 + [1] * 3
    assert last.tolist() == [0, 0, 0, 1, 1, 2, 2, 3]
    assert owner.tolist() == [0, 1, 1]

    reach = torch.zeros(2, dtype=torch.int32)
    metadata.prefill_gather_lens(reach, lengths, starts, torch.zeros(3, dtype=torch.int32), 2, 1, 4, 2)
    assert reach.tolist() == [5, 3 + 3]


def library(name: str) -> Any:
    """vLLM's own operator. Skips where its library, which follows from the CPU, has none."""
    platforms = pytest.importorskip("vllm.platforms")
    platforms.current_platform.import_kernels()
    if not hasattr(torch.ops._C, name):
        pytest.skip(f"vLLM's library for this CPU has no {name}")
    return getattr(torch.ops._C, name)


def test_the_librarys_logits_are_the_same():
    states, heads, count = 64, 16, 700
    theirs = library("fp8_paged_mqa_logits_cpu")
    cache = torch.zeros(14, states * 132, dtype=torch.uint8)
    keys = torch.randn(14 * states, pages.INDEX_HEAD).bfloat16()
    pages.write_index_keys(cache, states, torch.arange(len(keys)), keys)
    q, weight = torch.randn(2, heads, pages.INDEX_HEAD).to(torch.float8_e4m3fn), torch.rand(2, heads)
    lengths, table = torch.tensor([count, 65], dtype=torch.int32), torch.randperm(14).int().expand(2, 14).contiguous()
    got = theirs(q, cache, weight, lengths, table, states, count)
    want = attention.fp8_paged_mqa_logits_cpu(q, cache, weight, lengths, table, states, count)
    for row, length in enumerate(lengths.tolist()):
        mine = want[row, :length]
        assert (got[row, :length] - mine).abs().max() <= 1e-4 * mine.abs().max()


def test_the_librarys_attention_is_the_same_but_for_its_bf16():
    states, tokens = 64, 3
    theirs = library("flash_mla_with_kvcache_cpu")
    window, compressed = filled(8, states), filled(12, states)
    q = torch.randn(tokens, 4, pages.HEAD).bfloat16()
    near = torch.arange(200, 200 + tokens).unsqueeze(1) + torch.arange(128)
    far = torch.stack([torch.randperm(12 * states)[:512] for _ in range(tokens)])
    far[1, 100:] = -1
    sink, got, want = torch.randn(4), torch.empty_like(q), torch.empty_like(q)
    arguments = (q, window, near, states, compressed, far, states, sink, 0.04)
    theirs(got, *arguments)
    attention.flash_mla_with_kvcache_cpu(want, *arguments)
    assert (got.float() - want.float()).abs().max() <= 2**-6 * want.float().abs().max()
