"""Validation by leaving data out, a function each over :class:`KroneckerPlusNoise`."""

from __future__ import annotations

from torch import Tensor

from .covariance import KroneckerPlusNoise
from .rows import RowCovariance

__all__ = [
    "leave_one_out",
    "leave_one_out_log_prob",
    "leave_one_row_out",
    "leave_one_row_out_log_prob",
]


def leave_one_out(
    Y: Tensor,
    M: RowCovariance,
    K: Tensor,
    *,
    Sigma: Tensor | None = None,
    log_noise: Tensor | None = None,
    method: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Predict every entry of Y from all its other entries, with covariance U = M ⊗ K + I_T ⊗ Σ.

    ``mean y − [U⁻¹y] / diag(U⁻¹), variance 1 / diag(U⁻¹)``, noise included, from one factorisation

    Args:
        Y: (*batch, T, D), the data, less their mean.
        M: (*batch, T, T) positive semidefinite, :class:`SymmetricEigen`,
            :class:`LowRankRoot` or :class:`KernelMatrix`.
        K: (*batch, D, D) symmetric positive semidefinite.
        Sigma: (*batch, D, D) symmetric positive semidefinite noise covariance; or
        log_noise: (*batch, D), logarithms of the noise variances.
        method: see :class:`KroneckerPlusNoise`.

    Returns:
        (mean, variance), each (*batch, T, D)

    Raises:
        TypeError, ValueError: an argument does not fit, or is not finite.
        torch.linalg.LinAlgError: U is not positive definite, or Sigma is indefinite.

    Derivatives: first and second, in every mode of PyTorch.
    Cost: O(T³ + D³ + T²·D), with derivatives O(T³·D); memory O(T² + T·D²). Source: Rasmussen &
    Williams 2006, section 5.4.2.

    >>> import torch
    >>> Y, M, K = torch.tensor([[1.0], [3.0]]), torch.ones(2, 2), torch.eye(1)
    >>> leave_one_out(Y, M, K, log_noise=torch.zeros(1))
    (tensor([[1.5000], [0.5000]]), tensor([[1.5000], [1.5000]]))
    """
    return _covariance(M, K, Sigma, log_noise, method).leave_one_out(Y)


def leave_one_out_log_prob(
    Y: Tensor,
    M: RowCovariance,
    K: Tensor,
    *,
    Sigma: Tensor | None = None,
    log_noise: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    """Log density of every entry of Y under its prediction from all other entries, summed.

    ``Σ_td log N(Y_td; mean_td, variance_td)`` with mean and variance of :func:`leave_one_out`: the
    leave-one-out log predictive density. Its negative is a loss for M, K and the noise that
    rewards prediction, and is robust where the model is wrong.

    Args:
        Y, M, K, Sigma, log_noise, method: see :func:`leave_one_out`.

    Returns:
        (*batch), in nats, the total over T and D.

    Raises:
        TypeError, ValueError: an argument does not fit, or is not finite.
        torch.linalg.LinAlgError: U is not positive definite, or Sigma is indefinite.

    Derivatives: first and second, in every mode of PyTorch.
    Cost: O(T³ + D³ + T²·D), with derivatives O(T³·D); memory O(T² + T·D²). Source: Rasmussen &
    Williams 2006, section 5.4.2; Sundararajan & Keerthi 2001.

    >>> import torch
    >>> Y, M, K = torch.tensor([[1.0], [3.0]]), torch.ones(2, 2), torch.eye(1)
    >>> leave_one_out_log_prob(Y, M, K, log_noise=torch.zeros(1))
    tensor(-4.4100)
    """
    return _covariance(M, K, Sigma, log_noise, method).leave_one_out_log_prob(Y)


def leave_one_row_out(
    Y: Tensor,
    M: RowCovariance,
    K: Tensor,
    *,
    Sigma: Tensor | None = None,
    log_noise: Tensor | None = None,
    method: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Predict every row of Y from all its other rows, with covariance U = M ⊗ K + I_T ⊗ Σ.

    ``mean y_t − (U⁻¹_tt)⁻¹ [U⁻¹y]_t, covariance (U⁻¹_tt)⁻¹``, U⁻¹_tt the t-th D×D diagonal block;
    noise included, from one factorisation

    Args:
        Y, M, K, Sigma, log_noise, method: see :func:`leave_one_out`.

    Returns:
        (mean (*batch, T, D), covariance (*batch, T, D, D))

    Raises:
        TypeError, ValueError: an argument does not fit, or is not finite.
        torch.linalg.LinAlgError: U is not positive definite, or Sigma is indefinite.

    Derivatives: first and second, in every mode of PyTorch.
    Cost: O(T³ + T²·D + T·D³), with derivatives O(T³·D + T·D³); memory O(T² + T·D²). Source:
    Rasmussen & Williams 2006, section 5.4.2, by blocks.

    >>> import torch
    >>> Y, M, K = torch.tensor([[1.0], [3.0]]), torch.ones(2, 2), torch.eye(1)
    >>> mean, covariance = leave_one_row_out(Y, M, K, log_noise=torch.zeros(1))
    >>> mean
    tensor([[1.5000],
            [0.5000]])
    """
    return _covariance(M, K, Sigma, log_noise, method).leave_one_row_out(Y)


def leave_one_row_out_log_prob(
    Y: Tensor,
    M: RowCovariance,
    K: Tensor,
    *,
    Sigma: Tensor | None = None,
    log_noise: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    """Log density of every row of Y under its prediction from all other rows, summed.

    ``Σ_t log N(Y_t; mean_t, covariance_t)`` with mean and covariance of :func:`leave_one_row_out`

    Args:
        Y, M, K, Sigma, log_noise, method: see :func:`leave_one_out`.

    Returns:
        (*batch), in nats, the total over T and D.

    Raises:
        TypeError, ValueError: an argument does not fit, or is not finite.
        torch.linalg.LinAlgError: U is not positive definite, or Sigma is indefinite.

    Derivatives: first and second, in every mode of PyTorch.
    Cost: O(T³ + T²·D + T·D³), with derivatives O(T³·D + T·D³); memory O(T² + T·D²). Source:
    Rasmussen & Williams 2006, section 5.4.2, by blocks.

    >>> import torch
    >>> Y, M, K = torch.tensor([[1.0], [3.0]]), torch.ones(2, 2), torch.eye(1)
    >>> leave_one_row_out_log_prob(Y, M, K, log_noise=torch.zeros(1))
    tensor(-4.4100)
    """
    return _covariance(M, K, Sigma, log_noise, method).leave_one_row_out_log_prob(Y)


def _covariance(
    M: RowCovariance, K: Tensor, Sigma: Tensor | None, log_noise: Tensor | None, method: str
) -> KroneckerPlusNoise:
    U = KroneckerPlusNoise(M, K, Sigma=Sigma, log_noise=log_noise, method=method)
    U.prefer_basis()
    return U
