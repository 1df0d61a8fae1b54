"""The gradients of log det U on the routes that diagonalise K and Σ together, RᵀΣR = I."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..batch import Shape, broadcast, sum_to
from ..rows import RowMatrix

__all__ = ["columns", "logdet_gradient", "logdet_gradients"]


def columns(R: Tensor, weights: Tensor) -> Tensor:
    """R Diag(weights) Rᵀ."""
    return (R * weights[..., None, :]) @ R.mT


def logdet_gradient(
    f: Any, U: Any, g: Tensor, to: Any, saved: Sequence[Tensor] | None
) -> tuple[RowMatrix | None, Tensor | None, Any]:
    """g ∂ log det U in M, in K and in the noise's own tensors, where ``to`` has a batch shape to
    sum to, else None. ``saved``: what ``f.quad_logdet`` has left of the sums."""
    row, col_s, col_1 = f.sums(U.rows, saved)
    G = K = noise = None
    if to.rows is not None:
        G = f.row_gradient(row, g, to.rows)
    if to.K is not None:
        K = sum_to(columns(f.R, _shared(f.R, g[..., None] * col_s, to.K)), to.K, 2)
    if to.noise is not None:
        weights = _shared(f.R, g[..., None] * col_1, to.noise)
        noise = U.noise.pull_back_columns(f.R, weights, to.noise)
    return G, K, noise


def _shared(R: Tensor, weights: Tensor, target: Shape) -> Tensor:
    """The batch is summed over vectors as far as R allows: R has the batch shape that K and the
    noise share."""
    return sum_to(weights, broadcast(R.shape[:-2], target), 1)


def logdet_gradients(f: Any, U: Any) -> tuple[RowMatrix, Tensor, Tensor]:
    """∂ log det U in M, K and Σ."""
    row, col_s, col_1 = f.sums(U.rows)
    G = f.row_gradient(row, U.K.new_ones(U.batch), U.batch)
    return G, columns(f.R, col_s), columns(f.R, col_1)
