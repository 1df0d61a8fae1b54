"""The same negative log likelihood as other libraries compute it, and as one would by hand.

Each is ``f(Y, M, K, **noise) -> (*batch)``, differentiable in every argument, with ``noise`` one of
``Sigma`` and ``log_noise``.

* ``gpytorch``: GPyTorch's structured path, the log density of its ``MultitaskMultivariateNormal``
  on the operators that its ``MultitaskGaussianLikelihood`` makes. Its threshold, up to which
  everything is a dense Cholesky, is lowered: that is the faster of its two ways from T·D of about
  100 on.
* ``gpytorch_dense``: the same operators with the settings that ``import botorch`` makes for the
  whole process (0.18: fast computations off, Cholesky up to 4096), which is BoTorch's default.
* ``dense``: torch's own multivariate normal on the T·D × T·D covariance, batched.
* ``composed``: one eigendecomposition of each factor and the analytic gradients, in plain torch.
"""

from __future__ import annotations

import math
from typing import Any

import linear_operator
import torch
from gpytorch import distributions
from linear_operator import operators
from torch import Tensor

__all__ = ["PEERS", "composed", "dense", "gpytorch", "gpytorch_dense", "one_cholesky_per_output"]


def _constant(T: int, D: int) -> float:
    return T * D * math.log(2 * math.pi)


def _covariance_operator(M: Tensor, K: Tensor, noise: dict[str, Tensor]) -> Any:
    ones = M.new_ones(*M.shape[:-2], 1)
    rows = operators.ConstantDiagLinearOperator(ones, diag_shape=M.shape[-1])
    if "log_noise" in noise:
        Sigma = operators.DiagLinearOperator(noise["log_noise"].exp())
        white = operators.KroneckerProductDiagLinearOperator(rows, Sigma)
    else:
        Sigma = operators.DenseLinearOperator(noise["Sigma"])
        white = operators.KroneckerProductLinearOperator(rows, Sigma)
    factors = (operators.DenseLinearOperator(X) for X in (M, K))
    return operators.KroneckerProductLinearOperator(*factors) + white


def _log_density(Y: Tensor, M: Tensor, K: Tensor, noise: dict[str, Tensor]) -> Tensor:
    U = _covariance_operator(M, K, noise)
    return distributions.MultitaskMultivariateNormal(torch.zeros_like(Y), U).log_prob(Y)


def gpytorch(Y: Tensor, M: Tensor, K: Tensor, **noise: Tensor) -> Tensor:
    with linear_operator.settings.max_cholesky_size(1):
        return -_log_density(Y, M, K, noise)


def gpytorch_dense(Y: Tensor, M: Tensor, K: Tensor, **noise: Tensor) -> Tensor:
    settings = linear_operator.settings
    with (
        settings.fast_computations(False, False, False),
        settings.max_cholesky_size(4096),
        settings.cholesky_max_tries(6),
    ):
        return -_log_density(Y, M, K, noise)


def dense(Y: Tensor, M: Tensor, K: Tensor, **noise: Tensor) -> Tensor:
    T, D = Y.shape[-2:]
    Sigma = noise["Sigma"] if "Sigma" in noise else torch.diag_embed(noise["log_noise"].exp())
    eye = torch.eye(T, dtype=Y.dtype, device=Y.device)
    U = (
        M[..., :, None, :, None] * K[..., None, :, None, :]
        + eye[:, None, :, None] * Sigma[..., None, :, None, :]
    ).reshape(*Y.shape[:-2], T * D, T * D)
    normal = torch.distributions.MultivariateNormal(Y.new_zeros(T * D), U, validate_args=False)
    return -normal.log_prob(Y.flatten(-2))


# --- by hand ------------------------------------------------------------------------------------


