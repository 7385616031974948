"""Turns rows and resident sets into the tensors of a `StepPlan`."""

import numpy as np
import torch

from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.memory.host_store import HostStore
from vllm_lsa.memory.slot_pool import SlotPool
from vllm_lsa.residency.lookahead import LookaheadScheduler
from vllm_lsa.residency.plan import DecodeRow, Row, StepPlan


def plan_step(
    rows: list[Row],
    lookahead: LookaheadScheduler,
    geometry: KVGeometry,
    store: HostStore,
    pool: SlotPool,
    spare: int,
) -> StepPlan:
    """Lay out one step after `LookaheadScheduler.prepare`. spare: entries of each table row for chunks to come."""
    num_tokens = rows[-1].start + rows[-1].length if rows else 0
    size, lanes, layers, group = geometry.chunk_tokens, geometry.num_lanes, geometry.num_layers, geometry.layer_lanes
    offset = np.zeros(num_tokens, np.int32)
    page = np.full(num_tokens, -1, np.int64)
    slot = np.full((lanes, num_tokens), -1, np.int32)
    decodes: list[DecodeRow] = []
    decode_token: list[int] = []
    prefills: list[Row] = []
    whole_chunks: list[np.ndarray] = []
    complete: list[np.ndarray] = []
    begun: list[np.ndarray] = []
    begun_page: list[np.ndarray] = []
    for row in rows:
        request = row.request
        positions = np.arange(request.num_computed, request.num_computed + row.length)
        here = slice(row.start, row.start + row.length)
        chunks = np.arange(positions[0] // size, positions[-1] // size + 1)
        pages = store.page_ids(request.blocks, chunks)
        slots = pool.lookup(pages[None, :] + store.lane_offset[:, None])
        which = positions // size - chunks[0]
        offset[here] = positions % size
        page[here] = pages[which]
        slot[:, here] = slots[:, which]

        done = chunks[(chunks + 1) * size <= request.length]
        address = np.stack(
            [request.blocks[done // geometry.chunks_per_block], done % geometry.chunks_per_block], axis=1
        )
        partial = done * size < request.num_computed
        complete.append(address[~partial])
        whole_chunks.append(row.start + done[~partial] * size - request.num_computed)
        begun.append(address[partial])
        begun_page.append(pages[: len(done)][partial])

        if lookahead.is_decode(request):
            usage = lookahead.usage(request)
            # Once a step, not in every layer.
            blocks = None if usage is None else torch.from_numpy(request.blocks.astype(np.int64))
            decodes.append(DecodeRow(request, lookahead.resident(request), usage, lookahead.caps(request), blocks))
            decode_token.append(row.start)
        else:
            prefills.append(row)

    width = max((int(d.resident.counts.max()) for d in decodes), default=0) + spare
    table = np.full((lanes, len(decodes), width), -1, np.int32)
    counts = np.zeros((lanes, len(decodes)), np.int32)
    first_len = np.full((lanes, len(decodes)), size, np.int32)
    for i, decode in enumerate(decodes):
        resident = decode.resident
        used = int(resident.counts.max())
        table[:, i, :used] = resident.slots[:, :used]
        counts[:, i] = resident.counts
        first_len[:, i] = decode.request.length - resident.tail * size
        if resident.missing:
            _leave_out_missing(table[:, i], counts[:, i], first_len[:, i], size)

    starts = np.concatenate(whole_chunks) if rows else np.empty(0, np.int64)
    addresses = np.concatenate(complete + begun) if rows else np.empty((0, 2), np.int64)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array))

    def by_layer(array: np.ndarray) -> torch.Tensor:
        """[lanes, n, …] to [layers, n * group, …]."""
        split = array.reshape(layers, group, *array.shape[1:])
        return tensor(split.swapaxes(1, 2).reshape(layers, -1, *array.shape[2:]))

    return StepPlan(
        num_tokens=num_tokens,
        token_offset=tensor(offset.repeat(group)),
        token_page=torch.from_numpy((page[:, None] + store.lane_offset[:group]).reshape(-1)),
        token_slot=by_layer(slot),
        decodes=decodes,
        decode_token=tensor(np.array(decode_token, np.int64)),
        table=by_layer(table),
        counts=by_layer(counts),
        first_len=by_layer(first_len),
        prefills=prefills,
        complete_token=tensor((starts[:, None] + np.arange(size)).astype(np.int64)),
        complete_block=tensor(addresses[:, 0].astype(np.int64)),
        complete_chunk=tensor(addresses[:, 1].astype(np.int64)),
        complete_page=np.concatenate(begun_page) if rows else np.empty(0, np.int64),
        last_token=tensor(np.array([r.start + r.length - 1 for r in rows], np.int64)),
        last_row=tensor(np.array([lookahead.row(r.request) for r in rows], np.int64)),
    )


def _leave_out_missing(table: np.ndarray, counts: np.ndarray, first_len: np.ndarray, chunk_tokens: int) -> None:
    """Close up the entries that have no slot; attention streams those chunks. In place, one request, all lanes."""
    for lane in np.flatnonzero((table < 0).any(1) & (counts > 0)):
        slots = table[lane, : counts[lane]].copy()
        kept = slots[slots >= 0]
        if slots[0] < 0:
            first_len[lane] = chunk_tokens
        table[lane, : len(kept)] = kept
        counts[lane] = len(kept)
