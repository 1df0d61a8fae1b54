"""The eigenvectors of a low-rank M without a T×T eigenproblem.

Pivoted Cholesky gives M = F Fᵀ + E with E positive semidefinite and tr E at the rounding level of
M, the error that an eigendecomposition makes too. From there on it is the spectral form on r
columns; their complement belongs to the eigenvalue zero.
"""

from __future__ import annotations

from torch import Tensor

from ..ops import pivoted_cholesky
from ..rows.eigen import eigen
from ..rows.low_rank_root import eigen_of_root

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
    return eigen_of_root(F[..., :r])
