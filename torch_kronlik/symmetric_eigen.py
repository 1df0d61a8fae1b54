"""A constant factor M, diagonalised once for many calls."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .autocast import full_precision
from .checks import (
    check_broadcast,
    check_eigen,
    check_floating,
    check_rows,
    check_square,
    check_uniform,
)
from .rules.factorise import constant_eigen
from .rules.finite import finite

__all__ = ["SymmetricEigen", "symmetric_eigen"]


class SymmetricEigen(NamedTuple):
    """M = P Diag(s) Pᵀ by its eigenvalues and eigenvectors, a constant for differentiation.

    Accepted wherever M is. Make one with :func:`symmetric_eigen`.

    Args:
        eigenvalues: s, (*batch, T), ascending.
        eigenvectors: P, (*batch, T, T), orthonormal columns.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor

    @full_precision
    def decouple(self, Y: Tensor) -> tuple[SymmetricEigen, Tensor]:
        """The data and M in the basis of the eigenvectors, for many likelihoods of the same Y.

        There U is block diagonal with the blocks s_i K + Σ, one for each row of PᵀY, so that the
        model falls apart into T problems of one row::

            rows, Z = eigen.decouple(Y)
            kron_gaussian_nll(Z, rows, K, Sigma=Sigma).sum(-1)
            # equals kron_gaussian_nll(Y, eigen, K, Sigma=Sigma)

        Args:
            Y: (*batch, T, D).

        Returns:
            A SymmetricEigen of batch shape (*batch, T) and size 1, and PᵀY as (*batch, T, 1, D). K
            and the noise stay as they are; with a batch of their own they need one more dimension
            of size 1 behind it.

        Raises:
            TypeError, ValueError: Y does not fit, or is not finite.

        Cost: O(T²·D), once; O(T·D² + D³) for each value and gradient in K and the noise.

        >>> import torch
        >>> rows, Z = symmetric_eigen(torch.eye(3)).decouple(torch.zeros(3, 2))
        >>> Z.shape
        torch.Size([3, 1, 2])
        """
        s, P = self
        check_uniform(**{"M.eigenvectors": P, "Y": Y})
        check_square("M.eigenvectors", P, "T")
        check_eigen(s, P)
        check_rows("Y", Y, P.shape[-1])
        check_broadcast(Y=Y.shape[:-2], M=P.shape[:-2])
        rows = SymmetricEigen(s[..., None], torch.ones_like(s)[..., None, None])
        named = {"Y": Y, "M.eigenvalues": s, "M.eigenvectors": P}
        return rows, finite(P.mT @ Y, **named)[..., :, None, :]


@full_precision
def symmetric_eigen(M: Tensor) -> SymmetricEigen:
    """Diagonalise a symmetric positive semidefinite matrix that stays the same over many calls.

    M = P Diag(s) Pᵀ. Every later evaluation with the result costs O(T²·D + T·D²).

    Args:
        M: (*batch, T, T), symmetric. Gradients do not flow through an eigendecomposition here, so
            M must not require one: pass ``M.detach()``, or pass M itself to the functions.

    Returns:
        SymmetricEigen(eigenvalues (*batch, T), eigenvectors (*batch, T, T)).

    Raises:
        TypeError: M is not a float32 or float64 tensor.
        ValueError: M is not square, requires a gradient, or is not finite.

    Cost: O(T³), once.

    >>> import torch
    >>> s, P = symmetric_eigen(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    >>> s
    tensor([1., 2.])
    """
    check_floating(M=M)
    check_square("M", M, "T")
    if M.requires_grad:
        raise ValueError(
            "M requires a gradient, but symmetric_eigen(M) is a constant: pass M.detach(), "
            "or pass M itself to the likelihood"
        )
    s, P = constant_eigen(M)
    return SymmetricEigen(s, P)
