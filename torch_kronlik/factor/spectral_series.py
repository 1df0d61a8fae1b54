"""The functionals of U⁻¹ on the spectral route: values, and the terms of the series about it.

In the columns of R, U⁻¹ is blockdiag_j(C_j⁻¹) at the point of factorisation, C_j = λ_j M + I. About
that point it is (blockdiag_j(C_j) + E)⁻¹ with

    E_jl = (δ_jl λ_j + V_K,jl) M̃ + V_K,jl M + V_Σ,jl I,

where M̃, V_K, V_Σ are zero in value and carry the derivatives of M, RᵀKR and RᵀΣR (docs/maths.md,
"Second derivatives"). A weight x on the rows makes D×D matrices of U⁻¹, C_jl = tr(x (U⁻¹)_jl). A
series gives their values, which are diagonal, and the terms with E, which are zero in value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..batch import symmetric

if TYPE_CHECKING:
    from .spectral import Spectral

__all__ = ["Moved", "SpectralSeries", "moved_pairs"]

Maybe = Tensor | None


class Moved(NamedTuple):
    """M̃ (*batch, T, T), V_K and V_Σ (*batch, D, D); None for what does not move."""

    M: Maybe
    K: Maybe
    Sigma: Maybe

    def moves(self) -> bool:
        return any(x is not None for x in self)


class Weights(NamedTuple):
    """A weight x on the rows, as sums over the eigenvectors k of M.

    ``plain`` x_kk; ``once(w)`` Σ_i w_i X_ik x_ki; ``twice(w)`` Σ_il X_ki w_i x_il w_l X_lk with
    X = PᵀM̃P and w a column of W; each for every k: (*batch, S, T), where S counts weights.
    """

    plain: Tensor
    once: Callable[[Tensor], Tensor]
    twice: Callable[[Tensor], Tensor]


class SpectralSeries:
    """C_j⁻¹ = P Diag(W_·j) Pᵀ + (I − P Pᵀ). The terms with E need a complete basis P."""

    def __init__(self, f: Spectral) -> None:
        self.f, self.P, self.s, self.W = f, f.P, f.s, f.weights()

    # --- values: the diagonals of C --------------------------------------------------------------

    def identity(self) -> Tensor:
        """tr C_j⁻¹, (*batch, 1, D): the weight I."""
        return (self.W.sum(-2) + self.f.complement)[..., None, :]

    def outer(self, F: Maybe) -> Tensor:
        """f_sᵀ C_j⁻¹ f_s, (*batch, S, D), for the rows of F; None stands for the identity."""
        Fh, rest = self._split(F)
        inside = Fh.square() @ self.W
        return inside if rest is None else inside + rest.square().sum(-1, keepdim=True)

    def trace(self, x: Tensor) -> Tensor:
        """tr(C_j⁻¹ x), (*batch, 1, D), for a symmetric x (*batch, T, T)."""
        inside = (self.P * (x @ self.P)).sum(-2)[..., None, :] @ self.W
        if self.f.complement == 0:
            return inside
        return inside + _diagonal(self.f.outside(x)).sum(-1)[..., None, None]

    def pairs(self, F: Tensor) -> Tensor:
        """f_sᵀ C_j⁻¹ f_u, (*batch, D, S, S)."""
        Fh, rest = self._split(F)
        scaled = Fh[..., None, :, :] * self.W.mT[..., :, None, :]
        G: Tensor = scaled @ Fh[..., None, :, :].mT
        return G if rest is None else G + (rest @ rest.mT)[..., None, :, :]

    def _split(self, F: Maybe) -> tuple[Tensor, Maybe]:
        """F P, and the part of F outside the range of P."""
        if self.f.complement == 0:
            return (self.P if F is None else F @ self.P), None
        if F is None:
            F = torch.eye(self.f.size, dtype=self.P.dtype, device=self.P.device)
        return F @ self.P, self.f.outside(F.mT).mT

    # --- the terms with E ------------------------------------------------------------------------

    def moved_identity(self, e: Moved) -> Tensor:
        """(*batch, 1, D, D)"""
        X = self._rows(e)

        def once(w: Tensor) -> Tensor:
            return (w * _diagonal(_not_none(X)))[..., None, :]

        def twice(w: Tensor) -> Tensor:
            return w.square()[..., None, :] @ _not_none(X).square()

        return self._moved(e, Weights(torch.ones_like(self.s)[..., None, :], once, twice))

    def moved_outer(self, F: Maybe, e: Moved) -> Tensor:
        """(*batch, S, D, D)"""
        X = self._rows(e)
        Fh = self.P if F is None else F @ self.P

        def once(w: Tensor) -> Tensor:
            return ((Fh * w[..., None, :]) @ _not_none(X)) * Fh

        def twice(w: Tensor) -> Tensor:
            return ((Fh * w[..., None, :]) @ _not_none(X)).square()

        return self._moved(e, Weights(Fh.square(), once, twice))

    def moved_trace(self, x: Tensor, e: Moved) -> Tensor:
        """(*batch, 1, D, D)"""
        X, xh = self._rows(e), self.P.mT @ x @ self.P

        def once(w: Tensor) -> Tensor:
            return w[..., None, :] @ (_not_none(X) * xh)

        def twice(w: Tensor) -> Tensor:
            half = _not_none(X) * w[..., None, :]
            return ((half @ xh) * half).sum(-1)[..., None, :]

        return self._moved(e, Weights(_diagonal(xh)[..., None, :], once, twice))

    def moved_pairs(self, F: Tensor, e: Moved) -> Tensor:
        """(*batch, D, D, S, S)"""
        Z = ((F @ self.P)[..., None, :, :] * self.W.mT[..., :, None, :]).mT
        W = self.W.mT[..., :, None, :, None]
        MZ = self.s[..., None, :, None] * Z
        return moved_pairs(e, self.f.lam, self._rows(e), Z, MZ, lambda a: W * a)

    def _rows(self, e: Moved) -> Maybe:
        """PᵀM̃P."""
        return None if e.M is None else self.P.mT @ e.M @ self.P

    def _moved(self, e: Moved, x: Weights) -> Tensor:
        W, local = self.W, self._local(e)
        C = W.new_zeros(())
        if local is not None:
            WNW = W[..., :, None] * local * W[..., None, :]
            second = WNW @ (local * W[..., None, :])
            C = C + _contract(x.plain, second - WNW)
        return C if e.M is None else C + self._row_terms(e, x, local)

    def _local(self, e: Moved) -> Maybe:
        """N_i = s_i V_K + V_Σ, (*batch, T, D, D): the part of E that is diagonal in P."""
        noise = None if e.Sigma is None else e.Sigma[..., None, :, :]
        if e.K is None:
            return noise if noise is None else noise + 0 * self.s[..., :, None, None]
        N = self.s[..., :, None, None] * e.K[..., None, :, :]
        return N if noise is None else N + noise

    def _row_terms(self, e: Moved, x: Weights, local: Maybe) -> Tensor:
        """The terms with M̃: one row of the D×D result for each j."""
        W, lam = self.W, self.f.lam
        rows, diagonal = [], []
        for j in range(W.shape[-1]):
            w, lam_j = W[..., j], lam[..., j, None, None]
            once = x.once(w)
            row = torch.zeros_like(once @ W)
            if e.K is not None:
                row = row - (once @ W) * e.K[..., None, j, :]
            if local is not None:
                row = row + 2 * lam_j * ((once * w[..., None, :]) @ (local[..., j, :] * W))
            rows.append(row)
            double = lam_j.square() * (x.twice(w) @ w[..., None])
            diagonal.append((double - lam_j * (once @ w[..., None]))[..., 0])
        return symmetric(torch.stack(rows, -2)) + torch.diag_embed(torch.stack(diagonal, -1))


def moved_pairs(
    e: Moved, lam: Tensor, X: Maybe, Z: Tensor, MZ: Tensor, inverse: Callable[[Tensor], Tensor]
) -> Tensor:
    """zᵀ (−E + E C⁻¹ E) z for z_l = C_l⁻¹ f: (*batch, D, D, S, S).

    ``inverse`` applies every C_m⁻¹ to (*batch, D, D, T, S); X is M̃ in the coordinates of Z.
    """
    columns = Z[..., None, :, :, :]  # of each l: (T, S)
    Ea = torch.zeros_like(lam)[..., :, None, None, None] * columns
    if e.K is not None:
        Ea = Ea + e.K[..., :, :, None, None] * MZ[..., None, :, :, :]
    if e.Sigma is not None:
        Ea = Ea + e.Sigma[..., :, :, None, None] * columns
    if X is not None:
        K = torch.diag_embed(lam)[..., :, :, None, None]
        K = K if e.K is None else K + e.K[..., :, :, None, None]
        Ea = Ea + K * (X[..., None, :, :] @ Z)[..., None, :, :, :]
    first = Z.mT[..., :, None, :, :] @ Ea
    second: Tensor = torch.einsum("...mjis,...mliu->...jlsu", Ea, inverse(Ea))
    return second - first


def _contract(weights: Tensor, blocks: Tensor) -> Tensor:
    """Σ_i weights_si blocks_i: (*batch, S, T) and (*batch, T, D, D) to (*batch, S, D, D)."""
    D = blocks.shape[-1]
    flat = weights @ blocks.flatten(-2)
    return flat.reshape(*flat.shape[:-1], D, D)


def _not_none(X: Maybe) -> Tensor:
    assert X is not None
    return X


def _diagonal(X: Tensor) -> Tensor:
    return X.diagonal(dim1=-2, dim2=-1)
