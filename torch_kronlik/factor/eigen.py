"""The two eigendecompositions of the spectral route, with their failures explained."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..capture import is_captured
from ..ops import whiten_small
from .diagnose import (
    OVERFLOW,
    not_positive_definite,
    raise_if_not_finite,
    require_finite,
)

__all__ = ["U", "eigen", "require_positive_definite", "rounded", "whiten"]

U = "U = M ⊗ K + I ⊗ Sigma"


def eigen(M: Tensor) -> tuple[Tensor, Tensor]:
    """M = P Diag(s) Pᵀ with rounding below zero removed: (s, P)."""
    s, P = _eigh(M, M=M)
    return rounded(s), P


# The native kernel's storage; beyond it a call of LAPACK is the cheaper one anyway.
LARGEST_NATIVE = 16


def whiten(
    K: Tensor, Sigma: Tensor | None, log_noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """K and Sigma diagonalised together, RᵀΣR = I and RᵀKR = Diag(lam): (lam, R, log det Sigma).

    The outputs are taken in descending order of noise, so that L⁻¹ adds rows of smaller entries to
    rows of larger ones and L⁻¹KL⁻ᵀ is graded, and an algorithm that keeps the small eigenvalues of
    graded matrices can find them. ``lam`` is ascending.
    """
    if K.shape[-1] > LARGEST_NATIVE:
        return _whiten_by_lapack(K, Sigma, log_noise)
    noise = log_noise if Sigma is None else Sigma
    lam, R, logdet_noise, status = whiten_small(K, noise, Sigma is not None)
    if is_captured(status):
        return torch.where(status[..., None] == 0, lam, torch.nan), R, logdet_noise
    if bool(status.any()):
        raise_if_not_finite(K=K, Sigma=Sigma, log_noise=log_noise)
        if bool((status == 1).any()):
            not_positive_definite("Sigma", status == 1)
        raise OverflowError(OVERFLOW)
    return lam, R, logdet_noise


def _whiten_by_lapack(
    K: Tensor, Sigma: Tensor | None, log_noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``eigh`` gets the graded matrix from large to small, the order in which it keeps the small
    eigenvalues."""
    noise = log_noise if Sigma is None else Sigma.diagonal(dim1=-2, dim2=-1)
    assert noise is not None
    order = noise.argsort(-1, descending=True)
    inputs = {"K": K, "Sigma": Sigma, "log_noise": log_noise}
    K = _permuted(K, order)
    if Sigma is None:
        root = torch.exp(-0.5 * noise.take_along_dim(order, -1))[..., :, None]
        lam, Q = _eigh((root * K * root.mT).flip(-2, -1), **inputs)
        Q = Q.flip(-2)
        R, logdet_noise = root * Q, noise.sum(-1)
    else:
        L = _cholesky(_permuted(Sigma, order), Sigma)
        half = torch.linalg.solve_triangular(L, K, upper=False)
        whitened = torch.linalg.solve_triangular(L, half.mT, upper=False)
        lam, Q = _eigh(whitened.flip(-2, -1), **inputs)
        Q = Q.flip(-2)
        R = torch.linalg.solve_triangular(L.mT, Q, upper=True)
        logdet_noise = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    if not bool(torch.isfinite(logdet_noise).all()):
        raise_if_not_finite(**inputs)
    back = order.argsort(-1)[..., None].expand(R.shape)
    return rounded(lam), R.take_along_dim(back, -2), logdet_noise


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


def _eigh(X: Tensor, **arguments: Tensor | None) -> tuple[Tensor, Tensor]:
    require_finite(X, **arguments)
    values, vectors = torch.linalg.eigh(X)
    require_finite(values, **arguments)
    return values, vectors


def rounded(values: Tensor) -> Tensor:
    """Negative eigenvalues within the rounding error of ``eigh`` (n eps max|λ|) become the zeros
    that they stand for; a matrix that is truly indefinite keeps its negative eigenvalues."""
    if values.shape[-1] == 0:
        return values
    scale = torch.linalg.vector_norm(values, math.inf, -1, keepdim=True)
    below = -values.shape[-1] * torch.finfo(values.dtype).eps * scale
    return torch.where(values >= below, values.relu(), values)


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
            not_positive_definite(U, ~(least > 0))
    return lam.clone()
