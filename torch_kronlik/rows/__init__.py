"""What the covariance M over rows can be. A new kind is one class: see :class:`.base.Rows`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Rows
from .dense import Dense
from .eigen import SymmetricEigen, symmetric_eigen
from .kernel_columns import KernelColumns
from .kernel_matrix import KernelMatrix
from .low_rank_root import LowRankRoot
from .row_matrix import RowMatrix

__all__ = [
    "Dense",
    "KernelColumns",
    "KernelMatrix",
    "LowRankRoot",
    "RowCovariance",
    "RowMatrix",
    "Rows",
    "SymmetricEigen",
    "as_rows",
    "at_points",
    "symmetric_eigen",
]

RowCovariance = Tensor | SymmetricEigen | LowRankRoot | KernelMatrix
"""What a caller may pass as M."""


def as_rows(M: Any) -> Any:
    """The row covariance that a caller's M is: a tensor is a dense matrix."""
    if isinstance(M, Tensor):
        return Dense(M)
    if isinstance(M, KernelMatrix):
        return M.rows()
    if type(M) in Rows.records:
        return M
    hidden = (Dense, KernelColumns)
    kinds = ", ".join(k.__name__ for k in (*Rows.records, KernelMatrix) if k not in hidden)
    raise TypeError(f"M must be a tensor or a row covariance ({kinds}), got {type(M).__name__}")


def at_points(M: Any, x_new: Tensor) -> tuple[Tensor, Tensor]:
    """(M_cross, M_test) of new points, which a KernelMatrix alone can make."""
    if not isinstance(M, KernelMatrix):
        raise TypeError(
            "condition needs M_cross and M_test; new points alone are enough where M is a "
            f"KernelMatrix, got {type(M).__name__}"
        )
    return M.cross(x_new), M.covariance(x_new)
