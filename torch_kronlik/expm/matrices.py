"""Products with A and Aᵀ for A dense or sparse, and sums of rank-one terms in A's own form.

A has coefficients like every other element (see ``algebra``): one where A is not differentiated
along any direction, which is the case worth being fast.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from .algebra import Element, product

__all__ = ["CsrMatrix", "DenseMatrix", "Matrix", "sum_outer"]


class Matrix(Protocol):
    """A (*batch, n, n); vectors are elements with coefficients (*batch, n)."""

    def matvec(self, y: Element) -> Element:
        """A y"""

    def rmatvec(self, y: Element) -> Element:
        """Aᵀ y"""

    def diagonal(self) -> Tensor:
        """(*batch, n), of the part of A without ε."""

    def abs_products(self, d: Tensor) -> tuple[Tensor, Tensor]:
        """|Diag(d) A| 1 and |Diag(d) A|ᵀ 1 (*batch, n), of the part without ε."""

    def outer(self, x: Element, y: Element, batch: tuple[int, ...]) -> Element:
        """Σ_k x_k y_kᵀ at A's entries, summed to ``batch``; coefficients (*batch, n, terms)."""


def sum_outer(x: Tensor, y: Tensor, batch: tuple[int, ...]) -> Tensor:
    """Σ_k x_k y_kᵀ, (*batch, n, n); without ``batch`` the batch joins the sum over k."""
    if batch == ():
        x, y = torch.broadcast_tensors(x, y)
        x, y = (z.movedim(-2, 0).flatten(1) for z in (x, y))
    full = x @ y.mT
    return full.sum_to_size(*batch, *full.shape[-2:])


class DenseMatrix:
    def __init__(self, A: Tensor) -> None:  # (*batch, c, n, n)
        self.coefficients = list(A.unbind(-3))

    def matvec(self, y: Element) -> Element:
        return self._apply(self.coefficients, y)

    def rmatvec(self, y: Element) -> Element:
        return self._apply([A.mT for A in self.coefficients], y)

    @staticmethod
    def _apply(A: Element, y: Element) -> Element:
        if len(A) == 1 and A[0].dim() == 2:  # all coefficients and the batch in one product
            return list((torch.stack(y) @ A[0].mT).unbind())
        return product(lambda B, x: (B @ x.unsqueeze(-1)).squeeze(-1), A, y)

    def diagonal(self) -> Tensor:
        return self.coefficients[0].diagonal(dim1=-2, dim2=-1)

    def abs_products(self, d: Tensor) -> tuple[Tensor, Tensor]:
        absolute, d = self.coefficients[0].abs(), d.abs()
        return d * absolute.sum(-1), (d.unsqueeze(-2) @ absolute).squeeze(-2)

    def outer(self, x: Element, y: Element, batch: tuple[int, ...]) -> Element:
        return product(lambda a, b: sum_outer(a, b, batch), x, y)


class CsrMatrix:
    """A sparse matrix by its values (*batch, c, nnz), rows ``crow`` (n + 1) and columns ``col``."""

    def __init__(self, values: Tensor, crow: Tensor, col: Tensor) -> None:
        n = crow.shape[0] - 1
        self.shape = (n, n)
        self.col, self.row = col, torch.repeat_interleave(crow.diff(), output_size=col.shape[0])
        order = torch.argsort(col, stable=True)
        crow_t = torch.searchsorted(col[order], torch.arange(n + 1, device=col.device))
        self.coefficients = list(values.unbind(-2))
        self._forward = [self._csr(x, crow, col) for x in self.coefficients]
        turned = [x[..., order] for x in self.coefficients]
        self._transpose = [self._csr(x, crow_t, self.row[order]) for x in turned]

    def _csr(self, values: Tensor, crow: Tensor, col: Tensor) -> tuple[list[Tensor], torch.Size]:
        flat = values.reshape(math.prod(values.shape[:-1]), values.shape[-1])
        crow = crow.to(col.dtype)

        def matrix(x: Tensor) -> Tensor:
            return torch.sparse_csr_tensor(
                crow, col, x, self.shape, device=x.device, check_invariants=False
            )

        return [matrix(x) for x in flat], values.shape[:-1]

    def matvec(self, y: Element) -> Element:
        return product(self._apply, self._forward, y)

    def rmatvec(self, y: Element) -> Element:
        return product(self._apply, self._transpose, y)

    @staticmethod
    def _apply(matrices: tuple[list[Tensor], torch.Size], y: Tensor) -> Tensor:
        each, batch = matrices
        if batch == ():
            return (each[0] @ y.reshape(-1, y.shape[-1]).mT).mT.reshape(y.shape)
        joint = torch.broadcast_shapes(batch, y.shape[:-1])
        index = (
            torch.arange(len(each), device="cpu").reshape(batch).expand(joint).flatten().tolist()
        )
        rows = y.expand(*joint, y.shape[-1]).reshape(-1, y.shape[-1])
        out = [
            (each[i] @ row.unsqueeze(-1)).squeeze(-1) for i, row in zip(index, rows, strict=True)
        ]
        return torch.stack(out).reshape(*joint, y.shape[-1]) if out else y.new_empty(*joint, 0)

    def diagonal(self) -> Tensor:
        kept = torch.where(self.row == self.col, self.coefficients[0], 0)
        return self._sum_by(self.row, kept)

    def abs_products(self, d: Tensor) -> tuple[Tensor, Tensor]:
        entries = (d[..., self.row] * self.coefficients[0]).abs()
        return self._sum_by(self.row, entries), self._sum_by(self.col, entries)

    def _sum_by(self, index: Tensor, entries: Tensor) -> Tensor:
        zeros = entries.new_zeros(*entries.shape[:-1], self.shape[0])
        return zeros.index_add(-1, index, entries)

    def outer(self, x: Element, y: Element, batch: tuple[int, ...]) -> Element:
        def at_entries(a: Tensor, b: Tensor) -> Tensor:
            terms = zip(a.unbind(-1), b.unbind(-1), strict=True)
            entries = sum(p[..., self.row] * q[..., self.col] for p, q in terms)
            assert isinstance(entries, Tensor)
            return entries.sum_to_size(*batch, self.col.shape[0])

        return product(at_entries, x, y)
