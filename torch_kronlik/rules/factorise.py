"""The factorisation, a constant for differentiation: no gradient passes through an eigenvector."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..derivatives import define, define_flat, register
from ..factor import Shifted, Spectral, low_rank, plan, shifted
from ..factor import whiten as kernels
from ..noise import Noise
from ..records import Matrix, Scalar, Vector
from ..rows import eigen as rows_eigen
from .common import Covariance, Factored

__all__ = ["completed", "eigen", "factorise", "whiten"]

Tensors = tuple[Tensor, ...]


def _eigen_fake(M: Tensor) -> Tensors:
    return M.new_empty(M.shape[:-1]), M.new_empty(M.shape).mT  # as LAPACK leaves them


def _low_rank_fake(M: Tensor, max_rank: int, padded: bool) -> Tensors:
    return M.new_empty(M.shape[:-1]), M.new_empty(M.shape)


def _cholesky_fake(M: Tensor, lam: Tensor) -> Tensors:
    batch, n = torch.broadcast_shapes(M.shape[:-2], lam.shape[:-1]), lam.shape[-1]
    return M.new_empty((*batch, n, *M.shape[-2:])), M.new_empty((*batch, n))


eigen = define_flat("eigen(Tensor M) -> (Tensor s, Tensor P)", rows_eigen.eigen, _eigen_fake)
register(eigen, core_dims=lambda M: ([2], [1, 2]))

eigen_low_rank = define_flat(
    "eigen_low_rank(Tensor M, int max_rank, bool padded) -> (Tensor s, Tensor P)",
    low_rank.eigen_low_rank,
    _low_rank_fake,
)
register(eigen_low_rank, core_dims=lambda *_: ([2, None, None], [1, 2]))

require_positive_definite = define_flat(
    "require_positive_definite(Tensor s, Tensor lam, Tensor? P) -> Tensor",
    kernels.require_positive_definite,
    lambda s, lam, P: lam.new_empty(lam.shape),
)
register(require_positive_definite, core_dims=lambda *_: ([1, 1, 2], [1]))

cholesky_factors = define_flat(
    "cholesky_factors(Tensor M, Tensor lam) -> (Tensor L, Tensor logdet_C)",
    shifted.factors,
    _cholesky_fake,
)
register(cholesky_factors, core_dims=lambda *_: ([2, 1], [3, 1]))

# The eigenvalues after the leading zeros: a shape that depends on data, so never traced.
without_zeros = define_flat(
    "without_zeros(Tensor lam) -> Tensor",
    shifted.without_zeros,
    lambda lam: lam.new_empty(lam.shape),
)
register(without_zeros, core_dims=lambda *_: ([1], [1]))


class WhitenArguments(NamedTuple):
    K: Matrix
    noise: Noise


class Whitened(NamedTuple):
    """RᵀΣR = I and RᵀKR = Diag(λ)."""

    lam: Vector
    R: Matrix
    logdet_noise: Scalar


def _whiten(given: WhitenArguments) -> Whitened:
    return Whitened(*kernels.whiten(given.K, given.noise))


def _whiten_fake(given: WhitenArguments) -> Whitened:
    K, noise = given
    D = K.shape[-1]
    batch = torch.broadcast_shapes(K.shape[:-2], noise.batch)
    return Whitened(*map(K.new_empty, ((*batch, D), (*batch, D, D), noise.batch)))


whiten = define("whiten", WhitenArguments, Whitened, _whiten, _whiten_fake)


def factorise(parts: Covariance, method: str) -> tuple[Factored, str]:
    """U with its factorisation, and the method that made it."""
    lam, R, logdet_noise = whiten(parts.K, parts.noise)
    basis: Any = parts.rows.basis()
    if basis is None:
        return _factorise_matrix(parts, method, lam, R, logdet_noise)
    s, P = basis
    lam = require_positive_definite(s, lam, P if parts.rows.is_constant else None)
    return Factored(parts, Spectral(s, P, lam, R, logdet_noise)), parts.rows.method


def _factorise_matrix(
    parts: Covariance, method: str, lam: Tensor, R: Tensor, logdet_noise: Tensor
) -> tuple[Factored, str]:
    """The route that the plan picks for M as a matrix.

    While a graph is traced, shapes cannot depend on data: "auto" then stands for "spectral".
    """
    M, tracing = parts.rows.M, torch.compiler.is_compiling()
    if tracing and method == "auto":
        method = "spectral"
    costs = plan.costs(M.device.type)
    rank = costs.max_rank(method, M.shape[-1])
    if rank > 0:
        s, P = eigen_low_rank(M, rank, tracing)
        if P.shape[-2] == M.shape[-1]:
            lam = require_positive_definite(s, lam, None)
            return Factored(parts, Spectral(s, P, lam, R, logdet_noise)), "low_rank"
    nonzero = lam if tracing else without_zeros(lam)
    if costs.prefers_cholesky(method, M.shape[-1], nonzero.shape[-1]):
        L, logdet_C = cholesky_factors(M, nonzero)
        return Factored(parts, Shifted(L, logdet_C, lam, R, logdet_noise)), "cholesky"
    s, P = eigen(M)
    lam = require_positive_definite(s, lam, None)
    return Factored(parts, Spectral(s, P, lam, R, logdet_noise)), "spectral"


def completed(U: Factored) -> Factored:
    """U with a complete basis of M, from what the route left: no part is factorised again.

    The low-rank route adds an orthonormal basis of the complement. The Cholesky route has no basis:
    M is diagonalised here, for the first time.
    """
    f: Any = U.factor
    if isinstance(f, Spectral):
        return U._replace(factor=f.completed())
    s, P = eigen(U.rows.M)
    lam = require_positive_definite(s, f.lam, None)
    return U._replace(factor=Spectral(s, P, lam, f.R, f.logdet_noise))
