"""One T×T Cholesky factor per non-zero λ_j.

    C_j = λ_j M + I = L_j L_jᵀ,   U⁻¹ = Σ_j C_j⁻¹ ⊗ r_j r_jᵀ   with   RᵀΣR = I,  RᵀKR = Diag(λ)

Only K and Σ are diagonalised. λ is ascending, so the n factors belong to the last n columns of R;
the others have C_j = I. Plain numerics: nothing here is differentiated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Shape, broadcast, outer_to, sum_to, symmetric
from .diagnose import not_positive_definite, require_finite
from .eigen import U

__all__ = ["Cholesky", "factors", "without_zeros"]


def without_zeros(lam: Tensor) -> Tensor:
    """``lam`` (*batch, D), ascending, without the leading zeros common to the batch."""
    leading = (lam == 0).cumprod(-1).sum(-1)
    return lam[..., int(leading.amin()) if leading.numel() else 0 :].clone()


def factors(M: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """L_j and log det C_j for each λ_j of ``lam`` (*batch, n): (*batch, n, T, T), (*batch, n).

    Each is factorised where it is stored. LAPACK counts by columns, so that a C stored by rows is
    handed over as its transpose, which it equals.
    """
    n, T = lam.shape[-1], M.shape[-1]
    batch = broadcast(M.shape[:-2], lam.shape[:-1])
    L = M.new_empty((n, *batch, T, T))
    info = M.new_empty((n, *batch), dtype=torch.int32)
    require_finite(M, M=M)
    for j, C in enumerate(L):
        torch.mul(M, lam[..., j, None, None], out=C)
        C.diagonal(dim1=-2, dim2=-1).add_(1)
        torch.linalg.cholesky_ex(C.mT, out=(C.mT, info[j]))
    if bool(info.any()):
        require_finite(lam[..., :, None, None] * M[..., None, :, :])
        not_positive_definite(U, (info != 0).any(0))
    L = L.mT.movedim(0, -3)
    return L, (2 * _diagonal(L).log().sum(-1)).contiguous()


class Cholesky(NamedTuple):
    """U⁻¹ in factored form; every tensor has the batch shape of what it was computed from."""

    L: Tensor  # (*batch, n, T, T) Cholesky factors of λ_j M + I for the last n columns
    logdet_C: Tensor  # (*batch, n)
    lam: Tensor  # (*batch_K, D) eigenvalues of K relative to Sigma, ascending
    R: Tensor  # (*batch_K, D, D), RᵀΣR = I and RᵀKR = Diag(lam)
    logdet_noise: Tensor  # (*batch_noise), log det Sigma

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
            columns.append(y if L is None else _cholesky_solve(L, y))
        batch = torch.broadcast_shapes(self.L.shape[:-3], *(x.shape[:-2] for x in columns))
        return torch.cat([x.expand(*batch, *x.shape[-2:]) for x in columns], -1)

    def solve(self, Y: Tensor) -> Tensor:
        """A = U⁻¹·Y."""
        return self.solve_scaled(self._scale(Y @ self.R))

    def solve_scaled(self, Z: Tensor) -> Tensor:
        """A = U⁻¹·Y from the scaled data of :meth:`quad_logdet`."""
        return Z @ self.R.mT

    # --- gradients ---------------------------------------------------------------------------

    def sums(self, M: Tensor | None, saved: Sequence[Tensor] | None = None) -> Sequence[Tensor]:
        """The log-det gradients in this form: Σ_j λ_j C_j⁻¹, tr(M C_j⁻¹) and tr C_j⁻¹."""
        assert M is not None
        D, n = self.lam.shape[-1], self.L.shape[-3]
        rows = M.new_zeros((*self.L.shape[:-3], *M.shape[-2:]))
        zeros = _trace(M)[..., None].expand(*self.logdet_C.shape[:-1], D - n)
        with_M, plain = [zeros], [torch.full_like(zeros, self.size)]
        inverse = torch.empty_like(rows)
        for j, L in enumerate(self.L.unbind(-3), start=D - n):
            torch.cholesky_inverse(L, out=inverse.mT)
            rows.addcmul_(inverse, self.lam[..., j, None, None])
            plain.append(_trace(inverse)[..., None])
            with_M.append(inverse.mul_(M).sum((-2, -1))[..., None])
        return rows, torch.cat(with_M, -1), torch.cat(plain, -1)

    def rows(self, weights: Tensor, g: Tensor, left: Tensor | None, right: Tensor | None,
             to: Shape) -> Tensor:  # fmt: skip
        """g ∂log det/∂M plus left·rightᵀ, summed to the batch shape ``to``; ``weights`` is used
        up."""
        factor = g[..., None, None]
        scaled = weights.mul_(factor) if g.shape == weights.shape[:-2] else weights * factor
        out = sum_to(scaled, to, 2)
        if left is None or right is None:
            return out
        if left.dim() == right.dim() == 2:
            return out.addmm_(left, right.mT)
        return out.add_(outer_to(left, right, to))

    # --- second derivatives ------------------------------------------------------------------

    def logdet_hvp(
        self, M: Tensor | None, dM: Tensor | None, dK: Tensor | None, dSigma: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The derivatives of the three log-det gradients along a symmetric direction.

        With κ = diag(RᵀdK R) − λ ⊙ diag(RᵀdΣ R) they are Σ_j C_j⁻¹ (κ_j I − λ_j² dM) C_j⁻¹ for M,
        and for K and Σ traces of products of two inverses.
        """
        assert M is not None
        zero = M.new_zeros(())
        Kh = zero if dK is None else self.R.mT @ symmetric(dK) @ self.R
        Sh = zero if dSigma is None else self.R.mT @ symmetric(dSigma) @ self.R
        kappa = _diagonal(Kh) - self.lam * _diagonal(Sh)
        V = zero if dM is None else symmetric(dM)
        # All λ_j = 0 have C_j = I: the last of them stands for all.
        first = max(self.lam.shape[-1] - self.L.shape[-3] - 1, 0)
        of = (torch.arange(self.lam.shape[-1], device=M.device) - first).clamp(min=0)
        total = kappa[..., : first + 1].sum(-1, keepdim=True)
        inverses = self._inverses(M)
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
        return HM, HK, HS

    def _inverses(self, M: Tensor) -> Tensor:
        """The different C_j⁻¹, ascending in λ_j: (*batch, n, T, T), or n + 1 with I among them."""
        eye = torch.eye(self.size, dtype=M.dtype, device=M.device)
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


def _cholesky_solve(L: Tensor, y: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ y; ``torch.cholesky_solve`` copies the factor."""
    half = torch.linalg.solve_triangular(L, y, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(L.mT, half, upper=True)
    return solved


def _stack(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*values), -1)


def _trace(X: Tensor) -> Tensor:
    return _diagonal(X).sum(-1)


def _diagonal(X: Tensor) -> Tensor:
    return X.diagonal(dim1=-2, dim2=-1) if X.dim() else X[None]
