"""In the eigenvectors of M, for one noise that may be singular and no missing entries.

    M = P Diag(s) Pᵀ,   U = (P ⊗ I) blockdiag_i(s_i K + Σ) (P ⊗ I)ᵀ

Σ is not divided by. Its variances may be zero, all of them too (the matrix normal), wherever U is
positive definite. Plain numerics: nothing here is differentiated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import symmetric
from ..errors import COVARIANCE, not_positive_definite, require_finite
from ..noise import rows_of
from ..records import Matrix, Vector
from ..rows import RowMatrix
from .partial import no_sums, register_partial

__all__ = ["Rotated", "rotated"]


def rotated(s: Tensor, K: Tensor, Sigma: Tensor) -> Tensor:
    """The Cholesky factors of s_i K + Σ, one below the other: (*batch, T·D, D)."""
    K, Sigma = (symmetric(X)[..., None, :, :] for X in (K, Sigma))
    blocks = s[..., :, None, None] * K + Sigma
    require_finite(blocks, K=K, Sigma=Sigma)
    L: Tensor
    L, info = torch.linalg.cholesky_ex(blocks)
    if bool(info.any()):
        not_positive_definite(COVARIANCE, (info != 0).any(-1))
    return L.flatten(-3, -2).contiguous()


@register_partial
class Rotated(NamedTuple):
    """Every tensor has the batch shape of what it was computed from."""

    s: Vector  # (*batch, T)
    P: Matrix  # (*batch, T, T)
    L: Matrix  # the Cholesky factors of s_i K + Σ, one below the other: (*batch, T·D, D)

    # --- value and solve ---------------------------------------------------------------------

    def quad_logdet(self, Y: Tensor | None) -> tuple[Tensor, ...]:
        """(inv_quad, logdet), A, and nothing else to reuse."""
        L = rows_of(self.L)
        logdet = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1))
        sums = no_sums(L, logdet.shape)
        if Y is None:
            return torch.zeros_like(logdet), logdet, L.new_empty(0), *sums
        half = torch.linalg.solve_triangular(L, (self.P.mT @ Y)[..., None], upper=False)
        return half.square().sum((-3, -2, -1)), logdet, self.solve(Y), *sums

    def solve(self, Y: Tensor) -> Tensor:
        """A = U⁻¹·Y."""
        solved = torch.cholesky_solve((self.P.mT @ Y)[..., None], rows_of(self.L))
        return self.P @ solved.squeeze(-1)

    # --- functionals of U⁻¹ ------------------------------------------------------------------

    def shared(self) -> Tensor:
        """The inverses of s_i K + Σ, (*batch, T, D, D)."""
        return torch.cholesky_inverse(rows_of(self.L))

    def blocks(self, weights: Tensor | None) -> Tensor:
        """(x_s ⊗ I)ᵀ U⁻¹ (x_s ⊗ I) for weights x (*batch, S, T): (*batch, S, D, D). None stands
        for the identity."""
        return self._sums(self.P if weights is None else weights @ self.P, self.shared())

    @staticmethod
    def _sums(weights: Tensor, V: Tensor) -> Tensor:
        return torch.einsum("...st,...tde->...sde", weights.square(), V)

    def explained_pairs(self, weights: Tensor, K: Tensor) -> Tensor:
        """The same for all pairs of weights: (*batch, S, D, S, D)."""
        K = K[..., None, :, :]
        x, V = weights @ self.P, K @ self.shared() @ K
        return torch.einsum("...st,...tde,...ut->...sdue", x, V, x)

    def inverse(self) -> Tensor:
        """U⁻¹ as a matrix, (*batch, T·D, T·D)."""
        whole = torch.einsum("...it,...tde,...jt->...idje", self.P, self.shared(), self.P)
        return whole.flatten(-4, -3).flatten(-2)

    # --- gradients ---------------------------------------------------------------------------

    def gradient_in_M(self, U: Any, V: Tensor) -> RowMatrix:
        """tr(K (U⁻¹)_tu)."""
        weights = (V * symmetric(U.K)[..., None, :, :]).sum((-2, -1))
        return RowMatrix(self.P.shape[-2], pairs=((self.P * weights[..., None, :], self.P),))

    def gradient_in_K(self, U: Any, V: Tensor) -> Tensor:
        """Σ_tu M_tu (U⁻¹)_tu."""
        return (self.s[..., :, None, None] * V).sum(-3)

    def gradient_in_noise(self, V: Tensor) -> Tensor:
        """(U⁻¹)_tt, one below the other."""
        return self._sums(self.P, V).flatten(-3, -2)
