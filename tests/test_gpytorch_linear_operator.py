"""The operators under linear_operator's own battery, and what that battery does not ask.

The battery runs at its own (loose) tolerances in float32; exactness is tested below it.
"""

from __future__ import annotations

import math
import unittest
from typing import Any

import linear_operator
import pytest
import torch
from battery import NOISES, Recorder
from linear_operator.operators import (
    ConstantDiagLinearOperator,
    DenseLinearOperator,
    LinearOperator,
)
from linear_operator.test.linear_operator_test_case import LinearOperatorTestCase
from problems import dense_noise, from_roots, make_new_rows, make_problem, make_roots
from torch import Tensor

from torch_kronlik import reference
from torch_kronlik.gpytorch import (
    KroneckerPlusNoiseLinearOperator,
    KroneckerPosteriorLinearOperator,
)

# linear_operator compares dense matrices with torch's own symmetric square roots and logarithms.
pytestmark = pytest.mark.filterwarnings("ignore::linear_operator.utils.warnings.PerformanceWarning")


class Battery(LinearOperatorTestCase):
    """What all cases have in common."""

    seed = 0
    should_test_sample = True
    # It never iterates, at no size: these flags expect that no such method is called.
    should_call_cg = False
    should_call_lanczos = False
    should_call_lanczos_diagonalization = False
    noise: str
    batches: Any = ()

    def create_linear_op(self) -> LinearOperator:
        p = make_problem(3, 2, batch=self.batches, noise=self.noise, dtype=torch.float32, seed=3)
        M, K, *noise = (x.requires_grad_() for x in (p.M, p.K, *p.noise.values()))
        return KroneckerPlusNoiseLinearOperator(M, K, **dict(zip(p.noise, noise, strict=True)))

    def evaluate_linear_op(self, linear_op: Any) -> Tensor:
        """U as it stands: nothing is symmetrised."""
        M, K, noise = linear_op.M.double(), linear_op.K.double(), linear_op.noise
        Sigma = noise["Sigma"] if "Sigma" in noise else torch.diag_embed(noise["log_noise"].exp())
        eye = torch.eye(M.shape[-1], dtype=torch.float64)
        return (reference.kron(M, K) + reference.kron(eye, Sigma.double())).to(linear_op.dtype)


class TestDiagonal(Battery, unittest.TestCase):
    noise = "diagonal"


class TestFull(Battery, unittest.TestCase):
    noise = "full"


class TestDiagonalBatch(Battery, unittest.TestCase):
    noise, batches = "diagonal", (2,)


class TestFullBatch(Battery, unittest.TestCase):
    noise, batches = "full", (2,)


class TestDiagonalTwoBatches(Battery, unittest.TestCase):
    noise, batches = "diagonal", (3, 2)


class TestFullBroadcastBatches(Battery, unittest.TestCase):
    noise, batches = "full", {"Y": (), "M": (2,), "K": (), "noise": (3, 1)}


# ---------------------------------------------------------------- the covariance of predictions


class Posterior(Battery):
    observed: bool

    def create_linear_op(self) -> LinearOperator:
        new = make_new_rows(
            4, 3, 2, batch=self.batches, noise=self.noise, dtype=torch.float32, seed=3
        )
        p = new.problem
        U = KroneckerPlusNoiseLinearOperator(p.M, p.K, **p.noise)
        noise = {name: x.clone() for name, x in p.noise.items()} if self.observed else {}
        op = KroneckerPosteriorLinearOperator(U, new.M_cross, new.M_test)
        return op.with_noise(**noise) if self.observed else op

    def evaluate_linear_op(self, linear_op: Any) -> Tensor:
        U = linear_op.U
        zero = U.M.new_zeros(U.M.shape[-1], U.K.shape[-1])
        latent = reference.condition(
            zero, U.M, U.K, linear_op.M_cross, linear_op.M_test, **U.noise
        ).covariance_matrix
        if self.observed:
            eye = torch.eye(linear_op.M_test.shape[-1])
            latent = latent + reference.kron(eye, reference._noise_matrix(**linear_op.noise))
        return latent.to(linear_op.dtype)


class TestLatentPosterior(Posterior, unittest.TestCase):
    noise, observed = "diagonal", False


class TestPosterior(Posterior, unittest.TestCase):
    noise, observed = "full", True


class TestPosteriorBatch(Posterior, unittest.TestCase):
    noise, observed, batches = "diagonal", True, (2,)


# ---------------------------------------------------------------- exactness, in float64

TOLERANCE = 1e-10  # relative; the problems have condition numbers below 100
each_noise = pytest.mark.parametrize("noise", NOISES)


def make(noise: str, T: int = 5, D: int = 3, **options: Any) -> KroneckerPlusNoiseLinearOperator:
    p = make_problem(T, D, noise=noise, **options)
    return KroneckerPlusNoiseLinearOperator(p.M, p.K, **p.noise)


