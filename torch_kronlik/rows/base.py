"""What a row covariance is to the rest of the library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..batch import Shape
from ..records import Kind
from .row_matrix import RowMatrix

__all__ = ["RowCovarianceMembers", "Rows"]

if TYPE_CHECKING:
    Rows = Any  # which record stands in an open field, a checker cannot know
else:

    class Rows(Kind):
        """The row covariances: a record says with ``Rows.register`` that it is one."""


class RowCovarianceMembers(Protocol):
    """What M (T×T, symmetric positive semidefinite) is to the rest of the library.

    A row covariance is a NamedTuple of its own tensors, registered with ``Rows.register``, that has
    the members written down here. Nothing else in the library knows which one it is.
    """

    @property
    def is_constant(self) -> bool:
        """Whether M refuses to be differentiated."""

    @property
    def is_curved(self) -> bool:
        """Whether M is not linear in the own tensors."""

    @property
    def method(self) -> str:
        """The ``method_used`` where :meth:`basis` is known."""

    @property
    def size(self) -> int:
        """T."""

    @property
    def batch(self) -> torch.Size:
        """The batch shape of M."""

    def check(self) -> None:
        """Raise TypeError or ValueError, with a name, where the own tensors do not fit together."""

    def named(self) -> dict[str, Tensor]:
        """The own tensors under the names that a caller knows."""

    # --- M ---------------------------------------------------------------------------------------

    def matmul(self, X: Tensor) -> Tensor:
        """M X for X (*batch, T, k)."""

    def transposed_matmul(self, X: Tensor) -> Tensor:
        """Mᵀ X, different from M X only where a caller's matrix is not symmetric."""

    def symmetric_matmul(self, X: Tensor) -> Tensor:
        """The symmetric part of M times X."""

    def diagonal(self) -> Tensor:
        """(*batch, T)"""

    def dense(self) -> Tensor:
        """M as a matrix, (*batch, T, T), as it stands."""

    def scaled(self, c: Tensor) -> Any:
        """Diag(c) M Diag(c) for c (*batch, T), as a row covariance."""

    def basis(self) -> tuple[Tensor, Tensor] | None:
        """(s, P) with M = P Diag(s) Pᵀ, s (*batch, r) and P (*batch, T, r) constants for
        differentiation; None where finding them is a matter of the route."""

    # --- derivatives -----------------------------------------------------------------------------

    def matmul_tangent(self, X: Tensor, along: Any) -> Tensor | None:
        """The derivative of M X along a direction, of M as it stands, not of its symmetric part."""

    def matmul_pull_back(self, Z: Tensor, X: Tensor, to: Shape) -> Any:
        """The gradient of ⟨Z, M X⟩, of M as it stands."""

    def tangent(self, along: Any) -> RowMatrix | None:
        """dM along a direction of the own tensors, a record with None for what does not move."""

    def pull_back(self, G: RowMatrix, to: Shape) -> Any:
        """The gradient of ⟨G, M⟩ in the own tensors, at the batch shape ``to``: a record."""

    def curvature(self, G: RowMatrix, along: Any, to: Shape) -> Any:
        """The derivative of :meth:`pull_back` along a direction with G held, where curved."""
