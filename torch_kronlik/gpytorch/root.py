"""A root of U = M ⊗ K + I_T ⊗ Σ, for code that asks an operator for one."""

from __future__ import annotations

from typing import Any

import torch
from linear_operator.operators import LinearOperator, MatmulLinearOperator
from torch import Tensor

from .base import over_columns

__all__ = ["KroneckerPlusNoiseRoot"]


class KroneckerPlusNoiseRoot(LinearOperator):  # type: ignore[misc]
    """F with U = F Fᵀ, or G = F⁻ᵀ with U⁻¹ = G Gᵀ; or the transpose.

    F = (I ⊗ L) V, V = (M ⊗ K̃ + I)^½, Σ = L Lᵀ, K̃ = L⁻¹ K L⁻ᵀ: smooth in M, K and Σ.

    Args:
        U: a KroneckerPlusNoiseLinearOperator.
        inverse: G instead of F.
        transposed: its transpose.
    """

    def __init__(
        self, U: LinearOperator, *, inverse: bool = False, transposed: bool = False
    ) -> None:
        super().__init__(U, inverse=inverse, transposed=transposed)
        self._U, self._inverse, self._transposed = U, inverse, transposed

    def _size(self) -> torch.Size:
        size: torch.Size = self._U.shape
        return size

    def _transpose_nonbatch(self) -> LinearOperator:
        return type(self)(self._U, inverse=self._inverse, transposed=not self._transposed)

    def matmul(self, other: Any) -> Any:
        if isinstance(other, LinearOperator):
            return MatmulLinearOperator(self, other)
        return self._matmul(other)

    def _matmul(self, rhs: Tensor) -> Tensor:
        return over_columns(self._apply, rhs, self._U.num_outputs, len(self._U.batch_shape))

    def _apply(self, X: Tensor) -> Tensor:
        """G = U⁻¹ F and Gᵀ = Fᵀ U⁻¹ follow from F."""
        U = self._U.covariance
        if self._transposed:
            return self._transposed_root(U.solve(X) if self._inverse else X)
        root: Tensor = U.root_matmul(X)
        return U.solve(root) if self._inverse else root

    def _transposed_root(self, X: Tensor) -> Tensor:
        """Fᵀ·X = V·(X L), with V·Z = (F·Z) L⁻ᵀ."""
        U = self._U.covariance
        root = U.root_matmul(U.noise.root_transposed_matmul(X))
        V: Tensor = U.noise.root_solve_transposed(root)
        return V

    def _expand_batch(self, batch_shape: Any) -> LinearOperator:
        expanded = self._U._expand_batch(batch_shape)
        return type(self)(expanded, inverse=self._inverse, transposed=self._transposed)
