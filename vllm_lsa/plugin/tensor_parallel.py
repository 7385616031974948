"""The tensor-parallel group of this worker, as `residency.peers` sees it."""

import torch
from vllm.distributed.parallel_state import get_tp_group

from vllm_lsa.residency.peers import Peers


def rank_and_size() -> tuple[int, int]:
    """This worker's place in its tensor-parallel group, and how many ranks that has."""
    group = get_tp_group()
    return group.rank_in_group, group.world_size


def peers() -> Peers:
    """The other ranks of the group. What is on the host is exchanged by gloo, what is on the device by its library."""
    group = get_tp_group()
    if group.world_size == 1:
        return Peers()

    def gather(x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.world_size)]
        by = group.cpu_group if x.device.type == "cpu" else group.device_group
        torch.distributed.all_gather(parts, x.contiguous(), group=by)
        return torch.stack(parts)

    return Peers(gather)
