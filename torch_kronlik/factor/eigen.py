"""The two eigendecompositions of the spectral route, with their failures explained."""

from __future__ import annotations

import torch
from torch import Tensor

from .diagnose import LinAlgError, not_positive_definite, raise_if_not_finite

__all__ = ["U", "eigen", "require_positive_definite", "rounded", "whiten"]

U = "U = M ⊗ K + I ⊗ Sigma"


def eigen(M: Tensor) -> tuple[Tensor, Tensor]:
    """M = P Diag(s) Pᵀ with rounding below zero removed: (s, P)."""
    s, P = _eigh(M, M=M)
    return rounded(s), P.contiguous()


def whiten(
    K: Tensor, Sigma: Tensor | None, log_noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """K and Sigma diagonalised together, RᵀΣR = I and RᵀKR = Diag(lam): (lam, R, log det Sigma)."""
    if log_noise is not None:
        root = torch.exp(-0.5 * log_noise)
        whitened = root[..., :, None] * K * root[..., None, :]
        lam, Q = _eigh(whitened, K=K, log_noise=log_noise)
        R, logdet_noise = root[..., :, None] * Q, log_noise.sum(-1)
    else:
        assert Sigma is not None
        L = _cholesky(Sigma)
        half = torch.linalg.solve_triangular(L, K, upper=False)
        whitened = torch.linalg.solve_triangular(L, half.mT, upper=False)
        lam, Q = _eigh(whitened, K=K, Sigma=Sigma)
        R = torch.linalg.solve_triangular(L.mT, Q, upper=True)
        logdet_noise = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return rounded(lam), R.contiguous(), logdet_noise


def _cholesky(Sigma: Tensor) -> Tensor:
    L: Tensor
    L, info = torch.linalg.cholesky_ex(Sigma)
    if bool(info.any()):
        raise_if_not_finite(Sigma=Sigma)
        not_positive_definite("Sigma", info != 0)
    return L


def _eigh(X: Tensor, **arguments: Tensor) -> tuple[Tensor, Tensor]:
    try:
        values, vectors = torch.linalg.eigh(X)
    except LinAlgError:
        raise_if_not_finite(**arguments)
        raise
    if not bool(torch.isfinite(values).all()):
        raise_if_not_finite(**arguments)
        raise OverflowError(
            f"{' and '.join(arguments)}: their ratio exceeds the range of {X.dtype}; rescale them"
        )
    return values, vectors


def rounded(values: Tensor) -> Tensor:
    """Negative eigenvalues within the rounding error of ``eigh`` (n eps max|λ|) become the zeros
    that they stand for; a matrix that is truly indefinite keeps its negative eigenvalues."""
    if values.shape[-1] == 0:
        return values
    scale = values.abs().amax(-1, keepdim=True)
    below = -values.shape[-1] * torch.finfo(values.dtype).eps * scale
    return torch.where((values < 0) & (values >= below), 0.0, values)


def require_positive_definite(s: Tensor, lam: Tensor) -> Tensor:
    """``lam``, if 1 + s_i λ_j > 0 for all i, j; both ascending, so that the extremes decide."""
    if s.numel() and lam.numel():
        corners = s[..., [0, -1], None] * lam[..., None, [0, -1]]
        least = 1 + corners.flatten(-2).amin(-1)
        if not bool((least > 0).all()):
            not_positive_definite(U, ~(least > 0))
    return lam.clone()
