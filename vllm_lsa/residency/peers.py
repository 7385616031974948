"""What the ranks of a tensor-parallel group have to agree on. Each holds some heads of every layer."""

from collections.abc import Callable
from typing import Literal

import torch

Gather = Callable[[torch.Tensor], torch.Tensor]
"""Every rank's tensor, stacked in rank order [ranks, …], for a tensor whose shape and dtype are those of all ranks."""


class Peers:
    """The ranks that hold the other heads of the same layers; none by default.

    All ranks must call the same methods in the same order. Each works out its result from what all of them gave, in
    rank order, so the results are equal bit for bit.
    """

    def __init__(self, gather: Gather | None = None) -> None:
        """gather: a collective of the group; None where a rank holds all heads."""
        self._gather = gather

    def concatenate(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """All ranks' tensors one after the other along `dim` >= 0: of heads, in the order of the model."""
        return x if self._gather is None else torch.cat(self._gather(x).unbind(0), dim)

    def combine(self, x: torch.Tensor, mode: Literal["or", "mean"]) -> torch.Tensor:
        """Maximum ("or") or mean over ranks, each of which has combined equally many heads of its own."""
        if self._gather is None:
            return x
        every = self._gather(x)
        return every.amax(0) if mode == "or" else every.mean(0)

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks."""
        return x if self._gather is None else self._gather(x).sum(0)

    def agree(self, value: bool) -> bool:
        """Whether it is true on all ranks."""
        return value if self._gather is None else bool(self._gather(torch.tensor([value], dtype=torch.uint8)).all())
