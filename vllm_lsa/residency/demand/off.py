"""No demand: a step attends to its resident set and nothing else."""

import torch

from vllm_lsa.residency.demand.base import Demand


class NoDemand(Demand):
    """Picks nothing."""

    name = "off"
    index = None
    chunks = 0

    def pick(self, query: torch.Tensor, cells: torch.Tensor, candidates: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.empty(0, dtype=torch.int64, device=candidates.device)
