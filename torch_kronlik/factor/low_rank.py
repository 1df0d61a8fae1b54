"""The eigenvectors of a low-rank M without a T×T eigenproblem.

Pivoted Cholesky gives M = F Fᵀ + E with E positive semidefinite and tr E at the rounding level of
M, the error that an eigendecomposition makes too. From there on it is the spectral form on r
columns; their complement belongs to the eigenvalue zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import mean_with_transpose
from ..ops import pivoted_cholesky
from ..rows.eigen import eigen
from ..rows.low_rank_root import eigen_of_root

__all__ = ["eigen_low_rank"]


def _pivoted(M: Tensor, max_rank: int) -> tuple[list[int], Tensor]:
    F, rank = pivoted_cholesky(M, max_rank)
    return [int(r) for r in rank.flatten().tolist()], F


def _is_asymmetric(M: Tensor) -> bool:
    """By three rows: asymmetry of the size of rounding, which the pivots refuse, is in all."""
    rows = sorted({0, M.shape[-1] // 2, M.shape[-1] - 1})
    return not torch.equal(M[..., rows, :], M[..., :, rows].mT)


def eigen_low_rank(M: Tensor, max_rank: int, padded: bool) -> tuple[Tensor, Tensor]:
    """M = P Diag(s) Pᵀ to rounding: s (*batch, r), P (*batch, T, r); r ≤ max_rank.

    r is the largest rank of the batch. Where M has no such rank, or is not positive semidefinite,
    s and P have the shapes (*batch, 0) and (*batch, 0, 0). With ``padded``, for tracing, the shapes
    are those of max_rank = T in every case.
    """
    found, F = _pivoted(M, max_rank)
    if any(r < 0 for r in found) and _is_asymmetric(M):
        found, F = _pivoted(mean_with_transpose(M), max_rank)
    if any(r < 0 for r in found):
        if not padded:
            return M[..., 0, :0].clone(), M[..., :0, :0].clone()
        s, P = eigen(M)
        return s, P.contiguous()
    r = max_rank if padded else max(found, default=0)
    return eigen_of_root(F[..., :r])
