"""The border form, for M of full rank, one noise for all rows and few missing entries.

The complete U is factorised as in :mod:`.shifted`, and the missing entries are taken out again:

    C_l = λ_l M + I,   U⁻¹ = Σ_l C_l⁻¹ ⊗ r_l r_lᵀ   with   RᵀΣR = I,  RᵀKR = Diag(λ)
    X = U⁻¹ E_m,   P = E_mᵀ U⁻¹ E_m,   E_m the columns of the identity at the missing entries
    log det U_oo = log det U + log det P,   Q = U⁻¹ − X P⁻¹ Xᵀ

Plain numerics: nothing here is differentiated. Source: docs/maths.md, "Border".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import mean_with_transpose, places_of, symmetric, unflatten
from ..errors import COVARIANCE, not_positive_definite, require_finite
from ..records import Matrix, Scalar, Stack, Vector
from ..rows import RowMatrix
from . import shifted
from .columns import columns
from .partial import gather, no_sums, register_partial, scatter
from .solves import cholesky_solve, half_solve

__all__ = ["Border", "border", "missing"]


def missing(observed: Tensor) -> tuple[Tensor, Tensor]:
    """The places of the missing entries among the T·D, (*batch, m), and 1 where such a place is
    meant, 0 where it fills up the batch."""
    flags = 1 - observed.flatten(-2)
    places = places_of(flags)
    return places, flags.take_along_dim(places, -1)


def border(
    M: Tensor, lam: Tensor, R: Tensor, places: Tensor, real: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The Cholesky factors of the C_l, log det of each, the C_l⁻¹, X, and the Cholesky factor of
    P."""
    L, logdet = shifted.factors(M, lam)
    inverses = torch.cholesky_inverse(L)
    X = _columns(inverses, R, places, real)
    batch = torch.broadcast_shapes(X.shape[:-3], places.shape[:-1])
    m = places.shape[-1]
    flat = X.expand(*batch, *X.shape[-3:]).flatten(-3, -2)
    P = flat.take_along_dim(places.expand(*batch, m)[..., None], -2) * real[..., :, None]
    P = symmetric(P)
    P.diagonal(dim1=-2, dim2=-1).add_(1 - real)
    G, info = torch.linalg.cholesky_ex(P)
    if bool(info.any()):
        require_finite(P)
        not_positive_definite(f"{COVARIANCE} at the observed entries", info != 0)
    return L, logdet, inverses.contiguous(), X.contiguous(), G.contiguous()


