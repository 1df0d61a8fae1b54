"""M as a matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import Shape, outer_to, symmetric
from ..checks import check_square
from ..records import Matrix
from .base import Rows
from .row_matrix import RowMatrix

__all__ = ["Dense"]


@Rows.register
class Dense(NamedTuple):
    """M (*batch, T, T). The routes find out whether it is of low rank."""

    M: Matrix

    @property
    def is_constant(self) -> bool:
        return False

    @property
    def is_curved(self) -> bool:
        return False

    @property
    def size(self) -> int:
        return self.M.shape[-1]

    @property
    def batch(self) -> torch.Size:
        return self.M.shape[:-2]

    def check(self) -> None:
        check_square("M", self.M, "T")

    def named(self) -> dict[str, Tensor]:
        return {"M": self.M}

    def matmul(self, X: Tensor) -> Tensor:
        return self.M @ X

    def transposed_matmul(self, X: Tensor) -> Tensor:
        return self.M.mT @ X

    def symmetric_matmul(self, X: Tensor) -> Tensor:
        return 0.5 * (self.M @ X + self.M.mT @ X)

    def diagonal(self) -> Tensor:
        return self.M.diagonal(dim1=-2, dim2=-1)

    def dense(self) -> Tensor:
        return self.M

    def scaled(self, c: Tensor) -> Dense:
        return Dense(c[..., :, None] * self.M * c[..., None, :])

    def basis(self) -> None:
        return None

    def matmul_tangent(self, X: Tensor, along: Dense) -> Tensor | None:
        return None if along.M is None else along.M @ X

    def matmul_pull_back(self, Z: Tensor, X: Tensor, to: Shape) -> Dense:
        return Dense(outer_to(Z, X, to))

    def tangent(self, along: Dense) -> RowMatrix | None:
        return None if along.M is None else RowMatrix(self.size, whole=symmetric(along.M))

    def pull_back(self, G: RowMatrix, to: Shape) -> Dense:
        return Dense(G.dense(to))

    def curvature(self, G: RowMatrix, along: Dense, to: Shape) -> Dense:
        raise AssertionError("M is linear in itself")
