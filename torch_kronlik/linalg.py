"""Linear algebra with U = M ⊗ K + I_T ⊗ Σ, a function each over :class:`KroneckerPlusNoise`.

They share the arguments M, K and the noise, described once there; to use one factorisation for
several results, make the object.
"""

from __future__ import annotations

from torch import Tensor

from .covariance import KroneckerPlusNoise
from .rows import RowCovariance

__all__ = [
    "inverse_block_diag_sum",
    "inverse_diagonal",
    "kron_inv_quad_logdet",
    "kron_logdet",
    "kron_matmul",
    "kron_solve",
]


def kron_matmul(
    M: RowCovariance,
    K: Tensor,
    Y: Tensor,
    *,
    Sigma: Tensor | None = None,
    log_noise: Tensor | None = None,
) -> Tensor:
    """U·Y, without a factorisation.

    ``M Y K + Y Σ``

    Args:
        M: (*batch, T, T) positive semidefinite, :class:`SymmetricEigen`,
            :class:`LowRankRoot` or :class:`KernelMatrix`.
        K: (*batch, D, D) symmetric positive semidefinite.
        Y: (*batch, T, D).
        Sigma: (*batch, D, D) symmetric positive semidefinite noise covariance; or
        log_noise: (*batch, D), logarithms of the noise variances.

    Returns:
        (*batch, T, D)

    Raises:
        TypeError, ValueError: an argument does not fit, or is not finite.

    Cost: O(T²·D + T·D²).

    >>> import torch
    >>> M, K, s = torch.eye(2), torch.eye(2), torch.zeros(2)
    >>> kron_matmul(M, K, torch.ones(2, 2), log_noise=s)
    tensor([[2., 2.],
            [2., 2.]])
    """
    return KroneckerPlusNoise(M, K, Sigma=Sigma, log_noise=log_noise).matmul(Y)


