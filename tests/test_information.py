"""Information matrices against the dense ½ tr(U⁻¹ dU U⁻¹ dU), 50 digits and closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from battery import NOISES, ROUTES
from devices import to_numpy
from problems import BATCHES, Problem, condition_number, kinds_for, make_problem, normal
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

import torch_kronlik as tk
from torch_kronlik import reference
from torch_kronlik.distribution import KroneckerNormal
from torch_kronlik.information import fisher_information, observed_information

Check = Callable[..., None]
T, D = 5, 3
each_noise = pytest.mark.parametrize("noise", NOISES)


# ---------------------------------------------------------------- the models


def symmetric_normal(n: int, seed: int) -> Tensor:
    X = normal(n, n, seed=seed)
    return (X + X.mT) / 2


class Curved:
    """M, K, the noise and the mean move on curves through a problem: c is shared by all of them."""

    def __init__(self, p: Problem) -> None:
        self.p, (t, d) = p, p.Y.shape[-2:]
        self.name, self.noise = next(iter(p.noise.items()))
        parts = [symmetric_normal(n, seed) for seed, n in enumerate((t, t, d, d, d, d))]
        self.M1, self.M2, self.K1, self.K2, self.S1, self.S2 = (x.to(p.M) for x in parts)
        if self.name == "log_noise":
            self.S1, self.S2 = self.S1[0], self.S2[0]

    def params(self) -> dict[str, Tensor]:
        return {key: torch.zeros(()).to(self.p.M) for key in "abc"}

    def parts(self, a: Tensor, b: Tensor, c: Tensor) -> Problem:
        """The problem at (a, b, c), with the mean in place of Y."""
        M = self.p.M + a * self.M1 + (a + c) ** 2 * self.M2
        K = self.p.K * (b + c).exp() + b * self.K1 + a * b * self.K2
        noise = self.noise * (1 + c) + (b - c).sin() * self.S1 * 0.3 + c**2 * self.S2
        return Problem(self.p.Y * c + b, M, K, {self.name: noise})

    def normal(self, params: dict[str, Tensor], **options: Any) -> KroneckerNormal:
        q = self.parts(**params)
        return KroneckerNormal(q.Y, q.M, q.K, **q.noise)

    def covariance(self, params: dict[str, Tensor], method: str = "auto") -> tk.KroneckerPlusNoise:
        q = self.parts(**params)
        return tk.KroneckerPlusNoise(q.M, q.K, **q.noise, method=method)

    def dense_fisher(self, with_mean: bool) -> Tensor:
        """Summed over the joint batch, from the Jacobians of U and of the mean."""
        zeros = tuple(x.double() for x in self.params().values())
        if self.p.Y.numel() == 0:
            return torch.zeros(3, 3).double()

        def U(*abc: Tensor) -> Tensor:
            q = self.parts(*abc)
            return reference.covariance_matrix(q.M, q.K, **q.noise)

        def mean(*abc: Tensor) -> Tensor:
            return self.parts(*abc).Y.double()

        V, dU = torch.linalg.inv(U(*zeros)), jacobian(U, zeros)
        batch = mean(*zeros).shape[:-2] if with_mean else V.shape[:-2]
        batch = torch.broadcast_shapes(batch, V.shape[:-2])
        VdU = torch.stack([(V @ d).expand(*batch, *V.shape[-2:]) for d in dU])
        F = 0.5 * torch.einsum("a...ij,b...ji->ab...", VdU, VdU)
        if with_mean:
            dm = torch.stack([d.flatten(-2).expand(*batch, -1) for d in jacobian(mean, zeros)])
            F = F + torch.einsum("a...i,...ij,b...j->ab...", dm, V.expand(*batch, -1, -1), dm)
        return F.reshape(3, 3, batch.numel()).sum(-1)

    def dense_hessian(self, Y: Tensor) -> Tensor:
        def nll(*abc: Tensor) -> Tensor:
            q = self.parts(*abc)
            return reference.kron_gaussian_nll(Y - q.Y, q.M, q.K, **q.noise).sum()

        zeros = tuple(x.double() for x in self.params().values())
        if Y.numel() == 0:
            return torch.zeros(3, 3).double()
        return torch.stack([torch.stack(row) for row in hessian(nll, zeros)])


def to_double(p: Problem) -> Problem:
    return Problem(*(x.double() for x in p[:3]), {k: x.double() for k, x in p.noise.items()})


# ---------------------------------------------------------------- against the dense twin


@pytest.mark.parametrize("kind", kinds_for(torch.float64))
@each_noise
def test_fisher_of_every_kind(
    kind: str, noise: str, dtype: torch.dtype, assert_close: Check
) -> None:
    if kind not in kinds_for(dtype):
        return
    p = make_problem(T, D, kind=kind, noise=noise, dtype=dtype)
    actual = fisher_information(Curved(p).normal, Curved(p).params())
    wide = Curved(to_double(p))
    assert actual.matrix.dtype == dtype
    assert actual.names == ["a", "b", "c"]
    kappa = condition_number(p)
    assert_close(actual.matrix, wide.dense_fisher(True), condition=kappa, quantity="gradient")


@pytest.mark.parametrize("kind", kinds_for(torch.float64))
@each_noise
def test_observed_of_every_kind(
    kind: str, noise: str, dtype: torch.dtype, assert_close: Check
) -> None:
    if kind not in kinds_for(dtype):
        return
    p = make_problem(T, D, kind=kind, noise=noise, dtype=dtype)
    curved, Y = Curved(p), torch.randn(T, D, dtype=dtype)
    actual = observed_information(curved.normal, curved.params(), Y=Y)
    expected = Curved(to_double(p)).dense_hessian(Y.double())
    kappa = condition_number(p)
    # Along c, s moves by s itself: terms s² of each datum cancel
    floor = T * float(curved.noise.square().sum()) if noise == "diagonal" else 0.0
    assert_close(actual.matrix, expected, condition=kappa, quantity="gradient", floor=floor)
    assert torch.equal(actual.matrix, actual.matrix.mT)


@pytest.mark.parametrize("batch", BATCHES)
@each_noise
def test_batch_elements_add(batch: str, noise: str, assert_close: Check) -> None:
    curved = Curved(make_problem(T, D, batch=BATCHES[batch], noise=noise))
    point = curved.params()
    F = fisher_information(curved.normal, point).matrix
    assert_close(F, curved.dense_fisher(True), condition=100)
    F = fisher_information(curved.covariance, point).matrix
    assert_close(F, curved.dense_fisher(False), condition=100)
    Y = torch.randn(curved.p.Y.shape, dtype=torch.float64)
    H = observed_information(curved.normal, point, Y=Y).matrix
    assert_close(H, curved.dense_hessian(Y), condition=1000)


@pytest.mark.parametrize("method", ROUTES)
def test_every_route_gives_the_same(method: str, assert_close: Check) -> None:
    curved = Curved(make_problem(T, D, kind="rank_deficient"))
    Y = torch.randn(T, D, dtype=torch.float64)
    point, options = curved.params(), {"inputs": (method,)}
    assert_close(
        fisher_information(curved.covariance, point, **options).matrix,
        curved.dense_fisher(False),
        condition=100,
    )
    H = observed_information(curved.covariance, point, Y=Y, **options).matrix
    expected = observed_information(curved.covariance, point, Y=Y).matrix
    assert_close(H, expected, condition=100)


# ---------------------------------------------------------------- identities


@each_noise
def test_mean_observed_information_is_fishers(noise: str, assert_close: Check) -> None:
    """Exactly, over n = T·D data sets whose second moments are U's: √n times a root's columns."""
    curved = Curved(make_problem(T, D, noise=noise, kind="repeated_blocks"))
    U = curved.covariance(curved.params())
    n = T * D
    Y = n**0.5 * torch.linalg.cholesky(U.to_dense()).mT.reshape(n, T, D)
    H = observed_information(curved.covariance, curved.params(), Y=Y).matrix
    F = fisher_information(curved.covariance, curved.params()).matrix
    assert_close(H / n, F, condition=100)


def test_mean_observed_information_of_draws_approaches_fishers() -> None:
    """40 means over 50 draws each: their own spread gives the standard error of the total."""
    curved = Curved(make_problem(T, D))
    point = curved.params()
    F = fisher_information(curved.normal, point).matrix
    draws = curved.normal(point).sample((40, 50))
    means = [observed_information(curved.normal, point, Y=Y).matrix / 50 for Y in draws]
    mean, spread = torch.stack(means).mean(0), torch.stack(means).std(0)
    # nine entries, six of them distinct: beyond 4.5 standard errors once in 10⁴ seeds
    assert ((mean - F).abs() <= 4.5 * spread / 40**0.5).all()
    assert (spread / 40**0.5 <= 0.1 * F.abs().max()).all()  # the bound says something


def test_independent_rows_give_the_wishart_information(assert_close: Check) -> None:
    """M = 0: F = T/2 tr(Σ⁻¹ E_a Σ⁻¹ E_b); for variances on the log scale T/2 each."""
    Sigma = make_problem(T, D).noise["Sigma"]
    rows, columns = torch.tril_indices(D, D)

    def model(entries: Tensor) -> tk.KroneckerPlusNoise:
        lower = torch.zeros(D, D).double().index_put((rows, columns), entries)
        full = lower + lower.mT - torch.diag_embed(lower.diagonal())
        return tk.KroneckerPlusNoise(torch.zeros(T, T).double(), Sigma, Sigma=full)

    found = fisher_information(model, Sigma[rows, columns])
    V = torch.linalg.inv(Sigma)
    basis = [jacobian(lambda e: model(e).Sigma, Sigma[rows, columns])[..., a] for a in range(6)]
    expected = [[T / 2 * torch.trace(V @ Ea @ V @ Eb) for Eb in basis] for Ea in basis]
    assert_close(found.matrix, torch.tensor(expected).double(), condition=100)
    # The variance of a sample covariance: Var Σ̂_ij = (Σ_ii Σ_jj + Σ_ij²)/T.
    variance = (Sigma[rows, rows] * Sigma[columns, columns] + Sigma[rows, columns] ** 2) / T
    assert_close(found.standard_errors.square(), variance, condition=100, dims=1)

    def logs(s: Tensor) -> tk.KroneckerPlusNoise:
        zero = torch.zeros(T, T).double()
        return tk.KroneckerPlusNoise(zero, torch.eye(D).double(), log_noise=s)

    expected = T / 2 * torch.eye(D).double()
    assert_close(fisher_information(logs, torch.randn(D).double()).matrix, expected)


def test_information_of_a_mean_is_that_of_least_squares(assert_close: Check) -> None:
    p, X = make_problem(T, D), torch.randn(T, 2, dtype=torch.float64)

    def model(b: Tensor) -> KroneckerNormal:
        return KroneckerNormal(X @ b, p.M, p.K, **p.noise)

    x = reference.kron(X, torch.eye(D).double())
    expected = x.mT @ torch.linalg.solve(reference.covariance_matrix(p.M, p.K, **p.noise), x)
    b = torch.randn(2, D).double()
    assert_close(fisher_information(model, b).matrix, expected, condition=100)
    assert_close(observed_information(model, b, Y=p.Y).matrix, expected, condition=100)


def test_small_signals_keep_their_digits(assert_close: Check) -> None:
    """Beside a large noise the curvature of U is 1/(s λ) times the information: left out."""
    p = make_problem(T, D, kind="huge_noise")

    def model(p_: tuple[Tensor, Tensor]) -> tk.KroneckerPlusNoise:
        return tk.KroneckerPlusNoise(p.M * p_[0], p.K * p_[1], **p.noise)

    one = torch.ones(()).double()
    F = fisher_information(model, (one, one)).matrix
    V = torch.linalg.inv(p.noise["Sigma"])  # U⁻¹ = I ⊗ Σ⁻¹ up to 1e-10
    expected = 0.5 * p.M.square().sum() * torch.trace(V @ p.K @ V @ p.K)
    assert (F / expected - 1).abs().max() < 1e-8


# ---------------------------------------------------------------- 50 digits


@pytest.mark.parametrize("kind", ["generic", "identity", "repeated_blocks", "rank_deficient"])
@each_noise
def test_fisher_at_high_precision(kind: str, noise: str, assert_close: Check) -> None:
    """M, K and Σ along fixed directions, so that every derivative is exact."""
    p = make_problem(4, 2, kind=kind, noise=noise)
    name, value = next(iter(p.noise.items()))
    dM, dK, dS = symmetric_normal(4, 0), symmetric_normal(2, 1), symmetric_normal(2, 2)
    dS = dS[0] if noise == "diagonal" else dS

    def model(t: Tensor) -> tk.KroneckerPlusNoise:
        return tk.KroneckerPlusNoise(p.M + t[0] * dM, p.K + t[1] * dK, **{name: value + t[2] * dS})

    found = fisher_information(model, torch.zeros(3).double()).matrix
    with mpmath.workdps(50):
        M, K, S, M1, K1, S1 = (exact(x) for x in (p.M, p.K, value, dM, dK, dS))
        if noise == "diagonal":
            S = np.diag([mpmath.exp(x) for x in S])
            S1 = S @ np.diag(S1)
        I4 = exact(torch.eye(4))
        V = mpmath.matrix((np.kron(M, K) + np.kron(I4, S)).tolist()) ** -1
        dU = [np.kron(M1, K), np.kron(M, K1), np.kron(I4, S1)]
        VdU = [V * mpmath.matrix(d.tolist()) for d in dU]
        entries = [[sum((x * y)[i, i] for i in range(8)) / 2 for y in VdU] for x in VdU]
        expected = torch.tensor([[float(e) for e in row] for row in entries], dtype=torch.float64)
    assert_close(found, expected, condition=condition_number(p))


def exact(x: Tensor) -> Any:
    return np.vectorize(mpmath.mpf, otypes=[object])(to_numpy(x.double()))
