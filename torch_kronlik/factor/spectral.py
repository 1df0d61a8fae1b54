"""The spectral form: both factors diagonalised.

    Σ = L Lᵀ,   L⁻¹ K L⁻ᵀ = Q Λ Qᵀ,   R = L⁻ᵀ Q,   M = P S Pᵀ,   W_ij = 1 / (1 + s_i λ_j)
    U⁻¹ = (P ⊗ R) Diag(W) (P ⊗ R)ᵀ

P may have r ≤ T columns, where M has rank r: the complement of its range belongs to s = 0, where
W = 1, and enters as I − P Pᵀ. Plain numerics: nothing here is differentiated.
Source: Rakitsch, Lippert, Borgwardt, Stegle 2013.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import kron_diag
from .batch import Shape, add_outer_, sum_to, symmetric

__all__ = ["Spectral"]


class Spectral(NamedTuple):
    """U⁻¹ in factored form; every tensor has the batch shape of what it was computed from."""

    s: Tensor  # (*batch_M, r) eigenvalues of M
    P: Tensor  # (*batch_M, T, r) eigenvectors of M
    lam: Tensor  # (*batch_K, D) eigenvalues of K relative to Sigma
    R: Tensor  # (*batch_K, D, D), RᵀΣR = I and RᵀKR = Diag(lam)
    logdet_noise: Tensor  # (*batch_noise), log det Sigma

    @property
    def size(self) -> int:
        """T."""
        return self.P.shape[-2]

    @property
    def complement(self) -> int:
        """T − r."""
        return self.P.shape[-2] - self.P.shape[-1]

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
        rest = data - self.P @ inside
        # Once more: the first projection leaves rounding of the size of the part inside, which a
        # small W would not have damped.
        return rest - self.P @ (self.P.mT @ rest), inside

    def solve(self, Y: Tensor) -> Tensor:
        """A = U⁻¹·Y."""
        rest, data = self._transform(Y)
        Z = kron_diag(self.s, self.lam, data)[0]
        return self.solve_scaled(Z if rest is None else self.P @ Z + rest)

    def solve_scaled(self, Z: Tensor) -> Tensor:
        """A = U⁻¹·Y from the scaled data of :meth:`quad_logdet`."""
        return (self.P @ (Z @ self.R.mT)) if self.complement == 0 else Z @ self.R.mT

    def coordinates(self, Z: Tensor) -> Tensor:
        """PᵀA (*batch, r, D) from the scaled data."""
        return (Z if self.complement == 0 else self.P.mT @ Z) @ self.R.mT

    # --- gradients ---------------------------------------------------------------------------

    def sums(self, M: Tensor | None, saved: Sequence[Tensor] | None = None) -> Sequence[Tensor]:
        """The weights of the log-det gradients in this form: W λ, Wᵀ s and Wᵀ 1."""
        if saved is not None:
            return saved[1:]
        row, col_s, col_1 = kron_diag(self.s, self.lam)[3:]
        return row, col_s, col_1 + self.complement

    def rows(self, weights: Tensor, g: Tensor, left: Tensor | None, right: Tensor | None,
             to: Shape) -> Tensor:  # fmt: skip
        """g ∂log det/∂M, from ``weights`` W λ, plus left·rightᵀ, summed to the batch shape ``to``.

        ∂log det/∂M = P Diag(Wλ) Pᵀ, with Σ_j λ_j on the complement.
        """
        outside = sum_to(g * self.lam.sum(-1), to, 0)[..., None]
        inside = sum_to(g[..., None] * weights, to, 1)
        low = self.complement > 0
        X = self.P * ((inside - outside) if low else inside)[..., None, :]
        P = self.P.expand(X.shape)
        if left is None or right is None:
            out = X @ P.mT
        elif low and left.shape[:-2] == X.shape[:-2]:
            # One pass over the result; the factors are small here.
            right = right.expand(*X.shape[:-2], *right.shape[-2:])
            out = torch.cat([X, left], -1) @ torch.cat([P, right], -1).mT
        else:
            out = add_outer_(X @ P.mT, left, right)
        if low:
            out.diagonal(dim1=-2, dim2=-1).add_(outside)
        return out

    # --- second derivatives ------------------------------------------------------------------

    def logdet_hvp(
        self, M: Tensor | None, dM: Tensor | None, dK: Tensor | None, dSigma: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The derivatives of the three log-det gradients along a symmetric direction.

        The closed form (Zhou & Stephens 2014 have it for one variance), with 1 − s λ W = W put in.
        """
        s, lam, W = self.s, self.lam, self.weights()
        zero = W.new_zeros(())
        Kh = zero if dK is None else self.R.mT @ symmetric(dK) @ self.R
        Sh = zero if dSigma is None else self.R.mT @ symmetric(dSigma) @ self.R
        moved = _diagonal(Kh) - lam * _diagonal(Sh)
        HM, m_columns = self._rows_hvp(W, moved, None if dM is None else symmetric(dM))
        sW = s[..., :, None] * W
        cross = sW.mT @ W
        squares = W.mT @ W + self.complement
        HK = torch.diag_embed(m_columns) - (sW.mT @ sW) * Kh - cross * Sh
        HS = torch.diag_embed(-lam * m_columns) - cross * Kh - squares * Sh
        HK, HS = (symmetric(self.R @ H @ self.R.mT) for H in (HK, HS))
        return HM, HK, HS

    def _rows_hvp(self, W: Tensor, moved: Tensor, dM: Tensor | None) -> tuple[Tensor, Tensor]:
        """Σ_j C_j⁻¹ (moved_j I − λ_j² dM) C_j⁻¹ with C_j⁻¹ = I − P Diag(1 − W_j) Pᵀ, and for
        each j tr(C_j⁻¹ dM C_j⁻¹)."""
        lam2, P = self.lam.square(), self.P
        W2 = W.square()
        inner = torch.diag_embed((W2 * moved[..., None, :]).sum(-1))
        if dM is None:
            m_columns = torch.zeros_like(moved)
        else:
            half = P.mT @ dM
            Mh = half @ P
            inner = inner - ((W * lam2[..., None, :]) @ W.mT) * Mh
            m = _diagonal(Mh)
            m_columns = (W2 * m[..., :, None]).sum(-2)
        if self.complement == 0:
            return P @ inner @ P.mT, m_columns
        outside = moved.sum(-1)[..., None, None]
        inner = inner - outside * torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
        out = outside * torch.eye(P.shape[-2], dtype=P.dtype, device=P.device)
        if dM is not None:
            # The complement on one side or both: there W = 1.
            side = (W * lam2[..., None, :]).sum(-1)
            total = lam2.sum(-1)[..., None, None]
            rest = half - Mh @ P.mT
            mixed = P @ (side[..., :, None] * rest)
            out = out - mixed - mixed.mT - total * (dM - P @ half - (P @ rest).mT)
            m_columns = m_columns + (_diagonal(dM).sum(-1) - m.sum(-1))[..., None]
        return out + P @ inner @ P.mT, m_columns


def _diagonal(X: Tensor) -> Tensor:
    return X.diagonal(dim1=-2, dim2=-1) if X.dim() else X[None]
