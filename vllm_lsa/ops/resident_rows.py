"""The operations of a decode step on the device, besides attention and scores. Capturable in a CUDA graph.

All take the pool ``[S, 2, lane_heads, C, D]`` and the host pages ``[M, 2, lane_heads, C, D]`` of one dtype, that of
the model or uint8, which is e4m3 (`ops.e4m3`). Kernels reach the host pages from the pool's address: both are in one
address space once the host memory is pinned.
"""

from dataclasses import dataclass
from functools import cache

import torch

from vllm_lsa.device.state import NEXT, PAGE, DeviceRefresh, DeviceRows, DeviceSets, DeviceTails
from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.ops.cuda_native import Form, built_library, cuda_library, launch
from vllm_lsa.ops.e4m3 import UNSCALED, KVScales
from vllm_lsa.ops.early import early
from vllm_lsa.ops.native import power_of_two, require

COPY_TILE = 4096
"""Elements that a program of a copy has under way at a time."""
LOOK = 64
"""Entries of a long list of copies that a program looks at at a time."""
SPLIT_CHUNKS = 512
MAX_SPLITS = 128
"""Demand looks at a row's chunks in up to so many parts side by side, of about that many chunks each."""
MASS_ROWS = 4
"""Rows that it looks at side by side: programs with nothing to do take time as well."""
MASS_PROGRAMS = 1024
"""More than a device runs at a time are not worth it either, so many rows and lanes have fewer parts."""
CUDA_MOST = 32
CUDA_HEADS = 128
CUDA_PAGES = 8192
"""Chunks that come in a step, heads of a lane and state pages of a row up to which demand has a CUDA kernel."""


def host_delta(pool: torch.Tensor, host_pages: torch.Tensor) -> int:
    """Elements from the pool's first to the host store's. Raises ValueError if kernels cannot load 16 bytes at once."""
    require(pool.dtype == host_pages.dtype, f"pool and host pages differ in dtype: {pool.dtype}, {host_pages.dtype}")
    require(
        pool.is_contiguous() and host_pages.is_contiguous() and pool.shape[1:] == host_pages.shape[1:],
        f"pool and host pages must be contiguous pages of one shape: {list(pool.shape)}, {list(host_pages.shape)}",
    )
    require(host_pages.data_ptr() % 16 == 0 and pool.data_ptr() % 16 == 0, "pool and host pages must begin at 16 bytes")
    return (host_pages.data_ptr() - pool.data_ptr()) // pool.element_size()


def write_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pool: torch.Tensor,
    host_pages: torch.Tensor,
    rows: DeviceRows,
    tails: DeviceTails,
    layer: int,
    geometry: KVGeometry,
    queries: torch.Tensor,
    scales: KVScales = UNSCALED,
) -> None:
    """Write-through of each decode row's K and V, and its queries to the buffer of last ones.

    q: [T, Hq, D], k, v: [T, Hkv, D], rows may be strided. tails: as `advance` left them. queries: [R, layers, Hq, D].
    scales: of e4m3; into pages goes the nearest byte.
    """
    from vllm_lsa.kernels.write import write_rows_kernel

    g = geometry
    if not len(rows.length):
        return
    write_rows_kernel[(len(rows.length), g.num_kv_heads)](
        q, k, v, pool, queries, rows.token, rows.length, rows.query_row, tails.page, tails.slot,
        host_delta(pool, host_pages), q.stride(0), k.stride(0), v.stride(0), queries.stride(0), g.num_lanes,
        layer * g.layer_lanes, layer, 1.0 / scales.k, 1.0 / scales.v,
        GROUP=g.num_q_heads // g.num_kv_heads, LANE_HEADS=g.lane_heads, CHUNK=g.chunk_tokens, DIM=g.head_dim,
        DIM_PAD=power_of_two(g.head_dim), PER_BLOCK=g.chunks_per_block, E4M3=g.quantised, num_warps=1,
        **early(pool.device),
    )  # fmt: skip


