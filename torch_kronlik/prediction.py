"""The posterior at new rows as a function."""

from __future__ import annotations

from torch import Tensor

from .covariance import KroneckerPlusNoise
from .predict import KroneckerPosterior
from .rows import RowCovariance

__all__ = ["condition"]


def condition(
    Y: Tensor,
    M: RowCovariance,
    K: Tensor,
    M_cross: Tensor,
    M_test: Tensor,
    *,
    Sigma: Tensor | None = None,
    log_noise: Tensor | None = None,
    method: str = "auto",
) -> KroneckerPosterior:
    """The posterior at S new rows, given data with covariance U = M ⊗ K + I_T ⊗ Σ.

    ``mean M_* A K, covariance M_** ⊗ K − (M_* ⊗ K) U⁻¹ (M_*ᵀ ⊗ K)`` with A = U⁻¹·Y

    Args:
        Y: (*batch, T, D), the data, less their mean.
        M: (*batch, T, T) covariance over the rows of Y, symmetric positive semidefinite, or a
            :class:`SymmetricEigen`,
            :class:`LowRankRoot` or :class:`KernelMatrix`.
        K: (*batch, D, D) covariance over outputs, symmetric positive semidefinite.
        M_cross: M_*, (*batch, S, T), covariance of the new rows with those of Y.
        M_test: M_**, (*batch, S, S), covariance of the new rows, or its diagonal, (*batch, S): see
            :class:`KroneckerPosterior`.
        Sigma: (*batch, D, D) noise covariance, symmetric positive semidefinite; or
        log_noise: (*batch, D), logarithms of the noise variances, Σ = Diag(exp(s)).
        method: see :class:`KroneckerPlusNoise`.

    Returns:
        KroneckerPosterior, which computes what is asked of it: ``mean``, ``variance``,
        ``observation_variance``, ``row_covariance``, ``covariance_matrix``, ``rsample``,
        ``log_prob``. Where U = KroneckerPlusNoise(M, K, …) exists already,
        ``U.condition(Y, M_cross, M_test)`` uses its factorisation.

    Raises:
        TypeError, ValueError: an argument does not fit, or is not finite.
        torch.linalg.LinAlgError: U is not positive definite, or Sigma is indefinite.

    Cost: O(T³ + D³) once, then see :class:`KroneckerPosterior`.
    Source: Rakitsch et al. 2013; Rasmussen & Williams 2006, section 2.2.

    >>> import torch
    >>> Y, M, K = torch.ones(2, 1), torch.eye(2), torch.eye(1)
    >>> posterior = condition(Y, M, K, torch.eye(2), torch.eye(2), log_noise=torch.zeros(1))
    >>> posterior.mean
    tensor([[0.5000],
            [0.5000]])
    >>> posterior.covariance_matrix
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """
    U = KroneckerPlusNoise(M, K, Sigma=Sigma, log_noise=log_noise, method=method)
    return U.condition(Y, M_cross, M_test)
