"""The device operations of a decode step, against plain NumPy and the rules of `residency`."""

import numpy as np
import pytest
import torch

from tests.device_state import State
from tests.kernels import DEVICE, load
from tests.pick_case import FORMS, Case
from vllm_lsa.device.state import NEXT, DeviceRefresh, DeviceTails
from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.ops import resident_rows as ops
from vllm_lsa.ops.e4m3 import KVScales, quantise, unscaled

for _name in ("write", "demand", "pages"):
    load(_name)

LENGTHS = [0, 9, 700, 16, 137, 0, 641, 1, 88]
BUDGET = [False, True, True, False, True, True, False, True, True]
SCALES = KVScales(0.013, 0.004)
"""The larger ones of standard normal V saturate."""
E4M3 = pytest.mark.parametrize("e4m3", [False, True], ids=["", "e4m3"])


def geometry(lanes, dtype=torch.float32, block=32, chunk=8, heads=3, dim=16, e4m3=False):
    pages = torch.uint8 if e4m3 else dtype
    return KVGeometry(2, 2 * heads, heads, dim, pages, block, chunk, lanes, model_dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("dim", [16, 80])
@E4M3
def test_write_rows(dtype, lanes, dim, e4m3):
    g = geometry(lanes, dtype, dim=dim, e4m3=e4m3)
    s = State(g, LENGTHS, BUDGET, host_read=0.2)
    n = len(LENGTHS)
    pool, host = s.pools(g.dtype)
    q = torch.randn(n, 2 * g.num_q_heads, dim, device=DEVICE).to(dtype)[:, : g.num_q_heads]
    k, v = torch.randn(2, n, g.num_kv_heads, dim, device=DEVICE).to(dtype)
    queries = torch.full((n, 2, g.num_q_heads, dim), float("nan"), dtype=dtype, device=DEVICE)
    tails = DeviceTails.empty(n, g, DEVICE)
    for i, length in enumerate(LENGTHS):  # state is as after the step: as it is before, where the token begins a chunk
        if BUDGET[i] and length % 8 == 1:
            s.sets.counts[int(s.rows.state[i])] -= 1
    ops.advance(s.rows, s.sets, s.slot_of, tails, g)
    ops.write_rows(q, k, v, pool, host, s.rows, tails, 1, g, queries, SCALES)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    if e4m3:
        k, v = (quantise(x, scale) for x, scale in zip((k, v), SCALES, strict=True))
        assert ((v & 127) == 126).sum() > 9
    want_pool, want_host = s.pools(g.dtype)
    want_queries = torch.full_like(queries, float("nan"))
    for i, length in enumerate(LENGTHS):
        if not length:
            continue
        t, chunk, offset = int(s.rows.token[i]), (length - 1) // 8, (length - 1) % 8
        want_queries[int(s.rows.query_row[i]), 1] = q[t]
        for head in range(3):
            lane, local = lanes + head * lanes // 3, head % g.lane_heads
            page = int(s.page(i, np.array([chunk]), lane)[0])
            slot = int(s.entries[i][lane][1][-1]) if BUDGET[i] else int(s.slot_of[page])
            for which, x in enumerate((k, v)):
                want_host[page, which, local, offset] = x[t, head].cpu()
                if slot >= 0:
                    want_pool[slot, which, local, offset] = x[t, head]
    for got, want in ((pool, want_pool), (host, want_host), (queries, want_queries)):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@E4M3
def test_write_tokens_and_gather_history(dtype, lanes, e4m3):
    g = geometry(lanes, dtype, e4m3=e4m3)
    s = State(g, [137, 88], [False, False], host_read=0.3)
    pool, host = s.pools(g.dtype)
    k, v = torch.randn(137 + 2, 9, 16, device=DEVICE).to(dtype)[:, 2:8].split(3, 1)
    at = np.arange(137)
    page0 = np.append(s.page(0, at // 8, 0), [-1, -1])
    offset = np.append(at % 8, [5, 5]).astype(np.int32)
    read = ops.write_tokens(k, v, pool, host, s.put(page0), s.put(offset), s.slot_of, 1, g, SCALES)
    if e4m3:
        k, v = (unscaled(quantise(x, scale), dtype) for x, scale in zip((k, v), SCALES, strict=True))
    for got, want in zip(read, (k, v), strict=True):
        assert got.dtype == dtype and torch.equal(got[:137], want[:137])
    blocks = s.rows.block_table[0]
    for programs in (1, 5, 10000):
        keys, values = torch.full((2, 160, 3, 16), float("nan"), dtype=dtype, device=DEVICE)
        ops.gather_history(pool, host, blocks, s.slot_of, keys, values, 3, 14, 1, g, programs)
        assert torch.equal(keys[:112], k[24:136]) and torch.equal(values[:112], v[24:136])
        assert keys[112:].isnan().all() and values[112:].isnan().all()


def test_every_number_is_rounded_as_torch_does_and_read_exactly():
    """All bf16 numbers, infinities and NaN too, and what lies half way between two of e4m3; all 256 bytes."""
    g = KVGeometry(1, 1, 1, 256, torch.uint8, 64, 64, model_dtype=torch.float32)
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float().view(-1, 256)
    codes = torch.arange(256).to(torch.uint8)
    values = unscaled(codes, torch.float32)
    half = (values[:-1] + values[1:]) / 2
    near = torch.cat([half.nextafter(torch.tensor(side)) for side in (-1e9, 0.0, 1e9)])
    x = torch.cat([every, torch.cat([half, near, half.new_zeros(4)]).view(-1, 256)]).to(DEVICE)
    s = State(g, [len(x)], [False])
    pool, host = s.pools(torch.uint8)
    at = np.arange(len(x))
    where = s.put(s.page(0, at // 64, 0)), s.put((at % 64).astype(np.int32)), s.slot_of
    read = ops.write_tokens(x[:, None], -x[:, None], pool, host, *where, 0, g)
    for got, want in zip(read, (x, -x), strict=True):
        want = unscaled(quantise(want, 1.0), torch.float32)
        assert want.abs().nan_to_num().amax() == 448 and 4 < want.isnan().sum() < 600
        torch.testing.assert_close(got[:, 0], want, rtol=0, atol=0, equal_nan=True)
    keys, read_values = torch.zeros(2, 64, 1, 256, device=DEVICE)
    page = int(s.slot_of[int(s.page(0, np.zeros(1, int), 0)[0])])
    pool[page] = codes.to(DEVICE)
    ops.gather_history(pool, host, s.rows.block_table[0], s.slot_of, keys, read_values, 0, 1, 0, g, 1)
    for got in (keys, read_values):
        torch.testing.assert_close(got[:, 0], values.expand(64, 256).to(DEVICE), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("programs", [None, 1, 3])
def test_fetch(programs):
    g = geometry(3)
    s = State(g, [137], [True])
    pool, host = s.pools(torch.float32)
    host.normal_()
    page = torch.randperm(len(host), device=DEVICE)[:12].view(3, 4)
    slot = torch.randperm(len(pool), device=DEVICE)[:12].view(3, 4).int()
    slot[1] = -1
    page[1] = 2**50
    ops.fetch(pool, host, page, slot, programs)
    for i in (0, 2):
        assert torch.equal(pool[slot[i].long()].cpu(), host[page[i].cpu()])
    assert pool.isnan().all(-1).sum() == pool[..., 0].numel() - 8 * host[0, ..., 0].numel()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("most", [1, 2, 4])
@pytest.mark.parametrize("threshold", [0.0, 0.01])
@pytest.mark.parametrize("seed", [0, 1])
def test_pick_and_settle_follow_the_rule(form, lanes, most, threshold, seed):
    # So there are 2 parts, 8, and once 128.
    longest = 2**16 if (lanes, most, threshold, seed) == (1, 4, 0.01, 1) else (1024, 4096)[seed]
    case = Case(geometry(lanes), LENGTHS, BUDGET, most, threshold, seed, longest)
    case.check(lambda: case.pick(form), lambda: case.settle(form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spare", [-4, -1, 0, 5])
def test_of_equals_the_lowest_entry_leaves_and_the_oldest_chunk_comes(form, spare):
    case = Case(geometry(3), LENGTHS, BUDGET, 4, 0.0, max_chunks=4096, spare=5).with_ties().with_caps(spare)
    came, gone = case.check(lambda: case.pick(form), lambda: case.settle(form))
    assert came and bool(gone) == (spare < 5)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the CUDA kernel runs on a GPU")
@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("most", [1, 3, 8, 32])
@pytest.mark.parametrize("spare", [-1, 0, 2])
@pytest.mark.parametrize("longest", [12000, 40000], ids=["", "wide-clusters"])
def test_both_forms_do_the_same(lanes, most, spare, longest):
    g, lengths = geometry(lanes, block=2, chunk=1, dim=8), [5000, 0, longest, 9, 640, 3, longest // 2]
    results = []
    for form in FORMS:
        case = Case(g, lengths, [True] * 7, most, 1e-5, most, max_chunks=longest).with_caps(spare)
        case.pick(form)
        case.settle(form)
        s, scratch = case.state.sets, case.scratch
        exact = scratch.page, scratch.slot, scratch.picked, scratch.demanded, s.counts, s.chunk, s.slot, s.held
        results.append(((*exact, case.pool), s.usage))
    (triton, used), (cuda, used_cuda) = results
    torch.testing.assert_close(cuda, triton, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(used_cuda, used, rtol=1e-5, atol=0, equal_nan=True)
    assert (triton[1] >= 0).any()


def test_advance_gives_a_new_chunk_to_every_lane():
    g = geometry(3)
    lengths = [17, 24, 513, 1, 0]
    s = State(g, lengths, [True, True, True, False, True])
    # State is as after the step: take the tail away where the step's token begins it.
    for i in (0, 2):
        s.sets.counts[int(s.rows.state[i])] -= 1
    before = s.sets.counts.clone()
    tails = DeviceTails.empty(len(lengths), g, DEVICE)
    ops.advance(s.rows, s.sets, s.slot_of, tails, g)
    for i, length in enumerate(lengths):
        if s.rows.state[i] < 0 or not length:
            continue
        new = i in (0, 2)
        assert (s.sets.counts[int(s.rows.state[i])] == before[int(s.rows.state[i])] + new).all()
        for lane in range(6):
            assert s.read_lane(i, lane)[0][-1] == (length - 1) // 8
            assert s.by_chunk(s.sets.held, i, lane, g.chunks(length))[-1] == 1
            assert not new or s.by_chunk(s.sets.usage, i, lane, g.chunks(length))[-1] == 0


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_refresh_reaches_the_selected_set(lanes, seed):
    """Call it until nothing comes any more: sets are then what was selected, as far as the rule lets chunks go."""
    g = geometry(lanes)
    s = State(g, LENGTHS, BUDGET, seed=seed)
    rows = len(LENGTHS) + 2
    state = DeviceRefresh.empty(rows, len(s.sets.chunk), g, DEVICE)
    sink, recency, most_used = 1, 2, 0.08
    sparse = [i for i, length in enumerate(LENGTHS) if BUDGET[i] and length]
    target = s.rng.integers(0, 2, tuple(s.sets.chunk.shape)).astype(np.uint8)
    state.target.copy_(s.put(target))
    free = iter(range(s.num_slots, 10**6))
    spare: dict[tuple[int, int], list[int]] = {}
    for i in sparse:
        row = int(s.rows.state[i])
        state.selected[row] = (LENGTHS[i] - 1) // 8 - 1
        for lane in range(2 * lanes):
            spare[i, lane] = [next(free) for _ in range(1 + (i + lane) % NEXT)]
            mine = spare[i, lane] + [-1] * (NEXT - len(spare[i, lane]))
            s.rng.shuffle(mine)
            state.slot[row, lane] = s.put(np.array(mine, np.int32))
    before = {(i, lane): s.read_lane(i, lane) for i in sparse for lane in range(2 * lanes)}
    content = {}  # what each slot holds, as the copies say
    for key, (chunks, slots, _) in before.items():
        content.update({(key, slot): chunk for chunk, slot in zip(chunks, slots, strict=True)})
    for _ in range(60):
        ops.refresh(s.rows, s.sets, state, g, sink=sink, recency=recency, most_used=most_used, block=64)
        copies = int((state.copy_slot >= 0).sum())
        for i in sparse:
            row = int(s.rows.state[i])
            for lane in range(2 * lanes):
                chunks, slots, owned = s.read_lane(i, lane)
                assert all(content[(i, lane), t] == c for c, t in zip(chunks, slots, strict=True))
                assert len(set(chunks)) == len(chunks) == len(before[i, lane][0])
                assert chunks[-1] == (LENGTHS[i] - 1) // 8
                mine = state.slot[row, lane].cpu().numpy()
                assert sorted([*owned, *mine[mine >= 0]]) == sorted([*before[i, lane][2], *spare[i, lane]])
                held = s.by_chunk(s.sets.held, i, lane, g.chunks(LENGTHS[i]))
                assert (held == np.isin(np.arange(len(held)), chunks)).all()
                for item in range(NEXT):
                    slot, chunk = int(state.copy_slot[i, lane, item]), int(state.chunk[row, lane, item])
                    assert (slot >= 0) == (chunk >= 0) and slot in [-1, *mine]
                    if slot >= 0:
                        assert int(state.copy_page[i, lane, item]) == s.page(i, np.array([chunk]), lane)[0]
                        content[(i, lane), slot] = chunk
        if not copies:
            break
    assert not copies
    for i in sparse:
        full = (LENGTHS[i] - 1) // 8
        known = full - 1
        for lane in range(2 * lanes):
            old, now = before[i, lane][0], s.read_lane(i, lane)[0]
            chosen = s.by_chunk(state.target, i, lane, full + 1) == 1
            used = s.by_chunk(s.sets.usage, i, lane, full + 1)
            may = [c for c in old if sink <= c < min(full - recency, known) and not chosen[c] and used[c] <= most_used]
            want = [c for c in range(known) if chosen[c] and c not in old]
            came, left = set(now) - set(old), set(old) - set(now)
            assert came <= set(want) and left <= set(may) and len(came) == min(len(may), len(want))
    assert (state.copy_slot[[i for i in range(9) if i not in sparse]] == -1).all()