def _columns(inverses: Tensor, R: Tensor, places: Tensor, real: Tensor) -> Tensor:
    """U⁻¹ E_m, zero in the columns that fill up: (*batch, T, D, m)."""
    D, m = R.shape[-1], places.shape[-1]
    batch = torch.broadcast_shapes(inverses.shape[:-3], R.shape[:-2], places.shape[:-1])
    places = places.expand(*batch, m)
    own = R.expand(*batch, D, D).take_along_dim((places % D)[..., None], -2)  # (m, D): R_kl
    own = own * real[..., None]
    rows = (places // D)[..., None, :]
    out: Any = 0
    for j, inverse in enumerate(inverses.unbind(-3)):
        column = inverse.expand(*batch, *inverse.shape[-2:]).take_along_dim(rows, -1)
        weighted = column * own[..., None, :, j]
        out = out + R[..., None, :, None, j] * weighted[..., :, None, :]
    result: Tensor = out
    return result


@register_partial
class Border(NamedTuple):
    """Every tensor has the batch shape of what it was computed from."""

    L: Stack  # (*batch, D, T, T), the Cholesky factors of the C_l
    inverses: Stack  # (*batch, D, T, T), the C_l⁻¹
    lam: Vector  # (*batch, D)
    R: Matrix  # (*batch, D, D)
    logdet_U: Scalar  # of all entries
    places: Vector  # of the missing entries among the T·D, (*batch, m), integers
    real: Vector  # 1, and 0 for a place that fills up the batch: (*batch, m)
    X: Stack  # (*batch, T, D, m)
    G: Matrix  # (*batch, m, m), the Cholesky factor of P

    # --- value and solve ---------------------------------------------------------------------

    def quad_logdet(self, Y: Tensor | None) -> tuple[Tensor, ...]:
        """(inv_quad, logdet), A, and nothing else to reuse."""
        logdet = self.logdet_U + 2 * self.G.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        none_left = self.real.sum(-1) == self.X.shape[-3] * self.X.shape[-2]
        logdet = torch.where(none_left, 0, logdet)
        sums = no_sums(self.G, logdet.shape)
        if Y is None:
            return torch.zeros_like(logdet), logdet, self.G.new_empty(0), *sums
        A = self.solve(Y)
        return (Y * A).sum((-2, -1)), logdet, A, *sums

    def solve(self, Y: Tensor) -> Tensor:
        """A = Q·Y, as U⁻¹ of the data with their missing entries filled in by their means."""
        for _ in range(2):  # once more: the first leaves rounding of the size of the filled entries
            Y = Y - self._scatter(cholesky_solve(self.G, self._gather(self._complete(Y))))
        return self._without(self._complete(Y))

    def _complete(self, Y: Tensor) -> Tensor:
        """U⁻¹ Y."""
        data = (Y @ self.R).mT[..., None]
        return cholesky_solve(self.L, data).squeeze(-1).mT @ self.R.mT

    def _gather(self, Y: Tensor) -> Tensor:
        """The missing entries of Y (*batch, T, D): (*batch, m, 1)."""
        return gather(Y[..., None], self.places, self.real)

    def _scatter(self, x: Tensor) -> Tensor:
        """(*batch, m, 1) at the missing entries of (*batch, T, D), zero elsewhere."""
        return scatter(x, self.places, self.real, self.X.shape[-3:-1]).squeeze(-1)

    def _without(self, A: Tensor) -> Tensor:
        """A with zeros at the missing entries."""
        batch = torch.broadcast_shapes(A.shape[:-2], self.places.shape[:-1])
        gone = self._scatter(torch.ones_like(self.real)[..., None])
        return torch.where(gone > 0, 0, A.expand(*batch, *A.shape[-2:]))

    # --- functionals of Q --------------------------------------------------------------------

    def _halves(self, weights: Tensor | None) -> Tensor:
        """G⁻¹ Xᵀ (x_s ⊗ I), (*batch, m, S, D); None stands for the identity."""
        X = self.X
        if weights is not None:
            X = unflatten(weights @ X.flatten(-2), -1, X.shape[-2:])
        shape = X.shape[-3:-1]
        return unflatten(half_solve(self.G, X.flatten(-3, -2).mT), -1, shape)

    def blocks(self, weights: Tensor | None) -> Tensor:
        """(x_s ⊗ I)ᵀ Q (x_s ⊗ I) for weights x (*batch, S, T): (*batch, S, D, D). None stands for
        the identity: the blocks Q_tt."""
        if weights is None:
            return self._own_blocks(self.shared())
        squares = half_solve(self.L, weights.mT[..., None, :, :]).square().sum(-2)
        return self._less(squares, self._halves(weights))

    def _less(self, squares: Tensor, half: Tensor) -> Tensor:
        """The blocks of the complete U, from x_sᵀ C_l⁻¹ x_s (*batch, D, S), less the border's."""
        lost = torch.einsum("...xsd,...xse->...sde", half, half)
        return columns(self.R[..., None, :, :], squares.mT) - lost

    def _own_blocks(self, half: Tensor) -> Tensor:
        """Q_tt, with exact zeros in the rows and columns of missing entries."""
        blocks = self._less(self.inverses.diagonal(dim1=-2, dim2=-1), half)
        kept = self._without(torch.ones_like(blocks[..., 0]))
        return blocks * kept[..., :, None] * kept[..., None, :]

    def explained_pairs(self, weights: Tensor, K: Tensor) -> Tensor:
        """The same for all pairs of weights: (*batch, S, D, S, D)."""
        complete = half_solve(self.L, weights.mT[..., None, :, :])
        pairs = complete.mT @ complete  # (D, S, S)
        half = self._halves(weights)
        lost = torch.einsum("...xsd,...xue->...sdue", half, half)
        whole = torch.einsum("...dl,...lsu,...el->...sdue", self.R, pairs, self.R) - lost
        return torch.einsum("...ad,...sdue,...eb->...saub", K, whole, K)

    def inverse(self) -> Tensor:
        """Q as a matrix, (*batch, T·D, T·D)."""
        R = self.R
        whole = torch.einsum("...dl,...ltu,...el->...tdue", R, self.inverses, R)
        half = self._halves(None).flatten(-2)
        kept = self._without(torch.ones_like(self.X[..., 0])).flatten(-2)
        Q = whole.flatten(-4, -3).flatten(-2) - half.mT @ half
        return Q * kept[..., :, None] * kept[..., None, :]

    # --- gradients ---------------------------------------------------------------------------

    def shared(self) -> Tensor:
        """G⁻¹ Xᵀ, (*batch, m, T, D), which the three gradients are made of."""
        return self._halves(None)

    def gradient_in_M(self, U: Any, half: Tensor) -> RowMatrix:
        """tr(K Q_tu) = Σ_l λ_l C_l⁻¹ less the border's part."""
        whole = (self.lam[..., :, None, None] * self.inverses).sum(-3)
        left = torch.einsum("...xtd,...de->...txe", half, symmetric(U.K)).flatten(-2)
        right = half.transpose(-3, -2).flatten(-2)
        return RowMatrix(self.X.shape[-3], pairs=((-left, right),), whole=whole)

    def gradient_in_K(self, U: Any, half: Tensor) -> Tensor:
        """Σ_tu M_tu Q_tu."""
        M = mean_with_transpose(U.rows.dense())
        traces = (self.inverses * M[..., None, :, :]).sum((-2, -1))
        half = half.transpose(-3, -2)  # (T, m, D)
        moved = unflatten(M @ half.flatten(-2), -1, half.shape[-2:])
        lost = torch.einsum("...txd,...txe->...de", moved, half)
        return columns(self.R, traces) - symmetric(lost)

    def gradient_in_noise(self, half: Tensor) -> Tensor:
        """Q_tt, one below the other."""
        return self._own_blocks(half).flatten(-3, -2)
