"""The covariance of predictions as a linear_operator operator."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from linear_operator.utils.memoize import cached
from torch import Tensor

from ..batch import symmetric
from ..checks import check_broadcast, check_square
from ..covariance import KroneckerPlusNoise
from ..predict import KroneckerPosterior
from .base import (
    Noise,
    StructuredLinearOperator,
    as_noise,
    map_noise,
    noise_batch,
    noise_matrix,
)
from .operator import KroneckerPlusNoiseLinearOperator

__all__ = ["KroneckerPosteriorLinearOperator"]


class KroneckerPosteriorLinearOperator(StructuredLinearOperator):
    """Covariance of S new rows given data with covariance U = M ⊗ K + I_T ⊗ Σ.

    ``M_** ⊗ K − (M_* ⊗ K) U⁻¹ (M_*ᵀ ⊗ K)``, of the latent function; with noise, ``+ I_S ⊗ Σ``. The
    diagonal, products, samples and, with the noise of the data, solves and log-determinants are
    structured: nothing of size S·D × S·D or S·D × T·D is formed unless the matrix is asked for.

    Args:
        U: the covariance of the data.
        M_cross: M_*, (*batch, S, T), covariance of the new rows with the rows of the data.
        M_test: M_**, (*batch, S, S), covariance of the new rows.
        Sigma, log_noise: the noise, for new observations; neither for the latent function.

    Raises:
        TypeError, ValueError: an argument does not fit, or is not finite.
        torch.linalg.LinAlgError: not positive definite.

    Cost: the factorisation of U once; O(T²·S + T·S·D + S·D³) for the diagonal; for a solve or
    log-determinant the lesser of a Cholesky factorisation of size S·D and one of T + S rows.

    >>> import torch
    >>> U = KroneckerPlusNoiseLinearOperator(torch.eye(2), torch.eye(1), log_noise=torch.zeros(1))
    >>> posterior = KroneckerPosteriorLinearOperator(U, torch.eye(1, 2), torch.ones(1, 1))
    >>> posterior.diagonal(), posterior.with_noise(log_noise=torch.zeros(1)).diagonal()
    (tensor([0.5000]), tensor([1.5000]))
    """

    def __init__(
        self,
        U: KroneckerPlusNoiseLinearOperator,
        M_cross: Tensor,
        M_test: Tensor,
        *,
        Sigma: Tensor | None = None,
        log_noise: Tensor | None = None,
    ) -> None:
        super().__init__(U, M_cross, M_test, Sigma=Sigma, log_noise=log_noise)
        self.U, self.M_cross, self.M_test = U, M_cross, M_test
        self.noise: Noise = as_noise(Sigma, log_noise)
        check_square("M_test", M_test, "S")
        S, T = M_test.shape[-1], U.M.shape[-1]
        if M_cross.shape[-2:] != (S, T):
            raise ValueError(
                f"M_cross must have shape (*batch, S, T) with (S, T) = {(S, T)} (from M_test and "
                f"U), got {tuple(M_cross.shape)}"
            )
        self._batch = check_broadcast(
            U=U.batch_shape,
            M_cross=M_cross.shape[:-2],
            M_test=M_test.shape[:-2],
            noise=noise_batch(self.noise),
        )

    @cached_property
    def posterior(self) -> KroneckerPosterior:
        """The posterior of the latent function, its mean zero."""
        U = self.U.covariance
        zero = torch.zeros(U.event_shape, dtype=U.dtype, device=U.device)
        return KroneckerPosterior(U, zero, self.M_cross, self.M_test)

    def with_noise(self, **noise: Tensor) -> KroneckerPosteriorLinearOperator:
        """Of new observations. Noise equal to that of the data is taken to be the same tensor."""
        ours = self.U.noise
        if ours.keys() == noise.keys() and all(x.equal(noise[name]) for name, x in ours.items()):
            noise = ours
        return type(self)(self.U, self.M_cross, self.M_test, **noise)

    @property
    def num_outputs(self) -> int:
        """D."""
        return self.U.num_outputs

    def _size(self) -> torch.Size:
        n = self.M_test.shape[-1] * self.num_outputs
        return torch.Size((*self._batch, n, n))

    # --- algebra ---------------------------------------------------------------------------------

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self._over_columns(self._matrix_matmul, rhs)

    def _matrix_matmul(self, X: Tensor) -> Tensor:
        K, U = symmetric(self.U.K), self.U.covariance
        XK = X @ K
        out = symmetric(self.M_test) @ XK - self.M_cross @ U.solve(self.M_cross.mT @ XK) @ K
        return out + X @ noise_matrix(self.noise) if self.noise else out

    def _blocks(self) -> Tensor:
        """The D×D block of each row: (*batch, S, D, D)."""
        out = self.posterior.row_covariance
        out = out + noise_matrix(self.noise)[..., None, :, :] if self.noise else out
        return self._expanded(out, 3)

    def _diagonal(self) -> Tensor:
        return self._blocks().diagonal(dim1=-2, dim2=-1).flatten(-2)

    @cached(name="to_dense")  # type: ignore[untyped-decorator]
    def to_dense(self) -> Tensor:
        """The matrix itself."""
        out = self.posterior.covariance_matrix
        if self.noise:
            n = self.shape[-1]
            eye = torch.eye(self.M_test.shape[-1], dtype=out.dtype, device=out.device)
            noise = eye[:, None, :, None] * noise_matrix(self.noise)[..., None, :, None, :]
            out = out + noise.reshape(*noise.shape[:-4], n, n)
        return self._expanded(out, 2)

    @property
    def _has_noise_of_data(self) -> bool:
        """The same tensor, so that derivatives have one place to go."""
        return bool(self.noise) and all(x is self.U.noise.get(n) for n, x in self.noise.items())

    @cached_property
    def _joint(self) -> KroneckerPlusNoise | None:
        """The covariance of data and new observations together, where it is the cheaper way."""
        if not self._has_noise_of_data or self.shape[-1] <= self.U.M.shape[-1]:
            return None
        if self.U.covariance.is_per_row:  # missing entries are the data's, not those of new rows
            return None
        M, M_cross, M_test = (self._expanded(X, 2) for X in (self.U.M, self.M_cross, self.M_test))
        joint = torch.cat([torch.cat([M, M_cross.mT], -1), torch.cat([M_cross, M_test], -1)], -2)
        return KroneckerPlusNoiseLinearOperator(joint, self.U.K, **self.noise).covariance

    def _matrix_solve(self, Y: Tensor) -> Tensor:
        if self._joint is not None:
            return self._joint.solve(self._behind_data(Y))[..., -Y.shape[-2] :, :]
        solved = torch.cholesky_solve(_columns(Y), self._cholesky().to_dense())
        matrices: Tensor = solved.movedim(-1, 0).unflatten(-1, Y.shape[-2:])
        return matrices

    def _matrix_inv_quad_logdet(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """By the Schur complement: this is the inverse of the last block of the joint inverse."""
        if self._joint is not None:
            logdet = self._joint.logdet() - self.U.covariance.logdet()
            if Y.shape[0] == 0:
                return Y.sum((-2, -1)), logdet
            return self._joint.inv_quad_logdet(self._behind_data(Y))[0], logdet
        L = self._cholesky().to_dense()
        white = torch.linalg.solve_triangular(L, _columns(Y), upper=False)
        logdet = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return white.square().sum(-2).movedim(-1, 0), logdet

    def _behind_data(self, Y: Tensor) -> Tensor:
        """[0; Y], zeros at the rows of the data."""
        return torch.nn.functional.pad(Y, (0, 0, self.U.M.shape[-1], 0))

    def zero_mean_mvn_samples(self, num_samples: int) -> Tensor:
        """Draws from the normal distribution with mean zero: (num_samples, *batch, S·D)."""
        same = self._has_noise_of_data
        draws = self.posterior.rsample((num_samples,), observation_noise=same)
        draws = draws.expand(num_samples, *self._batch, *draws.shape[-2:])
        if self.noise and not same:
            L = torch.linalg.cholesky(noise_matrix(self.noise))
            draws = draws + torch.randn_like(draws) @ L.mT
        return draws.flatten(-2)

    # --- batches and entries ---------------------------------------------------------------------

    def _map(self, f: Callable[[Tensor, int], Tensor]) -> KroneckerPosteriorLinearOperator:
        U = self.U._map(f)
        noise = U.noise if self._has_noise_of_data else map_noise(f, self.noise)
        return type(self)(U, f(self.M_cross, 2), f(self.M_test, 2), **noise)

    def _submatrix(self, rows: Tensor, cols: Tensor) -> Tensor:
        """By products with columns of the identity, on the shorter side."""
        if rows.numel() < cols.numel():
            return self._submatrix(cols, rows).mT
        unit = torch.zeros(self.shape[-1], cols.numel(), dtype=self.dtype, device=self.device)
        unit[cols, torch.arange(cols.numel(), device=self.device)] = 1.0
        return self._expanded(self._matmul(unit), 2)[..., rows, :]

    def _get_indices(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Tensor:
        t, d = row_index // self.num_outputs, row_index % self.num_outputs
        u, e = col_index // self.num_outputs, col_index % self.num_outputs
        if t.equal(u):
            index = (*batch_indices, t, d, e)
            return self._blocks()[index]
        dense, index = self.to_dense(), (*batch_indices, row_index, col_index)
        entries: Tensor = dense[index]
        return entries


def _columns(Y: Tensor) -> Tensor:
    """(C, *b, S, D) to (*b, S·D, C)."""
    return Y.flatten(-2).movedim(0, -1)