def kron_solve(
    M: RowCovariance,
    K: Tensor,
    Y: Tensor,
    *,
    Sigma: Tensor | None = None,
    log_noise: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    """U⁻¹·Y.

    ``A = P [W ⊙ (Pᵀ Y R)] Rᵀ``, so that M A K + A Σ = Y

    Args:
        M: (*batch, T, T) positive semidefinite, :class:`SymmetricEigen`,
            :class:`LowRankRoot` or :class:`KernelMatrix`.
        K: (*batch, D, D) symmetric positive semidefinite.
        Y: (*batch, T, D).
        Sigma: (*batch, D, D) symmetric positive semidefinite noise covariance; or
        log_noise: (*batch, D), logarithms of the noise variances.
        method: see :class:`KroneckerPlusNoise`.

    Returns:
        (*batch, T, D)

    Raises:
        TypeError, ValueError: an argument does not fit, or is not finite.
        torch.linalg.LinAlgError: U is not positive definite, or Sigma is indefinite.

    Cost: O(T³ + D³ + T²·D + T·D²). Source: Rakitsch et al. 2013.

    >>> import torch
    >>> M, K, s = torch.eye(2), torch.eye(2), torch.zeros(2)
    >>> kron_solve(M, K, torch.ones(2, 2), log_noise=s)
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    return KroneckerPlusNoise(M, K, Sigma=Sigma, log_noise=log_noise, method=method).solve(Y)


def kron_logdet(
    M: RowCovariance,
    K: Tensor,
    *,
    Sigma: Tensor | None = None,
    log_noise: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    """log det U.

    ``T log det Σ + Σ_ij log(1 + s_i λ_j)``

    Args:
        M: (*batch, T, T) positive semidefinite, :class:`SymmetricEigen`,
            :class:`LowRankRoot` or :class:`KernelMatrix`.
        K: (*batch, D, D) symmetric positive semidefinite.
        Sigma: (*batch, D, D) symmetric positive semidefinite noise covariance; or
        log_noise: (*batch, D), logarithms of the noise variances.
        method: see :class:`KroneckerPlusNoise`.

    Returns:
        (*batch)

    Raises:
        TypeError, ValueError: an argument does not fit, or is not finite.
        torch.linalg.LinAlgError: U is not positive definite, or Sigma is indefinite.

    Cost: O(T³ + D³). Source: Rakitsch et al. 2013.

    >>> import torch
    >>> M, K, s = torch.eye(2), torch.eye(2), torch.zeros(2)
    >>> kron_logdet(M, K, log_noise=s)
    tensor(2.7726)
    """
    return KroneckerPlusNoise(M, K, Sigma=Sigma, log_noise=log_noise, method=method).logdet()


def kron_inv_quad_logdet(
    M: RowCovariance,
    K: Tensor,
    Y: Tensor,
    *,
    Sigma: Tensor | None = None,
    log_noise: Tensor | None = None,
    method: str = "auto",
) -> tuple[Tensor, Tensor]:
    """vec(Y)ᵀ U⁻¹ vec(Y) and log det U, from one factorisation.

    ``⟨Y, U⁻¹·Y⟩`` and ``log det U``, for the stacked rows vec(Y) = Y.reshape(T·D)

    Args:
        M: (*batch, T, T) positive semidefinite, :class:`SymmetricEigen`,
            :class:`LowRankRoot` or :class:`KernelMatrix`.
        K: (*batch, D, D) symmetric positive semidefinite.
        Y: (*batch, T, D).
        Sigma: (*batch, D, D) symmetric positive semidefinite noise covariance; or
        log_noise: (*batch, D), logarithms of the noise variances.
        method: see :class:`KroneckerPlusNoise`.

    Returns:
        (inv_quad, logdet), each (*batch)

    Raises:
        TypeError, ValueError: an argument does not fit, or is not finite.
        torch.linalg.LinAlgError: U is not positive definite, or Sigma is indefinite.

    Cost: O(T³ + D³ + T²·D + T·D²). Source: Rakitsch et al. 2013.

    >>> import torch
    >>> M, K, s = torch.eye(2), torch.eye(2), torch.zeros(2)
    >>> kron_inv_quad_logdet(M, K, torch.ones(2, 2), log_noise=s)
    (tensor(2.), tensor(2.7726))
    """
    return KroneckerPlusNoise(
        M, K, Sigma=Sigma, log_noise=log_noise, method=method
    ).inv_quad_logdet(Y)


def inverse_block_diag_sum(
    M: RowCovariance,
    K: Tensor,
    *,
    Sigma: Tensor | None = None,
    log_noise: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    """The sum of the D×D diagonal blocks of U⁻¹.

    ``B = Σ_k bldiag(U⁻¹, k) = R Diag(Wᵀ 1) Rᵀ``, the gradient of log det U in Σ

    Args:
        M: (*batch, T, T) positive semidefinite, :class:`SymmetricEigen`,
            :class:`LowRankRoot` or :class:`KernelMatrix`.
        K: (*batch, D, D) symmetric positive semidefinite.
        Sigma: (*batch, D, D) symmetric positive semidefinite noise covariance; or
        log_noise: (*batch, D), logarithms of the noise variances.
        method: see :class:`KroneckerPlusNoise`.

    Returns:
        (*batch, D, D)

    Raises:
        TypeError, ValueError: an argument does not fit, or is not finite.
        torch.linalg.LinAlgError: U is not positive definite, or Sigma is indefinite.

    Cost: O(T³ + D³), with or without derivatives. U⁻¹ is not formed.

    >>> import torch
    >>> M, K, s = torch.eye(2), torch.eye(2), torch.zeros(2)
    >>> inverse_block_diag_sum(M, K, log_noise=s)
    tensor([[1., 0.],
            [0., 1.]])
    """
    return KroneckerPlusNoise(
        M, K, Sigma=Sigma, log_noise=log_noise, method=method
    ).inverse_block_diag_sum()


def inverse_diagonal(
    M: RowCovariance,
    K: Tensor,
    *,
    Sigma: Tensor | None = None,
    log_noise: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    """The diagonal of U⁻¹.

    ``diag(U⁻¹) = (P ⊙ P) W (R ⊙ R)ᵀ``, as a T×D matrix

    Args:
        M: (*batch, T, T) positive semidefinite, :class:`SymmetricEigen`,
            :class:`LowRankRoot` or :class:`KernelMatrix`.
        K: (*batch, D, D) symmetric positive semidefinite.
        Sigma: (*batch, D, D) symmetric positive semidefinite noise covariance; or
        log_noise: (*batch, D), logarithms of the noise variances.
        method: see :class:`KroneckerPlusNoise`.

    Returns:
        (*batch, T, D)

    Raises:
        TypeError, ValueError: an argument does not fit, or is not finite.
        torch.linalg.LinAlgError: U is not positive definite, or Sigma is indefinite.

    Cost: O(T³ + D³ + T²·D), with derivatives O(T³·D).

    >>> import torch
    >>> M, K, s = torch.eye(2), torch.eye(2), torch.zeros(2)
    >>> inverse_diagonal(M, K, log_noise=s)
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    return KroneckerPlusNoise(
        M, K, Sigma=Sigma, log_noise=log_noise, method=method
    ).inverse_diagonal()
