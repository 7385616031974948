"""`benchmarks.v4_stack` without vLLM's kernels: valid data, tables and waves of copies, and its own checks."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import v4_caches, v4_layers, v4_plan
from benchmarks.v4_caches import Blocks, Memory, ResidentSets, Tier
from benchmarks.v4_kernels import HEAD_DIM, HEADS, WINDOW, NaiveKernels
from benchmarks.v4_layers import Queries, Side, Step, check, check_pool
from tests.kernels import DEVICE, load
from tests.v4 import pages as format_of

ROWS, PAGES, WIDTH, SPARE, RECENCY, LAYERS = 2, 23, 11, 2, 3, 3
BLOCKS = ROWS * PAGES + 2

# The kernels, whose logits do not depend on where a page lies as much as those of the twin.
load("index_logits")
load("pages")


@pytest.fixture(scope="module")
def memory() -> Memory:
    torch.manual_seed(0)
    made = Memory(BLOCKS, ROWS * (WIDTH + SPARE) + 1, LAYERS, DEVICE)
    for first in range(0, BLOCKS, 50):
        made.fill(first, min(first + 50, BLOCKS))
    return made


def resident(memory: Memory, seed: int = 0) -> tuple[torch.Tensor, ResidentSets]:
    """Block table of all pages, and resident sets with everything in its slot."""
    rng = np.random.default_rng(seed)
    blocks = rng.permutation(BLOCKS)[: ROWS * PAGES].reshape(ROWS, PAGES).astype(np.int32)
    sets = ResidentSets(blocks, WIDTH, SPARE, RECENCY, rng, DEVICE)
    for tier in (memory.c4, memory.keys):
        tier.pool.fill_(v4_caches.POISON)
        page, slot = tier.expand(*sets.blocks_and_slots())
        tier.fetch(page.to(DEVICE), slot.to(DEVICE))
    return torch.from_numpy(blocks).to(DEVICE), sets


def test_data_is_valid(memory: Memory) -> None:
    """Entries are about normal in every place, keys are finite; padding and what no cache here uses are not written."""
    slots = torch.arange(BLOCKS * 64, device=DEVICE)
    for layer in range(LAYERS):
        states = format_of.read_mla(memory.stock.pages[:, layer], 64, slots)
        assert states.isfinite().all() and states[:, :448].std(0).sub(1.32).abs().max() < 0.2
        keys, scales = format_of.read_index_keys(memory.stock.keys[:, layer], 64, slots)
        assert keys.isfinite().all() and keys.abs().max() > 200
        assert scales.min() >= 2**-7 and scales.max() < 2**-5
    assert memory.stock.pages[..., 64 * 584 :].eq(v4_caches.POISON).all()
    assert memory.stock.keys[..., 8448:].eq(v4_caches.POISON).all()
    used = LAYERS * (v4_plan.C4_PAGE + v4_plan.KEY_PAGE)
    assert memory.stock.memory[:, used:].eq(v4_caches.POISON).all()
    assert torch.equal(memory.c4.blocks, memory.stock.pages.cpu())
    assert torch.equal(memory.narrow.keys, memory.stock.keys)
    assert torch.equal(memory.keys.blocks, memory.stock.keys[:, memory.offloaded].cpu())


def test_blocks_are_as_wide_as_those_of_vllm() -> None:
    for c4, width in ((21, 1_002_240), (0, 216_000)):
        blocks = Blocks.empty(1, 21, c4, torch.device("cpu"))
        assert blocks.memory.shape == (1, width) and width % 576 == 0
        view = v4_caches.entry_view(Blocks.empty(3, 21, 21, torch.device("cpu")).pages[:, 5])
        assert view.shape == (3, 64, 584) and view.stride() == (1_002_240, 584, 1)
        assert view.storage_offset() % 16 == 0


def test_reference_is_that_of_the_tests_of_v4(memory: Memory) -> None:
    """Also where fewer entries are chosen than there is room for."""
    from tests.v4.attention import flash_mla_with_kvcache_cpu

    queries = Queries(ROWS, 1, DEVICE)
    pages = memory.stock.pages[:, 1]
    entries = torch.stack([torch.randperm(BLOCKS * 64)[:100] for _ in range(ROWS)]).int().to(DEVICE)
    counts = torch.tensor([100, 37], dtype=torch.int32, device=DEVICE)
    got = torch.full((ROWS, HEADS, HEAD_DIM), torch.nan, device=DEVICE)
    NaiveKernels().attend(
        queries.q[0], queries.window[0], queries.window_entries, queries.window_lengths, pages, entries, counts,
        queries.sink[0], None, got,
    )  # fmt: skip
    behind = torch.arange(100, device=DEVICE) >= counts.unsqueeze(1)
    want = torch.full((ROWS, HEADS, HEAD_DIM), torch.nan, dtype=torch.bfloat16)
    flash_mla_with_kvcache_cpu(
        want, queries.q[0].cpu(), queries.window[0].cpu(), queries.window_entries.long().cpu(), 64, pages.cpu(),
        entries.masked_fill(behind, -1).long().cpu(), 64, queries.sink[0].cpu(), HEAD_DIM**-0.5,
    )  # fmt: skip
    assert want.shape == (ROWS, HEADS, HEAD_DIM) and queries.window_entries.shape == (ROWS, WINDOW)
    torch.testing.assert_close(got.cpu(), want.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("share, steps", [(0.0, 1), (0.2, 1), (0.3, 9), (1.0, 1), (1.0, 3)])
def test_waves(memory: Memory, share: float, steps: int) -> None:
    """Sets become those that were asked for; nothing is copied over what a table still shows."""
    _, sets = resident(memory, seed=steps)
    before, wanted = sets.pages.copy(), sets.churned(share)
    tiers = [memory.c4, memory.keys]
    waves = sets.plan(wanted, tiers, steps)
    assert all(set(a) == set(b) for a, b in zip(sets.pages, wanted, strict=True))
    assert (wanted >= PAGES - RECENCY).sum() == ROWS * RECENCY
    changed = sum(len(np.setdiff1d(a, b)) for a, b in zip(wanted, before, strict=True))
    assert sum(wave.count for wave in waves) == changed
    assert share >= 1 or changed == ROWS * round(share * WIDTH)
    assert len(waves) <= max(steps, -(-WIDTH // SPARE))
    for wave in waves:
        coming = wave.slots[wave.slots >= 0]
        assert not torch.isin(coming, sets.slots[:, :WIDTH]).any()
        for tier, (page, slot) in zip(tiers, wave.copies, strict=True):
            tier.pool.view(-1, tier.pool.shape[2])[slot[slot >= 0].long()] = v4_caches.POISON
            tier.fetch(page, slot, programs=2)
        sets.apply(wave)
    check_pool(memory, sets)


def test_checks_pass(memory: Memory) -> None:
    """Stock and LSA with twins for vLLM's kernels, with index keys in either place, and after waves."""
    table, sets = resident(memory)
    queries, kernels = Queries(ROWS, LAYERS, DEVICE), NaiveKernels()
    stock = Step(Side.stock(memory, table), queries, kernels)
    lsa = [Step(Side.lsa(memory, sets, offloaded), queries, kernels) for offloaded in (False, True)]
    assert memory.scored == [0] and memory.offloaded == [1, 2]
    errors = check(stock, lsa, sets, [2])
    assert errors["logits"] < 1e-3 and errors["attention"] < 1e-2
    for wave in sets.plan(sets.churned(1.0), [memory.c4, memory.keys]):
        for tier, (page, slot) in zip((memory.c4, memory.keys), wave.copies, strict=True):
            tier.fetch(page, slot)
        sets.apply(wave)
    check(stock, lsa, sets, [1])
    for step in (stock, *lsa):
        step.run()
        assert step.out.isfinite().all() and step.chosen.ge(0).all()
    assert torch.equal(lsa[0].out, lsa[1].out)


