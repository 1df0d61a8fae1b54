"""The rules of matrix differential calculus: the change of a function to first order in a change.

Each takes the arguments and their changes, and returns the change of the value. Products broadcast
over batch dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .products import kron

__all__ = [
    "hadamard_differential",
    "inverse_differential",
    "kron_differential",
    "kron_plus_noise_differential",
    "logdet_differential",
]


def inverse_differential(X: Tensor, dX: Tensor) -> Tensor:
    """``d(X⁻¹) = −X⁻¹ dX X⁻¹``.

    Args:
        X, dX: (*batch, n, n), X regular.

    Returns:
        (*batch, n, n).

    Raises:
        torch.linalg.LinAlgError: X is singular.

    Cost: two solves, O(n³).

    >>> inverse_differential(torch.tensor([[2.0]]), torch.tensor([[1.0]]))
    tensor([[-0.2500]])
    """
    right = torch.linalg.solve(X, dX)
    dY: Tensor = -torch.linalg.solve(X, right, left=False)
    return dY


def logdet_differential(X: Tensor, dX: Tensor) -> Tensor:
    """``d log |det X| = ⟨X⁻ᵀ, dX⟩ = tr(X⁻¹ dX)``.

    Args:
        X, dX: (*batch, n, n), X regular.

    Returns:
        (*batch).

    Raises:
        torch.linalg.LinAlgError: X is singular.

    Cost: one solve, O(n³).

    >>> logdet_differential(torch.tensor([[2.0]]), torch.tensor([[1.0]]))
    tensor(0.5000)
    """
    change: Tensor = torch.linalg.solve(X, dX).diagonal(dim1=-2, dim2=-1).sum(-1)
    return change


def kron_differential(X: Tensor, dX: Tensor, Y: Tensor, dY: Tensor) -> Tensor:
    """``d(X ⊗ Y) = dX ⊗ Y + X ⊗ dY``.

    Args:
        X, dX: (*batch, m, n).
        Y, dY: (*batch, p, q).

    Returns:
        (*batch, m·p, n·q).

    Raises:
        TypeError, ValueError: an argument is not a tensor with two or more dimensions.

    Cost: 2·m·n·p·q multiplications.

    >>> one, two = torch.tensor([[1.0]]), torch.tensor([[2.0]])
    >>> kron_differential(two, one, one, two)
    tensor([[5.]])
    """
    return kron(dX, Y) + kron(X, dY)


def hadamard_differential(X: Tensor, dX: Tensor, Y: Tensor, dY: Tensor) -> Tensor:
    """``d(X ⊙ Y) = dX ⊙ Y + X ⊙ dY``.

    Args:
        X, dX, Y, dY: (*batch, m, n).

    Returns:
        (*batch, m, n).

    Raises:
        RuntimeError: the shapes do not broadcast.

    Cost: 2·m·n multiplications.

    >>> one, two = torch.tensor([[1.0]]), torch.tensor([[2.0]])
    >>> hadamard_differential(two, one, one, two)
    tensor([[5.]])
    """
    return dX * Y + X * dY


def kron_plus_noise_differential(
    M: Tensor, K: Tensor, *, dM: Tensor, dK: Tensor, dSigma: Tensor
) -> Tensor:
    """``dU = dM ⊗ K + M ⊗ dK + I_T ⊗ dΣ`` for the covariance U = M ⊗ K + I_T ⊗ Σ.

    Args:
        M, dM: (*batch, T, T).
        K, dK, dSigma: (*batch, D, D).

    Returns:
        (*batch, T·D, T·D), dense.

    Raises:
        TypeError, ValueError: an argument is not a tensor with two or more dimensions.

    Cost: O(T²·D²).

    >>> M, K, zero = torch.eye(2), torch.tensor([[1.0]]), torch.tensor([[0.0]])
    >>> kron_plus_noise_differential(M, K, dM=torch.zeros(2, 2), dK=zero, dSigma=K)
    tensor([[1., 0.],
            [0., 1.]])
    """
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    return kron_differential(M, dM, K, dK) + kron(eye, dSigma)
