"""What rows on a budget attend to on a device engine, as its buffers say."""

from collections.abc import Iterator

import numpy as np

from vllm_lsa.device.engine import DeviceEngine
from vllm_lsa.device.plan import DevicePlan
from vllm_lsa.residency.requests import Request


def held_chunks(engine: DeviceEngine, layer: int, plan: DevicePlan) -> Iterator[tuple[int, Request, np.ndarray]]:
    """(lane, request, its chunks there int32 [n], ascending) of a layer, for a step's rows on a budget."""
    lanes = engine.geometry.layer_lanes
    for name in plan.requests:
        request = engine.mirror.requests[name]
        row = engine.control.set_row(request)
        if row < 0:
            continue
        held = engine.sets.by_chunk(row, engine.sets.held, engine.geometry.chunks(request.length))
        here = held[layer * lanes : (layer + 1) * lanes].cpu().numpy()
        for i in range(lanes):
            yield layer * lanes + i, request, here[i].nonzero()[0].astype(np.int32)