def dense(op: KroneckerPlusNoiseLinearOperator) -> Tensor:
    return reference.covariance_matrix(op.M, op.K, **op.noise)


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


@pytest.fixture
def no_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conjugate gradients, Lanczos, and Cholesky with added jitter raise."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an approximate method was called")

    monkeypatch.setattr("linear_operator.utils.linear_cg", refuse)
    monkeypatch.setattr("linear_operator.utils.lanczos.lanczos_tridiag", refuse)
    monkeypatch.setattr("linear_operator.operators._linear_operator.psd_safe_cholesky", refuse)


@each_noise
@pytest.mark.parametrize("threshold", [0, 10_000])
def test_algebra_is_exact_at_every_threshold(
    noise: str, threshold: int, no_iteration: None
) -> None:
    op = make(noise)
    U, X = dense(op), torch.randn(15, 4, dtype=torch.float64)
    with linear_operator.settings.max_cholesky_size(threshold):
        inv_quad, logdet = op.inv_quad_logdet(X, logdet=True, reduce_inv_quad=False)
        close(inv_quad, (X * torch.linalg.solve(U, X)).sum(0))
        close(logdet, U.logdet())
        close(op.inv_quad(X), (X * torch.linalg.solve(U, X)).sum())
        close(op.solve(X), torch.linalg.solve(U, X))
        close(op.solve(X[:, 0], X.mT), X.mT @ torch.linalg.solve(U, X[:, 0]))
        F = op.root_decomposition().root
        close(F.to_dense() @ F.to_dense().mT, U)
        close(F.mT @ X, F.to_dense().mT @ X)
        G = op.root_inv_decomposition().root
        close(G.to_dense() @ G.to_dense().mT, torch.linalg.inv(U))
        close(G.to_dense(), torch.linalg.inv(F.to_dense()).mT)
        close(G.mT @ X, G.to_dense().mT @ X)
        evals, evecs = op.diagonalization()
        close(evecs.to_dense() @ evals.diag() @ evecs.to_dense().mT, U)
        close(op.cholesky().to_dense(), torch.linalg.cholesky(U))


@each_noise
def test_second_derivatives(noise: str) -> None:
    leaves = make_roots(3, 2, noise=noise)

    def f(*roots: Tensor) -> Tensor:
        p = from_roots(*roots, noise=noise)
        op = KroneckerPlusNoiseLinearOperator(p.M, p.K, **p.noise)
        y = p.Y.flatten()[:, None]
        inv_quad, logdet = op.inv_quad_logdet(y, logdet=True)
        return torch.stack([inv_quad, logdet, (op @ op.solve(y)).sum()])

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@each_noise
def test_samples_are_differentiable_through_the_root(noise: str) -> None:
    leaves, E = make_roots(3, 2, noise=noise), torch.randn(6, 2, dtype=torch.float64)

    def f(*roots: Tensor) -> tuple[Tensor, ...]:
        p = from_roots(*roots, noise=noise)
        op = KroneckerPlusNoiseLinearOperator(p.M, p.K, **p.noise)
        F, G = op.root_decomposition().root, op.root_inv_decomposition().root
        return F @ E, F.mT @ E, G @ E, G.mT @ E

    assert torch.autograd.gradcheck(lambda *r: f(leaves[0].detach(), *r), leaves[1:])


@each_noise
def test_multiples_of_the_identity_and_positive_factors_keep_the_structure(noise: str) -> None:
    op = make(noise, batch=(2,))
    eye = torch.eye(15, dtype=torch.float64)
    c = torch.tensor([0.5, 2.0], dtype=torch.float64)
    cases = [
        (op.add_jitter(0.3), dense(op) + 0.3 * eye),
        (op.add_diagonal(c[:, None]), dense(op) + c[:, None, None] * eye),
        (op + ConstantDiagLinearOperator(c[:, None], 15), dense(op) + c[:, None, None] * eye),
        (op * 3.0, dense(op) * 3),
        (op * c[:, None, None], dense(op) * c[:, None, None]),
    ]
    for actual, expected in cases:
        assert isinstance(actual, KroneckerPlusNoiseLinearOperator)
        close(actual.to_dense(), expected)
    assert not isinstance(op * -1.0, KroneckerPlusNoiseLinearOperator)


@each_noise
def test_a_larger_batch_leaves_the_factor_alone(noise: str) -> None:
    op = make(noise)
    for larger in (op.expand(4, 15, 15), op.repeat(4, 1, 1)):
        assert larger.shape == (4, 15, 15)
        assert larger.M is op.M
        close(larger.logdet(), op.logdet().expand(4))
    tiled = make(noise, batch=(2,)).repeat(3, 2, 1, 1)
    close(tiled.to_dense(), dense(make(noise, batch=(2,))).repeat(3, 2, 1, 1))


