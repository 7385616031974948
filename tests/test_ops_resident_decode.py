import copy
import dataclasses

import numpy as np
import pytest
import torch

from tests.device_state import NONSENSE, State
from tests.kernels import DEVICE, load
from tests.test_ops_closeness import assert_close
from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.ops import resident_decode as decode
from vllm_lsa.ops.e4m3 import KVScales, quantise
from vllm_lsa.ops.resident_decode import (
    Arrivals,
    DecodeConfig,
    DecodeScratch,
    resident_decode,
    resident_decode_naive,
)

kernels = load("paged_decode")
SCALE = 0.17
SCALES = KVScales(0.03, 1.7)
MIXED = [0, 37, 150, 1, 0, 64, 16]
ON_BUDGET = [False, False, True, True, True, True, False]


E4M3 = pytest.mark.parametrize("e4m3", [False, True], ids=["", "e4m3"])


def shape(dtype=torch.float32, dim=64, chunk=16, lanes=2, kv_heads=2, group=3, layers=2, e4m3=False):
    pages = torch.uint8 if e4m3 else dtype
    return KVGeometry(layers, kv_heads * group, kv_heads, dim, pages, 2 * chunk, chunk, lanes, model_dtype=dtype)


class Case:
    """Operands in which all that must not be read is NaN or out of range, in the pools, in q and in the tables."""

    def __init__(self, geometry, lengths, budget, layer=1, arrivals=0, arrivals_read=0.3, **options):
        torch.manual_seed(len(lengths))
        g, self.layer = geometry, layer
        self.state = state = State(g, lengths, budget, **options)
        pool, host = state.pools(g.dtype)
        for row, count in enumerate(state.chunks):
            for lane in range(layer * g.layer_lanes, (layer + 1) * g.layer_lanes) if count else ():
                if budget[row]:
                    chunks, slots = state.entries[row][lane]
                    pages = state.page(row, chunks, lane)
                else:
                    chunks = np.arange(count)
                    pages = state.page(row, chunks, lane)
                    slots = state.slot_of.cpu().numpy()[pages]
                tail = (lengths[row] - 1) % g.chunk_tokens + 1
                for chunk, slot, page in zip(chunks, slots, pages, strict=True):
                    self._fill(host[page] if slot < 0 else pool[slot], tail if chunk == count - 1 else g.chunk_tokens)
        self.arrivals = self._arrivals(pool, host, arrivals, arrivals_read) if arrivals else None
        n, heads, dim = len(lengths), g.num_q_heads, g.head_dim
        # Strided as where q, k and v are one tensor; padding rows' queries are NaN.
        q = torch.full((n, heads + 2 * g.num_kv_heads, dim), float("nan"), dtype=g.compute_dtype, device=DEVICE)
        self.q = q[:, :heads]
        used = state.rows.token[state.rows.length > 0].long()
        self.q[used] = torch.randn(len(used), heads, dim, device=DEVICE).to(g.compute_dtype) * 2
        self.operands = {
            "q": self.q,
            "pool": pool,
            "host_pages": host,
            "rows": state.rows,
            "slot_of": state.slot_of,
            "sets": state.sets,
            "layer": layer,
            "geometry": g,
            "scale": SCALE,
            "scales": SCALES if g.quantised else KVScales(),
            "arrivals": self.arrivals,
        }

    def _fill(self, page, tokens):
        g = self.state.geometry
        content = torch.randn(2, g.lane_heads, tokens, g.head_dim)
        if g.quantised:
            content = torch.stack([quantise(x, s) for x, s in zip(content, SCALES, strict=True)])
        page[:, :, :tokens] = content.to(g.dtype).to(page.device)

    def _arrivals(self, pool, host, most, host_read):
        """0 to `most` full chunks that are not in the sets, in slots that nobody has or read from their host pages."""
        state, g = self.state, self.state.geometry
        owned = [slots for lanes in state.owned for slots in lanes] + [state.slot_of.cpu().numpy()]
        free = iter(state.rng.permutation(np.setdiff1d(np.arange(state.num_slots), np.concatenate(owned))))
        page = np.full((len(state.lengths), g.layer_lanes, most), -1, np.int64)
        slot = np.full(page.shape, NONSENSE, np.int32)
        for row, entries in enumerate(state.entries):
            for i, (chunks, _) in enumerate(entries[self.layer * g.layer_lanes :][: g.layer_lanes]):
                absent = state.rng.permutation(np.setdiff1d(np.arange(state.chunks[row] - 1), chunks))
                new = absent[: state.rng.integers(0, most + 1)]
                page[row, i, : len(new)] = state.page(row, new, self.layer * g.layer_lanes + i)
                for j in range(len(new)):
                    slot[row, i, j] = -1 if state.rng.random() < host_read else next(free)
                    self._fill(host[page[row, i, j]] if slot[row, i, j] < 0 else pool[slot[row, i, j]], g.chunk_tokens)
        return Arrivals(state.put(page), state.put(slot))

    def scratch(self, splits=None, tile=16, interleaved=False):
        g = self.state.geometry
        longest = self.state.rows.block_table.shape[1] * g.block_tokens
        config = DecodeConfig(tile, warps=2, stages=2, per_sm=2, splits=splits, interleaved=interleaved)
        return DecodeScratch.empty(len(self.state.lengths), g, longest, DEVICE, config)

    def wide(self):
        """Operands for a result in float64; bytes of e4m3 stay what they are."""
        operands = {name: self.operands[name] for name in ("q", "pool", "host_pages")}
        return {name: x.double() if x.is_floating_point() else x for name, x in operands.items()}

    def check(self, scratch, **change):
        g = self.state.geometry
        out = torch.full((len(self.q), g.num_q_heads + 1, g.head_dim), 7.0, dtype=g.compute_dtype, device=DEVICE)
        want = torch.full(self.q.shape, 7.0, dtype=torch.float64, device=DEVICE)
        scratch.partial.fill_(float("nan"))
        scratch.lse.fill_(float("nan"))
        filled, joined = copy.deepcopy(self.arrivals), []
        if filled is not None:
            self.arrivals.page.fill_(-1)

        def join():
            joined.append(True)
            if filled is not None:
                self.arrivals.page.copy_(filled.page)

        resident_decode(**self.operands | change, out=out[:, 1:], scratch=scratch, join=join)
        assert len(joined) == 1
        resident_decode_naive(**self.operands | self.wide(), out=want)
        if g.compute_dtype == torch.float32:  # a GPU's exp2 is an approximation
            torch.testing.assert_close(out[:, 1:].double(), want, atol=1e-4, rtol=1e-4)
        else:
            assert_close(out[:, 1:], want)
        assert (out[:, 0] == 7).all()
        padding = self.state.rows.token[self.state.rows.length == 0].long()
        assert (out[padding] == 7).all()
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("splits", [1, 3])
@E4M3
def test_matches_naive(dtype, lanes, splits, e4m3):
    case = Case(shape(dtype, lanes=lanes, e4m3=e4m3), MIXED, ON_BUDGET, host_read=0.3)
    case.check(case.scratch(splits, tile=32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk,dim,group", [(8, 80, 1), (32, 96, 4), (64, 128, 7), (24, 256, 8)])
@E4M3
def test_sizes(dtype, chunk, dim, group, e4m3):
    geometry = shape(dtype, dim, chunk, group=group, lanes=1, kv_heads=1, e4m3=e4m3)
    case = Case(geometry, [chunk + 5, 3 * chunk + 1], [False, True], share=1.0)
    case.check(case.scratch(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("native", [False, True])
def test_e4m3_by_its_bits_and_as_a_device_has_it(monkeypatch, dtype, native):
    """The other one than what this device takes of itself; Triton's interpreter takes both."""
    if native and DEVICE.type == "cuda" and not decode.has_e4m3(DEVICE):
        pytest.skip("the device has no e4m3")
    monkeypatch.setattr(decode, "has_e4m3", lambda device: native)
    case = Case(shape(dtype, dim=80, e4m3=True), MIXED, ON_BUDGET, host_read=0.3)
    case.check(case.scratch(2, tile=32))


def test_more_query_heads_than_a_tile_has_rows():
    case = Case(shape(group=17, kv_heads=1, lanes=1), [40, 33], [False, True])
    case.check(case.scratch())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("host_read", [0.0, 0.1, 1.0])
def test_entries_on_several_state_pages(host_read, interleaved):
    geometry = shape(chunk=8, kv_heads=1, lanes=1, layers=3)
    case = Case(geometry, [1203, 1600], [True, False], 2, share=0.9, host_read=host_read)
    assert len(case.state.entries[0][2][0]) > 128
    case.check(case.scratch(4, tile=64, interleaved=interleaved))


def test_more_splits_than_tiles_and_short_rows_in_large_scratch():
    case = Case(shape(), [1, 20, 0], [True, False, True])
    case.check(case.scratch(8))
    case.check(case.scratch(8, interleaved=True))
    scratch = DecodeScratch.empty(16, shape(), 2048, DEVICE)
    case.check(scratch)
    case.check(scratch, max_length=20)


@pytest.mark.parametrize("dtype,dim", [(torch.bfloat16, 128), (torch.float16, 80)])
@pytest.mark.parametrize("splits", [1, 3, 64])
@pytest.mark.parametrize("few", [True, False])
def test_the_forms_of_16_bits_and_heads_of_up_to_128(dtype, dim, splits, few):
    """64 splits are merged by parts of a head; 600 tokens fill some of them, and the longest row uneven ones."""
    geometry = shape(dtype, dim, group=4)
    config = dataclasses.replace(DecodeConfig.default(geometry, 1 if few else 99), splits=splits)
    assert config.interleaved != few
    case = Case(geometry, [600, 1, 0, 2300, 900], [False, True, False, False, True], share=0.9, host_read=0.1)
    case.check(DecodeScratch.empty(5, geometry, 4096, DEVICE, config))


@pytest.mark.parametrize(
    "most,dtype,chunk,lanes,splits,dim",
    [
        (1, torch.float32, 8, 2, 1, 80),
        (3, torch.bfloat16, 8, 1, 3, 80),
        (3, torch.float16, 16, 2, 64, 128),
        (8, torch.float16, 8, 1, 1, 64),
        (8, torch.bfloat16, 24, 2, 2, 256),
        (8, torch.float32, 16, 1, 3, 128),
    ],
)
@E4M3
def test_arrivals(most, dtype, chunk, lanes, splits, dim, e4m3):
    lengths = [count and count * chunk - 5 for count in (13, 0, 9, 1, 20, 0, 2)]
    budget = [True, True, False, True, True, False, True]
    case = Case(shape(dtype, dim, chunk, lanes=lanes, e4m3=e4m3), lengths, budget, arrivals=most, host_read=0.1)
    came = (case.arrivals.page >= 0).sum(2)
    assert came[0].sum() + came[4].sum() > 0 == came[[1, 2, 3, 5]].sum()
    case.check(case.scratch(splits, tile=32))


@pytest.mark.parametrize("splits", [1, 3])
def test_a_row_with_many_arrivals_beside_its_tail_and_one_with_none(splits):
    """Up to 40 chunks, no power of two, are several iterations of the merge; beside them a set is its tail alone."""
    geometry = shape(torch.bfloat16, chunk=8, lanes=1, kv_heads=4, group=2)
    case = Case(geometry, [1, 300, 250], [True] * 3, share=0.0, arrivals=40)
    assert (case.state.sets.counts[case.state.rows.state.long()] == 1).all()
    assert (case.arrivals.page >= 0).sum(2).max() * 8 > 64
    case.check(case.scratch(splits))
    case.arrivals.page.fill_(-1)
    out = case.check(case.scratch(splits))
    case.arrivals = case.operands["arrivals"] = None
    assert torch.equal(out, case.check(case.scratch(splits)))


def test_arrivals_that_outweigh_the_set_and_do_not():
    case = Case(shape(chunk=8), [400], [True], arrivals=8)
    case.q *= torch.linspace(-20, 20, case.q.shape[1], device=DEVICE).view(1, -1, 1)
    case.check(case.scratch(2, tile=64))


@pytest.mark.parametrize("arrivals", [0, 3])
def test_join_comes_after_what_reads_the_sets(arrivals):
    case = Case(shape(chunk=8), [90, 0], [True, True], arrivals=arrivals)
    scratch, out, written = case.scratch(2), torch.zeros_like(case.q), []
    scratch.lse.fill_(float("nan"))

    def join():
        written.append(bool(scratch.lse.isfinite().any()))

    resident_decode(**case.operands | {"rows": case.state.rows.first(0)}, out=out, scratch=scratch, join=join)
    resident_decode(**case.operands, out=out, scratch=scratch, join=join)
    assert written == [False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_arrivals_in_the_form_of_their_own(dtype):
    geometry = shape(dtype, 128, chunk=8, lanes=1, group=2)
    case = Case(geometry, [700, 90], [True, False], share=0.9, arrivals=8)
    case.check(DecodeScratch.empty(2, geometry, 4096, DEVICE))


def test_rising_scores():
    case = Case(shape(), [700], [False])
    case.q *= torch.linspace(1, 20, case.q.shape[1], device=DEVICE).view(1, -1, 1)
    case.check(case.scratch(2, tile=64))


@E4M3
def test_cpu_without_interpreter_runs_the_twin(monkeypatch, e4m3):
    case = Case(shape(torch.bfloat16, e4m3=e4m3), MIXED, ON_BUDGET, arrivals=3)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    case.check(case.scratch())


def test_number_of_splits():
    geometry = dataclasses.replace(shape(torch.bfloat16, 128), num_q_heads=32, num_kv_heads=8, layer_lanes=8)
    half = dataclasses.replace(geometry, dtype=torch.uint8, model_dtype=torch.bfloat16)
    narrow = dataclasses.replace(geometry, head_dim=64)
    for g, rows, form, beside in (
        (geometry, 2, (32, 1, 3, 4, None, False), 2),
        (geometry, 3, (64, 2, 3, 3, None, True), 3),
        (narrow, 2, (64, 2, 3, 4, None, False), 4),
        (narrow, 3, (128, 4, 3, 3, None, True), 3),
        (half, 2, (128, 4, 3, 3, None, False), 3),
    ):
        config = DecodeConfig.default(g, rows)
        assert dataclasses.astuple(config) == form
        assert DecodeConfig.default(g, rows, beside=True) == dataclasses.replace(config, per_sm=beside)
    scratch = DecodeScratch(torch.empty(0), torch.empty(0), 256, 132, geometry)  # an H100
    assert scratch.splits(4, 131072) == 12
    assert scratch.splits(1, 131072) == 61
    assert scratch.splits(1, 131072, beside=True) == 32
    assert scratch.splits(1, 100) == 1
    assert scratch.splits(64, 131072) == 3
    for n in (1, 3, 5, 17, 40, 100):
        by_length = [scratch.splits(n, length) for length in (1, 512, 4096, 20000, 131072)]
        assert by_length == sorted(by_length), n


def test_refuses_bad_input():
    case = Case(shape(), [20, 3], [False, True])

    def refused(match, **change):
        with pytest.raises(ValueError, match=match):
            case.check(case.scratch(2), **change)

    g = case.state.geometry
    refused("q: expected", q=case.q[:, 1:])
    refused("q: the last dimension", q=torch.zeros(2, 64, 6, device=DEVICE).transpose(1, 2))
    refused("pool: expected", pool=case.operands["pool"][:, :1])
    refused("slot_of: expected", slot_of=case.state.slot_of[:-1])
    refused("sets.slot: expected", sets=dataclasses.replace(case.state.sets, slot=case.state.sets.slot.long()))
    page = torch.full((2, 2, 3), -1, device=DEVICE)
    refused("arrivals.page: expected", arrivals=Arrivals(page.int(), page.int()))
    refused("arrivals.page: expected", arrivals=Arrivals(page[:, :1], page.int()))
    refused("arrivals.slot: expected", arrivals=Arrivals(page, page.int()[..., :1]))
    refused("arrivals.page must be contiguous", arrivals=Arrivals(page.repeat(1, 2, 1)[:, :2], page.int()))
    refused("arrivals have no room", arrivals=Arrivals(page[..., :0], page[..., :0].int()))
    refused("layer 2", layer=2)
    refused("multiple of 8 up to 64", geometry=dataclasses.replace(g, chunk_tokens=4))
    host = torch.zeros(case.operands["host_pages"].numel() + 1).add_(0)
    refused("16 bytes", host_pages=host[1:].view(case.operands["host_pages"].shape))
    with pytest.raises(ValueError, match="scratch is for 1 rows"):
        case.check(DecodeScratch.empty(1, g, 64, DEVICE))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device")
@E4M3
def test_in_a_graph_reads_new_lengths_and_counts(e4m3):
    case = Case(shape(torch.bfloat16, lanes=2, e4m3=e4m3), MIXED, ON_BUDGET, host_read=0.3, arrivals=3)
    scratch, out = case.scratch(2), torch.zeros_like(case.q)

    def run():
        resident_decode(**case.operands, out=out, scratch=scratch)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    want = torch.zeros_like(out, dtype=torch.float64)
    wide = case.wide()
    rows, came = case.state.rows, case.arrivals.page
    for change in (
        lambda: None,
        lambda: rows.length[1:3].sub_(2),
        lambda: rows.length[3:4].zero_(),
        lambda: came[..., 1:].fill_(-1),
    ):
        change()
        out.zero_()
        want.zero_()
        graph.replay()
        resident_decode_naive(**case.operands | wide, out=want)
        assert_close(out, want)
