"""D×D results from a basis R with RᵀΣR = I, which every route shares."""

from __future__ import annotations

from torch import Tensor

__all__ = ["columns"]


def columns(R: Tensor, weights: Tensor) -> Tensor:
    """R Diag(weights) Rᵀ."""
    return (R * weights[..., None, :]) @ R.mT
