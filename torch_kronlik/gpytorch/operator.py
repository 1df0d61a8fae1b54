"""U = M ⊗ K + I_T ⊗ Σ as a linear_operator operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from linear_operator import to_dense
from linear_operator.operators import (
    ConstantDiagLinearOperator,
    LinearOperator,
    MatmulLinearOperator,
    RootLinearOperator,
)
from linear_operator.utils.memoize import cached
from torch import Tensor

from ..checks import check_broadcast, check_noise, check_square
from ..covariance import KroneckerPlusNoise
from .base import (
    CovarianceLinearOperator,
    Noise,
    as_noise,
    map_noise,
    noise_as_given,
    noise_batch,
)
from .root import KroneckerPlusNoiseRoot

__all__ = ["KroneckerPlusNoiseLinearOperator"]


class KroneckerPlusNoiseLinearOperator(CovarianceLinearOperator):
    """U = M ⊗ K + I_T ⊗ Σ for linear_operator and GPyTorch, exact at every size.

    Rows are stacked as in ``MultitaskMultivariateNormal(interleaved=True)``. Solves,
    log-determinants, samples and their derivatives are those of
    :class:`torch_kronlik.KroneckerPlusNoise`: one factorisation, kept. The thresholds and iterative
    methods of linear_operator's settings play no part. Sums with a multiple of the identity and
    positive multiples keep the structure; other sums are linear_operator's own.

    Args:
        M: (*batch, T, T) symmetric positive semidefinite, a tensor or an operator (made dense).
        K: (*batch, D, D) symmetric positive semidefinite, a tensor or an operator (made dense).
        Sigma: (*batch, D, D) symmetric positive definite noise covariance; or
        log_noise: (*batch, D), the logarithms of the noise variances.

    Raises:
        ValueError: shapes do not fit, or not exactly one noise argument. When it is used, also what
            :class:`torch_kronlik.KroneckerPlusNoise` raises.

    Cost: O(T³ + D³) once, O(T²·D + T·D²) for each column of a product or solve.

    >>> import torch
    >>> U = KroneckerPlusNoiseLinearOperator(torch.eye(3), torch.eye(2), log_noise=torch.zeros(2))
    >>> U.shape, U.logdet()
    (torch.Size([6, 6]), tensor(4.1589))
    """

    def __init__(
        self,
        M: Tensor | LinearOperator,
        K: Tensor | LinearOperator,
        *,
        Sigma: Tensor | LinearOperator | None = None,
        log_noise: Tensor | None = None,
    ) -> None:
        self.M, self.K = to_dense(M), to_dense(K)
        Sigma = None if Sigma is None else to_dense(Sigma)
        check_square("M", self.M, "T")
        check_square("K", self.K, "D")
        check_noise(self.K, Sigma, log_noise)
        super().__init__(self.M, self.K, Sigma=Sigma, log_noise=log_noise)
        self.noise: Noise = as_noise(Sigma, log_noise)
        self._batch = check_broadcast(
            M=self.M.shape[:-2], K=self.K.shape[:-2], noise=noise_batch(self.noise)
        )

    @cached_property
    def covariance(self) -> KroneckerPlusNoise:
        """The covariance object, which keeps the factorisation."""
        noise = self.noise
        return KroneckerPlusNoise(
            self.M, self.K, Sigma=noise.get("Sigma"), log_noise=noise.get("log_noise")
        )

    # --- algebra ---------------------------------------------------------------------------------

    @cached(name="to_dense")  # type: ignore[untyped-decorator]
    def to_dense(self) -> Tensor:
        """U itself, of the matrices as they stand: as products see it, U is not symmetrised."""
        T, n = self.M.shape[-1], self.shape[-1]
        eye = torch.eye(T, dtype=self.dtype, device=self.device)
        signal = self.M[..., :, None, :, None] * self.K[..., None, :, None, :]
        Sigma = noise_as_given(self.noise)
        U: Tensor = signal + eye[:, None, :, None] * Sigma[..., None, :, None, :]
        dense: Tensor = U.reshape(*self._batch, n, n)
        return dense

    def rmatmul(self, other: Any) -> Any:
        """``other @ U``, for U of the matrices as they stand."""
        if isinstance(other, LinearOperator):
            return MatmulLinearOperator(other, self)
        columns = other if other.dim() == 1 else other.mT
        noise: Any = map_noise(_transposed, self.noise)
        flipped = KroneckerPlusNoise(self.M.mT, self.K.mT, **noise)
        product = self._over_columns(flipped.matmul, columns)
        return product if other.dim() == 1 else product.mT

    @cached(name="root_decomposition")  # type: ignore[untyped-decorator]
    def root_decomposition(self, method: str | None = None) -> LinearOperator:
        """U = F Fᵀ with a structured F, unless ``method`` asks for a dense one."""
        if method is not None:
            return super().root_decomposition(method=method)
        return RootLinearOperator(KroneckerPlusNoiseRoot(self))

    @cached(name="root_inv_decomposition")  # type: ignore[untyped-decorator]
    def root_inv_decomposition(
        self,
        initial_vectors: Tensor | None = None,
        test_vectors: Tensor | None = None,
        method: str | None = None,
    ) -> LinearOperator:
        """U⁻¹ = G Gᵀ with a structured G = F⁻ᵀ, unless ``method`` asks for a dense one."""
        if method is not None:
            return super().root_inv_decomposition(initial_vectors, test_vectors, method=method)
        return RootLinearOperator(KroneckerPlusNoiseRoot(self, inverse=True))

    def zero_mean_mvn_samples(self, num_samples: int) -> Tensor:
        """Draws from N(0, U): (num_samples, *batch, T·D)."""
        return self.covariance.sample((num_samples,)).flatten(-2)

    def add_diagonal(self, diag: Tensor) -> LinearOperator:
        """U + Diag(diag): structured for a multiple of the identity, (*batch, 1) or a number."""
        if diag.dim() and diag.shape[-1] != 1:
            return super().add_diagonal(diag)
        c = diag if diag.dim() else diag[None]
        if "Sigma" not in self.noise:
            return type(self)(self.M, self.K, log_noise=(self.noise["log_noise"].exp() + c).log())
        eye = torch.eye(self.num_outputs, dtype=self.dtype, device=self.device)
        return type(self)(self.M, self.K, Sigma=self.noise["Sigma"] + c[..., None] * eye)

    def __add__(self, other: Any) -> LinearOperator:
        if isinstance(other, ConstantDiagLinearOperator):
            return self.add_diagonal(other.diag_values)
        return super().__add__(other)

    def _mul_constant(self, other: Tensor) -> LinearOperator:
        if not bool((other > 0).all()):
            return super()._mul_constant(other)
        c = other[..., None]
        if "Sigma" in self.noise:
            noise = {"Sigma": self.noise["Sigma"] * c[..., None]}
        else:
            noise = {"log_noise": self.noise["log_noise"] + c.log()}
        return type(self)(self.M * c[..., None], self.K, **noise)

    # --- batches and entries ---------------------------------------------------------------------

    def _map(self, f: Callable[[Tensor, int], Tensor]) -> KroneckerPlusNoiseLinearOperator:
        return type(self)(f(self.M, 2), f(self.K, 2), **map_noise(f, self.noise))

    def _expand_batch(self, batch_shape: Sequence[int]) -> LinearOperator:
        """Through the noise alone, so that M stays what it is: factorised once."""
        if torch.Size(batch_shape) == self._batch:
            return self

        def expand(x: Tensor, core: int) -> Tensor:
            return x.expand(*batch_shape, *x.shape[-core:])

        return type(self)(self.M, self.K, **map_noise(expand, self.noise))

    def _submatrix(self, rows: Tensor, cols: Tensor) -> Tensor:
        return self._entries(rows[:, None], cols, [slice(None)] * len(self._batch))

    def _get_indices(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Tensor:
        return self._entries(row_index, col_index, batch_indices)

    def _entries(self, i: Tensor, j: Tensor, batch: Sequence[Any]) -> Tensor:
        """U[batch, i, j], without the other entries."""
        D = self.num_outputs
        t, u, d, e = i // D, j // D, i % D, j % D

        def at(X: Tensor, a: Tensor, b: Tensor) -> Tensor:
            index = (*batch, a, b)
            return self._expanded(X, 2)[index]

        noise = torch.where(t == u, at(noise_as_given(self.noise), d, e), 0.0)
        return at(self.M, t, u) * at(self.K, d, e) + noise


def _transposed(x: Tensor, core: int) -> Tensor:
    return x.mT if core == 2 else x
