"""Entries that are not observed, given those that are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..autocast import full_precision
from ..batch import symmetric
from ..guards import finite
from ..waist import Waist

__all__ = ["impute"]


@full_precision
def impute(U: Waist, Y: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, variance) of the entries of Y that are not observed, each (*batch, T, D).

    With A = Q·Y, P_t the posterior covariance of f in row t, Σ_t its noise and N_t the zero-padded
    inverse of the observed block of Σ_t, the mean is M A K + A_t Σ_t, and the covariance

        (I − Σ_t N_t) P_t (I − N_t Σ_t) + Σ_t − Σ_t N_t Σ_t

    The noise of a row's observed entries says something about that of the others.
    """
    U.check_data("Y", Y)
    if U.observed is None:
        return finite(Y, Y=Y), torch.zeros_like(Y)
    A = U.inverse_matmul(Y)
    mean = U.rows.symmetric_matmul(A @ symmetric(U.K)) + U.noise.matmul(A)
    Sigma = U.noise.blocks()
    seen = U.observed.to(U.dtype)
    both = seen[..., :, None] * seen[..., None, :]
    L = torch.linalg.cholesky(Sigma * both + torch.diag_embed(1 - seen))
    kept = torch.cholesky_solve(Sigma * seen[..., :, None], L).mT * seen[..., None, :]  # Σ_t N_t
    prior = U.rows.diagonal()[..., None, None] * symmetric(U.K)[..., None, :, :]
    P = prior - U.explained(symmetric(U.rows.dense()))
    eye = torch.eye(Sigma.shape[-1], dtype=U.dtype, device=U.device)
    left = eye - kept
    covariance = left @ P @ left.mT + Sigma - kept @ Sigma
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    mean, variance = torch.broadcast_tensors(mean, variance)
    return torch.where(U.observed, Y, mean), torch.where(U.observed, 0, variance)
