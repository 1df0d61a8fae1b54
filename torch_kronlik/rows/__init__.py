"""What the covariance M over rows can be. A new kind is one class: see :class:`.base.Rows`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Rows
from .dense import Dense
from .eigen import SymmetricEigen, symmetric_eigen
from .low_rank_root import LowRankRoot
from .row_matrix import RowMatrix

__all__ = [
    "Dense",
    "LowRankRoot",
    "RowCovariance",
    "RowMatrix",
    "Rows",
    "SymmetricEigen",
    "as_rows",
    "symmetric_eigen",
]

RowCovariance = Tensor | SymmetricEigen | LowRankRoot
"""What a caller may pass as M."""


def as_rows(M: Any) -> Any:
    """The row covariance that a caller's M is: a tensor is a dense matrix."""
    if isinstance(M, Tensor):
        return Dense(M)
    if type(M) in Rows.records:
        return M
    kinds = ", ".join(kind.__name__ for kind in Rows.records if kind is not Dense)
    raise TypeError(f"M must be a tensor or a row covariance ({kinds}), got {type(M).__name__}")
