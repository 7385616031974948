"""The processes of a run: one, or those that ``torchrun`` started."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_PATIENCE = timedelta(hours=12)  # for the slowest rank of a step


class Group:
    """This process among those that work on a step together. A group of one does nothing."""

    def __init__(self, step: str, device: str) -> None:
        """Joins the others if ``torchrun`` started this. step: sets what it says apart from other steps'."""
        self.rank, self.size = rank_and_size()
        self.device = device
        if self.size == 1:
            return
        # Every step is a process group of its own, in processes of its own; the agent's store lives for all of them.
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store: Any = dist.TCPStore(host, port, self.size, is_master=not agent and self.rank == 0, timeout=_PATIENCE)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device != "cpu" else "gloo",
            store=dist.PrefixStore(f"{step}/{attempt}", store),
            rank=self.rank,
            world_size=self.size,
            timeout=_PATIENCE,
        )

    @property
    def leads(self) -> bool:
        """Whether this process does what only one does."""
        return self.rank == 0

    def mine(self, items: Sequence[int]) -> Sequence[int]:
        """The share of this process."""
        return items[self.rank :: self.size]

    def barrier(self) -> None:
        """Wait for all processes."""
        self.agree(True)

    def agree(self, value: bool) -> bool:
        """What the leading process says."""
        if self.size == 1:
            return value
        said = torch.tensor([int(value and self.leads)])
        dist.all_reduce(said)
        return bool(said.item())

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each of the fp32 tensors by its sum over processes, in one message."""
        if self.size == 1:
            return
        flat = torch.cat([x.reshape(-1) for x in tensors])
        dist.all_reduce(flat)
        for x, summed in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.copy_(summed.view_as(x))

    def close(self) -> None:
        if self.size > 1:
            self.barrier()
            dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """Of this process, as ``torchrun`` says in the environment; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
