"""U with a noise variance for each entry, as a linear_operator operator."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import Tensor

from ..checks import check_broadcast, check_square
from ..covariance import KroneckerPlusNoise
from .base import CovarianceLinearOperator

__all__ = ["RowNoiseLinearOperator"]


class RowNoiseLinearOperator(CovarianceLinearOperator):
    """U = M ⊗ K plus a noise variance for each entry, for linear_operator and GPyTorch.

    Args:
        M: (*batch, T, T) symmetric positive semidefinite.
        K: (*batch, D, D) symmetric positive semidefinite.
        row_log_noise: (*batch, T, D), the logarithms of the noise variances.
        observed: (T, D) of bool, where solves and log-determinants are those of the observed
            entries, padded with zeros; None for all.

    Raises, cost: as :class:`torch_kronlik.KroneckerPlusNoise`.
    """

    def __init__(
        self, M: Tensor, K: Tensor, row_log_noise: Tensor, observed: Tensor | None = None
    ) -> None:
        super().__init__(M, K, row_log_noise, observed=observed)
        self.M, self.K, self.row_log_noise, self.observed = M, K, row_log_noise, observed
        check_square("M", M, "T")
        check_square("K", K, "D")
        self._batch = check_broadcast(
            M=M.shape[:-2], K=K.shape[:-2], row_log_noise=row_log_noise.shape[:-2]
        )
        self.noise: dict[str, Tensor] = {}  # none that new rows would have too

    @cached_property
    def covariance(self) -> KroneckerPlusNoise:
        """The covariance object, which keeps the factorisation."""
        return KroneckerPlusNoise(
            self.M, self.K, row_log_noise=self.row_log_noise, observed=self.observed
        )

    def to_dense(self) -> Tensor:
        """U of all entries, as a matrix."""
        whole = KroneckerPlusNoise(self.M, self.K, row_log_noise=self.row_log_noise)
        return self._expanded(whole.to_dense(), 2)

    def zero_mean_mvn_samples(self, num_samples: int) -> Tensor:
        """Draws from N(0, U): (num_samples, *batch, T·D)."""
        return self.covariance.sample((num_samples,)).flatten(-2)

    def _map(self, f: Callable[[Tensor, int], Tensor]) -> RowNoiseLinearOperator:
        M, K, noise = (f(x, 2) for x in (self.M, self.K, self.row_log_noise))
        return RowNoiseLinearOperator(M, K, noise, observed=self.observed)

    def _submatrix(self, rows: Tensor, cols: Tensor) -> Tensor:
        return self.to_dense()[..., rows[:, None], cols]

    def _get_indices(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Tensor:
        dense, index = self.to_dense(), (*batch_indices, row_index, col_index)
        entries: Tensor = dense[index]
        return entries