def test_checks_fail(memory: Memory) -> None:
    """A byte that was not copied, a slot too few, and a top-k that misses an entry."""
    table, sets = resident(memory)
    queries, kernels = Queries(ROWS, LAYERS, DEVICE), NaiveKernels()
    stock = Step(Side.stock(memory, table), queries, kernels)
    step = Step(Side.lsa(memory, sets, False), queries, kernels)
    slot = int(sets.slots[1, 4])
    memory.c4.pool[slot, 1, 100] ^= 1
    with pytest.raises(SystemExit, match="request 1: resident c4 pages"):
        check_pool(memory, sets)
    memory.c4.pool[slot, 1, 100] ^= 1
    check_pool(memory, sets)
    sets.slots[0, 0] = sets.slots[0, 1]
    with pytest.raises(SystemExit, match="slot table"):
        check_pool(memory, sets)
    _, sets = resident(memory)
    step.layer(0, None, ("logits", "topk"))
    chosen = step.chosen[0].clone()
    v4_layers.check_top_k("all", step.logits, chosen)
    for bad, match in ((-1, "left 1 of"), (int(chosen[0, 1]), "twice"), (int(step.logits[0].argmin()), "1 of .* not")):
        wrong = chosen.clone()
        wrong[0, 0] = bad
        with pytest.raises(SystemExit, match=match):
            v4_layers.check_top_k("all", step.logits, wrong)
    memory.c4.pool[:, 0, 64 * 576 : 64 * 584] += 1  # the scales: values twice as large
    stock.layer(0, None, ("logits",))
    with pytest.raises(SystemExit, match="not bit for bit"):
        check(stock, [step], sets, [0])


def test_planned_numbers_are_those_of_vllm() -> None:
    """To a tenth of a MiB, and so the targets at a million tokens: three times as many requests, 1.25 GiB."""
    # Read, since importing vLLM for it would take longer than all else here.
    source = Path(__file__).with_name("test_v4_planning.py").read_text()
    found = re.search(r"^PLANNED = (\{.*?^\})", source, re.M | re.S)
    assert found
    asked = ast.literal_eval(found[1])
    forms = {"stock": (None, False), "lsa": (0, False), "index_keys_on_host": (0, True)}
    assert asked.keys() == forms.keys()
    for form, arguments in forms.items():
        for tokens, mib in zip((1 << 18, 1 << 19, 1 << 20), asked[form], strict=False):
            assert v4_plan.request_gib(tokens, *arguments) * 1024 == pytest.approx(mib, abs=0.1)
    assert v4_plan.resident_pages(1 << 20, 0.12) == (492, 4096)
    stock, lsa = v4_plan.request_gib(1 << 20), v4_plan.request_gib(1 << 20, 492 + 8)
    assert lsa < 1.25 and stock / lsa > 3


def test_a_tier_keeps_layers_apart() -> None:
    tier = Tier(5, 4, 2, 64, torch.device("cpu"))
    page, slot = tier.expand(np.array([[3, 0]]), np.array([[2, -1]]))
    assert page.tolist() == [[[6, 7], [0, 1]]] and slot.tolist() == [[[4, 5], [-1, -1]]]
    assert page.dtype == torch.int64 and slot.dtype == torch.int32