def _whiten(K: Tensor, noise: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(λ, R, log det Σ) with RᵀΣR = I, RᵀKR = Diag(λ)."""
    if "log_noise" in noise:
        s = noise["log_noise"]
        root = torch.exp(-0.5 * s)[..., :, None]
        lam, Q = torch.linalg.eigh(root * K * root.mT)
        return lam, root * Q, s.sum(-1)
    L = torch.linalg.cholesky(noise["Sigma"])
    half = torch.linalg.solve_triangular(L, K, upper=False)
    lam, Q = torch.linalg.eigh(torch.linalg.solve_triangular(L, half.mT, upper=False))
    R = torch.linalg.solve_triangular(L.mT, Q, upper=True)
    return lam, R, 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _gradients(
    A: Tensor, M: Tensor, K: Tensor, noise: dict[str, Tensor], R: Tensor, rows: Tensor, with_M: Any,
    plain: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """From Σ_j λ_j C_j⁻¹, tr(M C_j⁻¹) and tr C_j⁻¹: in Y, M, K and the noise."""
    gM = 0.5 * (rows - (A @ K) @ A.mT)
    gK = 0.5 * ((R * with_M[..., None, :]) @ R.mT - A.mT @ M @ A)
    gS = 0.5 * ((R * plain[..., None, :]) @ R.mT - A.mT @ A)
    if "log_noise" in noise:
        gS = noise["log_noise"].exp() * gS.diagonal(dim1=-2, dim2=-1)
    return A, gM, gK, gS


class _Composed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, Y: Tensor, M: Tensor, K: Tensor, name: str, given: Tensor) -> Tensor:
        noise = {name: given}
        s, P = torch.linalg.eigh(M)
        lam, R, logdet_noise = _whiten(K, noise)
        W = 1 / (1 + s[..., :, None] * lam[..., None, :])
        data = P.mT @ Y @ R
        A = P @ (W * data) @ R.mT
        ctx.save_for_backward(A, M, K, given, s, P, lam, R, W)
        ctx.noise = name
        T, D = Y.shape[-2:]
        logdet = T * logdet_noise - W.log().sum((-2, -1))
        return 0.5 * ((Y * A).sum((-2, -1)) + logdet + _constant(T, D))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        A, M, K, given, s, P, lam, R, W = ctx.saved_tensors
        rows = (P * (W * lam[..., None, :]).sum(-1)[..., None, :]) @ P.mT
        with_M, plain = (W * s[..., :, None]).sum(-2), W.sum(-2)
        found = _gradients(A, M, K, {ctx.noise: given}, R, rows, with_M, plain)
        gY, gM, gK, gS = (g.reshape(g.shape + (1,) * (x.dim() - g.dim())) * x for x in found)
        return gY, gM, gK, None, gS


def composed(Y: Tensor, M: Tensor, K: Tensor, **noise: Tensor) -> Tensor:
    ((name, given),) = noise.items()
    value: Tensor = _Composed.apply(Y, M, K, name, given)  # type: ignore[no-untyped-call]
    return value


def one_cholesky_per_output(Y: Tensor, M: Tensor, K: Tensor, **noise: Tensor) -> tuple[Tensor, ...]:
    """(value, gradients in Y, M, K, noise) without an eigenvector of M: the reference."""
    T, D = Y.shape[-2:]
    lam, R, logdet_noise = _whiten(K, noise)
    data, columns, logdets, rows = Y @ R, [], [T * logdet_noise], torch.zeros_like(M)
    with_M, plain = [], []
    for j in range(D):
        C = lam[..., j, None, None] * M
        C.diagonal(dim1=-2, dim2=-1).add_(1)
        L = torch.linalg.cholesky(C)
        logdets.append(2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1))
        columns.append(torch.cholesky_solve(data[..., j, None], L))
        inverse = torch.cholesky_inverse(L)
        rows += lam[..., j, None, None] * inverse
        with_M.append((inverse * M).sum((-2, -1)))
        plain.append(inverse.diagonal(dim1=-2, dim2=-1).sum(-1))
    A = torch.cat(columns, -1) @ R.mT
    value = 0.5 * ((Y * A).sum((-2, -1)) + sum(logdets) + _constant(T, D))
    sums = (torch.stack(x, -1) for x in (with_M, plain))
    return value, *_gradients(A, M, K, noise, R, rows, *sums)


PEERS = {
    "gpytorch": gpytorch,
    "gpytorch_dense": gpytorch_dense,
    "dense": dense,
    "composed": composed,
}
