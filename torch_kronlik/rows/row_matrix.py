"""A symmetric T×T matrix in the form in which it arises: a gradient in M, or a direction of M."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import Shape, add_outer_, broadcast, outer_to, sum_to, symmetric

__all__ = ["Pair", "RowMatrix"]

Pair = tuple[Tensor, Tensor]


class RowMatrix(NamedTuple):
    """G = α I + Diag(δ) + Σ_k L_k R_kᵀ + H, or its symmetric part.

    A row covariance takes from G what its own tensors need: products G X where M is a product of
    thin factors, all of G where M is a matrix.
    """

    size: int  # T
    scale: Tensor | None = None  # α, (*batch)
    pairs: tuple[Pair, ...] = ()  # L_k and R_k, (*batch, T, r_k) each
    whole: Tensor | None = None  # H, (*batch, T, T)
    diagonal: Tensor | None = None  # δ, (*batch, T)
    is_symmetric: bool = True  # what stands here; if not, the symmetric part is meant

    @property
    def batch(self) -> torch.Size:
        parts = [X.shape[:-2] for pair in self.pairs for X in pair]
        parts += [] if self.scale is None else [self.scale.shape]
        parts += [] if self.whole is None else [self.whole.shape[:-2]]
        parts += [] if self.diagonal is None else [self.diagonal.shape[:-1]]
        return broadcast(*parts)

    def apply(self, X: Tensor, to: Shape | None = None) -> Tensor:
        """G X for X (*batch, T, k), in O(T r k) without H.

        With ``to`` the batch is summed to that shape, as in :meth:`dense`: of each term by itself,
        since the terms of a gradient may be summed already, some more than others.
        """
        out: Tensor | None = None
        for term in self._products(X):  # one by one: T may be a million
            term = term if to is None else sum_to(term, to, 2)
            out = term if out is None else out + term
        assert out is not None
        return out

    def _products(self, X: Tensor) -> Iterator[Tensor]:
        """The terms of G X."""
        for L, R in self.pairs:
            yield (L if self.is_symmetric else 0.5 * L) @ (R.mT @ X)
            if not self.is_symmetric:
                yield 0.5 * (R @ (L.mT @ X))
        if self.scale is not None:
            yield self.scale[..., None, None] * X
        if self.diagonal is not None:
            yield self.diagonal[..., None] * X
        if self.whole is not None:
            yield (self.whole if self.is_symmetric else symmetric(self.whole)) @ X

    def trace(self) -> Tensor:
        """(*batch)"""
        terms = [(L * R).sum((-2, -1)) for L, R in self.pairs]
        if self.scale is not None:
            terms.append(self.size * self.scale)
        if self.diagonal is not None:
            terms.append(self.diagonal.sum(-1))
        if self.whole is not None:
            terms.append(self.whole.diagonal(dim1=-2, dim2=-1).sum(-1))
        return sum(terms[1:], terms[0])

    def scaled(self, c: Tensor) -> RowMatrix:
        """c G for c (*batch)."""
        wide = c[..., None, None]
        return self._replace(
            scale=None if self.scale is None else c * self.scale,
            pairs=tuple((wide * L, R) for L, R in self.pairs),
            whole=None if self.whole is None else wide * self.whole,
            diagonal=None if self.diagonal is None else c[..., None] * self.diagonal,
        )

    def plus(self, other: RowMatrix) -> RowMatrix:
        """G plus another symmetric matrix, of a scale and pairs alone."""
        scale = other.scale if self.scale is None else self.scale
        if self.scale is not None and other.scale is not None:
            scale = self.scale + other.scale
        return self._replace(scale=scale, pairs=self.pairs + other.pairs)

    def dense(self, to: Shape) -> Tensor:
        """G as a matrix, its batch summed to the shape ``to``: (*to, T, T). H is used up."""
        out = None if self.whole is None else sum_to(self.whole, to, 2)
        for L, R in self._joined(to):
            out = outer_to(L, R, to) if out is None else add_outer_(out, L, R)
        diagonal = None if self.scale is None else sum_to(self.scale, to, 0)[..., None]
        if self.diagonal is not None:
            own = sum_to(self.diagonal, to, 1)
            diagonal = own if diagonal is None else diagonal + own
        if diagonal is not None:
            if out is None:
                out = torch.diag_embed(diagonal.expand(*to, self.size))
            else:
                out.diagonal(dim1=-2, dim2=-1).add_(diagonal)
        assert out is not None
        return out if self.is_symmetric else symmetric(out)

    def _joined(self, to: Shape) -> list[Pair]:
        """Thin pairs side by side: one pass over the result for all of them."""
        if len(self.pairs) < 2 or sum(L.shape[-1] for L, _ in self.pairs) >= self.size:
            return list(self.pairs)
        if any(L.shape[:-2] != torch.Size(to) for L, _ in self.pairs):
            return list(self.pairs)
        pairs = [(L, R.expand(*L.shape[:-2], *R.shape[-2:])) for L, R in self.pairs]
        lefts, rights = zip(*pairs, strict=True)
        return [(torch.cat(lefts, -1), torch.cat(rights, -1))]
