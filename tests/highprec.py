"""The model at 50 digits (mpmath): value, solve and first gradients of one small problem.

The float64 reference cannot tell which of two float64 routes is the more accurate one; this can.
Inputs are taken as the exact numbers that their floats are, results are rounded once to float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mpmath  # type: ignore[import-untyped]
import numpy as np
import torch
from problems import Problem
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]  # of mpmath numbers


class HighPrecision(NamedTuple):
    """Every entry correct to the last float64 digit; gradients by name (Y, M, K and the noise)."""

    nll: Tensor  # ()
    logdet: Tensor  # ()
    inv_quad: Tensor  # ()
    solve: Tensor  # (T, D)
    inverse_diagonal: Tensor  # (T, D)
    inverse_block_diag_sum: Tensor  # (D, D)
    grad_logdet: dict[str, Tensor]
    grad_inv_quad: dict[str, Tensor]


def evaluate(problem: Problem, digits: int = 50) -> HighPrecision:
    """All quantities for a problem without batch dimensions; under a second for T·D ≤ 30."""
    with mpmath.workdps(digits):
        return _evaluate(problem)


def _evaluate(problem: Problem) -> HighPrecision:
    Y, M, K = (_exact(x) for x in (problem.Y, problem.M, problem.K))
    (T, D), (name, noise) = Y.shape, next(iter(problem.noise.items()))
    s = np.array([mpmath.exp(x) for x in _exact(noise)]) if name == "log_noise" else None
    Sigma = _exact(noise) if s is None else _diagonal_matrix(s)
    U = np.kron(M, K) + np.kron(_diagonal_matrix(_ones(T)), Sigma)
    V, logdet = _inverse_and_logdet(U)
    A = (V @ Y.reshape(-1)).reshape(T, D)
    V = V.reshape(T, D, T, D)
    inv_quad = (Y * A).sum()
    B = sum(V[t, :, t, :] for t in range(T))
    noise_of_logdet = B if s is None else s * np.diagonal(B)
    noise_of_quad = -A.T @ A if s is None else -s * (A * A).sum(0)
    grad_logdet = {
        "Y": 0 * A,
        "M": (V * K[None, :, None, :]).sum((1, 3)),
        "K": (V * M[:, None, :, None]).sum((0, 2)),
        name: noise_of_logdet,
    }
    grad_inv_quad = {"Y": 2 * A, "M": -A @ K @ A.T, "K": -A.T @ M @ A, name: noise_of_quad}
    return HighPrecision(
        nll=_float64((inv_quad + logdet + T * D * mpmath.log(2 * mpmath.pi)) / 2),
        logdet=_float64(logdet),
        inv_quad=_float64(inv_quad),
        solve=_float64(A),
        inverse_diagonal=_float64(np.array([np.diagonal(V[t, :, t, :]) for t in range(T)])),
        inverse_block_diag_sum=_float64(B),
        grad_logdet={key: _float64(value) for key, value in grad_logdet.items()},
        grad_inv_quad={key: _float64(value) for key, value in grad_inv_quad.items()},
    )


def _inverse_and_logdet(U: Array) -> tuple[Array, Any]:
    """Gauss–Jordan elimination without pivoting, which positive definite matrices do not need."""
    X, logdet = U.copy(), mpmath.mpf(0)
    for k in range(len(X)):
        pivot, row, column = X[k, k], X[k] / X[k, k], X[:, k].copy()
        if pivot <= 0:
            raise ValueError(f"U is not positive definite: pivot {k} is {pivot}")
        logdet += mpmath.log(pivot)
        X -= np.outer(column, row)
        X[k], X[:, k] = row, -column / pivot
        X[k, k] = 1 / pivot
    return X, logdet


def _exact(x: Tensor) -> Array:
    numbers = x.detach().cpu().double().numpy()
    exact: Array = np.vectorize(mpmath.mpf, otypes=[object])(numbers)
    return exact


def _ones(n: int) -> Array:
    return np.array([mpmath.mpf(1)] * n)


def _diagonal_matrix(entries: Array) -> Array:
    matrix = np.full((len(entries), len(entries)), mpmath.mpf(0))
    np.fill_diagonal(matrix, entries)
    return matrix


def _float64(x: Any) -> Tensor:
    return torch.tensor(np.asarray(x, dtype=object).astype(np.float64))  # on the default device
