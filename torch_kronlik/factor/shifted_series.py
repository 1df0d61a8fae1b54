"""The functionals of U⁻¹ on the Cholesky route: values, and the terms of the series about it.

The members are those of :mod:`.spectral_series`, which says what the series is. Here C_j⁻¹ comes
from the factors of C_j, and the terms with E from products of these inverses, which commute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..batch import symmetric
from .spectral_series import Moved, moved_pairs

if TYPE_CHECKING:
    from .shifted import Shifted

__all__ = ["ShiftedSeries"]

Maybe = Tensor | None


class ShiftedSeries:
    """With the Cholesky factors of C_j; all functions of M commute."""

    def __init__(self, f: Shifted, M: Tensor) -> None:
        self.f, self.M = f, M
        self.of = f.inverse_of()

    # --- values ----------------------------------------------------------------------------------

    def identity(self) -> Tensor:
        return self.f.traces()[..., None, :]

    def outer(self, F: Maybe) -> Tensor:
        if F is None:
            F = torch.eye(self.f.size, dtype=self.M.dtype, device=self.M.device)
        return _stack([h.square().sum(-2) for h in self.f.halves(F.mT)])

    def trace(self, x: Tensor) -> Tensor:
        return _stack([_diagonal(C).sum(-1) for C in self.f.applied(x)])[..., None, :]

    def pairs(self, F: Tensor) -> Tensor:
        G = torch.broadcast_tensors(*[h.mT @ h for h in self.f.halves(F.mT)])
        return torch.stack(G, -3)

    # --- the terms with E ------------------------------------------------------------------------

    def moved_identity(self, e: Moved) -> Tensor:
        return self._moved(e, None, None, total=True)

    def moved_outer(self, F: Maybe, e: Moved) -> Tensor:
        return self._moved(e, F, F, total=False)

    def moved_trace(self, x: Tensor, e: Moved) -> Tensor:
        return symmetric(self._moved(e, x, None, total=True))

    def moved_pairs(self, F: Tensor, e: Moved) -> Tensor:
        C = self.f.inverses()[..., self.of, :, :]
        Z = C @ F.mT[..., None, :, :]
        MZ = self.M[..., None, :, :] @ Z
        return moved_pairs(e, self.f.lam, e.M, Z, MZ, lambda a: C[..., :, None, :, :] @ a)

    def _moved(self, e: Moved, F: Maybe, G: Maybe, *, total: bool) -> Tensor:
        """Of Σ_s g_s f_sᵀ, or each of these for itself, for the rows of F and G."""
        C = self.f.inverses()
        ZF = C if F is None else C @ F.mT[..., None, :, :]
        ZG = ZF if G is F else (C if G is None else C @ G.mT[..., None, :, :])
        M = self.M[..., None, :, :]
        MF = MG = None
        if e.K is not None:
            MF = M @ ZF
            MG = MF if ZG is ZF else M @ ZG
        out = self._local(e, C, (ZF, MF), (ZG, MG), total)
        return out if e.M is None else out + self._row_terms(e, C, (ZF, MF), (ZG, MG), total)

    def _local(
        self, e: Moved, C: Tensor, F: tuple[Tensor, Maybe], G: tuple[Tensor, Maybe], total: bool
    ) -> Tensor:
        """The terms with V_K and V_Σ alone."""
        ZF, ZG, MF, MG = F[0], G[0], F[1], G[1]
        out = C.new_zeros(())
        if e.Sigma is not None:
            out = out - e.Sigma[..., None, :, :] * self._dot(ZF, ZG, total)
        if e.K is not None:
            out = out - e.K[..., None, :, :] * self._dot(ZF, _not_none(MG), total)
        for m in range(C.shape[-3]) if e.K is not None or e.Sigma is not None else ():
            own = self.of == m
            K, S = (None if V is None else V[..., own] for V in (e.K, e.Sigma))
            Cm = C[..., m, None, :, :]
            if S is not None:
                products = self._dot(ZF, Cm @ ZG, total)
                out = out + (S @ S.mT)[..., None, :, :] * products
            if K is not None:
                Y = Cm @ _not_none(MG)
                out = out + (K @ K.mT)[..., None, :, :] * self._dot(_not_none(MF), Y, total)
                if S is not None:
                    mixed = K @ S.mT
                    mixed = (mixed + mixed.mT)[..., None, :, :]
                    out = out + mixed * self._dot(ZF, Y, total)
        return out

    def _row_terms(
        self, e: Moved, C: Tensor, F: tuple[Tensor, Maybe], G: tuple[Tensor, Maybe], total: bool
    ) -> Tensor:
        """The terms with M̃."""
        X, (ZF, MF), (ZG, MG) = _not_none(e.M)[..., None, :, :], F, G
        lam = self.f.lam[..., None, :, None]
        HF = X @ ZF
        HG = HF if ZG is ZF else X @ ZG
        KF = C @ HF
        KG = KF if ZG is ZF else C @ HG
        first = self._dot(ZF, HG, total)
        twice = self._dot(HF, KG, total)
        out = torch.diag_embed((lam.square() * twice - lam * first).diagonal(dim1=-2, dim2=-1))
        if e.K is not None:
            K = e.K[..., None, :, :]
            out = out - K * first
            out = out + K * lam * self._dot(KF, _not_none(MG), total)
            out = out + K * lam.mT * self._dot(_not_none(MF), KG, total)
        if e.Sigma is not None:
            S = e.Sigma[..., None, :, :]
            out = out + S * lam * self._dot(KF, ZG, total) + S * lam.mT * self._dot(ZF, KG, total)
        return out

    def _dot(self, A: Tensor, B: Tensor, total: bool) -> Tensor:
        """a_sjᵀ b_sl for all j, l: (*batch, S, D, D), or (*batch, 1, D, D) summed over s."""
        if total:
            small = (A.flatten(-2) @ B.flatten(-2).mT)[..., None, :, :]
        else:
            small = torch.einsum("...jts,...lts->...sjl", A, B)
        return small[..., self.of[:, None], self.of]


def _not_none(X: Maybe) -> Tensor:
    assert X is not None
    return X


def _stack(columns: list[Tensor]) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*columns), -1)


def _diagonal(X: Tensor) -> Tensor:
    return X.diagonal(dim1=-2, dim2=-1)
