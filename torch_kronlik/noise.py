"""The noise Σ between outputs: what it can be, and what the rest of the library asks of it.

A noise is a record of its own tensors, the arguments that a caller gave. It knows Σ as a linear
map, and takes derivatives between Σ and its own tensors: ``tangent`` from their direction to dΣ,
``pull_back`` from a gradient in Σ to theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .batch import Shape, outer_to, sum_to, symmetric
from .guards import finite, positive
from .records import Kind, Matrix, Vector

__all__ = ["Diagonal", "Full", "Noise", "PerRow", "make_noise", "make_row_noise", "rows_of"]


if TYPE_CHECKING:
    Noise = Any  # which record stands in an open field, a checker cannot know
else:

    class Noise(Kind):
        """The kinds of noise."""


@Noise.register
class Diagonal(NamedTuple):
    """Σ = Diag(exp(s)), never expanded to a matrix where that can be avoided."""

    log_noise: Vector  # s

    @property
    def is_curved(self) -> bool:
        """Whether Σ is not linear in the own tensor."""
        return True

    @property
    def is_matrix(self) -> bool:
        """Whether the own tensor is Σ itself."""
        return False

    @property
    def batch(self) -> torch.Size:
        return self.log_noise.shape[:-1]

    @property
    def shape(self) -> tuple[int, int]:
        """Of Σ, and of a gradient in Σ, behind the batch."""
        return self.log_noise.shape[-1], self.log_noise.shape[-1]

    def named(self) -> dict[str, Tensor]:
        return {"log_noise": self.log_noise}

    # --- Σ ---------------------------------------------------------------------------------------

    def matrix(self) -> Tensor:
        """(*batch, D, D)"""
        return torch.diag_embed(self.log_noise.exp())

    def blocks(self) -> Tensor:
        """Σ of each row, (*batch, 1, D, D)."""
        return self.matrix()[..., None, :, :]

    def diagonal(self) -> Tensor:
        """(*batch, 1, D)"""
        return self.log_noise.exp()[..., None, :]

    def matmul(self, X: Tensor) -> Tensor:
        """X Σᵀ for X (*batch, T, D)."""
        return X * self.log_noise.exp()[..., None, :]

    def transposed_matmul(self, X: Tensor) -> Tensor:
        """X Σ."""
        return self.matmul(X)

    def root_matmul(self, E: Tensor) -> Tensor:
        """E Lᵀ."""
        return E * torch.exp(0.5 * self.log_noise)[..., None, :]

    def root_transposed_matmul(self, E: Tensor) -> Tensor:
        """E L."""
        return self.root_matmul(E)

    def root_solve_transposed(self, X: Tensor) -> Tensor:
        """X L⁻ᵀ."""
        return X / torch.exp(0.5 * self.log_noise)[..., None, :]

    def whitened(self, K: Tensor) -> Tensor:
        """L⁻¹ K L⁻ᵀ."""
        L = torch.exp(0.5 * self.log_noise)
        return K / L[..., :, None] / L[..., None, :]

    def congruence(self, R: Tensor) -> Tensor:
        """RᵀΣR, for R with RᵀΣR = I at the point of factorisation: exp(s) itself may overflow."""
        Q = self._scaled(R)
        return Q.mT @ Q

    def coordinates(self, R: Tensor) -> Tensor:
        """LᵀR."""
        return self._scaled(R)

    def _scaled(self, R: Tensor) -> Tensor:
        return torch.exp(0.5 * self.log_noise)[..., :, None] * R

    def order(self) -> Tensor:
        """The outputs in descending order of noise: (*batch, D)."""
        return self.log_noise.argsort(-1, descending=True)

    def hidden(self) -> tuple[Tensor, ...]:
        """What has to be looked at for infinities where a result of exp(s) may hide them."""
        return (self.log_noise,)

    # --- derivatives -----------------------------------------------------------------------------

    def matmul_tangent(self, X: Tensor, along: Diagonal) -> Tensor | None:
        """The derivative of X Σᵀ along a direction."""
        return self.tangent_matmul(X, along)

    def matmul_pull_back(self, Z: Tensor, X: Tensor, to: Shape) -> Diagonal:
        """The gradient of ⟨Z, X Σᵀ⟩."""
        return self.pull_back_product(Z, X, to)

    def tangent(self, along: Diagonal) -> Tensor | None:
        """dΣ along a direction of s."""
        if along.log_noise is None:
            return None
        return torch.diag_embed(self.log_noise.exp() * along.log_noise)

    def tangent_matmul(self, A: Tensor, along: Diagonal) -> Tensor | None:
        """A dΣ."""
        if along.log_noise is None:
            return None
        return A * (self.log_noise.exp() * along.log_noise)[..., None, :]

    def pull_back(self, G: Tensor, to: Shape) -> Diagonal:
        """The gradient in s from the one in Σ."""
        diagonal = G.diagonal(dim1=-2, dim2=-1)
        return Diagonal(self.log_noise.exp() * sum_to(diagonal, to, 1))

    def pull_back_product(self, Z: Tensor, A: Tensor, to: Shape) -> Diagonal:
        """The gradient of ⟨Z, A Σ⟩."""
        # exp(s) itself may overflow.
        root = torch.exp(0.5 * self.log_noise)[..., None, :]
        return Diagonal(sum_to(((root * Z) * (root * A)).sum(-2), to, 1))

    def pull_back_columns(self, R: Tensor, weights: Tensor, to: Shape) -> Diagonal:
        """The gradient in s where the one in Σ is R Diag(weights) Rᵀ."""
        # exp(s/2) ⊙ R is orthogonal, so nothing overflows.
        Q = self._scaled(R)
        return Diagonal(sum_to((Q.square() @ weights[..., None]).squeeze(-1), to, 1))

    def scaled_gradient(self, gradient: Diagonal, g: Tensor) -> Diagonal:
        """g times a gradient, summed to the batch shape of s."""
        return Diagonal(sum_to(g[..., None] * gradient.log_noise, self.batch, 1))

    def curvature(self, gradient: Diagonal, along: Diagonal) -> Diagonal:
        """The derivative of ``gradient`` along a direction, with the gradient in Σ held."""
        return Diagonal(along.log_noise * gradient.log_noise)


@Noise.register
class Full(NamedTuple):
    """Σ as a matrix."""

    Sigma: Matrix

    @property
    def is_curved(self) -> bool:
        """Whether Σ is not linear in the own tensor."""
        return False

    @property
    def is_matrix(self) -> bool:
        """Whether the own tensor is Σ itself."""
        return True

    @property
    def batch(self) -> torch.Size:
        return self.Sigma.shape[:-2]

    @property
    def shape(self) -> tuple[int, int]:
        """Of Σ, and of a gradient in Σ, behind the batch."""
        return self.Sigma.shape[-2], self.Sigma.shape[-1]

    def named(self) -> dict[str, Tensor]:
        return {"Sigma": self.Sigma}

    # --- Σ ---------------------------------------------------------------------------------------

    def matrix(self) -> Tensor:
        """(*batch, D, D), the symmetric part."""
        return symmetric(self.Sigma)

    def blocks(self) -> Tensor:
        """Σ of each row, (*batch, 1, D, D)."""
        return self.matrix()[..., None, :, :]

    def diagonal(self) -> Tensor:
        """(*batch, 1, D)"""
        return self.Sigma.diagonal(dim1=-2, dim2=-1)[..., None, :]

    def matmul(self, X: Tensor) -> Tensor:
        """X Σᵀ for X (*batch, T, D)."""
        return X @ self.Sigma.mT

    def transposed_matmul(self, X: Tensor) -> Tensor:
        """X Σ."""
        return X @ self.Sigma

    def _root(self) -> Tensor:
        """L with Σ = L Lᵀ."""
        L: Tensor = torch.linalg.cholesky(self.matrix())
        return L

    def root_matmul(self, E: Tensor) -> Tensor:
        """E Lᵀ."""
        return E @ self._root().mT

    def root_transposed_matmul(self, E: Tensor) -> Tensor:
        """E L."""
        return E @ self._root()

    def root_solve_transposed(self, X: Tensor) -> Tensor:
        """X L⁻ᵀ."""
        L = self._root()
        solved: Tensor = torch.linalg.solve_triangular(L.mT, X, upper=True, left=False)
        return solved

    def whitened(self, K: Tensor) -> Tensor:
        """L⁻¹ K L⁻ᵀ."""
        L = self._root()
        half = torch.linalg.solve_triangular(L, K, upper=False)
        out: Tensor = torch.linalg.solve_triangular(L, half.mT, upper=False)
        return out

    def congruence(self, R: Tensor) -> Tensor:
        """RᵀΣR."""
        return R.mT @ self.Sigma @ R

    def coordinates(self, R: Tensor) -> Tensor:
        """LᵀR."""
        return self._root().mT @ R

    def order(self) -> Tensor:
        """The outputs in descending order of noise: (*batch, D)."""
        return self.Sigma.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True)

    def hidden(self) -> tuple[Tensor, ...]:
        """Nothing: a product shows what is not finite in Sigma."""
        return ()

    # --- derivatives -----------------------------------------------------------------------------

    def matmul_tangent(self, X: Tensor, along: Full) -> Tensor | None:
        """The derivative of X Σᵀ along a direction."""
        return None if along.Sigma is None else X @ along.Sigma.mT

    def matmul_pull_back(self, Z: Tensor, X: Tensor, to: Shape) -> Full:
        """The gradient of ⟨Z, X Σᵀ⟩ for any square matrix, not symmetrised."""
        return Full(outer_to(Z.mT, X.mT, to))

    def tangent(self, along: Full) -> Tensor | None:
        """dΣ along a direction of Sigma: its symmetric part."""
        return None if along.Sigma is None else symmetric(along.Sigma)

    def tangent_matmul(self, A: Tensor, along: Full) -> Tensor | None:
        """A dΣ."""
        return None if along.Sigma is None else A @ symmetric(along.Sigma)

    def pull_back(self, G: Tensor, to: Shape) -> Full:
        """The gradient in Sigma."""
        return Full(sum_to(G, to, 2))

    def pull_back_product(self, Z: Tensor, A: Tensor, to: Shape) -> Full:
        """The gradient of ⟨Z, A Σ⟩."""
        return Full(symmetric(outer_to(Z.mT, A.mT, to)))

    def pull_back_columns(self, R: Tensor, weights: Tensor, to: Shape) -> Full:
        """The gradient R Diag(weights) Rᵀ."""
        return Full(sum_to((R * weights[..., None, :]) @ R.mT, to, 2))

    def scaled_gradient(self, gradient: Full, g: Tensor) -> Full:
        """g times a gradient, summed to the batch shape of Sigma."""
        return Full(sum_to(g[..., None, None] * gradient.Sigma, self.batch, 2))

    def curvature(self, gradient: Full, along: Full) -> Full:
        """Zero: Σ is linear in Sigma."""
        return Full(torch.zeros_like(gradient.Sigma))


@Noise.register
class PerRow(NamedTuple):
    """A noise Σ_t for each row t. Which entries are observed, the factorisation knows."""

    row_Sigma: Matrix  # the matrices Σ_t, one below the other: (*batch, T·D, D)

    @property
    def is_curved(self) -> bool:
        """Whether Σ is not linear in the own tensor."""
        return False

    @property
    def is_matrix(self) -> bool:
        """Whether the own tensor is Σ itself."""
        return True

    @property
    def batch(self) -> torch.Size:
        return self.row_Sigma.shape[:-2]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrices Σ_t, and of a gradient in them, behind the batch."""
        return self.row_Sigma.shape[-2], self.row_Sigma.shape[-1]

    def named(self) -> dict[str, Tensor]:
        return {"row_Sigma": self.row_Sigma}

    # --- Σ ---------------------------------------------------------------------------------------

    def blocks(self) -> Tensor:
        """Σ_t, the symmetric parts: (*batch, T, D, D)."""
        return symmetric(rows_of(self.row_Sigma))

    def diagonal(self) -> Tensor:
        """(*batch, T, D)"""
        return rows_of(self.row_Sigma).diagonal(dim1=-2, dim2=-1)

    def matmul(self, X: Tensor) -> Tensor:
        """The rows Σ_t x_t for X (*batch, T, D)."""
        return _each(rows_of(self.row_Sigma), X)

    def transposed_matmul(self, X: Tensor) -> Tensor:
        """The rows Σ_tᵀ x_t."""
        return _each(rows_of(self.row_Sigma).mT, X)

    def hidden(self) -> tuple[Tensor, ...]:
        """Nothing: a product shows what is not finite in Sigma."""
        return ()

    # --- derivatives -----------------------------------------------------------------------------

    def matmul_tangent(self, X: Tensor, along: PerRow) -> Tensor | None:
        """The derivative of the rows Σ_t x_t along a direction."""
        return None if along.row_Sigma is None else _each(rows_of(along.row_Sigma), X)

    def matmul_pull_back(self, Z: Tensor, X: Tensor, to: Shape) -> PerRow:
        """The gradient of Σ_t ⟨z_t, Σ_t x_t⟩ for any square matrices, not symmetrised."""
        return PerRow(sum_to((Z[..., :, None] * X[..., None, :]).flatten(-3, -2), to, 2))

    def tangent(self, along: PerRow) -> Tensor | None:
        """dΣ_t along a direction: the symmetric parts."""
        return (
            None if along.row_Sigma is None else symmetric(rows_of(along.row_Sigma)).flatten(-3, -2)
        )

    def tangent_matmul(self, A: Tensor, along: PerRow) -> Tensor | None:
        """The rows dΣ_t a_t."""
        return None if along.row_Sigma is None else _each(symmetric(rows_of(along.row_Sigma)), A)

    def pull_back(self, G: Tensor, to: Shape) -> PerRow:
        """The gradient in the matrices Σ_t."""
        return PerRow(sum_to(G, to, 2))

    def pull_back_product(self, Z: Tensor, A: Tensor, to: Shape) -> PerRow:
        """The gradient of Σ_t ⟨z_t, Σ_t a_t⟩."""
        return PerRow(sum_to(symmetric(Z[..., :, None] * A[..., None, :]).flatten(-3, -2), to, 2))

    def curvature(self, gradient: PerRow, along: PerRow) -> PerRow:
        """Zero: the matrices are the own tensor."""
        return PerRow(torch.zeros_like(gradient.row_Sigma))


