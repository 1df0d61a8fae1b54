"""The spectral form: both factors diagonalised.

    Σ = L Lᵀ,   L⁻¹ K L⁻ᵀ = Q Λ Qᵀ,   R = L⁻ᵀ Q,   M = P S Pᵀ,   W_ij = 1 / (1 + s_i λ_j)
    U⁻¹ = (P ⊗ R) Diag(W) (P ⊗ R)ᵀ

P may have r ≤ T columns, where M has rank r: the complement of its range belongs to s = 0, where
W = 1, and enters as I − P Pᵀ. Plain numerics: nothing here is differentiated.
Source: Rakitsch, Lippert, Borgwardt, Stegle 2013.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import Shape, outer_to, sum_to, symmetric
from ..ops import kron_diag
from ..records import Matrix, Scalar, Vector
from ..rows import RowMatrix
from .base import COMPLETE, Factor
from .columns import logdet_gradient, logdet_gradients
from .spectral_series import SpectralSeries

__all__ = ["Spectral"]


@Factor.register_beside(Noise=COMPLETE)
class Spectral(NamedTuple):
    """U⁻¹ in factored form; every tensor has the batch shape of what it was computed from."""

    s: Vector  # (*batch_M, r) eigenvalues of M
    P: Matrix  # (*batch_M, T, r) eigenvectors of M
    lam: Vector  # (*batch_K, D) eigenvalues of K relative to Sigma
    R: Matrix  # (*batch_K, D, D), RᵀΣR = I and RᵀKR = Diag(lam)
    logdet_noise: Scalar  # (*batch_noise), log det Sigma

    @property
    def size(self) -> int:
        """T."""
        return self.P.shape[-2]

    @property
    def complement(self) -> int:
        """T − r."""
        return self.P.shape[-2] - self.P.shape[-1]

    def outside(self, X: Tensor) -> Tensor:
        """(I − P Pᵀ) X for X (*batch, T, k)."""
        return self._rest(X - self.P @ (self.P.mT @ X))

    def _rest(self, X: Tensor) -> Tensor:
        """Once more: the first projection leaves rounding of the size of the part inside, which a
        small W would not have damped."""
        return X - self.P @ (self.P.mT @ X)

    def completed(self) -> Spectral:
        """The same with a complete basis: any orthonormal one of the complement, where s = 0."""
        if self.complement == 0:
            return self
        Q = torch.linalg.qr(self.P, mode="complete")[0]
        P = torch.cat([self.P, Q[..., self.s.shape[-1] :]], -1)
        zeros = self.s.new_zeros(()).expand(*self.s.shape[:-1], self.complement)
        return self._replace(s=torch.cat([self.s, zeros], -1), P=P)

    def series(self, rows: Any) -> SpectralSeries:
        """The functionals of U⁻¹."""
        return SpectralSeries(self)

    def weights(self) -> Tensor:
        """W (*batch, r, D)."""
        return 1 / (1 + self.s[..., :, None] * self.lam[..., None, :])

    # --- value and solve ---------------------------------------------------------------------

    def quad_logdet(self, Y: Tensor | None) -> tuple[Tensor, ...]:
        """(inv_quad, logdet), then what the gradients reuse: the scaled data, W λ, Wᵀ s, Wᵀ 1."""
        rest, data = self._transform(Y) if Y is not None else (None, None)
        Z, logdet, inv_quad, row, col_s, col_1 = kron_diag(self.s, self.lam, data)
        logdet = logdet + self.size * self.logdet_noise
        if Y is None:
            inv_quad = torch.zeros_like(logdet)
        if rest is not None:
            inv_quad = inv_quad + rest.square().sum((-2, -1))
            Z = self.P @ Z + rest
        return inv_quad, logdet, Z, row, col_s, col_1 + self.complement

    def _transform(self, Y: Tensor) -> tuple[Tensor | None, Tensor]:
        """The part of Y R outside the range of P (None for a full basis), and PᵀY R."""
        if self.complement == 0:
            return None, self.P.mT @ Y @ self.R
        data = Y @ self.R
        inside = self.P.mT @ data
        return self._rest(data - self.P @ inside), inside

    def solve(self, Y: Tensor) -> Tensor:
        """A = U⁻¹·Y."""
        rest, data = self._transform(Y)
        Z = kron_diag(self.s, self.lam, data)[0]
        return self.solve_scaled(Z if rest is None else self.P @ Z + rest)

    def solve_scaled(self, Z: Tensor) -> Tensor:
        """A = U⁻¹·Y from the scaled data of :meth:`quad_logdet`."""
        return (self.P @ (Z @ self.R.mT)) if self.complement == 0 else Z @ self.R.mT

    def sizes_of_sums(self) -> tuple[int, int, int]:
        """The sizes of the three sums that :meth:`quad_logdet` leaves for the gradients."""
        return self.s.shape[-1], self.lam.shape[-1], self.lam.shape[-1]

    def quadratic_in_K(self, g: Tensor, Z: Tensor, to: Shape | None) -> Tensor | None:
        """g Aᵀ M A from the scaled data, as g (PᵀA)ᵀ S (PᵀA): what M annihilates in a large A then
        cancels exactly."""
        if to is None:
            return None
        B = self.coordinates(Z)
        weighted = (g[..., None] * self.s)[..., :, None] * B
        return outer_to(weighted.mT, B.mT, to)

    def coordinates(self, Z: Tensor) -> Tensor:
        """PᵀA (*batch, r, D) from the scaled data."""
        return (Z if self.complement == 0 else self.P.mT @ Z) @ self.R.mT

    # --- gradients ---------------------------------------------------------------------------

    def sums(self, rows: Any, saved: Sequence[Tensor] | None = None) -> Sequence[Tensor]:
        """The weights of the log-det gradients in this form: W λ, Wᵀ s and Wᵀ 1."""
        if saved is not None:
            return saved
        row, col_s, col_1 = kron_diag(self.s, self.lam)[3:]
        return row, col_s, col_1 + self.complement

    def row_gradient(self, weights: Tensor, g: Tensor, to: Shape) -> RowMatrix:
        """g ∂log det/∂M, from ``weights`` W λ, where it can be summed to the batch shape ``to``.

        ∂log det/∂M = P Diag(Wλ) Pᵀ, with Σ_j λ_j on the complement.
        """
        outside = sum_to(g * self.lam.sum(-1), to, 0)
        inside = sum_to(g[..., None] * weights, to, 1)
        if self.complement == 0:
            return RowMatrix(self.size, pairs=((self.P * inside[..., None, :], self.P),))
        low = self.P * (inside - outside[..., None])[..., None, :]
        return RowMatrix(self.size, outside, ((low, self.P),))

    def logdet_gradient(
        self, U: Any, g: Tensor, to: Any, saved: Sequence[Tensor] | None
    ) -> tuple[RowMatrix | None, Tensor | None, Any]:
        """See :func:`.columns.logdet_gradient`."""
        return logdet_gradient(self, U, g, to, saved)

    def logdet_gradients(self, U: Any) -> tuple[RowMatrix, Tensor, Tensor]:
        """See :func:`.columns.logdet_gradients`."""
        return logdet_gradients(self, U)

    # --- second derivatives ------------------------------------------------------------------

    def logdet_hvp(
        self, U: Any, dM: RowMatrix | None, dK: Tensor | None, dSigma: Tensor | None
    ) -> tuple[RowMatrix, Tensor, Tensor]:
        """The derivatives of the three log-det gradients along a symmetric direction.

        The closed form (Zhou & Stephens 2014 have it for one variance), with 1 − s λ W = W put in.
        """
        s, lam, W = self.s, self.lam, self.weights()
        zero = W.new_zeros(())
        Kh = zero if dK is None else self.R.mT @ symmetric(dK) @ self.R
        Sh = zero if dSigma is None else self.R.mT @ symmetric(dSigma) @ self.R
        moved = _diagonal(Kh) - lam * _diagonal(Sh)
        HM, m_columns = self._rows_hvp(W, moved, dM)
        sW = s[..., :, None] * W
        cross = sW.mT @ W
        squares = W.mT @ W + self.complement
        HK = torch.diag_embed(m_columns) - (sW.mT @ sW) * Kh - cross * Sh
        HS = torch.diag_embed(-lam * m_columns) - cross * Kh - squares * Sh
        HK, HS = (symmetric(self.R @ H @ self.R.mT) for H in (HK, HS))
        return HM, HK, HS

    def _rows_hvp(self, W: Tensor, moved: Tensor, dM: RowMatrix | None) -> tuple[RowMatrix, Tensor]:
        """Σ_j C_j⁻¹ (moved_j I − λ_j² dM) C_j⁻¹ with C_j⁻¹ = I − P Diag(1 − W_j) Pᵀ, and for
        each j tr(C_j⁻¹ dM C_j⁻¹)."""
        lam2, P = self.lam.square(), self.P
        W2 = W.square()
        inner = torch.diag_embed((W2 * moved[..., None, :]).sum(-1))
        m_columns = torch.zeros_like(moved)
        if dM is not None:
            half = dM.apply(P)
            Mh = P.mT @ half
            inner = inner - ((W * lam2[..., None, :]) @ W.mT) * Mh
            m = _diagonal(Mh)
            m_columns = (W2 * m[..., :, None]).sum(-2)
        if self.complement == 0:
            return RowMatrix(self.size, pairs=((P @ inner, P),)), m_columns
        outside = moved.sum(-1)
        eye = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
        inner = inner - outside[..., None, None] * eye
        if dM is None:
            return RowMatrix(self.size, outside, ((P @ inner, P),)), m_columns
        # The complement on one side or both: there W = 1.
        side = (W * lam2[..., None, :]).sum(-1)[..., None, :]
        total = lam2.sum(-1)
        rest = half - P @ Mh
        weights = total[..., None, None] - side
        pairs = (
            (P @ (inner + total[..., None, None] * Mh), P),
            (rest * weights, P),
            (P * weights, rest),
        )
        m_columns = m_columns + (dM.trace() - m.sum(-1))[..., None]
        return dM.scaled(-total).plus(RowMatrix(self.size, outside, pairs)), m_columns


def _diagonal(X: Tensor) -> Tensor:
    return X.diagonal(dim1=-2, dim2=-1) if X.dim() else X[None]
