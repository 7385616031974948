"""The orthonormal Hadamard rotation, in Sylvester's order."""

import torch

from vllm_lsa.errors import LsaError


def _require_power_of_two(dim: int) -> None:
    if dim < 1 or dim & (dim - 1):
        raise LsaError(f"{dim} dimensions have no Hadamard rotation: use a power of two, or keys that are not rotated")


def hadamard_matrix(dim: int) -> torch.Tensor:
    """The matrix fp32 [dim, dim], H_2n = [[H_n, H_n], [H_n, -H_n]] / √2. Symmetric and its own inverse.

    Raises LsaError unless dim is a power of two.
    """
    _require_power_of_two(dim)
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * dim**-0.5


def hadamard_transform(x: torch.Tensor) -> torch.Tensor:
    """``x @ hadamard_matrix(D)`` in D log D steps. x: [..., D], any float dtype, which the result has too.

    Raises LsaError unless D is a power of two.
    """
    dim = x.shape[-1]
    _require_power_of_two(dim)
    half = 1
    while half < dim:
        a, b = x.unflatten(-1, (dim // (2 * half), 2, half)).unbind(-2)
        x = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        half *= 2
    return x * dim**-0.5
