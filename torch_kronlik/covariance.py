"""The covariance U = M ⊗ K + I_T ⊗ Σ as an object: the public face."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .autocast import full_precision
from .checks import (
    check_broadcast,
    check_noise,
    check_observed,
    check_row_noise,
    check_sample_shape,
    check_square,
    check_uniform,
)
from .noise import make_noise, make_row_noise
from .predict import KroneckerPosterior, impute, leave_out
from .regression import Regression
from .rows import RowCovariance, as_rows, at_points
from .waist import MatrixRoot, Waist, check_method, check_observed_method

__all__ = ["KroneckerPlusNoise"]


class KroneckerPlusNoise(Waist):
    """The covariance U = M ⊗ K + I_T ⊗ Σ of a T×D matrix whose rows are stacked.

    It is factorised once, at the first operation that needs it; every later operation, derivatives
    included, uses that factorisation. U itself is never formed, except by :meth:`to_dense`.

    Args:
        M: (*batch, T, T) positive semidefinite, :class:`SymmetricEigen`, :class:`LowRankRoot` or
            :class:`KernelMatrix`.
        K: (*batch, D, D) symmetric positive semidefinite.
        Sigma: (*batch, D, D) noise covariance, symmetric positive semidefinite: zero variances are
            accepted where U is positive definite; or
        log_noise: (*batch, D), the logarithms s of the noise variances, Σ = Diag(exp(s)).
        row_Sigma: (*batch, T, D, D), a noise covariance Σ_t for each row; or
        row_log_noise: (*batch, T, D), the logarithms of its variances. Exactly one of the four
            noises is given.
        row_scale: (*batch, T), positive, with Sigma or log_noise: row t has the noise v_t Σ
            (replicates, exposure).
        observed: (*batch, T, D) of bool, True where an entry of Y is observed: ``~Y.isnan()``. U is
            then the covariance of the observed entries alone. What stands in Y at the others, NaN
            included, is not looked at. Results keep the shape (T, D) and are zero there; ``logdet``
            and the densities are those of the observed entries.
        method: "auto", "spectral" (both factors diagonalised), "cholesky" (a T×T factorisation for
            each non-zero eigenvalue of K) or "low_rank" (by pivoted Cholesky factorisation, cheap
            for M of low numerical rank). Every method is exact to rounding; "auto" takes the
            cheapest, and ``method_used`` says which. For a SymmetricEigen, which is diagonalised
            already, it is always "spectral". With ``observed`` or a noise for each row: "auto",
            "capacitance" (M of low rank r: a matrix of size r·D), "border" (one noise for all rows:
            the complete U, less the missing entries) or "dense" (the covariance of the observed
            entries itself). For complete data with row_scale, ``method_used`` is the route of the
            problem with scaled rows; with a singular Sigma it is "rotated".

    Raises:
        TypeError, ValueError: an argument's type, dtype, device or shape does not fit.

    The operations raise ValueError for an argument that is not finite and
    ``torch.linalg.LinAlgError`` where Sigma is indefinite or U is not positive definite. M and K
    are not checked by themselves: where one of them is indefinite, U may be positive definite.

    Cost: O(T³ + D³) for the factorisation, O(T²·D + T·D²) for a solve; memory O(T² + T·D + D²).
    With ``observed`` or a noise for each row, and M of rank r: O(T·r²·D² + (r·D)³) and O(T·r·D);
    with M of full rank, m entries missing and n observed: O(D·T³ + T²·D·m + m³), where the
    noise is the same in all rows, or O(n³).
    Source: Rakitsch, Lippert, Borgwardt, Stegle 2013; docs/maths.md, "Observed entries".

    >>> U = KroneckerPlusNoise(torch.eye(3), torch.eye(2), log_noise=torch.zeros(2))
    >>> U.shape, U.logdet()
    (torch.Size([6, 6]), tensor(4.1589))
    """

    @full_precision
    def __init__(
        self,
        M: RowCovariance,
        K: Tensor,
        *,
        Sigma: Tensor | None = None,
        log_noise: Tensor | None = None,
        row_Sigma: Tensor | None = None,
        row_log_noise: Tensor | None = None,
        row_scale: Tensor | None = None,
        observed: Tensor | None = None,
        method: str = "auto",
    ) -> None:
        self.M, self.Sigma, self.log_noise = M, Sigma, log_noise
        self.row_Sigma, self.row_log_noise, self.row_scale = row_Sigma, row_log_noise, row_scale
        rows = as_rows(M)
        of_rows = {"row_Sigma": row_Sigma, "row_log_noise": row_log_noise, "row_scale": row_scale}
        is_per_row = observed is not None or any(x is not None for x in of_rows.values())
        given = {"Sigma": Sigma, "log_noise": log_noise, **of_rows}
        noises = {name: x for name, x in given.items() if x is not None}
        check_uniform(**rows.named(), K=K, **noises)
        rows.check()
        check_square("K", K, "D")
        noise: Any = None
        if is_per_row:
            check_row_noise((rows.size, K.shape[-1]), Sigma, log_noise, **of_rows)
        if Sigma is not None or log_noise is not None or not is_per_row:
            check_noise(K, Sigma, log_noise)
            noise = make_noise(Sigma, log_noise)
        if not is_per_row:
            check_method(method)
            super().__init__(rows, K, noise, method)
            return
        shape = rows.size, K.shape[-1]
        if observed is not None:
            check_observed(observed, shape, K.device)
        check_observed_method(method)
        cores = {"Sigma": 2, "log_noise": 1, "row_Sigma": 3, "row_log_noise": 2, "row_scale": 1}
        batches = {name: x.shape[: x.dim() - cores[name]] for name, x in noises.items()}
        if observed is not None:
            batches["observed"] = observed.shape[:-2]
        check_broadcast(M=rows.batch, K=K.shape[:-2], **batches)
        each = partial(make_row_noise, noise, **of_rows, shape=shape, observed=observed)
        super().__init__(rows, K, each, method, observed, noise, row_scale is None)
        own = (Sigma, log_noise, *of_rows.values(), observed)
        self._watched += [x for x in own if x is not None]
        if row_scale is not None and method in ("auto", "border"):
            self.scale_rows(row_scale, method if observed is not None else "auto")

    @property
    def shape(self) -> torch.Size:
        """(*batch, T·D, T·D), whatever is observed."""
        n = self.event_shape.numel()
        return torch.Size((*self.batch_shape, n, n))

    def __repr__(self) -> str:
        names = ("Sigma", "log_noise", "row_Sigma", "row_log_noise")
        noise = next(name for name in names if getattr(self, name) is not None)
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, T={self.event_shape[0]}, "
            f"D={self.event_shape[1]}, noise={noise}, dtype={self.dtype}, device={self.device})"
        )

    # --- linear algebra --------------------------------------------------------------------------

    @full_precision
    def matmul(self, Y: Tensor) -> Tensor:
        """U·Y = M Y Kᵀ + Y Σᵀ: (*batch, T, D), without a factorisation. Defined for any square M, K
        and Σ, with the plain gradient. Cost: O(T²·D + T·D²)."""
        self.check_data("Y", Y)
        return self.multiply(Y)

    @full_precision
    def solve(self, Y: Tensor) -> Tensor:
        """U⁻¹·Y: (*batch, T, D). Cost: O(T²·D + T·D²) after the factorisation."""
        self.check_data("Y", Y)
        return self.inverse_matmul(Y)

    def logdet(self) -> Tensor:
        """log det U: (*batch)."""
        return self.quad_logdet(None)[1]

    @full_precision
    def inv_quad_logdet(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """(vec(Y)ᵀ U⁻¹ vec(Y), log det U), each (*batch), from one factorisation."""
        batch = self.check_data("Y", Y)
        inv_quad, logdet = self.quad_logdet(Y)
        return inv_quad, logdet.expand(batch)

    def inverse_block_diag_sum(self) -> Tensor:
        """B, the sum of the D×D diagonal blocks of U⁻¹ and the gradient of log det U in Σ:
        (*batch, D, D). Cost: O(T·D²) after the factorisation, O(T³) with derivatives."""
        return self.inverse_block_sum()

    def inverse_diagonal(self) -> Tensor:
        """diag(U⁻¹): (*batch, T, D). Cost: O(T²·D) after the factorisation, O(T³·D) with
        derivatives."""
        return self.finite(self.inverse_blocks_diagonal())

    def to_dense(self) -> Tensor:
        """U itself, (*batch, T·D, T·D), or with ``observed`` its rows and columns at the observed
        entries: for small problems and for checking."""
        return self.dense()

    @full_precision
    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws from N(0, U): (*sample_shape, *batch, T, D), reparameterised.

        Y = (P ⊗ LQ) Diag(√(1 + s_i λ_j)) (P ⊗ Q)ᵀ ε with Σ = L Lᵀ and standard normal ε, a smooth
        function of M, K and Σ: gradients flow through it, to first order.

        Cost: O(T²·D + T·D²) a draw after the factorisation.
        """
        check_sample_shape(sample_shape)
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)

        def white() -> Tensor:
            return torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)

        if not self.is_per_row:
            self.method_used  # noqa: B018  factorises: with a singular Sigma, it is per row after that
        if not self.is_per_row:
            return self.finite(self.root_matmul(white()))
        rows = MatrixRoot(self.rows.dense(), "M").matmul(white())
        signal = MatrixRoot(self.K, "K").matmul(rows.mT).mT
        return self.seen(self.finite(signal + self.noise_draw(white())))

    # --- data ------------------------------------------------------------------------------------

    def nll(self, Y: Tensor) -> Tensor:
        """The negative log density of data Y (*batch, T, D), less their mean, under N(0, U), in
        nats: (*batch). See :func:`kron_gaussian_nll`."""
        return self.gaussian_nll(Y)

    def condition(
        self, Y: Tensor, M_cross: Tensor, M_test: Tensor | None = None
    ) -> KroneckerPosterior:
        """The posterior at new rows, given data Y: see :func:`condition`.

        Where M is a :class:`KernelMatrix`, ``condition(Y, x_new)`` with the new points, (*batch,
        S, d) or (S,), makes the two covariances. For many points of which the variances alone are
        wanted, ``condition(Y, M.cross(x_new), M.variance(x_new))`` spares the S×S matrix.
        """
        if M_test is None:
            M_cross, M_test = at_points(self.M, M_cross)
        return KroneckerPosterior(self, Y, M_cross, M_test)

    def regress(
        self, Y: Tensor, X: Tensor, *, reml: bool = True, effects: Tensor | None = None
    ) -> Regression:
        """Generalised least squares of Y (*batch, T, D) on covariates X (*batch, T, c), whose
        ``nll`` is the restricted or the full likelihood: see :class:`Regression`."""
        return Regression(self, Y, X, reml=reml, effects=effects)

    def impute(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, variance) of every entry that is not observed, noise included, given those that
        are, each (*batch, T, D). Observed entries are as they are, with variance zero.

        Cost: that of the posterior variances at T rows.
        """
        return impute(self, Y)

    def leave_one_out(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """Every entry of Y predicted from all its other entries: see :func:`leave_one_out`."""
        return leave_out.entries(self, Y)

    def leave_one_out_log_prob(self, Y: Tensor) -> Tensor:
        """The log density of these predictions: see :func:`leave_one_out_log_prob`."""
        return leave_out.entries_log_prob(self, Y)

    def leave_one_row_out(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """Every row of Y predicted from all its other rows: see :func:`leave_one_row_out`."""
        return leave_out.rows(self, Y)

    def leave_one_row_out_log_prob(self, Y: Tensor) -> Tensor:
        """The log density of these predictions: see :func:`leave_one_row_out_log_prob`."""
        return leave_out.rows_log_prob(self, Y)
