"""The Gaussian negative log likelihood with covariance U = M ⊗ K + I_T ⊗ Σ."""

from __future__ import annotations

from torch import Tensor

from .autocast import full_precision
from .covariance import KroneckerPlusNoise
from .rows import RowCovariance

__all__ = ["kron_gaussian_nll"]


@full_precision
def kron_gaussian_nll(
    Y: Tensor,
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
) -> Tensor:
    """Negative log density of vec(Y) ~ N(0, M ⊗ K + I_T ⊗ Σ), with its analytic gradient.

    ``½ (log det U + vec(Y)ᵀ U⁻¹ vec(Y) + T·D·log 2π)``, vec(Y) = Y.reshape(T·D). Value and gradient
    share one factorisation, and only the gradients that are asked for are computed. With
    A = U⁻¹·Y and B the sum of the D×D diagonal blocks of U⁻¹, the gradient in Σ is ½ (B − AᵀA); in
    ``log_noise`` it is exp(s) ⊙ the diagonal of that, and only the diagonal is formed.

    Args:
        Y: (*batch, T, D), residuals: the mean is subtracted.
        M: (*batch, T, T), covariance over rows, symmetric positive semidefinite; or a
            :class:`SymmetricEigen`, a constant diagonalised once, a
            :class:`LowRankRoot` or a :class:`KernelMatrix`.
        K: (*batch, D, D), covariance over outputs, symmetric positive semidefinite.
        Sigma: (*batch, D, D), noise covariance, symmetric positive semidefinite; or
        log_noise: (*batch, D), logarithms s of the noise variances, Σ = Diag(exp(s)).
        row_Sigma, row_log_noise, row_scale: noise that differs between rows, see
            :class:`KroneckerPlusNoise`.
        observed: (*batch, T, D) of bool, True where an entry of Y is observed, ``~Y.isnan()``. What
            stands in Y at the others is not looked at, and its gradient is zero.
        method: see :class:`KroneckerPlusNoise`.

    Returns:
        (*batch), in nats, the constant included, the total over the (observed) entries.

    Raises:
        TypeError, ValueError: an argument does not fit, or is not finite.
        torch.linalg.LinAlgError: U is not positive definite, or Sigma is indefinite.

    Derivatives: first and second, in every mode of PyTorch; a third raises NotImplementedError.
    Small problems (T ≤ 64, D ≤ 16) whose M has the joint batch shape, and those with a constant M
    and D ≤ 16, go into a CUDA graph, gradients included. A replay raises nothing: a batch element
    at fault has a value that is not finite.

    Cost: O(T³ + D³ + T²·D + T·D²). Source: Rakitsch et al. 2013; Zhou & Stephens 2014.

    >>> import torch
    >>> Y, M, K = torch.zeros(3, 2), torch.eye(3), torch.eye(2)
    >>> kron_gaussian_nll(Y, M, K, log_noise=torch.zeros(2))
    tensor(7.5931)
    """
    U = KroneckerPlusNoise(
        M,
        K,
        Sigma=Sigma,
        log_noise=log_noise,
        row_Sigma=row_Sigma,
        row_log_noise=row_log_noise,
        row_scale=row_scale,
        observed=observed,
        method=method,
    )
    return U.nll(Y)
