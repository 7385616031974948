"""What each worker of an engine says of its LSA: called through `LLM.collective_rpc`."""

import zlib
from typing import Any

import numpy as np
import torch

from tests.held_chunks import held_chunks
from vllm_lsa.device.engine import DeviceEngine
from vllm_lsa.device.plan import DevicePlan
from vllm_lsa.plugin.runtime import Runtime

_digests: dict[int, int] = {}
_chunks: dict[str, list[list[int]]] = {}


def watch(worker: Any) -> None:
    """From here on note, per lane, the chunks that decoding attends to; on a CUDA device those of rows on a budget, in
    steps that are not replayed from a graph."""
    engine = Runtime.latest().engine
    if isinstance(engine, DeviceEngine):
        engine.tracer = lambda layer, plan: _note_on_device(engine, layer, plan)
    else:
        engine.attention.tracer = _note


def _note(lane: int, request: Any, chunks: np.ndarray) -> None:
    chunks = np.sort(chunks)
    _digests[lane] = zlib.crc32(chunks.tobytes(), _digests.get(lane, 0))
    name = request.id.rsplit("-", 1)[0]  # as it was before vLLM made it unique
    lanes = _chunks.setdefault(f"{name}:{request.num_computed}", [])
    assert lane == len(lanes)
    lanes.append(chunks.tolist())


def _note_on_device(engine: DeviceEngine, layer: int, plan: DevicePlan) -> None:
    for lane, request, chunks in held_chunks(engine, layer, plan):
        _note(lane, request, chunks)


def report(worker: Any) -> dict[str, Any]:
    """Sizes, counts, the checksums [layer][lane of the layer] of a rank, and which chunks those are of: for each decode
    of a request, by "its name:tokens before", a sorted list for each lane."""
    engine = Runtime.latest().engine
    if isinstance(engine, DeviceEngine):
        # Counts come to the host behind the steps.
        torch.cuda.synchronize()
        engine.close_step()
        torch.cuda.synchronize()
    g, counted = engine.geometry, engine.counted()
    return {
        "rank": g.rank,
        "ranks": g.ranks,
        "device": engine.pool.pages.device.index or 0,
        "kv_heads": g.num_kv_heads,
        "host_blocks": engine.store.num_blocks,
        "host_bytes": engine.store.num_blocks * g.block_bytes,
        "pool_slots": engine.pool.num_slots,
        "sets": [
            [_digests.get(layer * g.layer_lanes + i, 0) for i in range(g.layer_lanes)] for layer in range(g.num_layers)
        ],
        "chunks": _chunks,
        "counts": {
            "pinned": engine.pool.num_pinned,
            "live": len(engine.mirror.requests),
            "cycles": counted["cycles"],
            "streamed": counted["bytes_streamed"],
            "fetched": counted["bytes_fetched"],
            "demanded": counted["chunks_demanded"],
            "missed": counted["chunks_missed"],
        },
    }