def test_entries_are_read_without_the_matrix() -> None:
    op = make("full", T=200, D=4)
    recorder = Recorder()
    with recorder:
        rows = op[5:9, ::2].to_dense()
        entries = op[torch.tensor([3, 799]), torch.tensor([2, 796])]
        diagonal = op.diagonal()
    assert max(math.prod(s) for s in recorder.shapes()) <= 200 * 200
    U = dense(op)
    close(rows, U[5:9, ::2])
    close(entries, U[[3, 799], [2, 796]])
    close(diagonal, U.diagonal())


def test_operators_as_factors_are_made_dense() -> None:
    p = make_problem(4, 2, noise="full")
    op = KroneckerPlusNoiseLinearOperator(
        DenseLinearOperator(p.M),
        DenseLinearOperator(p.K),
        Sigma=DenseLinearOperator(p.noise["Sigma"]),
    )
    close(op.to_dense(), reference.covariance_matrix(p.M, p.K, **p.noise))


def test_one_factorisation_serves_every_operation() -> None:
    op, y = make("diagonal"), torch.randn(15, 1, dtype=torch.float64)
    recorder = Recorder()
    with recorder:
        op.evaluate_kernel().inv_quad_logdet(y, logdet=True)
        op.solve(y)
        op.logdet()
    assert recorder.count("_linalg_eigh") <= 2  # M once, K once


def test_shapes_are_checked() -> None:
    M, K, s = torch.eye(3), torch.eye(2), torch.zeros(2)
    with pytest.raises(ValueError, match="exactly one of Sigma and log_noise"):
        KroneckerPlusNoiseLinearOperator(M, K)
    with pytest.raises(ValueError, match="log_noise must have shape"):
        KroneckerPlusNoiseLinearOperator(M, K, log_noise=torch.zeros(3))
    U = KroneckerPlusNoiseLinearOperator(M, K, log_noise=s)
    with pytest.raises(ValueError, match=r"M_cross must have shape .* \(S, T\) = \(4, 3\)"):
        KroneckerPosteriorLinearOperator(U, torch.zeros(3, 4), torch.eye(4))
    with pytest.raises(ValueError, match="Y must be finite"):
        U.solve(torch.full((6, 1), torch.nan))


# ---------------------------------------------------------------- the covariance of predictions


def make_posterior(noise: str, S: int, seed: int = 0) -> tuple[Any, Tensor, Tensor]:
    """The operator without noise, and the dense covariances without and with the noise."""
    new = make_new_rows(5, S, 3, noise=noise, seed=seed)
    p, zero = new.problem, torch.zeros(5, 3, dtype=torch.float64)
    U = KroneckerPlusNoiseLinearOperator(p.M, p.K, **p.noise)
    expected = reference.condition(zero, p.M, p.K, new.M_cross, new.M_test, **p.noise)
    latent = expected.covariance_matrix
    assert latent is not None
    eye = torch.eye(S, dtype=torch.float64)
    observed = latent + reference.kron(eye, dense_noise(p))
    return KroneckerPosteriorLinearOperator(U, new.M_cross, new.M_test), latent, observed


@each_noise
@pytest.mark.parametrize("S", [1, 4])  # a Cholesky factorisation of size S·D, and the joint rows
def test_posterior_is_exact(noise: str, S: int, no_iteration: None) -> None:
    latent, expected, expected_observed = make_posterior(noise, S)
    observed = latent.with_noise(**latent.U.noise)
    other = latent.with_noise(**{n: x + 0.1 for n, x in latent.U.noise.items()})
    assert (observed._joint is not None) == (S == 4)
    assert other._joint is None
    X = torch.randn(3 * S, 2, dtype=torch.float64)
    for op, C in [(latent, expected), (observed, expected_observed), (other, other.to_dense())]:
        close(op.to_dense(), C)
        close(op.diagonal(), C.diagonal())
        close(op @ X, C @ X)
        close(op.solve(X), torch.linalg.solve(C, X))
        close(op.logdet(), C.logdet())
        close(op.inv_quad(X), (X * torch.linalg.solve(C, X)).sum())
        F = op.root_decomposition().root.to_dense()
        close(F @ F.mT, C)
        close(op[1:, 0:2].to_dense(), C[1:, 0:2])
        i, j = torch.tensor([0, 2, 1]), torch.tensor([1, 0, 3 * S - 1])
        close(op[i, j], C[i, j])


@each_noise
@pytest.mark.parametrize("what", ["latent", "same", "other"])
def test_posterior_samples_have_the_covariance(noise: str, what: str) -> None:
    op, _, _ = make_posterior(noise, 2)
    if what != "latent":
        change = 0.0 if what == "same" else 0.7
        op = op.with_noise(**{n: x + change for n, x in op.U.noise.items()})
    draws, C = op.zero_mean_mvn_samples(40_000), op.to_dense()
    assert draws.shape == (40_000, 6)
    # standard errors of the entries of a sample covariance, of a normal distribution
    error = (C.square() + C.diagonal()[:, None] * C.diagonal()).div(40_000).sqrt()
    assert ((draws.mT @ draws / 40_000 - C).abs() < 5 * error).all()
