"""What the row covariances M = F Fᵀ with a thin root share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..batch import Shape
from ..records import share_members
from .base import Rows
from .row_matrix import RowMatrix

__all__ = ["register_thin"]


class _Members:
    """What such a kind gets beside its own ``matmul``, ``tangent`` and ``pull_back``.

    M is symmetric by construction, and not linear in the own tensors.
    """

    is_constant = False
    is_curved = True
    method = "low_rank"

    def transposed_matmul(self: Any, X: Tensor) -> Tensor:
        out: Tensor = self.matmul(X)
        return out

    def symmetric_matmul(self: Any, X: Tensor) -> Tensor:
        out: Tensor = self.matmul(X)
        return out

    def matmul_tangent(self: Any, X: Tensor, along: Any) -> Tensor | None:
        moved = self.tangent(along)
        return None if moved is None else moved.apply(X)

    def matmul_pull_back(self: Any, Z: Tensor, X: Tensor, to: Shape) -> Any:
        return self.pull_back(RowMatrix(self.size, pairs=((Z, X),), is_symmetric=False), to)


def register_thin(record: type) -> type:
    """Make ``record``, a NamedTuple, a row covariance with the members that all of them share where
    it has none of its own."""
    share_members(record, _Members)
    registered: type = Rows.register(record)
    return registered
