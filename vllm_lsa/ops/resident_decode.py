"""Decode attention over the resident chunks of whole rows and of rows on a budget, from the device's own tables."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch

from vllm_lsa.device.state import PAGE, DeviceRows, DeviceSets
from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.ops.e4m3 import UNSCALED, KVScales, has_e4m3, unscaled
from vllm_lsa.ops.early import early
from vllm_lsa.ops.native import DTYPES, power_of_two, require, require_tensor, unsupported

_KERNELS = "vllm_lsa.kernels.paged_decode"
_SPLIT_TOKENS = 128
"""Tokens that a split is worth: with fewer, its start and the merge cost more than they save."""
_FEW_LANES = 16
"""Decode rows times KV heads that are few."""
_MERGE_ELEMENTS = 2048
"""Elements of `partial` that a program of the merge reads: for a single row, some 8 KB on each multiprocessor."""
_NEW_TILE_ELEMENTS = 4096
"""Elements of K that a program of the merge reads of arrivals in an iteration."""


@dataclass(frozen=True)
class Arrivals:
    """Full chunks that rows on a budget attend to in one layer beside their sets, up to M in each lane.

    page: int64 [n, layer_lanes, M], host pages; -1 from the number that came on, and everywhere in whole and empty
    rows. slot: int32 [n, layer_lanes, M], where in the pool the copies of those lie, -1 for none: then host pages are
    read.
    """

    page: torch.Tensor
    slot: torch.Tensor


def leaves_room(geometry: KVGeometry, rows: int) -> bool:
    """Whether attention with demand beside it leaves that room on each multiprocessor: with few rows and wide heads,
    where one program of the scores on each is worth more than two on some. Measured on an H200 for 1 x 128K.
    """
    wide = power_of_two(geometry.head_dim) == 128 and geometry.dtype.itemsize == 2
    return wide and rows * geometry.num_kv_heads <= _FEW_LANES


@dataclass(frozen=True)
class DecodeConfig:
    """How the kernel is launched.

    tile: tokens of an iteration, a power of two from 16. warps, stages: of a program. per_sm: programs for each
    multiprocessor, as many as fit or fewer. splits: of each row, None to choose by the number of rows. interleaved:
    whether a split has every so many tiles of a row, not tiles in a row.
    """

    tile: int
    warps: int
    stages: int
    per_sm: int
    splits: int | None = None
    interleaved: bool = False

    @classmethod
    def default(cls, geometry: KVGeometry, rows: int = 1, beside: bool = False) -> "DecodeConfig":
        """For so many decode rows on Hopper, measured on an H200 for heads of 64 and 128. beside: demand is beside it.

        With few rows small tiles begin sooner; those of wide heads leave room for what runs beside them. Else three
        programs a multiprocessor, each with 64 KiB of K and V under way, whose shared memory is no room for more: four
        that leave some are not dealt out evenly. A warp for every 32 tokens: where threads outnumber the tile's tokens,
        Triton looks a token's page up in every thread that needs it, at twice the instructions. Wide heads and fp32,
        where it matters less, want the registers. Pages of e4m3 want more warps, which turn them into 16 bits.
        """
        elements, size = 2 * power_of_two(geometry.head_dim), geometry.compute_dtype.itemsize
        if size == 2 and elements <= 256:
            if geometry.quantised:
                return cls(tile=128, warps=4, stages=3, per_sm=3)
            if rows * geometry.num_kv_heads <= _FEW_LANES:
                tile = min(64, 2**13 // elements)
                room = beside and leaves_room(geometry, rows)
                return cls(tile=tile, warps=tile // 32, stages=3, per_sm=2 if room else 4)
            tile = min(128, 2**14 // elements)
            return cls(tile=tile, warps=tile // 32, stages=3, per_sm=3, interleaved=True)
        return cls(tile=max(16, 2**16 // size // (elements * size)), warps=4, stages=3, per_sm=2)


@dataclass
class DecodeScratch:
    """Where splits leave their results for the merge. One serves all layers, and all steps of up to `rows` rows.

    partial: fp32, [n, Hq, splits, D] flat. lse: fp32, [n, Hq, splits] flat, base 2. config: None for that of the number
    of rows.
    """

    partial: torch.Tensor
    lse: torch.Tensor
    rows: int
    multiprocessors: int
    geometry: KVGeometry
    config: DecodeConfig | None = None

    @classmethod
    def empty(
        cls,
        rows: int,
        geometry: KVGeometry,
        max_length: int,
        device: torch.device,
        config: DecodeConfig | None = None,
    ) -> "DecodeScratch":
        """rows: most decode rows of a step, padding included. max_length: tokens of the longest row."""
        on_gpu = device.type == "cuda"
        sms = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
        none = torch.empty(0, dtype=torch.float32, device=device)
        scratch = cls(none, none, rows, sms, geometry, config)
        most = max(n * scratch.splits(n, max_length, b) for n in range(1, rows + 1) for b in (False, True))
        states = geometry.num_q_heads * most
        scratch.partial, scratch.lse = none.new_empty(states * geometry.head_dim), none.new_empty(states)
        return scratch

    def form(self, n: int, beside: bool = False) -> DecodeConfig:
        """How the kernel is launched for n rows. beside: with demand beside it."""
        return self.config or DecodeConfig.default(self.geometry, n, beside)

    def splits(self, n: int, max_length: int, beside: bool = False) -> int:
        """Splits of each of n rows of up to `max_length` tokens: the fewest, up to 64, that keep the device about as
        busy as any number does.

        Programs run in waves of as many as fit; what counts is how full the waves are on average. A lower `max_length`
        never gives more splits, so that scratch for the longest rows is enough for all.
        """
        config = self.form(n, beside)
        if config.splits is not None:
            return config.splits
        most = max(1, min(64, max_length // _SPLIT_TOKENS))
        slots = self.multiprocessors * config.per_sm
        waves = [n * self.geometry.num_kv_heads * splits / slots for splits in range(1, most + 1)]
        filled = [wave / math.ceil(wave) for wave in waves]
        return 1 + next(i for i, x in enumerate(filled) if x >= 0.95 * max(filled))


def resident_decode(
    q: torch.Tensor,
    pool: torch.Tensor,
    host_pages: torch.Tensor,
    rows: DeviceRows,
    slot_of: torch.Tensor,
    sets: DeviceSets,
    layer: int,
    geometry: KVGeometry,
    scale: float,
    out: torch.Tensor,
    scratch: DecodeScratch,
    max_length: int | None = None,
    scales: KVScales = UNSCALED,
    arrivals: Arrivals | None = None,
    join: Callable[[], None] | None = None,
) -> None:
    """Attention of one query token per row over the row's chunks in `layer`, written to `out`.

    q, out: [T, Hq, D], rows may be strided, heads too; fp32, bf16 or fp16. Row i is token ``rows.token[i]``; what no
    row with a length names is left alone in `out`. pool: [S, 2, lane_heads, C, D] on the device, of q's dtype, or
    uint8: e4m3, whose values are multiplied by `scales`. host_pages: [M, 2, lane_heads, C, D], pinned host memory, of
    the pool's dtype. slot_of: int32 [M], the slot of each host page, or -1. scale: factor on q·k. max_length: tokens of
    the longest row that may come, by default what its block table can hold; with it the number of splits is chosen.

    A whole row attends to all of its tokens, a row on a budget to the entries of its lanes' sets, where the last one is
    the tail. A chunk without a slot is read from its host page. Rows of length 0, entries from counts on and tokens
    from length on are never read. Sums are fp32. Nothing is allocated or read back: fit for a CUDA graph.

    The kernel may begin before the one ahead of it on the stream has ended: that one must write nothing that is read
    here but K and V of the rows' newest tokens.

    arrivals: what this step's demand took in, which rows on a budget attend to as well. It may be filled while the sets
    are read, which do not change until all of this has ended. join: called once, after what reads the sets was launched
    and before what reads arrivals is: there the stream waits for those who fill them.

    On CPU tensors this is `resident_decode_naive`, unless the kernels were loaded in Triton's interpreter. Raises
    ValueError on a bad shape, dtype, stride or address; what only the device knows is not checked.
    """
    kernels, join = sys.modules.get(_KERNELS), join or _nothing
    if q.device.type == "cpu":
        if kernels is None or not kernels.INTERPRETED:
            join()
            return resident_decode_naive(
                q, pool, host_pages, rows, slot_of, sets, layer, geometry, scale, out, scales, arrivals
            )
    elif q.device.type != "cuda":
        raise unsupported(q.device)
    kernels = kernels or import_module(_KERNELS)

    n = rows.length.shape[0]
    if n == 0:
        return join()
    _check(q, pool, host_pages, rows, slot_of, sets, layer, geometry, out, arrivals)
    kv_heads, q_heads, dim = geometry.num_kv_heads, geometry.num_q_heads, geometry.head_dim
    max_length = max_length or rows.block_table.shape[1] * geometry.block_tokens
    beside = arrivals is not None
    splits, config = scratch.splits(n, max_length, beside), scratch.form(n, beside)
    require(
        n * q_heads * splits * dim <= scratch.partial.numel() and n * q_heads * splits <= scratch.lse.numel(),
        f"the scratch is for {scratch.rows} rows and shorter ones: {n} rows of {max_length} tokens do not fit",
    )
    dim_pad, group, direct = power_of_two(dim), q_heads // kv_heads, splits == 1 and not beside
    min_tiles = max(1, _SPLIT_TOKENS // config.tile)
    by_bits = geometry.quantised and not has_e4m3(pool.device)
    pages = pool.view(torch.float8_e4m3fn) if geometry.quantised and not by_bits else pool
    vector = 16 // geometry.dtype.itemsize
    host_delta = (host_pages.data_ptr() - pool.data_ptr()) // 16
    scale_log2, v_factor = scale * scales.k * math.log2(math.e), 1.0 / scales.v
    kernels.attend[(n * kv_heads, splits)](
        q, pages, rows.token, rows.length, rows.state, rows.block_table, slot_of,
        sets.pages, sets.counts, sets.chunk, sets.slot, out, scratch.partial, scratch.lse,
        q.stride(0), q.stride(1), out.stride(0), out.stride(1), rows.block_table.stride(0), sets.pages.stride(0),
        layer, host_delta, splits, scale_log2, v_factor,
        KV_HEADS=kv_heads, GROUP=group, GROUP_PAD=max(16, power_of_two(group)), D=dim, D_PAD=dim_pad,
        CHUNK=geometry.chunk_tokens, BLOCK_CHUNKS=geometry.chunks_per_block, LANES=geometry.num_lanes,
        LANE_HEADS=geometry.lane_heads, SET_PAGE=PAGE, VECTOR=vector, TILE=config.tile,
        MIN_TILES=min_tiles, DIRECT=direct, E4M3=by_bits, WIDEN=kernels.INTERPRETED and q.dtype == torch.bfloat16,
        INTERLEAVED=config.interleaved, num_warps=config.warps, num_stages=config.stages, **early(pool.device),
    )  # fmt: skip
    join()
    if not direct:
        splits_pad = power_of_two(splits)
        new_page, new_slot = (arrivals.page, arrivals.slot) if arrivals else (None, None)
        most = arrivals.page.shape[2] if arrivals else 0
        dim_part = min(dim_pad, max(32, _MERGE_ELEMENTS // splits_pad))
        kernels.merge[(n, q_heads, dim_pad // dim_part)](
            scratch.partial, scratch.lse, rows.token, rows.length, rows.state, sets.counts, out,
            q, pages, new_page, new_slot, out.stride(0), out.stride(1), q.stride(0), q.stride(1),
            layer, host_delta, splits, scale_log2, v_factor,
            KV_HEADS=kv_heads, GROUP=group, D=dim, D_PAD=dim_pad, D_PART=dim_part, CHUNK=geometry.chunk_tokens,
            LANES=geometry.num_lanes, LANE_HEADS=geometry.lane_heads, VECTOR=vector, TILE=config.tile,
            MIN_TILES=min_tiles, SPLITS_PAD=splits_pad, ARRIVALS=most, ARRIVALS_PAD=power_of_two(most),
            NEW_TILE=max(16, _NEW_TILE_ELEMENTS // dim_pad), E4M3=by_bits, num_warps=4, **early(pool.device),
        )  # fmt: skip


def _nothing() -> None:
    pass


def _check(
    q: torch.Tensor,
    pool: torch.Tensor,
    host_pages: torch.Tensor,
    rows: DeviceRows,
    slot_of: torch.Tensor,
    sets: DeviceSets,
    layer: int,
    geometry: KVGeometry,
    out: torch.Tensor,
    arrivals: Arrivals | None,
) -> None:
    dtype, device, dim, chunk = geometry.compute_dtype, q.device, geometry.head_dim, geometry.chunk_tokens
    require(dtype in DTYPES, f"dtype {dtype} is none of float32, bfloat16, float16")
    multiple = 16 if geometry.quantised else 8
    require(dim % multiple == 0, f"head dimension {dim} is not a multiple of {multiple}")
    require(chunk % 8 == 0 and chunk <= 64, f"chunk_tokens={chunk} is not a multiple of 8 up to 64")
    require(0 <= layer < geometry.num_layers, f"layer {layer} is outside 0..{geometry.num_layers - 1}")
    for name, x in (("q", q), ("out", out)):
        require(
            x.dim() == 3 and x.shape[1:] == (geometry.num_q_heads, dim) and x.dtype == dtype and x.device == device,
            f"{name}: expected {dtype} [T, {geometry.num_q_heads}, {dim}] on {device}, "
            f"got {x.dtype} {list(x.shape)} on {x.device}",
        )
        require(x.stride(2) == 1, f"{name}: the last dimension must be contiguous, got strides {x.stride()}")
    for name, x in (("pool", pool), ("host_pages", host_pages)):
        where = device if name == "pool" else torch.device("cpu")
        require_tensor(name, x, (x.shape[0], *geometry.page_shape), geometry.dtype, where)
        require(x.is_contiguous(), f"{name} must be contiguous")
        # One pointer with two ranges of offsets serves both tiers, in loads of 16 bytes.
        require(x.data_ptr() % 16 == 0, f"{name} must begin at a multiple of 16 bytes")
    n = rows.length.shape[0]
    require_tensor("rows.block_table", rows.block_table, (n, rows.block_table.shape[1]), torch.int32, device)
    fixed = {
        "rows.token": (rows.token, (n,)),
        "rows.length": (rows.length, (n,)),
        "rows.state": (rows.state, (n,)),
        "slot_of": (slot_of, (host_pages.shape[0],)),
        "sets.pages": (sets.pages, tuple(sets.pages.shape)),
        "sets.counts": (sets.counts, (sets.pages.shape[0], geometry.num_lanes)),
        "sets.chunk": (sets.chunk, (sets.chunk.shape[0], geometry.num_lanes, PAGE)),
        "sets.slot": (sets.slot, tuple(sets.chunk.shape)),
    }
    for name, (x, shape) in fixed.items():
        require_tensor(name, x, shape, torch.int32, device)
        require(x.is_contiguous(), f"{name} must be contiguous")
    if arrivals is not None:
        most = arrivals.page.shape[-1]
        require(most > 0, "arrivals have no room for one in a lane")
        for name, x, kind in (("page", arrivals.page, torch.int64), ("slot", arrivals.slot, torch.int32)):
            require_tensor(f"arrivals.{name}", x, (n, geometry.layer_lanes, most), kind, device)
            require(x.is_contiguous(), f"arrivals.{name} must be contiguous")


def resident_decode_naive(
    q: torch.Tensor,
    pool: torch.Tensor,
    host_pages: torch.Tensor,
    rows: DeviceRows,
    slot_of: torch.Tensor,
    sets: DeviceSets,
    layer: int,
    geometry: KVGeometry,
    scale: float,
    out: torch.Tensor,
    scales: KVScales = UNSCALED,
    arrivals: Arrivals | None = None,
) -> None:
    """Twin of `resident_decode`, lane by lane; float64 tensors give float64 results."""
    chunk, heads, group = geometry.chunk_tokens, geometry.lane_heads, geometry.num_q_heads // geometry.num_kv_heads
    wide = torch.promote_types(q.dtype, torch.float32)
    for row, (token, length, state) in enumerate(
        zip(rows.token.tolist(), rows.length.tolist(), rows.state.tolist(), strict=True)
    ):
        if length == 0:
            continue
        query = q[token].to(wide).view(geometry.layer_lanes, heads, group, geometry.head_dim)
        for i in range(geometry.layer_lanes):
            lane = layer * geometry.layer_lanes + i
            chunks, slots = _entries(rows.block_table[row], length, state, slot_of, sets, lane, geometry)
            pages = host_page(rows.block_table[row], chunks, lane, geometry)
            tokens = (len(chunks) - 1) * chunk + (length - 1) % chunk + 1
            kv = _read(pool, host_pages, pages, slots)[:, :, :tokens]
            if arrivals is not None:
                came = arrivals.page[row, i] >= 0
                new = _read(pool, host_pages, arrivals.page[row, i, came], arrivals.slot[row, i, came].long())
                kv = torch.cat([kv, new], 2)
            keys, values = kv
            keys, values = scales.k * unscaled(keys, wide), scales.v * unscaled(values, wide)
            weights = (scale * torch.einsum("hgd,htd->hgt", query[i], keys)).softmax(-1)
            part = torch.einsum("hgt,htd->hgd", weights, values).flatten(0, 1)
            out[token, i * heads * group : (i + 1) * heads * group] = part.to(out.dtype)


def _read(pool: torch.Tensor, host_pages: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """[2, lane_heads, N * C, D] on the device of pages that lie in slots, or in the host store where a slot is -1.

    pages, slots: int64 [N].
    """
    kv = pool.new_empty(len(slots), *pool.shape[1:])
    resident = slots >= 0
    kv[resident] = pool[slots[resident]]
    kv[~resident] = host_pages[pages[~resident].to(host_pages.device)].to(kv.device)
    return kv.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _entries(
    blocks: torch.Tensor,
    length: int,
    state: int,
    slot_of: torch.Tensor,
    sets: DeviceSets,
    lane: int,
    geometry: KVGeometry,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks and slots, int64 [N] each, that a row attends to in a lane, its tail last."""
    if state < 0:
        chunks = torch.arange(geometry.chunks(length), device=blocks.device)
        return chunks, slot_of[host_page(blocks, chunks, lane, geometry)].long()
    entries = torch.arange(int(sets.counts[state, lane]), device=blocks.device)
    at = sets.pages[state, entries // PAGE].long(), torch.full_like(entries, lane), entries % PAGE
    return sets.chunk[at].long(), sets.slot[at].long()


def host_page(blocks: torch.Tensor, chunks: torch.Tensor, lane: int, geometry: KVGeometry) -> torch.Tensor:
    """Host pages, int64 [N], of a request's chunks in a lane. blocks: int32 [B], its block ids. chunks: int64 [N]."""
    per_block = geometry.chunks_per_block
    return (blocks[chunks // per_block].long() * geometry.num_lanes + lane) * per_block + chunks % per_block
