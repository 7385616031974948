"""What each worker of an engine says of its LSA: called through `LLM.collective_rpc`."""

import zlib
from typing import Any

import numpy as np

from vllm_lsa.plugin.runtime import Runtime

_digests: dict[int, int] = {}


def watch(worker: Any) -> None:
    """From here on keep a checksum, per lane, of the chunks that decoding attends to."""

    def trace(lane: int, request: Any, chunks: np.ndarray) -> None:
        _digests[lane] = zlib.crc32(np.sort(chunks).tobytes(), _digests.get(lane, 0))

    Runtime.latest().engine.attention.tracer = trace


def report(worker: Any) -> dict[str, Any]:
    """Sizes, counts and the checksums [layer][lane of the layer] of a rank."""
    engine = Runtime.latest().engine
    g, counted = engine.geometry, engine.counted()
    return {
        "rank": g.rank,
        "ranks": g.ranks,
        "kv_heads": g.num_kv_heads,
        "host_blocks": engine.store.num_blocks,
        "host_bytes": engine.store.num_blocks * g.block_bytes,
        "pool_slots": engine.pool.num_slots,
        "sets": [
            [_digests.get(layer * g.layer_lanes + i, 0) for i in range(g.layer_lanes)] for layer in range(g.num_layers)
        ],
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
