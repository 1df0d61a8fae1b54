"""Fixed effects against dense generalised least squares, an independent program, closed forms."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.stats
import statsmodels.api as sm
import torch
from devices import opcheck, to_numpy
from problems import make_problem, normal
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

import torch_kronlik as tk

T, D, c = 7, 2, 2
each_noise = pytest.mark.parametrize("noise", ["full", "diagonal"])
each_reml = pytest.mark.parametrize("reml", [True, False])


class Dense(NamedTuple):
    coefficients: Tensor  # (p)
    covariance: Tensor  # (p, p)
    nll: Tensor
    residuals: Tensor  # (n)


def dense(y: Tensor, x: Tensor, U: Tensor, reml: bool) -> Dense:
    """By the formulas, of y (n), x (n, p) and U (n, n)."""
    inverse = torch.linalg.inv(U)
    S = x.mT @ inverse @ x
    b = torch.linalg.solve(S, x.mT @ inverse @ y)
    r = y - x @ b
    n, p = x.shape
    twice = r @ inverse @ r + torch.logdet(U) + n * math.log(2 * math.pi)
    if reml:
        twice = twice + torch.logdet(S) - torch.logdet(x.mT @ x) - p * math.log(2 * math.pi)
    return Dense(b, torch.linalg.inv(S), twice / 2, r)


def data(noise: str = "full", seed: int = 0) -> tuple[Any, Tensor]:
    p = make_problem(T, D, noise=noise, seed=seed)
    return p, torch.stack([torch.ones(T, dtype=torch.float64), normal(T, seed=seed + 1)], -1)


def covariance(p: Any, **more: Any) -> tk.KroneckerPlusNoise:
    return tk.KroneckerPlusNoise(p.M, p.K, **p.noise, **more)


def design(X: Tensor) -> Tensor:
    """Columns x_c ⊗ e_j, j fastest."""
    return torch.kron(X, torch.eye(D, dtype=X.dtype))


def close(found: Tensor, expected: Tensor, rtol: float = 1e-11) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


@each_reml
@each_noise
def test_against_dense(noise: str, reml: bool) -> None:
    p, X = data(noise)
    fit = covariance(p).regress(p.Y, X, reml=reml)
    e = dense(p.Y.flatten(), design(X), covariance(p).to_dense(), reml)
    close(fit.coefficients.flatten(), e.coefficients)
    close(fit.covariance, e.covariance)
    close(fit.standard_errors.flatten(), e.covariance.diagonal().sqrt())
    close(fit.nll, e.nll)
    close(fit.residuals.flatten(), e.residuals)


@each_reml
def test_missing_entries_are_left_out(reml: bool) -> None:
    p, X = data()
    observed = normal(T, D, seed=5) > -0.6
    Y = torch.where(observed, p.Y, math.nan)
    U = covariance(p, observed=observed)
    places = observed.flatten().nonzero()[:, 0]
    fit = U.regress(Y, X, reml=reml)
    e = dense(p.Y.flatten()[places], design(X)[places], U.to_dense(), reml)
    close(fit.coefficients.flatten(), e.coefficients)
    close(fit.covariance, e.covariance)
    close(fit.nll, e.nll)
    close(fit.residuals.flatten()[places], e.residuals)
    assert not fit.residuals[~observed].any()


def test_each_output_with_covariates_of_its_own() -> None:
    p, X = data()
    effects = torch.tensor([[True, True], [False, True]])
    fit = covariance(p).regress(p.Y, X, effects=effects)
    kept = effects.flatten().nonzero()[:, 0]
    e = dense(p.Y.flatten(), design(X)[:, kept], covariance(p).to_dense(), True)
    close(fit.coefficients.flatten()[kept], e.coefficients)
    close(fit.covariance[kept][:, kept], e.covariance)
    close(fit.nll, e.nll)
    assert fit.coefficients[1, 0] == 0 == fit.standard_errors[1, 0]


def test_against_statsmodels() -> None:
    """Generalised least squares of a program of others, its Wald test included."""
    p, X = data()
    fit = covariance(p).regress(p.Y, X)
    U, x, y = (to_numpy(z) for z in (covariance(p).to_dense(), design(X), p.Y.flatten()))
    theirs = sm.GLS(y, x, sigma=U).fit()
    np.testing.assert_allclose(to_numpy(fit.coefficients.flatten()), theirs.params, rtol=1e-9)
    np.testing.assert_allclose(
        to_numpy(fit.covariance), theirs.normalized_cov_params, rtol=1e-8, atol=1e-12
    )
    L = normal(2, c * D, seed=9)
    test = theirs.wald_test(
        to_numpy(L), use_f=False, scalar=True, cov_p=theirs.normalized_cov_params
    )
    found = fit.wald(L)
    assert found.degrees_of_freedom == 2
    np.testing.assert_allclose(to_numpy(found.statistic), test.statistic, rtol=1e-8)
    np.testing.assert_allclose(to_numpy(found.p_value), test.pvalue, rtol=1e-8)


@pytest.mark.parametrize("q", [1, 2, 3, 4])
def test_p_values_far_in_the_tail(q: int) -> None:
    p, X = data()
    L = torch.eye(c * D, dtype=torch.float64)[:q]
    for rhs in (0.0, 30.0, 300.0):
        found = covariance(p).regress(p.Y, X).wald(L, torch.full((q,), rhs, dtype=torch.float64))
        expected = scipy.stats.chi2.logsf(found.statistic.item(), q)
        if math.isfinite(expected):
            np.testing.assert_allclose(found.log_p_value.item(), expected, rtol=1e-9)
    assert found.log_p_value < -1000


def test_ordinary_least_squares_where_rows_are_independent() -> None:
    X, Y = data()[1], data()[0].Y
    zero, eye = torch.zeros(T, T, dtype=torch.float64), torch.eye(D, dtype=torch.float64)
    fit = tk.KroneckerPlusNoise(zero, eye, Sigma=eye).regress(Y, X)
    close(fit.coefficients, torch.linalg.lstsq(X, Y).solution)


def test_no_covariates_is_the_plain_likelihood() -> None:
    p, X = data()
    U = covariance(p)
    for reml in (True, False):
        fit = U.regress(p.Y, X[:, :0], reml=reml)
        close(fit.nll, U.nll(p.Y))
        assert fit.coefficients.shape == (0, D)


@each_reml
def test_invariance(reml: bool) -> None:
    """Effects in Y move the coefficients alone; other units of X leave the likelihoods."""
    p, X = data()
    U, B = covariance(p), normal(c, D, seed=4)
    before, after = (U.regress(Y, X, reml=reml) for Y in (p.Y, p.Y + X @ B))
    close(after.coefficients - before.coefficients, B)
    close(after.nll, before.nll)
    close(U.regress(p.Y, X * torch.tensor([1e-6, 1e6]).to(X), reml=reml).nll, before.nll)


@each_reml
def test_derivatives(reml: bool) -> None:
    p, X = data()

    def f(Y: Tensor, X: Tensor, M: Tensor, K: Tensor, Sigma: Tensor) -> Any:
        fit = tk.KroneckerPlusNoise(M, K, Sigma=Sigma).regress(Y, X, reml=reml)
        return fit.nll, fit.coefficients, fit.standard_errors

    given = [x.detach().requires_grad_() for x in (p.Y, X, p.M, p.K, p.noise["Sigma"])]
    assert gradcheck(f, given, atol=1e-5)
    assert gradgradcheck(lambda *x: f(*x)[0], given, atol=1e-4)


def test_batches() -> None:
    p = make_problem(T, D, batch=(2,))
    X = torch.stack([data()[1], data(seed=3)[1]])
    fit = covariance(p).regress(p.Y, X)
    for i in range(2):
        one = tk.KroneckerPlusNoise(p.M[i], p.K[i], Sigma=p.noise["Sigma"][i]).regress(p.Y[i], X[i])
        close(fit.coefficients[i], one.coefficients)
        close(fit.nll[i], one.nll)


def test_universal_kriging() -> None:
    """The limit of a Gaussian prior on the coefficients that gets ever wider."""
    p = make_problem(T + 3, D)
    X = torch.stack([torch.ones(T + 3, dtype=torch.float64), normal(T + 3, seed=1)], -1)
    new, old = slice(T, None), slice(T)
    U = tk.KroneckerPlusNoise(p.M[old, old], p.K, **p.noise)
    found = U.regress(p.Y[old], X[old]).predict(X[new], p.M[new, old], p.M[new, new])
    x, x_new, K = design(X[old]), design(X[new]), p.K
    inverse = torch.linalg.inv(U.to_dense())
    e = dense(p.Y[old].flatten(), x, U.to_dense(), True)
    cross = torch.kron(p.M[new, old], K)
    h = x_new - cross @ inverse @ x
    mean = x_new @ e.coefficients + cross @ inverse @ e.residuals
    whole = torch.kron(p.M[new, new], K) - cross @ inverse @ cross.mT + h @ e.covariance @ h.mT
    close(found.mean.flatten(), mean)
    close(found.variance.flatten(), whole.diagonal())
    noise = p.noise["Sigma"].diagonal()
    close(found.observation_variance, whole.diagonal().reshape(3, D) + noise)
    blocks = torch.stack([whole[i * D : i * D + D, i * D : i * D + D] for i in range(3)])
    close(found.row_covariance, blocks)


def test_the_loss_profiles_effects_out() -> None:
    p, X = data("diagonal")
    loss = tk.KroneckerGaussianNLLLoss(D, reduction="sum").double()
    with torch.no_grad():
        loss.log_noise.copy_(p.noise["log_noise"])
    value = loss(p.Y, p.M, p.K, X=X)
    close(value, covariance(p).regress(p.Y, X).nll)
    assert grad(value, loss.log_noise)[0].abs().min() > 0


def test_dependent_columns_are_named() -> None:
    p, X = data()
    U = covariance(p)
    twice = torch.cat([X, X[:, :1] - 2 * X[:, 1:]], -1)
    with pytest.raises(
        ValueError, match=r"linearly independent columns, but X\[\.\.\., 2\] depends"
    ):
        U.regress(p.Y, twice)
    observed = torch.ones(T, D, dtype=torch.bool)
    observed[1:, 1] = False  # one entry of output 1: it has two effects
    with pytest.raises(
        ValueError, match=r"at the observed entries, but X\[\.\.\., 1\] \(output 1\)"
    ):
        covariance(p, observed=observed).regress(p.Y, X)


def test_covariates_of_missing_entries_are_not_looked_at() -> None:
    p, X = data()
    observed = torch.ones(T, D, dtype=torch.bool)
    observed[2] = False
    observed[3, 1] = False
    effects = torch.tensor([[True, True], [False, True]])
    U = covariance(p, observed=observed)
    hidden = X.clone()
    hidden[2], hidden[3, 1] = math.nan, math.nan  # covariate 1 enters output 1 alone
    found = U.regress(p.Y, hidden, effects=effects)
    close(found.nll, U.regress(p.Y, X, effects=effects).nll)
    hidden[5, 1] = math.inf
    with pytest.raises(ValueError, match=r"X\[5, 1\] is inf"):
        U.regress(p.Y, hidden, effects=effects)


def test_errors() -> None:
    p, X = data()
    U = covariance(p)
    with pytest.raises(ValueError, match=r"X must have shape .*T = 7.* got \(6, 2\)"):
        U.regress(p.Y, X[1:])
    with pytest.raises(TypeError, match="X"):
        U.regress(p.Y, X.float())
    with pytest.raises(ValueError, match="X must be finite"):
        U.regress(p.Y, X / 0)
    with pytest.raises(TypeError, match=r"effects must be a tensor of bool, got torch\.float64"):
        U.regress(p.Y, X, effects=X)
    with pytest.raises(ValueError, match=r"effects must have shape \(c, D\).*got \(1, 2\)"):
        U.regress(p.Y, X, effects=torch.ones(1, 2, dtype=torch.bool))
    fit = U.regress(p.Y, X)
    with pytest.raises(ValueError, match=r"L must have shape .*c·D = 4.*got \(1, 3\)"):
        fit.wald(torch.ones(1, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"linearly independent rows.*L\[\.\.\., 1, :\] depends"):
        fit.wald(torch.ones(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"X_new must have shape .*S = 1.*c = 2.*got \(1, 1\)"):
        fit.predict(X[:1, :1], p.M[:1], p.M[:1, 0])


def test_opcheck() -> None:
    op = torch.ops.torch_kronlik.orthonormaliser.default
    opcheck(op, (normal(5, 3, seed=1), "must be independent", "a|b|c"))
