"""The eigenvectors of a low-rank M without a T×T eigenproblem.

Pivoted Cholesky gives M = F Fᵀ + E with E positive semidefinite and tr E at the rounding level of
M, the error that an eigendecomposition makes too. From there on it is the spectral form on r
columns; their complement belongs to the eigenvalue zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import pivoted_cholesky
from .eigen import eigen

__all__ = ["eigen_low_rank"]


def eigen_low_rank(M: Tensor, max_rank: int, padded: bool) -> tuple[Tensor, Tensor]:
    """M = P Diag(s) Pᵀ to rounding: s (*batch, r), P (*batch, T, r); r ≤ max_rank.

    r is the largest rank of the batch. Where M has no such rank, or is not positive semidefinite,
    s and P have the shapes (*batch, 0) and (*batch, 0, 0). With ``padded``, for tracing, the shapes
    are those of max_rank = T in every case.
    """
    F, rank = pivoted_cholesky(M, max_rank)
    found = [int(r) for r in rank.flatten().tolist()]
    if any(r < 0 for r in found):
        if not padded:
            return M[..., 0, :0].clone(), M[..., :0, :0].clone()
        s, P = eigen(M)
        return s, P.contiguous()
    r = max_rank if padded else max(found, default=0)
    # F = Q C: the factor C keeps the small eigenvalues that FᵀF would lose.
    Q, C = torch.linalg.qr(F[..., :r])
    s, V = torch.linalg.eigh(C @ C.mT)
    # What eigh returns below zero for a Gram matrix is rounding.
    return s.clamp_(min=0), Q @ V
