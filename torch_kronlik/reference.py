"""The dense twin: every quantity of this library as its textbook formula.

It forms U = M ⊗ K + I_T ⊗ Σ as a (T·D) × (T·D) matrix and costs O((T·D)³), so it is for reading
and for testing, never a fallback.  Names, argument order and letters are those of the structured
functions; `**noise` is Sigma= or log_noise=.  Everything is computed in float64 and differentiable
to all orders by plain autograd: only operations whose second-order rules PyTorch has right are
used (Cholesky factorisation and its solves, products, indexing).

y = vec(Y) stacks the rows of Y: entry (t, d) of Y is entry t·D + d of y.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor


class EigenPair(Protocol):
    """A symmetric matrix P Diag(s) Pᵀ given by its eigenvalues s and eigenvectors P."""

    @property
    def eigenvalues(self) -> Tensor: ...
    @property
    def eigenvectors(self) -> Tensor: ...


Factor: TypeAlias = Tensor | EigenPair


class Posterior(NamedTuple):
    """Y at S new rows given the data; `covariance_matrix` needs the full M_test."""

    mean: Tensor  # (*batch, S, D)
    variance: Tensor  # (*batch, S, D), of the latent function
    observation_variance: Tensor  # (*batch, S, D), with the noise
    row_covariance: Tensor  # (*batch, S, D, D)
    covariance_matrix: Tensor | None  # (*batch, S·D, S·D)


# ---------------------------------------------------------------- linear algebra


def block_diag(A: Tensor, k: int, num_blocks: int) -> Tensor:
    """The k-th diagonal block, (*batch, m, n), of A (*batch, p·m, p·n), p = num_blocks."""
    m, n = A.shape[-2] // num_blocks, A.shape[-1] // num_blocks
    return A[..., k * m : (k + 1) * m, k * n : (k + 1) * n]


def block_diag_sum(A: Tensor, num_blocks: int) -> Tensor:
    """Σ_k bldiag(A, k), (*batch, m, n)."""
    return torch.stack([block_diag(A.double(), k, num_blocks) for k in range(num_blocks)]).sum(0)


def kron(A: Tensor, B: Tensor) -> Tensor:
    """A ⊗ B; unlike torch.kron it broadcasts batch dimensions and takes any strides."""
    blocks = A[..., :, None, :, None] * B[..., None, :, None, :]
    rows, columns = A.shape[-2] * B.shape[-2], A.shape[-1] * B.shape[-1]
    return blocks.reshape(*blocks.shape[:-4], rows, columns)


def covariance_matrix(M: Factor, K: Tensor, **noise: Tensor | None) -> Tensor:
    """U = M ⊗ K + I_T ⊗ Σ, (*batch, T·D, T·D)."""
    M, K, Sigma = _dense(M), _dense(K), _noise_matrix(**noise)
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    return kron(M, K) + kron(eye, Sigma)


def kron_matmul(M: Factor, K: Tensor, Y: Tensor, **noise: Tensor | None) -> Tensor:
    """U·Y, (*batch, T, D), for any square M, K and Sigma: nothing is symmetrised here."""
    M = M.double() if isinstance(M, Tensor) else _dense(M)
    Sigma = noise.get("Sigma")
    Sigma = _noise_matrix(**noise) if Sigma is None else Sigma.double()
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    U = kron(M, K.double()) + kron(eye, Sigma)
    return _unvec(U @ _vec(Y), Y.shape[-1])


def kron_solve(M: Factor, K: Tensor, Y: Tensor, **noise: Tensor | None) -> Tensor:
    """A = U⁻¹·Y, (*batch, T, D)."""
    return _unvec(_solve(covariance_matrix(M, K, **noise), _vec(Y)), Y.shape[-1])


def kron_logdet(M: Factor, K: Tensor, **noise: Tensor | None) -> Tensor:
    """log det U, (*batch)."""
    G = torch.linalg.cholesky(covariance_matrix(M, K, **noise))
    return 2 * _diagonal(G).log().sum(-1)


def kron_inv_quad_logdet(
    M: Factor, K: Tensor, Y: Tensor, **noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(yᵀU⁻¹y, log det U), each (*batch)."""
    inv_quad = (Y * kron_solve(M, K, Y, **noise)).sum((-2, -1))
    return inv_quad, kron_logdet(M, K, **noise).expand_as(inv_quad)


def inverse_block_diag_sum(M: Factor, K: Tensor, **noise: Tensor | None) -> Tensor:
    """B = Σ_t bldiag(U⁻¹, t), (*batch, D, D)."""
    return _diagonal_blocks(_inverse(covariance_matrix(M, K, **noise)), K.shape[-1]).sum(-3)


def inverse_diagonal(M: Factor, K: Tensor, **noise: Tensor | None) -> Tensor:
    """diag(U⁻¹), (*batch, T, D)."""
    diagonal = _diagonal(_inverse(covariance_matrix(M, K, **noise)))
    return _unvec(diagonal.unsqueeze(-1), K.shape[-1])


# ---------------------------------------------------------------- likelihood


