"""What the operators of this package share: products with columns, and their batch dimensions.

linear_operator stacks the T×D entries of a matrix into a column of length T·D, row by row, and puts
several columns side by side: (*batch, T·D, C). The functions of this library take matrices, with
every column as a batch element: (C, *batch, T, D).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from linear_operator.operators import (
    DenseLinearOperator,
    LinearOperator,
    MatmulLinearOperator,
    TriangularLinearOperator,
)
from linear_operator.utils.memoize import cached
from torch import Tensor
from typing_extensions import Self

from ..batch import expand_to, symmetric
from ..covariance import KroneckerPlusNoise

__all__ = [
    "CovarianceLinearOperator",
    "Noise",
    "StructuredLinearOperator",
    "as_matrices",
    "as_noise",
    "map_noise",
    "noise_as_given",
    "noise_batch",
    "noise_matrix",
    "over_columns",
]

Noise = dict[str, Tensor]  # {"log_noise": (*batch, D)} or {"Sigma": (*batch, D, D)}
_CORE = {"log_noise": 1, "Sigma": 2}


def as_noise(Sigma: Tensor | None, log_noise: Tensor | None) -> Noise:
    """The arguments that are given, under their names."""
    both = {"Sigma": Sigma, "log_noise": log_noise}
    return {name: x for name, x in both.items() if x is not None}


def map_noise(f: Callable[[Tensor, int], Tensor], noise: Noise) -> Noise:
    """f of the noise argument and of its number of dimensions that are not batch."""
    return {name: f(x, _CORE[name]) for name, x in noise.items()}


def noise_batch(noise: Noise) -> torch.Size:
    return torch.Size(torch.broadcast_shapes(*(x.shape[: -_CORE[n]] for n, x in noise.items())))


def noise_as_given(noise: Noise) -> Tensor:
    """Σ as a matrix, not symmetrised."""
    return noise["Sigma"] if "Sigma" in noise else torch.diag_embed(noise["log_noise"].exp())


def noise_matrix(noise: Noise) -> Tensor:
    """Σ, with a symmetric gradient."""
    if "Sigma" in noise:
        return symmetric(noise["Sigma"])
    return torch.diag_embed(noise["log_noise"].exp())


def as_matrices(columns: Tensor, num_outputs: int, batch_dims: int) -> Tensor:
    """(*b, T·D, C) to (C, *b, T, D), with ones in front of b up to ``batch_dims`` dimensions."""
    missing = max(batch_dims - (columns.dim() - 2), 0)
    matrices: Tensor = columns[(None,) * missing].movedim(-1, 0).unflatten(-1, (-1, num_outputs))
    return matrices


def over_columns(
    f: Callable[[Tensor], Tensor], x: Tensor, num_outputs: int, batch_dims: int
) -> Tensor:
    """f, a function of matrices (C, *batch, T, D), applied to x: (*b, T·D, C) or one (T·D)."""
    if x.dim() == 1:
        return over_columns(f, x[:, None], num_outputs, batch_dims).squeeze(-1)
    return f(as_matrices(x, num_outputs, batch_dims)).flatten(-2).movedim(0, -1)


class StructuredLinearOperator(LinearOperator):  # type: ignore[misc]
    """A symmetric operator whose products differentiate by the rules of the functions they call.

    The base class would send them through functions of its own, which differentiate only once, and
    choose algorithms by size.
    """

    # --- for subclasses --------------------------------------------------------------------------

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """D."""

    @abstractmethod
    def _map(self, f: Callable[[Tensor, int], Tensor]) -> Self:
        """f of each argument and of its number of dimensions that are not batch."""

    @abstractmethod
    def _submatrix(self, rows: Tensor, cols: Tensor) -> Tensor:
        """The entries in these rows and columns: (*batch, R, C)."""

    @abstractmethod
    def _matrix_solve(self, Y: Tensor) -> Tensor:
        """The solve of matrices (C, *batch, T, D)."""

    @abstractmethod
    def _matrix_inv_quad_logdet(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """(C, *batch), and the log-determinant (*batch)."""

    # --- algebra ---------------------------------------------------------------------------------

    def matmul(self, other: Any) -> Any:
        if isinstance(other, LinearOperator):
            return MatmulLinearOperator(self, other)
        return self._matmul(other)

    def _over_columns(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return over_columns(f, x, self.num_outputs, len(self.batch_shape))

    def _transpose_nonbatch(self) -> LinearOperator:
        return self

    def evaluate_kernel(self) -> LinearOperator:
        """Itself, with what it has computed: the arguments are dense already."""
        return self

    def _solve(self, rhs: Tensor, preconditioner: Any = None, num_tridiag: int = 0) -> Any:
        if num_tridiag:
            return super()._solve(rhs, preconditioner, num_tridiag)
        return self._over_columns(self._matrix_solve, rhs)

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        """``self⁻¹ right``, or ``left self⁻¹ right``."""
        solved = self._over_columns(self._matrix_solve, right_tensor)
        return solved if left_tensor is None else left_tensor @ solved

    def inv_quad_logdet(
        self,
        inv_quad_rhs: Tensor | None = None,
        logdet: bool = False,
        reduce_inv_quad: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """The diagonal of ``rhsᵀ self⁻¹ rhs``, (*batch, C), or its sum, (*batch), and the
        log-determinant, (*batch). Zero stands for what is not asked for."""
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        if inv_quad_rhs is None:
            nothing = torch.zeros(*self.shape[:-1], 0, dtype=self.dtype, device=self.device)
            return zero, self.inv_quad_logdet(nothing, logdet)[1]
        vector = inv_quad_rhs.dim() == 1
        columns = inv_quad_rhs[:, None] if vector else inv_quad_rhs
        Y = as_matrices(columns, self.num_outputs, len(self.batch_shape))
        inv_quad, log_det = self._matrix_inv_quad_logdet(Y)
        inv_quad = inv_quad.sum(0) if vector or reduce_inv_quad else inv_quad.movedim(0, -1)
        return inv_quad, log_det if logdet else zero

    def inv_quad(self, inv_quad_rhs: Tensor, reduce_inv_quad: bool = True) -> Tensor:
        """The diagonal of ``rhsᵀ self⁻¹ rhs``, or its sum."""
        return self.inv_quad_logdet(inv_quad_rhs, reduce_inv_quad=reduce_inv_quad)[0]

    @cached(name="cholesky")  # type: ignore[untyped-decorator]
    def _cholesky(self, upper: bool = False) -> LinearOperator:
        """Of the dense matrix, as it is: no jitter is added."""
        L = torch.linalg.cholesky(self.to_dense())
        return TriangularLinearOperator(L.mT if upper else L, upper=upper)

    def _choose_root_method(self) -> str:
        return "cholesky"

    def diagonalization(self, method: str | None = None) -> tuple[Tensor, LinearOperator | None]:
        """Eigenvalues and eigenvectors of the dense matrix, at every size."""
        pair: tuple[Tensor, LinearOperator | None] = super().diagonalization(method or "symeig")
        return pair

    # --- batches and entries ---------------------------------------------------------------------

    def _expanded(self, x: Tensor, core: int) -> Tensor:
        return expand_to(x, self.batch_shape, core)

    def repeat(self, *sizes: Any) -> LinearOperator:
        """Tiled along batch dimensions."""
        sizes = tuple(sizes[0]) if len(sizes) == 1 else sizes
        if len(sizes) < self.dim() or tuple(sizes[-2:]) != (1, 1):
            raise RuntimeError(
                f"sizes must repeat batch dimensions only, (..., 1, 1), got {tuple(sizes)}"
            )
        times = sizes[:-2]
        old = (*[1] * (len(times) - len(self.batch_shape)), *self.batch_shape)
        if all(o == 1 or t == 1 for o, t in zip(old, times, strict=True)):
            return self._expand_batch([o * t for o, t in zip(old, times, strict=True)])
        return self._map(lambda x, core: self._expanded(x, core).repeat(*times, *[1] * core))

    def _expand_batch(self, batch_shape: Sequence[int]) -> LinearOperator:
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        return self._map(lambda x, core: expand_to(x, batch_shape, core))

    def _permute_batch(self, *dims: int) -> LinearOperator:
        return self._map(lambda x, core: self._expanded(x, core).permute(*dims, *range(-core, 0)))

    def _unsqueeze_batch(self, dim: int) -> LinearOperator:
        return self._map(lambda x, core: self._expanded(x, core).unsqueeze(dim))

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        if any(not isinstance(i, slice) or i != slice(None) for i in batch_indices):
            op = self._map(lambda x, core: self._expanded(x, core)[batch_indices])
            return op._getitem(row_index, col_index)
        n = torch.arange(self.shape[-1], device=self.device)
        rows, cols = n[row_index], n[col_index]
        if rows.equal(n) and cols.equal(n):
            return self
        return DenseLinearOperator(self._submatrix(rows, cols))


class CovarianceLinearOperator(StructuredLinearOperator):
    """An operator around a covariance M ⊗ K + noise of this library, with the batch ``_batch``."""

    M: Tensor
    K: Tensor
    _batch: torch.Size

    @property
    @abstractmethod
    def covariance(self) -> KroneckerPlusNoise:
        """The covariance object, which keeps the factorisation."""

    @property
    def num_outputs(self) -> int:
        """D."""
        return int(self.K.shape[-1])

    def _size(self) -> torch.Size:
        n = self.M.shape[-1] * self.K.shape[-1]
        return torch.Size((*self._batch, n, n))

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self._over_columns(self.covariance.matmul, rhs)

    def _matrix_solve(self, Y: Tensor) -> Tensor:
        return self.covariance.solve(Y)

    def _matrix_inv_quad_logdet(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        if Y.shape[0] == 0:
            return Y.sum((-2, -1)), self.covariance.logdet()
        inv_quad, logdet = self.covariance.inv_quad_logdet(Y)
        return inv_quad, logdet[0]

    def _diagonal(self) -> Tensor:
        return self.covariance.diagonal().flatten(-2)
