"""The capacitance form, for M of low rank with any entries observed and any noise.

    M = F Fᵀ,  K = H Hᵀ,  φ_t = f_t ⊗ H,  N_t the zero-padded inverse of the observed block of Σ_t
    C = I + Σ_t f_t f_tᵀ ⊗ HᵀN_tH,      log det U_oo = Σ_t log det Σ_t,oo + log det C
    Q_tu = δ_tu N_t − N_t φ_t C⁻¹ φ_uᵀ N_u

Plain numerics: nothing here is differentiated. Source: Woodbury; docs/maths.md, "Capacitance".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import Shape, outer_to, symmetric, unflatten
from ..noise import rows_of
from ..records import Matrix, Scalar
from ..rows import RowMatrix
from .partial import no_sums, register_partial
from .solves import cholesky_solve, half_solve

__all__ = ["Capacitance", "capacitance"]


def capacitance(F: Tensor, H: Tensor, N: Tensor) -> Tensor:
    """The Cholesky factor of C: (*batch, r·q, r·q)."""
    n = F.shape[-1] * H.shape[-1]
    C = _gram(F, H.mT[..., None, :, :] @ rows_of(N) @ H[..., None, :, :])
    C = C + torch.eye(n, dtype=F.dtype, device=F.device)
    L: Tensor = torch.linalg.cholesky(C)
    return L.contiguous()


def _gram(F: Tensor, W: Tensor) -> Tensor:
    """Σ_t f_t f_tᵀ ⊗ W_t for W (*batch, T, a, b): (*batch, r·a, r·b)."""
    r, (a, b) = F.shape[-1], W.shape[-2:]
    wide = (F[..., :, None] * W.flatten(-2)[..., None, :]).flatten(-2)
    out = unflatten(F.mT @ wide, -1, (r, a, b)).transpose(-3, -2)
    return out.flatten(-4, -3).flatten(-2)


@register_partial
class Capacitance(NamedTuple):
    """Every tensor has the batch shape of what it was computed from."""

    F: Matrix  # (*batch, T, r)
    H: Matrix  # (*batch, D, q)
    N: Matrix  # the N_t, one below the other: (*batch, T·D, D)
    L: Matrix  # (*batch, r·q, r·q), the Cholesky factor of C
    logdet_noise: Scalar  # Σ_t log det Σ_t,oo

    # --- value and solve ---------------------------------------------------------------------

    def quad_logdet(self, Y: Tensor | None) -> tuple[Tensor, ...]:
        """(inv_quad, logdet), A, and nothing else to reuse."""
        logdet = self.logdet_noise + 2 * self.L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        sums = no_sums(self.L, logdet.shape)
        if Y is None:
            return torch.zeros_like(logdet), logdet, self.L.new_empty(0), *sums
        u, rest, A = self._regress(Y)
        # a sum of squares: nothing cancels
        return (rest * A).sum((-2, -1)) + u.square().sum((-2, -1)), logdet, A, *sums

    def _regress(self, Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The coefficients u (*batch, r, q) of the features, Y − F u Hᵀ, and A."""
        u = self._corrected(0 * self._project(Y), Y)
        u = self._corrected(u, Y)  # once more: the first leaves rounding of the size of Y
        rest = Y - self.F @ u @ self.H.mT
        return u, rest, self._weigh(rest)

    def _corrected(self, u: Tensor, Y: Tensor) -> Tensor:
        """u + C⁻¹ (Φᵀ N (Y − Φ u) − u)."""
        missing = self._project(Y - self.F @ u @ self.H.mT) - u
        step = cholesky_solve(self.L, missing.flatten(-2)[..., None]).squeeze(-1)
        return u + unflatten(step, -1, u.shape[-2:])

    def _weigh(self, X: Tensor) -> Tensor:
        """The rows N_t x_t."""
        return (rows_of(self.N) * X[..., None, :]).sum(-1)

    def _project(self, X: Tensor) -> Tensor:
        """Σ_t f_t (HᵀN_t x_t)ᵀ: (*batch, r, q)."""
        return self.F.mT @ (self._weigh(X) @ self.H)

    def solve(self, Y: Tensor) -> Tensor:
        """A = Q·Y."""
        return self._regress(Y)[2]

    def quadratic_in_K(self, g: Tensor, A: Tensor, to: Shape | None) -> Tensor | None:
        """g Aᵀ M A, as g (FᵀA)ᵀ (FᵀA): what M annihilates in a large A then cancels."""
        if to is None:
            return None
        B = self.F.mT @ A
        return outer_to((g[..., None, None] * B).mT, B.mT, to)

    # --- functionals of Q --------------------------------------------------------------------

    def _columns(self) -> Tensor:
        """N_t H, (*batch, T, D, q)."""
        return rows_of(self.N) @ self.H[..., None, :, :]

    def _halves(self, weights: Tensor) -> Tensor:
        """L⁻¹ Σ_t x_st φ_tᵀ N_t for weights x (*batch, S, T): (*batch, S, r·q, D)."""
        out = weights @ self._features_times(self._columns().mT).flatten(-3)
        r, (D, q) = self.F.shape[-1], self.H.shape[-2:]
        return half_solve(self.L[..., None, :, :], out.unflatten(-1, (r * q, D)))

    def blocks(self, weights: Tensor | None) -> Tensor:
        """(x_s ⊗ I)ᵀ Q (x_s ⊗ I) for weights x (*batch, S, T): (*batch, S, D, D). None stands for
        the identity: the blocks Q_tt."""
        N = rows_of(self.N)
        if weights is None:
            return self._own_blocks(self._columns())
        half = self._halves(weights)
        squares = unflatten(weights.square() @ N.flatten(-2), -1, N.shape[-2:])
        return squares - half.mT @ half

    def _own_blocks(self, columns: Tensor) -> Tensor:
        """Q_tt, from the N_t H."""
        half = self._own_halves(columns)
        return rows_of(self.N) - half.mT @ half

    def _own_halves(self, columns: Tensor) -> Tensor:
        """L⁻¹ φ_tᵀ N_t for each t, (*batch, T, r·q, D), from the N_t H."""
        return half_solve(self.L[..., None, :, :], self._features_times(columns.mT).flatten(-3, -2))

    def _features_times(self, W: Tensor) -> Tensor:
        """f_t ⊗ W_t for W (*batch, T, a, b): (*batch, T, r, a, b)."""
        return self.F[..., :, :, None, None] * W[..., :, None, :, :]

    def explained(self, weights: Tensor, K: Tensor) -> Tensor:
        """K (x_s ⊗ I)ᵀ Q (x_s ⊗ I) K.

        With x = F g + ρ, the part in the features is H (gᵀg I − (g ⊗ I)ᵀ C⁻¹ (g ⊗ I)) Hᵀ, where
        nothing of the size of N cancels.
        """
        g, rest, V, a, b = self._in_features(weights)
        own = g.square().sum(-1)[..., None, None] * torch.eye(
            V.shape[-1], dtype=V.dtype, device=V.device
        )
        own = own + (rest.square() @ V.flatten(-2)).unflatten(-1, V.shape[-2:])
        cross = torch.einsum("...xsa,...xsb->...sab", a, b)
        squares = sum(torch.einsum("...xsa,...xsb->...sab", x, x) for x in (a, b))
        H = self.H[..., None, :, :]
        out: Tensor = H @ (own + cross + cross.mT - squares) @ H.mT
        return out

    def explained_pairs(self, weights: Tensor, K: Tensor) -> Tensor:
        """The same for all pairs of weights: (*batch, S, D, S, D)."""
        g, rest, V, a, b = self._in_features(weights)
        S, q = a.shape[-2:]
        eye = torch.eye(q, dtype=g.dtype, device=g.device)
        own = (g @ g.mT)[..., :, None, :, None] * eye[:, None, :]
        own = own + torch.einsum("...st,...tab,...ut->...saub", rest, V, rest)
        a, b = a.flatten(-2), b.flatten(-2)
        cross = a.mT @ b
        flat = cross + cross.mT - a.mT @ a - b.mT @ b
        inner = own + flat.unflatten(-1, (S, q)).unflatten(-3, (S, q))
        return torch.einsum("...da,...saub,...eb->...sdue", self.H, inner, self.H)

    def _in_features(self, X: Tensor) -> tuple[Tensor, ...]:
        """g and ρ with x = F g + ρ for the rows x of X (the columns of F are orthogonal), HᵀN_tH,
        and L⁻¹ (g ⊗ I) and L⁻¹ Φᵀ N (ρ ⊗ H) as (*batch, r·q, S, q)."""
        scale = self.F.square().sum(-2)
        inverse = torch.where(scale > 0, 1 / scale, 0)[..., None, :]
        g = (X @ self.F) * inverse
        rest = X - g @ self.F.mT
        more = (rest @ self.F) * inverse
        g, rest = g + more, rest - more @ self.F.mT
        V = self.H.mT[..., None, :, :] @ self._columns()
        wide = self._features_times(V).flatten(-3)
        (r, q), S = (self.F.shape[-1], self.H.shape[-1]), X.shape[-2]
        eye = torch.eye(q, dtype=g.dtype, device=g.device)
        a = g[..., :, :, None, None] * eye  # (S, r, q, q)
        b = (rest @ wide).unflatten(-1, (r, q, q))
        a, b = (x.movedim(-4, -2).flatten(-4, -3).flatten(-2) for x in (a, b))
        a, b = (half_solve(self.L, x).unflatten(-1, (S, q)) for x in (a, b))
        return g, rest, V, a, b

    def inverse(self) -> Tensor:
        """Q as a matrix, (*batch, T·D, T·D)."""
        half = self._own_halves(self._columns()).mT.flatten(-3, -2)
        N, T = rows_of(self.N), self.F.shape[-2]
        eye = torch.eye(T, dtype=N.dtype, device=N.device)
        blocks = eye[:, None, :, None] * N[..., :, :, None, :]
        return blocks.flatten(-4, -3).flatten(-2) - half @ half.mT

    # --- gradients ---------------------------------------------------------------------------

    def shared(self) -> Tensor:
        """N_t H, which the three gradients are made of."""
        return self._columns()

    def gradient_in_M(self, U: Any, columns: Tensor) -> RowMatrix:
        """tr(K Q_tu)."""
        N, K = rows_of(self.N), symmetric(U.K)[..., None, :, :]
        if not bool(torch.triu(N, 1).any()):
            return self._gradient_in_M_diagonal(U)
        V = self.H.mT[..., None, :, :] @ columns
        wide = self._features_times(V)  # (T, r, q, a)
        half = half_solve(self.L, wide.movedim(-4, -2).flatten(-4, -3).flatten(-2))
        X = half.unflatten(-1, (wide.shape[-4], -1)).movedim(-2, -3).flatten(-2)  # (T, r q a)
        diagonal = (K * N).sum((-2, -1))
        return RowMatrix(self.F.shape[-2], diagonal=diagonal, pairs=((-X, X),))

    def _gradient_in_M_diagonal(self, U: Any) -> RowMatrix:
        """The same for diagonal N_t, with D r columns instead of q² r: for t ≠ u it is
        −Σ_de K_de n_td n_ue f_tᵀ (h_dᵀ C⁻¹ h_e) f_u."""
        n, K, r = rows_of(self.N).diagonal(dim1=-2, dim2=-1), symmetric(U.K), self.F.shape[-1]
        eye = torch.eye(r, dtype=n.dtype, device=n.device)
        wide = eye[:, None, None, :] * self.H.mT[..., None, :, :, None]  # (r, q, D, r)
        half = half_solve(self.L, wide.flatten(-4, -3).flatten(-2))
        shape = self.H.shape[-2], r
        inner = unflatten(unflatten(half.mT @ half, -1, shape), -3, shape)
        inner = inner * K[..., :, None, :, None]
        inner = inner.flatten(-4, -3).flatten(-2)
        X = (n[..., :, :, None] * self.F[..., :, None, :]).flatten(-2)  # (T, D r)
        diagonal = (K.diagonal(dim1=-2, dim2=-1)[..., None, :] * n).sum(-1)
        return RowMatrix(self.F.shape[-2], diagonal=diagonal, pairs=((-(X @ inner), X),))

    def gradient_in_K(self, U: Any, columns: Tensor) -> Tensor:
        """Σ_tu M_tu Q_tu."""
        r, D = self.F.shape[-1], self.H.shape[-2]
        inside = _gram(self.F, rows_of(self.N)).unflatten(-1, (r, D)).unflatten(-3, (r, D))
        half = half_solve(self.L, _gram(self.F, columns).mT).unflatten(-1, (r, D))
        lost = half.movedim(-1, -3).flatten(-2)  # (D, r q r)
        return symmetric(inside.diagonal(dim1=-4, dim2=-2).sum(-1) - lost @ lost.mT)

    def gradient_in_noise(self, columns: Tensor) -> Tensor:
        """Q_tt, one below the other."""
        return self._own_blocks(columns).flatten(-3, -2)