def kron_gaussian_nll(Y: Tensor, M: Factor, K: Tensor, **noise: Tensor | None) -> Tensor:
    """−log N(y; 0, U) = ½ (yᵀU⁻¹y + log det U + T·D·log 2π), (*batch)."""
    inv_quad, logdet = kron_inv_quad_logdet(M, K, Y, **noise)
    return (inv_quad + logdet + Y.shape[-2] * Y.shape[-1] * math.log(2 * math.pi)) / 2


# ---------------------------------------------------------------- prediction and validation


def condition(
    Y: Tensor, M: Factor, K: Tensor, M_cross: Tensor, M_test: Tensor, **noise: Tensor | None
) -> Posterior:
    """The Gaussian posterior at S new rows: mean C U⁻¹ y, covariance M_test ⊗ K − C U⁻¹ Cᵀ.

    C = M_cross ⊗ K.  M_test is (*batch, S, S), or only its diagonal (*batch, S).
    """
    U = covariance_matrix(M, K, **noise)
    K, D, S = _dense(K), K.shape[-1], M_cross.shape[-2]
    full = M_test.shape[-2:] == (S, S)
    M_test = _dense(M_test if full else torch.diag_embed(M_test))
    C = kron(M_cross.double(), K)
    mean = _unvec(C @ _solve(U, _vec(Y)), D)
    covariance = kron(M_test, K) - C @ _solve(U, C.mT)
    variance = _unvec(_diagonal(covariance).unsqueeze(-1), D).expand_as(mean)
    return Posterior(
        mean,
        variance,
        variance + _diagonal(_noise_matrix(**noise)).unsqueeze(-2),
        _diagonal_blocks(covariance, D).expand(*mean.shape, D),
        covariance.expand(*mean.shape[:-2], S * D, S * D) if full else None,
    )


def leave_one_out(Y: Tensor, M: Factor, K: Tensor, **noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and variance of every entry given all others, each (*batch, T, D)."""
    mean, covariance = _leave_out(covariance_matrix(M, K, **noise), _vec(Y), 1)
    return _unvec(mean, Y.shape[-1]), _unvec(covariance[..., 0], Y.shape[-1])


def leave_one_row_out(
    Y: Tensor, M: Factor, K: Tensor, **noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean (*batch, T, D) and covariance (*batch, T, D, D) of every row given all other rows."""
    mean, covariance = _leave_out(covariance_matrix(M, K, **noise), _vec(Y), Y.shape[-1])
    return _unvec(mean, Y.shape[-1]), covariance


def _leave_out(U: Tensor, y: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Delete each group of `size` successive entries and condition it on the rest."""
    index = torch.arange(U.shape[-1], device=U.device)
    batch = torch.broadcast_shapes(U.shape[:-2], y.shape[:-2])
    y = y.expand(*batch, -1, 1)
    means, covariances = [y[..., :0, :]], [y.new_zeros(*batch, 0, size, size)]
    for out in index.view(-1, size):
        rest = index[(index < out[0]) | (index > out[-1])]
        C = U[..., out, :][..., rest]
        weights = _solve(U[..., rest, :][..., rest], C.mT).mT
        means.append(weights @ y[..., rest, :])
        covariance = U[..., out, :][..., out] - weights @ C.mT
        covariances.append(covariance.expand(*batch, size, size).unsqueeze(-3))
    return torch.cat(means, -2), torch.cat(covariances, -3)


# ---------------------------------------------------------------- building blocks


def _dense(X: Factor) -> Tensor:
    """X in float64, symmetrised so that gradients are full-matrix and symmetric."""
    if not isinstance(X, Tensor):
        P = X.eigenvectors.double()
        X = P * X.eigenvalues.double().unsqueeze(-2) @ P.mT
    return (X.double() + X.double().mT) / 2


def _noise_matrix(Sigma: Tensor | None = None, log_noise: Tensor | None = None) -> Tensor:
    """Σ, or Diag(exp(s))."""
    if Sigma is not None and log_noise is None:
        return _dense(Sigma)
    if log_noise is not None and Sigma is None:
        return torch.diag_embed(log_noise.double().exp())
    raise ValueError("expected exactly one of Sigma= and log_noise=")


def _vec(Y: Tensor) -> Tensor:
    return Y.double().flatten(-2).unsqueeze(-1)  # (*batch, T·D, 1)


def _unvec(y: Tensor, D: int) -> Tensor:
    return y.reshape(*y.shape[:-2], y.shape[-2] // D, D)  # (*batch, T, D)


def _solve(U: Tensor, b: Tensor) -> Tensor:
    return torch.cholesky_solve(b, torch.linalg.cholesky(U))


def _inverse(U: Tensor) -> Tensor:
    return _solve(U, torch.eye(U.shape[-1], dtype=U.dtype, device=U.device))


def _diagonal(A: Tensor) -> Tensor:
    return A.diagonal(dim1=-2, dim2=-1)


def _diagonal_blocks(A: Tensor, D: int) -> Tensor:
    """The D × D diagonal blocks of A (*batch, T·D, T·D), stacked: (*batch, T, D, D)."""
    blocks = A.reshape(*A.shape[:-2], A.shape[-2] // D, D, A.shape[-1] // D, D)
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
