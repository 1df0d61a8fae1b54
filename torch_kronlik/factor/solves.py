"""Solves with a Cholesky factor that many data share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["cholesky_solve", "half_solve"]


def half_solve(L: Tensor, y: Tensor) -> Tensor:
    """L⁻¹ y for y (*batch, n, k)."""
    return _with_columns(L, y, lambda own, Y: torch.linalg.solve_triangular(own, Y, upper=False))


def cholesky_solve(L: Tensor, y: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ y for y (*batch, n, k)."""

    def solve(own: Tensor, Y: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(own, Y, upper=False)
        out: Tensor = torch.linalg.solve_triangular(own.mT, half, upper=True)
        return out

    return _with_columns(L, y, solve)


def _with_columns(L: Tensor, y: Tensor, solve: Any) -> Tensor:
    """Data that share a factor are columns of one solve, for which torch would copy it out
    otherwise."""
    y = y.reshape((1,) * (L.dim() - y.dim()) + y.shape)
    lead, batch = y.dim() - L.dim(), range(y.dim() - 2)
    shared = [i for i in batch if i < lead or L.shape[i - lead] == 1]
    kept = [i for i in batch if i not in shared]
    order = [*kept, y.dim() - 2, *shared, y.dim() - 1]
    own = L.reshape(*(L.shape[i - lead] for i in kept), *L.shape[-2:])
    columns = y.permute(order)
    solved: Tensor = solve(own, columns.flatten(len(kept) + 1))
    whole = solved.reshape(*solved.shape[:-1], *columns.shape[len(kept) + 1 :])
    return whole.permute([order.index(i) for i in range(y.dim())])
