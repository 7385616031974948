import dataclasses

import numpy as np
import pytest
import torch

from tests.device_state import State
from tests.kernels import DEVICE, load
from tests.test_ops_closeness import assert_close
from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.ops import resident_decode as decode
from vllm_lsa.ops.e4m3 import KVScales, quantise
from vllm_lsa.ops.resident_decode import (
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

    def __init__(self, geometry, lengths, budget, layer=1, **options):
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
                    tokens = tail if chunk == count - 1 else g.chunk_tokens
                    content = torch.randn(2, g.lane_heads, tokens, g.head_dim)
                    if g.quantised:
                        content = torch.stack([quantise(x, s) for x, s in zip(content, SCALES, strict=True)])
                    content = content.to(g.dtype)
                    (host[page] if slot < 0 else pool[slot])[:, :, :tokens] = content.to(
                        host.device if slot < 0 else DEVICE
                    )
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
        }

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
        resident_decode(**self.operands | change, out=out[:, 1:], scratch=scratch)
        resident_decode_naive(**self.operands | self.wide(), out=want)
        if g.compute_dtype == torch.float32:  # a GPU's exp2 is an approximation
            torch.testing.assert_close(out[:, 1:].double(), want, atol=1e-4, rtol=1e-4)
        else:
            assert_close(out[:, 1:], want)
        assert (out[:, 0] == 7).all()
        padding = self.state.rows.token[self.state.rows.length == 0].long()
        assert (out[padding] == 7).all()


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


def test_rising_scores():
    case = Case(shape(), [700], [False])
    case.q *= torch.linspace(1, 20, case.q.shape[1], device=DEVICE).view(1, -1, 1)
    case.check(case.scratch(2, tile=64))


@E4M3
def test_cpu_without_interpreter_runs_the_twin(monkeypatch, e4m3):
    case = Case(shape(torch.bfloat16, e4m3=e4m3), MIXED, ON_BUDGET)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    case.check(case.scratch())


def test_number_of_splits():
    geometry = dataclasses.replace(shape(torch.bfloat16, 128), num_q_heads=32, num_kv_heads=8, layer_lanes=8)
    half = dataclasses.replace(geometry, dtype=torch.uint8, model_dtype=torch.bfloat16)
    narrow = dataclasses.replace(geometry, head_dim=64)
    for g, rows, form in (
        (geometry, 2, (32, 1, 3, 4, None, False)),
        (geometry, 3, (64, 2, 3, 3, None, True)),
        (narrow, 2, (64, 2, 3, 4, None, False)),
        (narrow, 3, (128, 4, 3, 3, None, True)),
        (half, 2, (128, 4, 3, 3, None, False)),
    ):
        assert dataclasses.astuple(DecodeConfig.default(g, rows)) == form
    scratch = DecodeScratch(torch.empty(0), torch.empty(0), 256, 132, geometry)  # an H100
    assert scratch.splits(4, 131072) == 12
    assert scratch.splits(1, 131072) == 61
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
    case = Case(shape(torch.bfloat16, lanes=2, e4m3=e4m3), MIXED, ON_BUDGET, host_read=0.3)
    scratch, out = case.scratch(2), torch.zeros_like(case.q)

    def run():
        resident_decode(**case.operands, out=out, scratch=scratch)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    want = torch.zeros_like(out, dtype=torch.float64)
    wide = case.wide()
    rows = case.state.rows
    for change in (lambda: None, lambda: rows.length[1:3].sub_(2), lambda: rows.length[3:4].zero_()):
        change()
        out.zero_()
        want.zero_()
        graph.replay()
        resident_decode_naive(**case.operands | wide, out=want)
        assert_close(out, want)