def write_tokens(
    k: torch.Tensor,
    v: torch.Tensor,
    pool: torch.Tensor,
    host_pages: torch.Tensor,
    page0: torch.Tensor,
    offset: torch.Tensor,
    slot_of: torch.Tensor,
    layer: int,
    geometry: KVGeometry,
    scales: KVScales = UNSCALED,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write-through of tokens of prompts: into their host pages, and into the slots of those that have one.

    k, v: [T, Hkv, D]. page0: int64 [T], the token's page in lane 0, -1 to leave it out. offset: int32 [T], its place in
    the chunk.

    Returns K and V as pages have them, [T, Hkv, D] of k's dtype: k and v themselves, or new ones with what the bytes of
    e4m3 say, without scales, and with anything for tokens that were left out.
    """
    from vllm_lsa.kernels.write import write_tokens_kernel

    g = geometry
    if not len(page0):
        return k, v
    read_k, read_v = torch.empty((2, *k.shape), dtype=k.dtype, device=k.device) if g.quantised else (None, None)
    write_tokens_kernel[(-(-len(page0) // 16), g.num_kv_heads)](
        k, v, pool, page0, offset, slot_of, read_k, read_v, host_delta(pool, host_pages), k.stride(0), v.stride(0),
        layer * g.layer_lanes, len(page0), 1.0 / scales.k, 1.0 / scales.v,
        LANE_HEADS=g.lane_heads, CHUNK=g.chunk_tokens, DIM=g.head_dim, DIM_PAD=power_of_two(g.head_dim),
        PER_BLOCK=g.chunks_per_block, TOKENS=16, E4M3=g.quantised, num_warps=4,
    )  # fmt: skip
    return (k, v) if read_k is None or read_v is None else (read_k, read_v)


def advance(
    rows: DeviceRows, sets: DeviceSets, slot_of: torch.Tensor, tails: DeviceTails, geometry: KVGeometry
) -> None:
    """Once a step, before its first layer: find out where each row's token goes. A row on a budget whose token begins a
    chunk gets that as its tail. slot_of: int32 [M], the slot of each host page or -1.
    """
    from vllm_lsa.kernels.demand import advance_kernel

    if not len(rows.length):
        return
    lanes = geometry.num_lanes
    advance_kernel[(len(rows.length),)](
        rows.length, rows.state, rows.block_table, slot_of, sets.pages, sets.counts, sets.chunk, sets.slot, sets.held,
        sets.usage, tails.page, tails.slot, rows.block_table.stride(0), sets.pages.stride(0), lanes,
        CHUNK=geometry.chunk_tokens, PER_BLOCK=geometry.chunks_per_block, PAGE=PAGE, LANES_PAD=power_of_two(lanes),
        num_warps=4,
    )  # fmt: skip


@dataclass
class DemandScratch:
    """What demand needs beside the sets, for up to n rows: what came, and room for the search.

    page: int64 [n, G, most], slot: int32 [n, G, most]: of the last layer, host pages of what came, -1 for none, and the
    slots that they were copied into, -1 where there was none. picked: int32 [n, lanes, most], chunks that came, of all
    layers, -1 for none. victims: int32 [n, lanes, most + 1]. demanded: int64 [1], chunks since the start. logits: fp32
    [state pages, Hq, PAGE]. The chunks of a row are looked at in up to `splits` parts: top, total: fp32 [n, G, heads of
    a lane padded to a power of two, splits]; wanted, where: int32 [n, G, splits], best: fp32.
    """

    picked: torch.Tensor
    victims: torch.Tensor
    page: torch.Tensor
    slot: torch.Tensor
    demanded: torch.Tensor
    logits: torch.Tensor
    top: torch.Tensor
    total: torch.Tensor
    wanted: torch.Tensor
    where: torch.Tensor
    best: torch.Tensor

    @classmethod
    def empty(
        cls, rows: int, most: int, num_pages: int, geometry: KVGeometry, device: torch.device, max_chunks: int = 1024
    ) -> "DemandScratch":
        """max_chunks: of the longest row."""
        lanes = geometry.layer_lanes
        heads = power_of_two(geometry.num_q_heads // lanes)
        splits = min(MAX_SPLITS, power_of_two(-(-max_chunks // SPLIT_CHUNKS)))

        def parts(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(rows, lanes, *shape, splits, dtype=dtype, device=device)

        return cls(
            picked=torch.full((rows, geometry.num_lanes, most), -1, dtype=torch.int32, device=device),
            victims=torch.zeros(rows, geometry.num_lanes, most + 1, dtype=torch.int32, device=device),
            page=torch.full((rows, lanes, most), -1, dtype=torch.int64, device=device),
            slot=torch.full((rows, lanes, most), -1, dtype=torch.int32, device=device),
            demanded=torch.zeros(1, dtype=torch.int64, device=device),
            logits=torch.zeros(num_pages, geometry.num_q_heads, PAGE, dtype=torch.float32, device=device),
            top=parts(torch.float32, heads),
            total=parts(torch.float32, heads),
            wanted=parts(torch.int32),
            where=parts(torch.int32),
            best=parts(torch.float32),
        )


@cache
def demand_form(device: torch.device) -> Form:
    """How demand is decided: by one CUDA kernel, where that was built and the device has clusters of thread blocks."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9:
        return "triton"
    return "cuda" if cuda_library() else "triton"


def pick(
    rows: DeviceRows,
    sets: DeviceSets,
    scratch: DemandScratch,
    layer: int,
    geometry: KVGeometry,
    pool: torch.Tensor,
    host_pages: torch.Tensor,
    *,
    threshold: float,
    decay: float,
    block: int = SPLIT_CHUNKS,
    form: Form | None = None,
) -> None:
    """For each lane of a layer: note usage, and take in the chunks with most mass, the oldest one of equals first.

    scratch.logits holds the scores of the rows' full chunks and is overwritten. What comes is copied from the host
    pages into slots that the lane has to spare, as scratch.page and scratch.slot say; `settle` puts it into the list.
    Until then no list changes, so attention may read them beside this. A lane must own as many slots beyond those in
    use as its sets.room. block: chunks that a program of Triton looks at at a time. form: None for `demand_form`, or
    "triton" for more than the CUDA kernel takes.

    Raises LsaError if CUDA refuses the launch.
    """
    g, n = geometry, len(rows.length)
    if not n:
        return
    per_lane, most = g.num_q_heads // g.layer_lanes, scratch.slot.shape[2]
    if (form or _form(sets, scratch, per_lane)) == "cuda":
        arguments = demand_arguments(
            rows, sets, scratch, layer, g, pool, host_pages, threshold=threshold, decay=decay
        )  # fmt: skip
        launch(built_library(), "lsa_demand", *arguments)
        return
    from vllm_lsa.kernels import demand

    grid = (n, g.layer_lanes)
    side_by_side = min(n, MASS_ROWS) * g.layer_lanes
    splits = max(1, min(scratch.best.shape[2], power_of_two(MASS_PROGRAMS // side_by_side + 1) // 2))
    shape = dict(CHUNK=g.chunk_tokens, PAGE=PAGE, Q_HEADS=g.num_q_heads, LANE_Q=per_lane, SPLITS=splits, BLOCK=block)
    heads, stride, first = power_of_two(per_lane), sets.pages.stride(0), layer * g.layer_lanes
    shared = (min(n, MASS_ROWS), g.layer_lanes, splits)
    if splits > 1:  # the next kernel does it where each lane has one program anyway
        demand.mass_stats_kernel[shared](
            rows.length, rows.state, sets.pages, scratch.logits, scratch.top, scratch.total, n, stride,
            **shape, LANE_Q_PAD=heads, num_warps=4, **early(pool.device),
        )  # fmt: skip
    demand.mass_kernel[shared](
        rows.length, rows.state, sets.pages, sets.held, sets.usage, scratch.logits, scratch.top, scratch.total,
        scratch.wanted, scratch.best, scratch.where, n, stride, g.num_lanes, first, threshold, decay,
        **shape, LANE_Q_PAD=heads, num_warps=4, **early(pool.device),
    )  # fmt: skip
    demand.pick_kernel[grid](
        rows.length, rows.state, rows.block_table, sets.pages, sets.counts, sets.room, sets.slot, sets.held,
        scratch.logits, scratch.wanted, scratch.best, scratch.where, scratch.picked, scratch.page, scratch.slot,
        scratch.demanded, pool, host_delta(pool, host_pages), rows.block_table.stride(0), stride, g.num_lanes, first,
        **shape, ELEMENTS=pool[0].numel(), TILE=min(COPY_TILE, power_of_two(pool[0].numel())),
        MOST=most, MOST_PAD=power_of_two(most), PER_BLOCK=g.chunks_per_block, num_warps=4, **early(pool.device),
    )  # fmt: skip


def _form(sets: DeviceSets, scratch: DemandScratch, heads: int) -> Form:
    fits = scratch.slot.shape[2] <= CUDA_MOST and heads <= CUDA_HEADS and sets.pages.shape[1] <= CUDA_PAGES
    return demand_form(sets.pages.device) if fits else "triton"


def settle(
    rows: DeviceRows,
    sets: DeviceSets,
    scratch: DemandScratch,
    geometry: KVGeometry,
    *,
    sink: int,
    recency: int,
    block: int = 1024,
    form: Form | None = None,
) -> None:
    """Once a step, after the `pick` of all layers: put what came into the lists, and let the least used leave.

    The rule is `Replacement.choose`; of equals the lowest entry leaves, and at most one more than may come. sink,
    recency: chunks that never leave. Where these leave no room, what came with least mass goes again. block, form: as
    for `pick`. Raises LsaError if CUDA refuses the launch.
    """
    g, n = geometry, len(rows.length)
    if not n:
        return
    if (form or _form(sets, scratch, g.num_q_heads // g.layer_lanes)) == "cuda":
        launch(built_library(), "lsa_settle", *settle_arguments(rows, sets, scratch, g, sink=sink, recency=recency))
        return
    from vllm_lsa.kernels.demand import settle_kernel

    most = scratch.picked.shape[2]
    settle_kernel[(n, g.num_lanes)](
        rows.length, rows.state, sets.pages, sets.counts, sets.caps, sets.chunk, sets.slot, sets.held, sets.usage,
        scratch.picked, scratch.victims, sets.pages.stride(0), g.num_lanes, sink, recency,
        MOST=most, MOST_PAD=power_of_two(most), CHUNK=g.chunk_tokens, PAGE=PAGE, BLOCK=block, num_warps=4,
        **early(sets.pages.device),
    )  # fmt: skip


def settle_arguments(
    rows: DeviceRows, sets: DeviceSets, scratch: DemandScratch, geometry: KVGeometry, *, sink: int, recency: int
) -> tuple[int | float, ...]:
    """What the C function of the CUDA kernel takes, up to the stream. Arguments: see `settle`."""
    return (
        rows.length.data_ptr(), rows.state.data_ptr(), sets.pages.data_ptr(), sets.pages.stride(0),
        sets.counts.data_ptr(), sets.caps.data_ptr(), sets.room.data_ptr(), sets.chunk.data_ptr(),
        sets.slot.data_ptr(), sets.held.data_ptr(), sets.usage.data_ptr(), scratch.picked.data_ptr(), len(rows.length),
        geometry.num_lanes, geometry.chunk_tokens, scratch.picked.shape[2], sink, recency,
    )  # fmt: skip


def demand_arguments(
    rows: DeviceRows, sets: DeviceSets, scratch: DemandScratch, layer: int, geometry: KVGeometry, pool: torch.Tensor,
    host_pages: torch.Tensor, *, threshold: float, decay: float,
) -> tuple[int | float, ...]:  # fmt: skip
    """The same for `pick`."""
    g, size = geometry, pool.element_size()
    return (
        *settle_arguments(rows, sets, scratch, g, sink=0, recency=0), rows.block_table.data_ptr(),
        rows.block_table.stride(0), scratch.logits.data_ptr(), scratch.page.data_ptr(), scratch.slot.data_ptr(),
        scratch.demanded.data_ptr(), pool.data_ptr(), host_delta(pool, host_pages) * size, pool[0].numel() * size,
        g.layer_lanes, layer * g.layer_lanes, g.num_q_heads, g.chunks_per_block, threshold, decay,
    )  # fmt: skip


def refresh(
    rows: DeviceRows,
    sets: DeviceSets,
    state: DeviceRefresh,
    geometry: KVGeometry,
    *,
    sink: int,
    recency: int,
    most_used: float,
    block: int = 1024,
) -> None:
    """Once a step, before its first layer: bring the sets of all lanes nearer to what was selected.

    The chunks that state.copy_page and copy_slot named at the last call must have been copied; they take the places of
    chunks that were not selected, are neither sink nor recent and were used at most `most_used` of late. Then the next
    ones are named, to be copied beside the step.
    """
    from vllm_lsa.kernels.demand import refresh_kernel

    g = geometry
    if not len(rows.length):
        return
    refresh_kernel[(len(rows.length), g.num_lanes)](
        rows.length, rows.state, rows.block_table, sets.pages, sets.counts, sets.chunk, sets.slot, sets.held,
        sets.usage, state.target, state.selected, state.chunk, state.slot, state.victims, state.copy_page,
        state.copy_slot, state.brought, rows.block_table.stride(0), sets.pages.stride(0), g.num_lanes, sink, recency,
        most_used,
        NEXT=NEXT, CHUNK=g.chunk_tokens, PER_BLOCK=g.chunks_per_block, PAGE=PAGE, BLOCK=block, num_warps=4,
    )  # fmt: skip


def fetch(
    pool: torch.Tensor, host_pages: torch.Tensor, page: torch.Tensor, slot: torch.Tensor, programs: int | None = None
) -> None:
    """Copy host pages into slots: page int64 [...], slot int32 [...], contiguous; a slot of -1 leaves the entry out.

    programs: how many share the list; None for one each. Few leave the rest of the GPU to what runs beside it.
    """
    from vllm_lsa.kernels.pages import fetch_kernel

    count = slot.numel()
    if not count:
        return
    elements = pool[0].numel()
    # Where each entry has a program of its own, it need not look around.
    look = 1 if programs is None or count <= programs else LOOK
    fetch_kernel[(min(-(-count // look), programs or count),)](
        pool, page, slot, count, host_delta(pool, host_pages), ELEMENTS=elements,
        TILE=min(COPY_TILE, power_of_two(elements)), LOOK=look, num_warps=4,
    )  # fmt: skip


def gather_history(
    pool: torch.Tensor,
    host_pages: torch.Tensor,
    blocks: torch.Tensor,
    slot_of: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first_chunk: int,
    num_chunks: int,
    layer: int,
    geometry: KVGeometry,
    programs: int,
) -> None:
    """K and V of a request's chunks [first_chunk, first_chunk + num_chunks) into keys and values [>= tokens, Hkv, D].

    blocks: int32 or int64, the request's block ids. From slots where there are some, else from the host store. Of e4m3
    pages keys and values get what the bytes say, without scales.
    """
    from vllm_lsa.kernels.pages import gather_history_kernel

    g = geometry
    gather_history_kernel[(max(1, min(programs, num_chunks * g.num_kv_heads)),)](
        pool, blocks, slot_of, keys, values, first_chunk, num_chunks, host_delta(pool, host_pages), g.num_lanes,
        layer * g.layer_lanes,
        HEADS=g.num_kv_heads, LANE_HEADS=g.lane_heads, CHUNK=g.chunk_tokens, DIM=g.head_dim,
        DIM_PAD=power_of_two(g.head_dim), PER_BLOCK=g.chunks_per_block, E4M3=g.quantised, num_warps=4,
    )  # fmt: skip
