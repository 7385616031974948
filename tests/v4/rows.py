"""fp32 products whose rows do not depend on how many there are: what a request gets must not depend on its batch."""

import torch

# BLAS takes another path for fewer rows, which sums in another order.
_FEW = 16


def padded(x: torch.Tensor) -> torch.Tensor:
    """x [T, ...] with rows of zeros behind, if it has few."""
    return x if len(x) >= _FEW else torch.cat([x, x.new_zeros(_FEW - len(x), *x.shape[1:])])


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, K] @ weight [N, K] transposed."""
    return (padded(x) @ weight.T)[: len(x)]
