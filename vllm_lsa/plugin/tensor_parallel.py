"""The tensor-parallel group of this worker, as `residency.peers` sees it."""

import torch
from vllm.distributed.parallel_state import get_tp_group

from vllm_lsa.residency.peers import Peers


def rank_and_size() -> tuple[int, int]:
    """This worker's place in its tensor-parallel group, and how many ranks that has."""
    group = get_tp_group()
    return group.rank_in_group, group.world_size


def peers() -> Peers:
    """The other ranks of the group. What is on the host is exchanged by gloo, what is on the device by vLLM's own
    communicator: one more would take device memory that nobody has counted, in the first cycle of the first request.
    """
    group = get_tp_group()
    if group.world_size == 1:
        return Peers()

    def gather(x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            return group.all_gather(x.contiguous()[None], 0)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.world_size)]
        torch.distributed.all_gather(parts, x.contiguous(), group=group.cpu_group)
        return torch.stack(parts)

    return Peers(gather)
