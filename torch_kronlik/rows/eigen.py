"""M by its eigenvalues and eigenvectors: a constant, diagonalised once for many calls."""

from __future__ import annotations

import math
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ..autocast import full_precision
from ..batch import Shape, mean_with_transpose
from ..checks import (
    check_broadcast,
    check_eigen,
    check_floating,
    check_rows,
    check_square,
    check_uniform,
)
from ..derivatives import define_flat, register
from ..errors import require_finite
from ..guards import finite
from ..records import Matrix, Vector
from .base import Rows
from .dense import Dense
from .row_matrix import RowMatrix

__all__ = ["SymmetricEigen", "eigen", "eigh", "precise_eigh", "rounded", "symmetric_eigen"]


@Rows.register
class SymmetricEigen(NamedTuple):
    """M = P Diag(s) Pᵀ by its eigenvalues and eigenvectors, a constant for differentiation.

    Accepted wherever M is. Make one with :func:`symmetric_eigen`.

    Args:
        eigenvalues: s, (*batch, T), ascending.
        eigenvectors: P, (*batch, T, T), orthonormal columns.
    """

    eigenvalues: Vector
    eigenvectors: Matrix

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
        self.check()
        check_rows("Y", Y, P.shape[-1])
        check_broadcast(Y=Y.shape[:-2], M=P.shape[:-2])
        rows = SymmetricEigen(s[..., None], torch.ones_like(s)[..., None, None])
        named = {"Y": Y, "M.eigenvalues": s, "M.eigenvectors": P}
        return rows, finite(P.mT @ Y, **named)[..., :, None, :]

    # --- as a row covariance, see Rows -----------------------------------------------------------

    @property
    def is_constant(self) -> bool:
        return True

    @property
    def is_curved(self) -> bool:
        return False

    @property
    def method(self) -> str:
        return "spectral"

    @property
    def size(self) -> int:
        """T."""
        return self.eigenvectors.shape[-1]

    @property
    def batch(self) -> torch.Size:
        return self.eigenvectors.shape[:-2]

    def check(self) -> None:
        check_square("M.eigenvectors", self.eigenvectors, "T")
        check_eigen(self.eigenvalues, self.eigenvectors)

    def named(self) -> dict[str, Tensor]:
        return {"M.eigenvalues": self.eigenvalues, "M.eigenvectors": self.eigenvectors}

    def matmul(self, X: Tensor) -> Tensor:
        """M X for X (*batch, T, k)."""
        return self.eigenvectors @ (self.eigenvalues[..., :, None] * (self.eigenvectors.mT @ X))

    def transposed_matmul(self, X: Tensor) -> Tensor:
        return self.matmul(X)

    def symmetric_matmul(self, X: Tensor) -> Tensor:
        return self.matmul(X)

    def diagonal(self) -> Tensor:
        """(*batch, T)"""
        return (self.eigenvectors.square() @ self.eigenvalues[..., None]).squeeze(-1)

    def dense(self) -> Tensor:
        """M as a matrix, (*batch, T, T)."""
        return (self.eigenvectors * self.eigenvalues[..., None, :]) @ self.eigenvectors.mT

    def scaled(self, c: Tensor) -> Dense:
        """A matrix: its eigenvectors are others."""
        return Dense(self.dense()).scaled(c)

    def basis(self) -> tuple[Tensor, Tensor]:
        return self.eigenvalues, self.eigenvectors

    def tangent(self, along: SymmetricEigen | None) -> RowMatrix | None:
        return None if along is None or all(x is None for x in along) else _refuse()

    def matmul_tangent(self, X: Tensor, along: SymmetricEigen) -> None:
        self.tangent(along)

    def matmul_pull_back(self, Z: Tensor, X: Tensor, to: Shape) -> NoReturn:
        _refuse()

    def pull_back(self, G: RowMatrix, to: Shape) -> NoReturn:
        _refuse()

    def curvature(self, G: RowMatrix, along: SymmetricEigen, to: Shape) -> NoReturn:
        _refuse()


def _refuse(*_: object) -> NoReturn:
    raise ValueError(
        "M requires a gradient, but a SymmetricEigen is a constant: pass M.detach() to "
        "symmetric_eigen, or pass M itself to the likelihood"
    )


# --- the eigendecomposition ----------------------------------------------------------------------


def eigen(M: Tensor) -> tuple[Tensor, Tensor]:
    """M = P Diag(s) Pᵀ with rounding below zero removed: (s, P)."""
    s, P = eigh(mean_with_transpose(M), M=M)
    return rounded(s), P


def eigh(X: Tensor, **arguments: Tensor | None) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh`` of X, which was made of these arguments."""
    require_finite(X, **arguments)
    values, vectors = precise_eigh(X)
    require_finite(values, **arguments)
    return values, vectors


def precise_eigh(X: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh`` as LAPACK's precision has it: the float32 solvers of cuSOLVER lose
    thirty times as much, and its float64 ones take a third longer."""
    if X.is_cuda and X.dtype == torch.float32:
        values, vectors = torch.linalg.eigh(X.double())
        return values.float(), vectors.float()
    values, vectors = torch.linalg.eigh(X)
    return values, vectors


def rounded(values: Tensor) -> Tensor:
    """Negative eigenvalues within the rounding error of ``eigh`` (n eps max|λ|) become the zeros
    that they stand for; a matrix that is truly indefinite keeps its negative eigenvalues."""
    if values.shape[-1] == 0:
        return values
    scale = torch.linalg.vector_norm(values, math.inf, -1, keepdim=True)
    below = -values.shape[-1] * torch.finfo(values.dtype).eps * scale
    return torch.where(values >= below, values.relu(), values)


def _eigen_fake(M: Tensor) -> tuple[Tensor, Tensor]:
    return M.new_empty(M.shape[:-1]), M.new_empty(M.shape).mT  # as LAPACK leaves them


# A constant that refuses to be differentiated: it is not a part of something that has a rule.
_constant_eigen = define_flat(
    "constant_eigen(Tensor M) -> (Tensor s, Tensor P)", eigen, _eigen_fake
)
register(_constant_eigen, vjp=_refuse, jvp=_refuse, core_dims=lambda M: ([2], [1, 2]))


@full_precision
def symmetric_eigen(M: Tensor) -> SymmetricEigen:
    """Diagonalise a symmetric positive semidefinite matrix that stays the same over many calls.

    M = P Diag(s) Pᵀ. Every later evaluation with the result costs O(T²·D + T·D²), where all entries
    are observed and all rows have one noise.

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
    s, P = _constant_eigen(M)
    return SymmetricEigen(s, P)
