"""M by some of its columns, that is of a kernel's at the pivots of a Cholesky factorisation.

    C = k(x, x_p)  (T×r),   W = k(x_p, x_p) = L Lᵀ,   F = C L⁻ᵀ,   X = C W⁻¹,   M = F Fᵀ = X Cᵀ

X are interpolation weights. With X and L held where they are, and E = C − X W, which is zero,

    M = C Xᵀ + X Cᵀ − X W Xᵀ + E W⁻¹ Eᵀ

is right in value, first and second derivatives in C and W. No derivative passes through the
inverse of W, whose condition number is that of rounding: an error of X enters multiplied by an
interpolation residual. E is taken for zero: its rounding, times the second derivative of E, would
be divided by the smallest pivot. Source: docs/maths.md, "M from a kernel".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import Shape, sum_to, symmetric
from ..derivatives import define_flat, may_be_differentiated, register
from ..records import Matrix
from .low_rank_root import basis_of_root
from .row_matrix import Pair, RowMatrix
from .thin import register_thin

__all__ = ["KernelColumns"]


@register_thin
class KernelColumns(NamedTuple):
    """What :class:`.kernel_matrix.KernelMatrix` is to the rest of the library."""

    columns: Matrix  # C, (*batch, T, r)
    corner: Matrix  # W, (*batch, r, r)
    root: Matrix  # L, (*batch, r, r), lower triangular, a constant

    @property
    def size(self) -> int:
        return self.columns.shape[-2]

    @property
    def batch(self) -> torch.Size:
        return self.columns.shape[:-2]

    def check(self) -> None:
        """The tensors were made by the library itself."""

    def named(self) -> dict[str, Tensor]:
        return {"M.columns": self.columns, "M.corner": self.corner}

    def features(self) -> Tensor:
        """F, (*batch, T, r), a constant."""
        return _times_inverse(self.columns.detach(), self.root.mT, upper=True)

    def _weights(self) -> Tensor:
        """X, (*batch, T, r), a constant."""
        return self._over_root(self.features())

    def _over_root(self, Z: Tensor) -> Tensor:
        """Z L⁻¹."""
        return _times_inverse(Z, self.root, upper=False)

    def _over_corner(self, Z: Tensor) -> Tensor:
        """Z W⁻¹."""
        return self._over_root(_times_inverse(Z, self.root.mT, upper=True))

    def _residual(self, orders: int) -> Tensor:
        """E, zero but for its derivatives, of which so many are meaningful."""
        out: Tensor = _kernel_residual(self.columns, self.corner, self._weights(), orders)
        return out

    def _pairs(self) -> tuple[Pair, ...]:
        """L_k and R_k with M = Σ_k L_k R_kᵀ; where something may ask for derivatives, with them."""
        if not may_be_differentiated(self.columns, self.corner):
            F = self.features()
            return ((F, F),)
        X, E = self._weights(), self._residual(2)
        half = self.columns - 0.5 * (X @ symmetric(self.corner))
        return (half, X), (X, half), (E, self._over_corner(E))

    def matmul(self, X: Tensor) -> Tensor:
        return RowMatrix(self.size, pairs=self._pairs()).apply(X)

    def diagonal(self) -> Tensor:
        return _sum((L * R).sum(-1) for L, R in self._pairs())

    def dense(self) -> Tensor:
        return _sum(L @ R.mT for L, R in self._pairs())

    def scaled(self, c: Tensor) -> KernelColumns:
        return self._replace(columns=c[..., None] * self.columns)

    def basis(self) -> tuple[Tensor, Tensor]:
        s, P = basis_of_root(self.features())
        return s, P

    # --- derivatives -----------------------------------------------------------------------------

    def tangent(self, along: KernelColumns) -> RowMatrix | None:
        dC, dW = along.columns, along.corner
        if dC is None and dW is None:
            return None
        X = self._weights()
        left = _moved_residual(dC, dW, X)
        first = left if dC is None else left + dC  # 2 dC − X dW, or −X dW
        half = 0.5 * first
        pairs: tuple[Pair, ...] = ((half, X), (X, half))
        if may_be_differentiated(self.columns, self.corner):
            E, curved = self._residual(1), self._over_corner(left)
            pairs = (*pairs, (curved, E), (E, curved))
        return RowMatrix(self.size, pairs=pairs)

    def pull_back(self, G: RowMatrix, to: Shape) -> KernelColumns:
        X = self._weights()
        GX = G.apply(X)
        corner = -(X.mT @ GX)
        if may_be_differentiated(self.columns, self.corner):
            GE = G.apply(self._over_corner(self._residual(1)))
            GX, corner = GX + GE, corner - 2 * symmetric(X.mT @ GE)
        return self._gradient(2 * GX, corner, to)

    def curvature(self, G: RowMatrix, along: KernelColumns, to: Shape) -> KernelColumns:
        X = self._weights()
        moved = _moved_residual(along.columns, along.corner, X)
        GB = G.apply(self._over_corner(moved))
        GB = _limited(GB, self.columns, self.corner, 0)
        return self._gradient(2 * GB, -2 * symmetric(X.mT @ GB), to)

    def _gradient(self, columns: Tensor, corner: Tensor, to: Shape) -> KernelColumns:
        r = self.root.shape[-1]
        zeros = corner.new_zeros(()).expand(*to, r, r)
        return KernelColumns(sum_to(columns, to, 2), sum_to(corner, to, 2), zeros)


def _times_inverse(Z: Tensor, triangular: Tensor, *, upper: bool) -> Tensor:
    """Z times the inverse of a triangular matrix, each with a batch of its own."""
    out: Tensor = torch.linalg.solve_triangular(triangular.detach(), Z, upper=upper, left=False)
    return out


def _sum(terms: Iterable[Tensor]) -> Tensor:
    first, *others = terms
    return sum(others, first)


def _moved_residual(dC: Tensor | None, dW: Tensor | None, X: Tensor) -> Tensor:
    """dE = dC − X dW, with None for zero, but not both."""
    if dW is None:
        assert dC is not None
        return dC
    moved = X @ symmetric(dW)
    return -moved if dC is None else dC - moved


# --- second order, and no more ---------------------------------------------------------------


def _residual_vjp(inputs: Any, outputs: Any, grads: Any, needs: Any) -> Any:
    C, W, X, orders = inputs
    g = _limited(grads[0], C, W, orders - 1)
    gC = sum_to(g, C.shape[:-2], 2) if needs[0] else None
    gW = sum_to(-symmetric(X.mT @ g), W.shape[:-2], 2) if needs[1] else None
    return gC, gW, None, None


def _residual_jvp(inputs: Any, outputs: Any, tangents: Any) -> Any:
    (C, W, X, orders), (dC, dW, *_) = inputs, tangents
    if dC is None and dW is None:
        return [None]
    moved = _moved_residual(dC, dW, X)
    return [_limited(moved.expand_as(outputs[0]), C, W, orders - 1)]


def _residual(C: Tensor, W: Tensor, X: Tensor, orders: int) -> Tensor:
    batch = torch.broadcast_shapes(C.shape[:-2], W.shape[:-2], X.shape[:-2])
    return C.new_zeros((*batch, *C.shape[-2:]))


_kernel_residual = define_flat(
    "kernel_residual(Tensor C, Tensor W, Tensor X, int orders) -> Tensor", _residual, _residual
)
register(
    _kernel_residual,
    vjp=_residual_vjp,
    jvp=_residual_jvp,
    core_dims=lambda *_: ([2, 2, 2, None], [2]),
)


def _limited_vjp(inputs: Any, outputs: Any, grads: Any, needs: Any) -> Any:
    _, C, W, orders = inputs
    return _limited(grads[0], C, W, _fewer(orders)), None, None, None


def _limited_jvp(inputs: Any, outputs: Any, tangents: Any) -> Any:
    _, C, W, orders = inputs
    dG = tangents[0]
    if dG is None and all(t is None for t in tangents):
        return [None]
    left = _fewer(orders)
    return [None if dG is None else _limited(dG, C, W, left)]


def _fewer(orders: int) -> int:
    if orders == 0:
        raise NotImplementedError(
            "third derivatives with respect to a KernelMatrix are not implemented; first and "
            "second derivatives are"
        )
    return orders - 1


# The identity in G, which so many derivatives may pass.
_limited = define_flat(
    "limited(Tensor G, Tensor C, Tensor W, int orders) -> Tensor",
    lambda G, C, W, orders: G.clone(),
    lambda G, C, W, orders: torch.empty_like(G),
)
register(_limited, vjp=_limited_vjp, jvp=_limited_jvp, core_dims=lambda *_: ([2, 2, 2, None], [2]))
