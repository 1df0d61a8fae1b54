"""D×D results from a basis R with RᵀΣR = I, which every route shares."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["columns", "noise_diagonal"]


def columns(R: Tensor, weights: Tensor) -> Tensor:
    """R Diag(weights) Rᵀ."""
    return (R * weights[..., None, :]) @ R.mT


def noise_diagonal(R: Tensor, weights: Tensor, log_noise: Tensor) -> Tensor:
    """exp(s) ⊙ diag(R Diag(weights) Rᵀ) for Σ = Diag(exp(s)): exp(s/2) ⊙ R is orthogonal, so that
    nothing overflows."""
    Q = torch.exp(0.5 * log_noise)[..., :, None] * R
    return (Q.square() @ weights[..., None]).squeeze(-1)