def rows_of(X: Tensor) -> Tensor:
    """Matrices that stand one below the other, (*batch, T·D, n), as (*batch, T, D, n)."""
    D = X.shape[-1]
    out: Tensor = X.unflatten(-2, (X.shape[-2] // D, D))
    return out


def _each(blocks: Tensor, X: Tensor) -> Tensor:
    """The rows B_t x_t, (*batch, T, D), without a copy of the blocks for each x."""
    out: Tensor = (blocks * X[..., None, :]).sum(-1)
    return out


def make_noise(Sigma: Tensor | None = None, log_noise: Tensor | None = None) -> Diagonal | Full:
    """The noise that a caller's keywords name: exactly one is given."""
    if log_noise is not None:
        return Diagonal(log_noise)
    assert Sigma is not None
    return Full(Sigma)


def make_row_noise(
    noise: Diagonal | Full | None,
    row_Sigma: Tensor | None,
    row_log_noise: Tensor | None,
    row_scale: Tensor | None,
    shape: tuple[int, int],
    observed: Tensor | None,
) -> PerRow:
    """The noise of each of T rows, from the one of all rows or from what is given for each.

    Args:
        noise: Σ, None where a keyword gives Σ_t.
        row_Sigma, row_log_noise, row_scale: see :class:`.KroneckerPlusNoise`.
        shape: (T, D).
        observed: (*batch, T, D) or None. The noise gets the batch shape that observed has too.
    """
    T, D = shape
    if row_Sigma is not None:
        blocks = row_Sigma
    elif row_log_noise is not None:
        blocks = torch.diag_embed(row_log_noise.exp())
    else:
        assert noise is not None
        blocks = noise.blocks()
    if row_scale is not None:
        blocks = blocks * positive(row_scale, "row_scale")[..., None, None]
    if observed is not None:
        blocks = blocks + torch.zeros_like(observed, dtype=blocks.dtype)[..., None]
    of_all = {} if noise is None else noise.named()
    of_rows = {"row_Sigma": row_Sigma, "row_log_noise": row_log_noise, "row_scale": row_scale}
    named = {name: x for name, x in {**of_all, **of_rows}.items() if x is not None}
    blocks = finite(blocks, **named)
    return PerRow(blocks.expand(*blocks.shape[:-3], T, D, D).flatten(-3, -2))
