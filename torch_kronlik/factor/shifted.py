"""One T×T Cholesky factor per non-zero λ_j.

    C_j = λ_j M + I = L_j L_jᵀ,   U⁻¹ = Σ_j C_j⁻¹ ⊗ r_j r_jᵀ   with   RᵀΣR = I,  RᵀKR = Diag(λ)

Only K and Σ are diagonalised. λ is ascending, so the n factors belong to the last n columns of R;
the others have C_j = I. Plain numerics: nothing here is differentiated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..batch import Shape, broadcast, mean_with_transpose, sum_to, symmetric
from ..errors import COVARIANCE, not_positive_definite, require_finite
from ..records import Matrix, Scalar, Stack, Vector
from ..rows import RowMatrix
from .base import COMPLETE, Factor
from .columns import logdet_gradient, logdet_gradients
from .shifted_series import ShiftedSeries
from .solves import cholesky_solve

__all__ = ["Shifted", "factors", "without_zeros"]


def without_zeros(lam: Tensor) -> Tensor:
    """``lam`` (*batch, D), ascending, without the leading zeros common to the batch."""
    leading = (lam == 0).cumprod(-1).sum(-1)
    return lam[..., int(leading.amin()) if leading.numel() else 0 :].clone()


def factors(M: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """L_j and log det C_j for each λ_j of ``lam`` (*batch, n): (*batch, n, T, T), (*batch, n)."""
    require_finite(M, M=M)
    made = ops.shifted_cholesky if _is_native(M) else _factors_by_torch
    L, logdet, status = made(M, lam)
    if bool(status.any()):
        require_finite(lam[..., :, None, None] * M[..., None, :, :])
        not_positive_definite(COVARIANCE, (status != 0).any(-1))
    return L, logdet


def _is_native(M: Tensor) -> bool:
    return ops.HAS_LAPACK and M.device.type == "cpu"


def _factors_by_torch(M: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each is factorised where it is stored, where there is no batch. LAPACK counts by columns: to
    it, a lower triangle stored by rows is an upper one."""
    n, T = lam.shape[-1], M.shape[-1]
    batch, M = broadcast(M.shape[:-2], lam.shape[:-1]), mean_with_transpose(M)
    L = M.new_empty((*batch, n, T, T))
    info = M.new_empty((*batch, n), dtype=torch.int32)
    for j, C in enumerate(L.unbind(-3)):
        torch.mul(M, lam[..., j, None, None], out=C)
        C.diagonal(dim1=-2, dim2=-1).add_(1)
        torch.linalg.cholesky_ex(C.mT, upper=True, out=(C.mT, info[..., j]))
    return L, 2 * _diagonal(L).log().sum(-1), info


