"""The covariance U = M ⊗ K + I_T ⊗ Σ as an object: the public face."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .autocast import full_precision
from .checks import check_noise, check_sample_shape, check_square, check_uniform
from .noise import make_noise
from .predict import KroneckerPosterior, leave_out
from .rows import RowCovariance, as_rows
from .waist import Waist, check_method

__all__ = ["KroneckerPlusNoise"]


class KroneckerPlusNoise(Waist):
    """The covariance U = M ⊗ K + I_T ⊗ Σ of a T×D matrix whose rows are stacked.

    It is factorised once, at the first operation that needs it; every later operation, derivatives
    included, uses that factorisation. U itself is never formed, except by :meth:`to_dense`.

    Args:
        M: (*batch, T, T) symmetric positive semidefinite, or a :class:`SymmetricEigen` (constant).
        K: (*batch, D, D) symmetric positive semidefinite.
        Sigma: (*batch, D, D) symmetric positive definite noise covariance; or
        log_noise: (*batch, D), the logarithms s of the noise variances, Σ = Diag(exp(s)).
        method: "auto", "spectral" (both factors diagonalised), "cholesky" (a T×T factorisation for
            each non-zero eigenvalue of K) or "low_rank" (M of low numerical rank; another M goes
            to "spectral"). Every method is exact to rounding; "auto" takes the cheapest. A
            SymmetricEigen is diagonalised already: every method is "spectral" then.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device or shape does not fit.

    The operations raise ValueError for an argument that is not finite and
    ``torch.linalg.LinAlgError`` where Sigma or U is not positive definite. An M whose negative
    eigenvalues are within rounding (T·eps times the largest one) may pass for semidefinite.

    Cost: O(T³ + D³) for the factorisation, O(T²·D + T·D²) for a solve; memory O(T² + T·D + D²).
    Source: Rakitsch, Lippert, Borgwardt, Stegle 2013.

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
        method: str = "auto",
    ) -> None:
        self.M, self.Sigma, self.log_noise = M, Sigma, log_noise
        rows = as_rows(M)
        check_uniform(**rows.named(), K=K, Sigma=Sigma, log_noise=log_noise)
        rows.check()
        check_square("K", K, "D")
        check_noise(K, Sigma, log_noise)
        check_method(method)
        super().__init__(rows, K, make_noise(Sigma, log_noise), method)

    @property
    def shape(self) -> torch.Size:
        """(*batch, T·D, T·D)."""
        n = self.event_shape.numel()
        return torch.Size((*self.batch_shape, n, n))

    def __repr__(self) -> str:
        (noise,) = self.noise.named()
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
        """U itself, (*batch, T·D, T·D): for small problems and for checking."""
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
        white = torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)
        return self.finite(self.root_matmul(white))

    # --- data ------------------------------------------------------------------------------------

    def nll(self, Y: Tensor) -> Tensor:
        """The negative log density of data Y (*batch, T, D), less their mean, under N(0, U), in
        nats: (*batch). See :func:`kron_gaussian_nll`."""
        return self.gaussian_nll(Y)

    def condition(self, Y: Tensor, M_cross: Tensor, M_test: Tensor) -> KroneckerPosterior:
        """The posterior at new rows, given data Y: see :func:`condition`."""
        return KroneckerPosterior(self, Y, M_cross, M_test)

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
