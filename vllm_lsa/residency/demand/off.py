"""No demand: a step attends to its resident set and nothing else."""

import torch

from vllm_lsa.residency.demand.base import Demand


class NoDemand(Demand):
    """Estimates nothing."""

    name = "off"
    index = None

    def mass(
        self, query: torch.Tensor, cells: torch.Tensor, blocks: torch.Tensor, num_chunks: int, scale: float, layer: int,
        lanes: int,
    ) -> torch.Tensor:  # fmt: skip
        raise RuntimeError("demand is off")
