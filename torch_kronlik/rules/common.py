"""What the operators on a factorised U share: U as a record, and products with U."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import Shape, broadcast, outer_to, symmetric
from ..factor import Factor
from ..noise import Noise
from ..records import Batch, Matrix, own_layout
from ..rows import RowMatrix, Rows

__all__ = [
    "Covariance",
    "Direction",
    "Factored",
    "Maybe",
    "Targets",
    "add_records",
    "batch_of",
    "empty_record",
    "is_empty",
    "minus",
    "plus",
    "product_gradients",
    "product_row_matrix",
    "product_tangent",
    "total",
]

Maybe = Tensor | None


class Covariance(NamedTuple):
    """U = M ⊗ K + I ⊗ Σ by its parts, which is what U is differentiated with respect to."""

    rows: Rows
    K: Matrix
    noise: Noise

    @property
    def batch(self) -> torch.Size:
        return broadcast(self.rows.batch, self.K.shape[:-2], self.noise.batch)

    @property
    def shape(self) -> tuple[int, int]:
        """(T, D)"""
        return self.rows.size, self.K.shape[-1]

    def named(self) -> dict[str, Tensor]:
        """The tensors under the names that a caller knows."""
        return {**self.rows.named(), "K": self.K, **self.noise.named()}


class Factored(NamedTuple):
    """U with its factorisation, whose tensors are constants for differentiation."""

    parts: Covariance
    factor: Factor

    @property
    def rows(self) -> Any:
        return self.parts.rows

    @property
    def K(self) -> Tensor:
        return self.parts.K

    @property
    def noise(self) -> Any:
        return self.parts.noise

    @property
    def batch(self) -> torch.Size:
        return self.parts.batch

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts.shape

    def named(self) -> dict[str, Tensor]:
        return self.parts.named()


class Direction(NamedTuple):
    """A direction, or gradients, in the parts of U; None, or a record of Nones, for zero."""

    rows: Rows | None
    K: Matrix | None
    noise: Noise | None


class Targets(NamedTuple):
    """The batch shapes of the gradients in Y and in the parts of U, None for those not asked."""

    Y: Batch | None
    rows: Batch | None
    K: Batch | None
    noise: Batch | None

    @classmethod
    def of(cls, Y: Maybe, parts: Any, needs_Y: bool, needs: Any) -> Targets:
        """The batch shapes of the arguments themselves, where ``needs`` has a True."""
        return cls(
            Y.shape[:-2] if needs_Y and Y is not None else None,
            parts.rows.batch if any(needs.rows) else None,
            parts.K.shape[:-2] if needs.K else None,
            parts.noise.batch if any(needs.noise) else None,
        )


def is_empty(record: Any) -> bool:
    """Whether a record, or what stands for one, holds no tensor."""
    if record is None:
        return True
    return all(is_empty(x) for x in record) if isinstance(record, tuple) else False


def empty_record(like: Any, to: Shape | None, new: Tensor) -> Any:
    """A record of the kind of ``like`` for gradients at the batch shape ``to``: its shapes, with
    one empty dimension where nothing is asked for."""
    leaves = zip(like, own_layout(type(like)).leaves, strict=True)
    return type(like)(
        *(
            new.new_empty((0,) if to is None else (*to, *x.shape[x.dim() - leaf.core :]))
            for x, leaf in leaves
        )
    )


def batch_of(record: Any) -> torch.Size:
    """The joint batch shape of the tensors in a record; () where there are none."""
    if is_empty(record):
        return torch.Size()
    leaves = zip(record, own_layout(type(record)).leaves, strict=True)
    return broadcast(*(x.shape[: x.dim() - leaf.core] for x, leaf in leaves if x is not None))


def add_records(a: Any, b: Any) -> Any:
    """a + b, tensor by tensor, with None for zero."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, tuple):
        return type(a)(*(add_records(x, y) for x, y in zip(a, b, strict=True)))
    return a + b


# --- products ------------------------------------------------------------------------------------


def product_gradients(
    Z: Tensor, A: Tensor, U: Any, to: Targets, *, symmetrise: bool = True
) -> Direction:
    """Gradients of ⟨Z, M A K + A Σ⟩ in the parts of U, as functions of symmetric matrices.

    They are symmetric by themselves where Z is a multiple of A.
    """
    rows = K = noise = None
    if to.rows is not None:
        rows = U.rows.pull_back(product_row_matrix(Z, A, U, symmetrise), to.rows)
    if to.K is not None:
        K = symmetric(outer_to(Z.mT, U.rows.symmetric_matmul(A).mT, to.K))
    if to.noise is not None:
        noise = U.noise.pull_back_product(Z, A, to.noise)
    return Direction(rows, K, noise)


def product_row_matrix(Z: Tensor, A: Tensor, U: Any, symmetrise: bool = True) -> RowMatrix:
    """Z K Aᵀ, the gradient of ⟨Z, M A K⟩ in M."""
    return RowMatrix(U.rows.size, pairs=((Z @ symmetric(U.K), A),), is_symmetric=not symmetrise)


def product_tangent(A: Tensor, U: Any, along: Any) -> Maybe:
    """dU·A = dM A K + M A dK + A dΣ along a direction; None where nothing moves.

    Functions of symmetric matrices move along the symmetric part of a direction.
    """
    dM = None if is_empty(along.rows) else U.rows.tangent(along.rows)
    terms: list[Maybe] = [None if dM is None else dM.apply(A) @ symmetric(U.K)]
    if along.K is not None:
        terms.append(U.rows.symmetric_matmul(A @ symmetric(along.K)))
    if not is_empty(along.noise):
        terms.append(U.noise.tangent_matmul(A, along.noise))
    return total(terms)


def total(terms: Sequence[Maybe]) -> Maybe:
    """The sum, with None for zero."""
    present = [x for x in terms if x is not None]
    return sum(present[1:], present[0]) if present else None


def minus(a: Maybe, b: Maybe) -> Maybe:
    """a − b, with None for zero."""
    if b is None:
        return a
    return -b if a is None else a - b


def plus(a: Maybe, b: Maybe) -> Maybe:
    """a + b, with None for zero."""
    return total([a, b])
