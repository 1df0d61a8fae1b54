"""The factorisation, a constant for differentiation: no gradient passes through an eigenvector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..derivatives import define, register
from ..factor import cholesky, low_rank, plan
from ..factor import eigen as kernels
from .common import Covariance, Maybe, noise_batch, refuse_rows

__all__ = ["constant_eigen", "eigen", "factorise", "known_rows"]

Tensors = tuple[Tensor, ...]


def _eigen_fake(M: Tensor) -> Tensors:
    return M.new_empty(M.shape[:-1]), M.new_empty(M.shape).mT  # as LAPACK leaves them


def _low_rank_fake(M: Tensor, max_rank: int, padded: bool) -> Tensors:
    return M.new_empty(M.shape[:-1]), M.new_empty(M.shape)


def _whiten_fake(K: Tensor, Sigma: Maybe, log_noise: Maybe) -> Tensors:
    noise, D = noise_batch(Sigma, log_noise), K.shape[-1]
    batch = torch.broadcast_shapes(K.shape[:-2], noise)
    return K.new_empty((*batch, D)), K.new_empty((*batch, D, D)), K.new_empty(noise)


def _cholesky_fake(M: Tensor, lam: Tensor) -> Tensors:
    batch, n = torch.broadcast_shapes(M.shape[:-2], lam.shape[:-1]), lam.shape[-1]
    return M.new_empty((*batch, n, *M.shape[-2:])), M.new_empty((*batch, n))


eigen = define("eigen(Tensor M) -> (Tensor s, Tensor P)", kernels.eigen, _eigen_fake)
register(eigen, core_dims=lambda M: ([2], [1, 2]))

eigen_low_rank = define(
    "eigen_low_rank(Tensor M, int max_rank, bool padded) -> (Tensor s, Tensor P)",
    low_rank.eigen_low_rank,
    _low_rank_fake,
)
register(eigen_low_rank, core_dims=lambda *_: ([2, None, None], [1, 2]))

whiten = define(
    "whiten(Tensor K, Tensor? Sigma, Tensor? log_noise)"
    " -> (Tensor lam, Tensor R, Tensor logdet_noise)",
    kernels.whiten,
    _whiten_fake,
)
register(whiten, core_dims=lambda *_: ([2, 2, 1], [1, 2, 0]))

require_positive_definite = define(
    "require_positive_definite(Tensor s, Tensor lam) -> Tensor",
    kernels.require_positive_definite,
    lambda s, lam: lam.new_empty(lam.shape),
)
register(require_positive_definite, core_dims=lambda *_: ([1, 1], [1]))

cholesky_factors = define(
    "cholesky_factors(Tensor M, Tensor lam) -> (Tensor L, Tensor logdet_C)",
    cholesky.factors,
    _cholesky_fake,
)
register(cholesky_factors, core_dims=lambda *_: ([2, 1], [3, 1]))

# The eigenvalues after the leading zeros: a shape that depends on data, so never traced.
without_zeros = define(
    "without_zeros(Tensor lam) -> Tensor",
    cholesky.without_zeros,
    lambda lam: lam.new_empty(lam.shape),
)
register(without_zeros, core_dims=lambda *_: ([1], [1]))


def _rows_vjp(inputs: Any, outputs: Any, grads: Any, needs: Any) -> list[None]:
    return refuse_rows() if needs[0] or needs[2] else [None] * 3


def _rows_jvp(inputs: Any, outputs: Any, tangents: Any) -> list[None]:
    return refuse_rows() if tangents[0] is not None or tangents[2] is not None else [None]


# The same check for eigenvalues and eigenvectors that the user made.
require_known_rows = define(
    "require_known_rows(Tensor s, Tensor lam, Tensor P) -> Tensor",
    kernels.require_positive_definite,
    lambda s, lam, P: lam.new_empty(lam.shape),
)
register(require_known_rows, vjp=_rows_vjp, jvp=_rows_jvp, core_dims=lambda *_: ([1, 1, 2], [1]))

# The public one, which is not a part of something differentiable.
constant_eigen = define(
    "constant_eigen(Tensor M) -> (Tensor s, Tensor P)", kernels.eigen, _eigen_fake
)
register(constant_eigen, vjp=refuse_rows, jvp=refuse_rows, core_dims=lambda M: ([2], [1, 2]))


def factorise(
    M: Tensor, K: Tensor, Sigma: Maybe, log_noise: Maybe, method: str
) -> tuple[Covariance, str]:
    """The factorised covariance, and the method that made it.

    While a graph is traced, shapes cannot depend on data: "auto" then stands for "spectral".
    """
    tracing = torch.compiler.is_compiling()
    if tracing and method == "auto":
        method = "spectral"
    lam, R, logdet_noise = whiten(K, Sigma, log_noise)
    T, covariance = M.shape[-1], (M, K, Sigma, log_noise)
    costs = plan.costs(M.device.type)
    rank = costs.max_rank(method, T)
    if rank > 0:
        s, P = eigen_low_rank(M, rank, tracing)
        if P.shape[-2] == T:
            lam = require_positive_definite(s, lam)
            return Covariance(*covariance, s, P, lam, R, logdet_noise, "spectral"), "low_rank"
    nonzero = lam if tracing else without_zeros(lam)
    if costs.prefers_cholesky(method, T, nonzero.shape[-1]):
        L, logdet_C = cholesky_factors(M, nonzero)
        return Covariance(*covariance, L, logdet_C, lam, R, logdet_noise, "cholesky"), "cholesky"
    s, P = eigen(M)
    lam = require_positive_definite(s, lam)
    return Covariance(*covariance, s, P, lam, R, logdet_noise, "spectral"), "spectral"


def known_rows(
    s: Tensor, P: Tensor, K: Tensor, Sigma: Maybe, log_noise: Maybe, M: Maybe = None
) -> Covariance:
    """The factorised covariance with M = P Diag(s) Pᵀ, a constant unless M is given too."""
    lam, R, logdet_noise = whiten(K, Sigma, log_noise)
    lam = require_known_rows(s, lam, P) if M is None else require_positive_definite(s, lam)
    return Covariance(M, K, Sigma, log_noise, s, P, lam, R, logdet_noise, "spectral")
