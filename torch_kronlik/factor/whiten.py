"""K and Σ diagonalised together, with the failures explained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..batch import symmetric
from ..capture import is_captured
from ..errors import (
    COVARIANCE,
    OVERFLOW,
    not_positive_definite,
    raise_if_not_finite,
    require_finite,
)
from ..noise import Diagonal, Full
from ..ops import whiten_small
from ..rows.eigen import eigh, rounded

__all__ = ["require_positive_definite", "whiten"]

# The native kernel's storage; beyond it a call of LAPACK is the cheaper one anyway.
LARGEST_NATIVE = 16


def whiten(K: Tensor, noise: Diagonal | Full) -> tuple[Tensor, Tensor, Tensor]:
    """K and Sigma diagonalised together, RᵀΣR = I and RᵀKR = Diag(lam): (lam, R, log det Sigma).

    The outputs are taken in descending order of noise, so that L⁻¹ adds rows of smaller entries to
    rows of larger ones and L⁻¹KL⁻ᵀ is graded, and an algorithm that keeps the small eigenvalues of
    graded matrices can find them. ``lam`` is ascending.
    """
    if K.shape[-1] > LARGEST_NATIVE:
        return _whiten_by_lapack(K, noise)
    (tensor,) = noise
    lam, R, logdet_noise, status = whiten_small(K, tensor, noise.is_matrix)
    if is_captured(status):
        return torch.where(status[..., None] == 0, lam, torch.nan), R, logdet_noise
    if bool(status.any()):
        raise_if_not_finite(K=K, **noise.named())
        if bool((status == 1).any()):
            not_positive_definite("Sigma", status == 1)
        raise OverflowError(OVERFLOW)
    return lam, R, logdet_noise


def _whiten_by_lapack(K: Tensor, noise: Diagonal | Full) -> tuple[Tensor, Tensor, Tensor]:
    """``eigh`` gets the graded matrix from large to small, the order in which it keeps the small
    eigenvalues."""
    inputs = {"K": K, **noise.named()}
    order = noise.order()
    whiten_graded: Any = _whiten_full if noise.is_matrix else _whiten_diagonal
    lam, R, logdet_noise = whiten_graded(_permuted(symmetric(K), order), noise, order, inputs)
    if not bool(torch.isfinite(logdet_noise).all()):
        raise_if_not_finite(**inputs)
    back = order.argsort(-1)[..., None].expand(R.shape)
    return rounded(lam), R.take_along_dim(back, -2), logdet_noise


Whitened = tuple[Tensor, Tensor, Tensor]


def _whiten_diagonal(
    K: Tensor, noise: Diagonal, order: Tensor, inputs: dict[str, Tensor]
) -> Whitened:
    log_noise = noise.log_noise
    root = torch.exp(-0.5 * log_noise.take_along_dim(order, -1))[..., :, None]
    lam, Q = eigh((root * K * root.mT).flip(-2, -1), **inputs)
    return lam, root * Q.flip(-2), log_noise.sum(-1)


def _whiten_full(K: Tensor, noise: Full, order: Tensor, inputs: dict[str, Tensor]) -> Whitened:
    L = _cholesky(_permuted(noise.matrix(), order), noise.Sigma)
    half = torch.linalg.solve_triangular(L, K, upper=False)
    whitened = torch.linalg.solve_triangular(L, half.mT, upper=False)
    lam, Q = eigh(whitened.flip(-2, -1), **inputs)
    R = torch.linalg.solve_triangular(L.mT, Q.flip(-2), upper=True)
    return lam, R, 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _permuted(X: Tensor, order: Tensor) -> Tensor:
    """X with rows and columns in the order (*batch, D), at the joint batch shape."""
    batch = torch.broadcast_shapes(X.shape[:-2], order.shape[:-1])
    X, order = X.expand(*batch, *X.shape[-2:]), order.expand(*batch, -1)
    return X.take_along_dim(order[..., :, None], -2).take_along_dim(order[..., None, :], -1)


def _cholesky(X: Tensor, Sigma: Tensor) -> Tensor:
    require_finite(Sigma, Sigma=Sigma)
    L: Tensor
    L, info = torch.linalg.cholesky_ex(X)
    if bool(info.any()):
        not_positive_definite("Sigma", info != 0)
    return L


def require_positive_definite(s: Tensor, lam: Tensor, P: Tensor | None = None) -> Tensor:
    """``lam``, if 1 + s_i λ_j > 0 for all i, j: it is bilinear, so the extremes decide.

    P is given with eigenvalues that the user made, to be checked too.
    """
    if is_captured(lam) or s.numel() == 0 or lam.numel() == 0:
        return lam.clone()
    least = torch.minimum(s.min(), lam.min())
    if P is not None:
        least = least + 0 * (s.sum() + P.sum())  # a NaN unless they are finite
    if not bool(least >= 0):
        if P is not None:
            raise_if_not_finite(**{"M.eigenvalues": s, "M.eigenvectors": P})
        s_ends, lam_ends = (torch.stack(x.aminmax(dim=-1), -1) for x in (s, lam))
        least = 1 + (s_ends[..., :, None] * lam_ends[..., None, :]).flatten(-2).amin(-1)
        if not bool((least > 0).all()):
            not_positive_definite(COVARIANCE, ~(least > 0))
    return lam.clone()