def _inverses_by_torch(L: Tensor, M: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = M.new_zeros((*L.shape[:-3], *L.shape[-2:]))
    with_M, plain = (M.new_empty(L.shape[:-2]) for _ in range(2))
    inverse = torch.empty_like(rows)
    for j, own in enumerate(L.unbind(-3)):
        torch.cholesky_inverse(own.mT, upper=True, out=inverse.mT)
        rows.addcmul_(inverse, lam[..., j, None, None])
        plain[..., j] = _trace(inverse)
        with_M[..., j] = inverse.mul_(M).sum((-2, -1))  # of M's symmetric part: C_j⁻¹ has no other
    return rows, with_M, plain


@Factor.register_beside(Noise=COMPLETE)
class Shifted(NamedTuple):
    """U⁻¹ in factored form; every tensor has the batch shape of what it was computed from."""

    L: Stack  # (*batch, n, T, T) Cholesky factors of λ_j M + I for the last n columns
    logdet_C: Vector  # (*batch, n)
    lam: Vector  # (*batch_K, D) eigenvalues of K relative to Sigma, ascending
    R: Matrix  # (*batch_K, D, D), RᵀΣR = I and RᵀKR = Diag(lam)
    logdet_noise: Scalar  # (*batch_noise), log det Sigma

    @property
    def size(self) -> int:
        """T."""
        return self.L.shape[-1]

    def _columns(self) -> Iterator[tuple[int, Tensor | None]]:
        """Every j with L_j, None where λ_j = 0."""
        D, n = self.lam.shape[-1], self.L.shape[-3]
        for j in range(D):
            yield j, self.L[..., j - (D - n), :, :] if j >= D - n else None

    # --- value and solve ---------------------------------------------------------------------

    def quad_logdet(self, Y: Tensor | None) -> tuple[Tensor, ...]:
        """(inv_quad, logdet), the scaled data (C_j⁻¹ (Y R)_j)_j, and nothing else to reuse."""
        logdet = self.logdet_C.sum(-1) + self.size * self.logdet_noise
        nothing = (self.L.new_empty((*self.logdet_C.shape[:-1], 0)) for _ in range(3))
        if Y is None:
            return torch.zeros_like(logdet), logdet, self.L.new_empty(0), *nothing
        data = Y @ self.R
        Z = self._scale(data)
        return (data * Z).sum((-2, -1)), logdet, Z, *nothing

    def _scale(self, data: Tensor) -> Tensor:
        columns = []
        for j, L in self._columns():
            y = data[..., j, None]
            columns.append(y if L is None else cholesky_solve(L, y))
        batch = torch.broadcast_shapes(self.L.shape[:-3], *(x.shape[:-2] for x in columns))
        return torch.cat([x.expand(*batch, *x.shape[-2:]) for x in columns], -1)

    def solve(self, Y: Tensor) -> Tensor:
        """A = U⁻¹·Y."""
        return self.solve_scaled(self._scale(Y @ self.R))

    def solve_scaled(self, Z: Tensor) -> Tensor:
        """A = U⁻¹·Y from the scaled data of :meth:`quad_logdet`."""
        return Z @ self.R.mT

    def sizes_of_sums(self) -> tuple[int, int, int]:
        """None of the sums that :meth:`sums` makes: they cost as much as a gradient."""
        return 0, 0, 0

    def quadratic_in_K(self, g: Tensor, Z: Tensor, to: Shape | None) -> None:
        """Nothing better than the product with M."""

    # --- the functionals of U⁻¹ --------------------------------------------------------------

    @property
    def complement(self) -> int:
        """Nothing of a basis is left out."""
        return 0

    def series(self, rows: Any) -> ShiftedSeries:
        """The functionals of U⁻¹."""
        return ShiftedSeries(self, mean_with_transpose(rows.M.detach()))

    def halves(self, X: Tensor) -> list[Tensor]:
        """L_j⁻¹ X for every j, so that C_j⁻¹ is a product of two."""
        solve = torch.linalg.solve_triangular
        return [X if L is None else solve(L, X, upper=False) for _, L in self._columns()]

    def applied(self, X: Tensor) -> list[Tensor]:
        """C_j⁻¹ X for every j."""
        return [X if L is None else torch.cholesky_solve(X, L) for _, L in self._columns()]

    def traces(self) -> Tensor:
        """tr C_j⁻¹, (*batch, D)."""
        eye = torch.eye(self.size, dtype=self.L.dtype, device=self.L.device)
        return _stack([h.square().sum((-2, -1)) for h in self.halves(eye)])

    # --- gradients ---------------------------------------------------------------------------

    def sums(self, rows: Any, saved: Sequence[Tensor] | None = None) -> Sequence[Tensor]:
        """The log-det gradients in this form: Σ_j λ_j C_j⁻¹, tr(M C_j⁻¹) and tr C_j⁻¹."""
        M = rows.M
        zeros = self.lam.shape[-1] - self.L.shape[-3]
        summed = ops.shifted_inverses if _is_native(M) else _inverses_by_torch
        rows, with_M, plain = summed(self.L, M, self.lam[..., zeros:])
        own = _trace(M)[..., None].expand(*plain.shape[:-1], zeros)
        with_M = torch.cat([own, with_M], -1)
        return rows, with_M, torch.cat([torch.full_like(own, self.size), plain], -1)

    def row_gradient(self, weights: Tensor, g: Tensor, to: Shape) -> RowMatrix:
        """g ∂log det/∂M, from ``weights`` Σ_j λ_j C_j⁻¹, which is used up."""
        factor = g[..., None, None]
        scaled = weights.mul_(factor) if g.shape == weights.shape[:-2] else weights * factor
        return RowMatrix(self.size, whole=sum_to(scaled, to, 2))

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

        With κ = diag(RᵀdK R) − λ ⊙ diag(RᵀdΣ R) they are Σ_j C_j⁻¹ (κ_j I − λ_j² dM) C_j⁻¹ for M,
        and for K and Σ traces of products of two inverses.
        """
        M = mean_with_transpose(U.rows.M)
        zero = M.new_zeros(())
        Kh = zero if dK is None else self.R.mT @ symmetric(dK) @ self.R
        Sh = zero if dSigma is None else self.R.mT @ symmetric(dSigma) @ self.R
        kappa = _diagonal(Kh) - self.lam * _diagonal(Sh)
        V = zero if dM is None else dM.dense(dM.batch)
        of, first = self.inverse_of(), self._first()
        total = kappa[..., : first + 1].sum(-1, keepdim=True)
        inverses = self.inverses()
        HM, moved = self._rows_hvp(
            inverses, torch.cat([total, kappa[..., first + 1 :]], -1), self.lam[..., first:], V
        )
        moved = moved[..., of]
        products = [inverses, M[..., None, :, :] @ inverses]
        with_M2, with_M, plain = (
            (X.flatten(-2) @ Z.flatten(-2).mT)[..., of[:, None], of]
            for X, Z in ((products[1], products[1].mT), products, (inverses, inverses))
        )
        HK = torch.diag_embed(moved) - with_M2 * Kh - symmetric(with_M) * Sh
        HS = torch.diag_embed(-self.lam * moved) - symmetric(with_M) * Kh - plain * Sh
        HK, HS = (symmetric(self.R @ H @ self.R.mT) for H in (HK, HS))
        return RowMatrix(self.size, whole=HM), HK, HS

    def _first(self) -> int:
        """All λ_j = 0 have C_j = I: the last of them stands for all."""
        return max(self.lam.shape[-1] - self.L.shape[-3] - 1, 0)

    def inverse_of(self) -> Tensor:
        """The place of C_j⁻¹ among :meth:`inverses`, for every j."""
        j = torch.arange(self.lam.shape[-1], device=self.lam.device)
        return (j - self._first()).clamp(min=0)

    def inverses(self) -> Tensor:
        """The different C_j⁻¹, ascending in λ_j: (*batch, n, T, T), or n + 1 with I among them."""
        eye = torch.eye(self.size, dtype=self.L.dtype, device=self.L.device)
        own = self.lam.shape[-1] > self.L.shape[-3]
        inverses = [eye.expand(*self.L.shape[:-3], *eye.shape)] if own else []
        inverses += [torch.cholesky_inverse(L) for L in self.L.unbind(-3)]
        return torch.stack(inverses, -3)

    @staticmethod
    def _rows_hvp(inverses: Tensor, kappa: Tensor, lam: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_j C_j⁻¹ (κ_j I − λ_j² V) C_j⁻¹, and tr(C_j⁻¹ V C_j⁻¹) for every j."""
        eye = torch.eye(inverses.shape[-1], dtype=inverses.dtype, device=inverses.device)
        out, moved = torch.zeros_like(eye), []
        for j, C in enumerate(inverses.unbind(-3)):
            middle = kappa[..., j, None, None] * eye - lam[..., j, None, None].square() * V
            out = out + C @ middle @ C
            moved.append(((C @ C) * V).sum((-2, -1)))
        return out, _stack(moved)


def _stack(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*values), -1)


def _trace(X: Tensor) -> Tensor:
    return _diagonal(X).sum(-1)


def _diagonal(X: Tensor) -> Tensor:
    return X.diagonal(dim1=-2, dim2=-1) if X.dim() else X[None]
