"""kron_gaussian_nll against scipy, closed forms and its defining properties.

Against the dense twin it is in test_linalg.py, with every other function.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from battery import NOISES, from_leaves, leaves
from devices import to_numpy
from problems import condition_number, dense_noise, kinds_for, make_problem
from scipy import stats  # type: ignore[import-untyped]
from torch.autograd import grad

import torch_kronlik as tk
from torch_kronlik.factor.plan import METHODS

Check = Callable[..., None]
each_noise = pytest.mark.parametrize("noise", NOISES)
each_route = pytest.mark.parametrize("method", METHODS)


@each_route
@each_noise
@pytest.mark.parametrize("kind", kinds_for(torch.float32))  # scipy refuses the others as singular
def test_equals_scipy(kind: str, noise: str, method: str, assert_close: Check) -> None:
    p = make_problem(6, 3, kind=kind, noise=noise)
    M, K, Sigma, y = (to_numpy(x) for x in (p.M, p.K, dense_noise(p), p.Y.reshape(-1)))
    U = np.kron(M, K) + np.kron(np.eye(6), Sigma)
    expected = -stats.multivariate_normal(cov=U).logpdf(y)
    actual = tk.kron_gaussian_nll(p.Y, p.M, p.K, **p.noise, method=method)
    assert_close(actual, torch.tensor(expected), condition=condition_number(p), dims=0, floor=18.0)


@each_route
@each_noise
def test_one_output_equals_scipy(noise: str, method: str) -> None:
    """D = 1: the ordinary Gaussian process likelihood."""
    p = make_problem(7, 1, noise=noise)
    cov = p.K[0, 0] * p.M + dense_noise(p)[0, 0] * torch.eye(7)
    expected = -stats.multivariate_normal(cov=to_numpy(cov)).logpdf(to_numpy(p.Y[:, 0]))
    actual = tk.kron_gaussian_nll(p.Y, p.M, p.K, **p.noise, method=method)
    torch.testing.assert_close(actual.item(), float(expected))


@each_route
def test_white_noise_in_closed_form(method: str, dtype: torch.dtype) -> None:
    """M = K = I, Σ = σ² I: T·D independent numbers of variance 1 + σ²."""
    T, D, s = 6, 4, torch.tensor(0.7, dtype=dtype)
    Y = torch.linspace(-2, 2, T * D, dtype=dtype).reshape(T, D)
    M, K = torch.eye(T, dtype=dtype), torch.eye(D, dtype=dtype)
    log_noise = s.expand(D).clone().requires_grad_()
    nll = tk.kron_gaussian_nll(Y, M, K, log_noise=log_noise, method=method)
    u = 1 + s.exp()
    expected = (Y.square().sum() / u + T * D * (2 * math.pi * u).log()) / 2
    torch.testing.assert_close(nll, expected)
    (g,) = grad(nll, log_noise)
    torch.testing.assert_close(g, s.exp() * (T / u - Y.square().sum(0) / u**2) / 2)


@each_route
@each_noise
def test_sum_over_outputs_when_they_are_independent(noise: str, method: str) -> None:
    """Diagonal K and Σ: one likelihood for each output."""
    p = make_problem(6, 3, noise="diagonal")
    K, v = p.K.diagonal(), p.noise["log_noise"]
    form = {"log_noise": v} if noise == "diagonal" else {"Sigma": v.exp().diag()}
    joint = tk.kron_gaussian_nll(p.Y, p.M, K.diag(), **form, method=method)
    each = tk.kron_gaussian_nll(
        p.Y.mT[..., None], p.M, K[:, None, None], log_noise=v[:, None], method=method
    )
    assert each.shape == (3,)
    torch.testing.assert_close(joint, each.sum())


@each_route
def test_two_noise_forms_agree(method: str) -> None:
    """Σ = Diag(exp(s)), and ∂/∂s = exp(s) ⊙ the diagonal of ∂/∂Σ."""
    p = make_problem(5, 3, batch=(2,), noise="diagonal")
    s = p.noise["log_noise"].clone().requires_grad_()
    Sigma = s.detach().exp().diag_embed().requires_grad_()
    a = tk.kron_gaussian_nll(p.Y, p.M, p.K, log_noise=s, method=method)
    b = tk.kron_gaussian_nll(p.Y, p.M, p.K, Sigma=Sigma, method=method)
    torch.testing.assert_close(a, b)
    (gs,), (gSigma,) = grad(a.sum(), s), grad(b.sum(), Sigma)
    torch.testing.assert_close(gs, s.exp() * gSigma.diagonal(dim1=-2, dim2=-1))


@each_route
@each_noise
def test_gradient_has_mean_zero_at_the_truth(noise: str, method: str) -> None:
    """E[yyᵀ] = U: averaged over the columns of a root of U, the score in M, K and Σ vanishes."""
    p = make_problem(4, 3, noise=noise)
    U = tk.KroneckerPlusNoise(p.M, p.K, **p.noise).to_dense()
    # n vectors whose outer products sum to n·U
    Y = (torch.linalg.cholesky(U).mT * math.sqrt(12)).reshape(12, 4, 3)
    values = {key: x.requires_grad_() for key, x in leaves(p).items() if key != "Y"}
    q = from_leaves({"Y": Y, **values})
    nll = tk.kron_gaussian_nll(q.Y, q.M, q.K, **q.noise, method=method).mean()
    for g in grad(nll, list(values.values())):
        torch.testing.assert_close(g, torch.zeros_like(g), rtol=0, atol=1e-12)


@each_route
@each_noise
def test_gradients_in_the_factors_are_symmetric(noise: str, method: str) -> None:
    p = make_problem(20, 6, noise=noise)
    values = {key: x.requires_grad_() for key, x in leaves(p).items()}
    q = from_leaves(values)
    nll = tk.kron_gaussian_nll(q.Y, q.M, q.K, **q.noise, method=method)
    for key, g in zip(values, grad(nll, list(values.values())), strict=True):
        if key in ("M", "K", "Sigma"):
            torch.testing.assert_close(g, g.mT, rtol=1e-12, atol=1e-12)


def test_fits_by_gradient_descent() -> None:
    """A second-order optimiser from torch finds the closed-form noise of white data."""
    T, D = 50, 2
    Y = torch.randn(T, D, dtype=torch.float64) * torch.tensor([2.0, 3.0])
    M, K = torch.eye(T, dtype=torch.float64), torch.zeros(D, D, dtype=torch.float64)
    s = torch.zeros(D, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([s], max_iter=50, line_search_fn="strong_wolfe")

    def step() -> torch.Tensor:
        optimiser.zero_grad()
        nll: torch.Tensor = tk.kron_gaussian_nll(Y, M, K, log_noise=s)
        nll.backward()
        return nll

    optimiser.step(step)
    torch.testing.assert_close(s.detach().exp(), Y.square().mean(0), rtol=1e-5, atol=0)
