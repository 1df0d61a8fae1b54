"""The covariance of the observed entries itself, factorised: any M, K, noise and entries.

Plain numerics: nothing here is differentiated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import mean_with_transpose, places_of, submatrix, symmetric, unflatten
from ..errors import COVARIANCE, not_positive_definite, require_finite
from ..noise import rows_of
from ..records import Matrix, Vector
from ..rows import RowMatrix
from .partial import gather, no_sums, register_partial, scatter
from .plan import require_memory
from .solves import cholesky_solve, half_solve

__all__ = ["Direct", "direct"]


def direct(
    M: Tensor, K: Tensor, Sigma: Tensor, observed: Tensor, traced: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The places of the observed entries among the T·D, (*batch, n), 1 where such a place is meant
    and 0 where it fills up the batch, and the Cholesky factor of U there.

    While a graph is traced, n is T·D.
    """
    T, D = observed.shape[-2:]
    batch = torch.broadcast_shapes(M.shape[:-2], K.shape[:-2], Sigma.shape[:-2])
    flags = observed.expand(*batch, T, D).flatten(-2)
    places = places_of(flags, T * D if traced else None)
    n = places.shape[-1]
    if not traced:
        require_memory(n, T, D, M)
    real = flags.take_along_dim(places, -1)
    t, d = places // D, places % D
    U = submatrix(mean_with_transpose(M).expand(*batch, T, T), t)
    U = U * submatrix(symmetric(K).expand(*batch, D, D), d)
    blocks = symmetric(rows_of(Sigma)).expand(*batch, T, D, D)
    rows = blocks.flatten(-3, -2).take_along_dim(places[..., None], -2)  # Σ_t[d, :]
    noise = rows.gather(-1, d[..., None, :].expand(*batch, n, n))
    U = U + noise * (t[..., :, None] == t[..., None, :])
    U = U * (real[..., :, None] * real[..., None, :])
    U.diagonal(dim1=-2, dim2=-1).add_(1 - real)
    require_finite(U, M=M, K=K)
    L, info = torch.linalg.cholesky_ex(U)
    if bool(info.any()):
        not_positive_definite(f"{COVARIANCE} at the observed entries", info != 0)
    return places, real, L.contiguous()


@register_partial
class Direct(NamedTuple):
    """Every tensor has the joint batch shape."""

    places: Vector  # of the observed entries among the T·D, (*batch, n), integers
    real: Vector  # 1, and 0 for a place that fills up the batch: (*batch, n)
    L: Matrix  # (*batch, n, n), the Cholesky factor of U at the observed entries
    like: Matrix  # (*batch, T, D), for its shape

    # --- value and solve ---------------------------------------------------------------------

    def _gather(self, Y: Tensor) -> Tensor:
        """The observed entries of Y (*batch, T, D, k): (*batch, n, k)."""
        return gather(Y, self.places, self.real)

    def _scatter(self, x: Tensor) -> Tensor:
        """(*batch, n, k) at the observed entries of (*batch, T, D, k), zero elsewhere."""
        return scatter(x, self.places, self.real, self.like.shape[-2:])

    def quad_logdet(self, Y: Tensor | None) -> tuple[Tensor, ...]:
        """(inv_quad, logdet), A, and nothing else to reuse."""
        logdet = 2 * self.L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        sums = no_sums(self.L, logdet.shape)
        if Y is None:
            return torch.zeros_like(logdet), logdet, self.L.new_empty(0), *sums
        half = half_solve(self.L, self._gather(Y[..., None]))
        return half.square().sum((-2, -1)), logdet, self.solve(Y), *sums

    def solve(self, Y: Tensor) -> Tensor:
        """A = Q·Y."""
        return self._scatter(cholesky_solve(self.L, self._gather(Y[..., None]))).squeeze(-1)

    # --- functionals of Q --------------------------------------------------------------------

    def inverse(self) -> Tensor:
        """Q as a matrix, (*batch, T·D, T·D)."""
        real = self.real[..., :, None] * self.real[..., None, :]
        own = torch.cholesky_inverse(self.L) * real
        n = self.like.shape[-2:].numel()
        out = own.new_zeros((*own.shape[:-2], n, own.shape[-1]))
        out = out.scatter(-2, self.places[..., :, None].expand(own.shape), own)
        columns = self.places[..., None, :].expand(out.shape)
        return own.new_zeros((*own.shape[:-2], n, n)).scatter(-1, columns, out)

    def blocks(self, weights: Tensor | None) -> Tensor:
        """(x_s ⊗ I)ᵀ Q (x_s ⊗ I) for weights x (*batch, S, T): (*batch, S, D, D). None stands for
        the identity: the blocks Q_tt."""
        if weights is None:
            return self.shared().diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        eye = torch.eye(self.like.shape[-1], dtype=self.L.dtype, device=self.L.device)
        half = self._halves(weights, eye)
        return half.mT @ half

    def explained(self, weights: Tensor, K: Tensor) -> Tensor:
        """K (x_s ⊗ I)ᵀ Q (x_s ⊗ I) K."""
        half = self._halves(weights, K)
        return half.mT @ half

    def explained_pairs(self, weights: Tensor, K: Tensor) -> Tensor:
        """The same for all pairs of weights: (*batch, S, D, S, D)."""
        half = self._halves(weights, K)
        return torch.einsum("...sxd,...uxe->...sdue", half, half)

    def _halves(self, weights: Tensor, K: Tensor) -> Tensor:
        """L⁻¹ (x_s ⊗ K) at the observed entries: (*batch, S, n, D)."""
        S, D = weights.shape[-2], K.shape[-1]
        wide = weights.mT[..., :, None, :, None] * K[..., None, :, None, :]  # (T, D, S, D)
        half = half_solve(self.L, self._gather(wide.flatten(-2)))
        return unflatten(half, -1, (S, D)).movedim(-2, -3)

    # --- gradients ---------------------------------------------------------------------------

    def shared(self) -> Tensor:
        """The Q_tu, (*batch, T, D, T, D), which the three gradients are made of."""
        shape = self.like.shape[-2:]
        return unflatten(unflatten(self.inverse(), -1, shape), -3, shape)

    def gradient_in_M(self, U: Any, Q: Tensor) -> RowMatrix:
        """tr(K Q_tu)."""
        K = symmetric(U.K)
        whole = torch.einsum("...tdue,...de->...tu", Q, K)
        return RowMatrix(self.like.shape[-2], whole=whole)

    def gradient_in_K(self, U: Any, Q: Tensor) -> Tensor:
        """Σ_tu M_tu Q_tu."""
        M = U.rows.dense()
        return symmetric(torch.einsum("...tdue,...tu->...de", Q, symmetric(M)))

    def gradient_in_noise(self, Q: Tensor) -> Tensor:
        """Q_tt, one below the other."""
        return Q.diagonal(dim1=-4, dim2=-2).movedim(-1, -3).flatten(-3, -2)
