"""The spectral route (MATH: section "Spectral form"): both factors diagonalised.

    Σ = L Lᵀ,   L⁻¹ K L⁻ᵀ = Q Λ Qᵀ,   R = L⁻ᵀ Q,   M = P S Pᵀ,   W_ij = 1 / (1 + s_i λ_j)
    U⁻¹ = (P ⊗ R) Diag(W) (P ⊗ R)ᵀ

Plain numerics: nothing here is differentiated. Source: Rakitsch, Lippert, Borgwardt, Stegle 2013.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import kron_diag
from .batch import symmetric

__all__ = ["Spectral"]


class Spectral(NamedTuple):
    """U⁻¹ in factored form; every tensor has the batch shape of what it was computed from."""

    s: Tensor  # (*batch_M, T) eigenvalues of M
    P: Tensor  # (*batch_M, T, T) eigenvectors of M
    lam: Tensor  # (*batch_K, D) eigenvalues of K relative to Sigma
    R: Tensor  # (*batch_K, D, D), R^T Sigma R = I and R^T K R = Diag(lam)
    logdet_noise: Tensor  # (*batch_noise), log det Sigma

    def weights(self) -> Tensor:
        """W (*batch, T, D)."""
        return 1 / (1 + self.s[..., :, None] * self.lam[..., None, :])

    def quad_logdet(self, Y: Tensor | None) -> tuple[Tensor, ...]:
        """(inv_quad, logdet), then what the gradients reuse: the scaled data and the sums of W."""
        data = None if Y is None else self.P.mT @ Y @ self.R
        Z, logdet, inv_quad, *sums = kron_diag(self.s, self.lam, data)
        logdet = logdet + self.s.shape[-1] * self.logdet_noise
        return torch.zeros_like(logdet) if Y is None else inv_quad, logdet, Z, *sums

    def solve(self, Y: Tensor) -> Tensor:
        return self.solve_scaled(kron_diag(self.s, self.lam, self.P.mT @ Y @ self.R)[0])

    def solve_scaled(self, Z: Tensor) -> Tensor:
        """A = U⁻¹·Y from the scaled data of :meth:`quad_logdet`."""
        return self.P @ (Z @ self.R.mT)

    def sums(self) -> Sequence[Tensor]:
        """W λ, Wᵀ s and Wᵀ 1."""
        return kron_diag(self.s, self.lam)[3:]

    def rows(self, weights: Tensor) -> Tensor:
        """P Diag(weights) Pᵀ."""
        return (self.P * weights[..., None, :]) @ self.P.mT

    def columns(self, weights: Tensor) -> Tensor:
        """R Diag(weights) Rᵀ."""
        return (self.R * weights[..., None, :]) @ self.R.mT

    def columns_diagonal(self, weights: Tensor) -> Tensor:
        """diag(R Diag(weights) Rᵀ)."""
        return (self.R.square() @ weights[..., None]).squeeze(-1)

    def logdet_hvp(
        self, dM: Tensor | None, dK: Tensor | None, dSigma: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The derivatives of the three log-det gradients along a symmetric direction.

        The closed form of MATH, section "Second derivatives", with 1 − s λ W = W put in.
        """
        s, lam, W = self.s, self.lam, self.weights()
        zero = W.new_zeros(())
        Mh = zero if dM is None else self.P.mT @ symmetric(dM) @ self.P
        Kh = zero if dK is None else self.R.mT @ symmetric(dK) @ self.R
        Sh = zero if dSigma is None else self.R.mT @ symmetric(dSigma) @ self.R
        m, k, n = (_diagonal(X) for X in (Mh, Kh, Sh))
        W2 = W.square()
        m_columns = (W2 * m[..., :, None]).sum(-2)
        sW = s[..., :, None] * W
        cross = sW.mT @ W
        HM = (
            torch.diag_embed((W2 * (k - lam * n)[..., None, :]).sum(-1))
            - ((W * lam.square()[..., None, :]) @ W.mT) * Mh
        )
        HK = torch.diag_embed(m_columns) - (sW.mT @ sW) * Kh - cross * Sh
        HS = torch.diag_embed(-lam * m_columns) - cross * Kh - (W.mT @ W) * Sh
        return (
            self.P @ HM @ self.P.mT,
            symmetric(self.R @ HK @ self.R.mT),
            symmetric(self.R @ HS @ self.R.mT),
        )


def _diagonal(X: Tensor) -> Tensor:
    return X.diagonal(dim1=-2, dim2=-1) if X.dim() else X[None]
