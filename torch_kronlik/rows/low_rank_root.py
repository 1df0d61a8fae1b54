"""M by a thin root."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import Shape
from ..derivatives import define_flat, register
from ..errors import require_finite
from ..records import Matrix
from .eigen import precise_eigh
from .row_matrix import RowMatrix
from .thin import register_thin

__all__ = ["LowRankRoot", "basis_of_root"]


@register_thin
class LowRankRoot(NamedTuple):
    """The row covariance M = F Fᵀ of rank r or less, never formed.

    Accepted wherever M is. Gradients flow to F.

    Args:
        F: (*batch, T, r), any matrix: features of the rows, random or learnt. r may exceed T, but
            then M as a matrix is cheaper.

    Cost: of a likelihood with its gradients O(T·r² + T·r·D); memory O(T·(r + D)).

    >>> import torch, torch_kronlik as tk
    >>> F = torch.ones(3, 1)
    >>> tk.kron_logdet(tk.LowRankRoot(F), torch.eye(1), log_noise=torch.zeros(1))
    tensor(1.3863)
    """

    F: Matrix

    @property
    def size(self) -> int:
        """T."""
        return self.F.shape[-2]

    @property
    def batch(self) -> torch.Size:
        return self.F.shape[:-2]

    def check(self) -> None:
        if self.F.dim() < 2:
            raise ValueError(f"M.F must have shape (*batch, T, r), got {tuple(self.F.shape)}")

    def named(self) -> dict[str, Tensor]:
        return {"M.F": self.F}

    def matmul(self, X: Tensor) -> Tensor:
        """M X for X (*batch, T, k)."""
        return self.F @ (self.F.mT @ X)

    def diagonal(self) -> Tensor:
        """(*batch, T)"""
        return self.F.square().sum(-1)

    def dense(self) -> Tensor:
        """M as a matrix, (*batch, T, T)."""
        return self.F @ self.F.mT

    def scaled(self, c: Tensor) -> LowRankRoot:
        return LowRankRoot(c[..., None] * self.F)

    def basis(self) -> tuple[Tensor, Tensor]:
        s, P = basis_of_root(self.F)
        return s, P

    def tangent(self, along: LowRankRoot) -> RowMatrix | None:
        if along.F is None:
            return None
        return RowMatrix(self.size, pairs=((along.F, self.F), (self.F, along.F)))

    def pull_back(self, G: RowMatrix, to: Shape) -> LowRankRoot:
        return LowRankRoot(2 * G.apply(self.F, to))

    def curvature(self, G: RowMatrix, along: LowRankRoot, to: Shape) -> LowRankRoot:
        return LowRankRoot(2 * G.apply(along.F, to))


def eigen_of_root(F: Tensor) -> tuple[Tensor, Tensor]:
    """F Fᵀ = P Diag(s) Pᵀ for F (*batch, T, r): s (*batch, min(T, r)), P (*batch, T, min(T, r))."""
    # F = Q C: the factor C keeps the small eigenvalues that FᵀF would lose.
    Q, C = torch.linalg.qr(F)
    s, V = precise_eigh(C @ C.mT)
    # What eigh returns below zero for a Gram matrix is rounding.
    return s.clamp_(min=0), Q @ V


def _basis(F: Tensor) -> tuple[Tensor, Tensor]:
    require_finite(F, **{"M.F": F})
    return eigen_of_root(F)


def _fake(F: Tensor) -> tuple[Tensor, Tensor]:
    T, r = F.shape[-2:]
    n = min(T, r)
    return F.new_empty((*F.shape[:-2], n)), F.new_empty((*F.shape[:-2], T, n))


basis_of_root = define_flat("basis_of_root(Tensor F) -> (Tensor s, Tensor P)", _basis, _fake)
register(basis_of_root, core_dims=lambda F: ([2], [1, 2]))
