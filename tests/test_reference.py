"""The dense twin against closed forms, scipy, 50-digit arithmetic and other dense routes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from devices import to_numpy
from highprec import evaluate
from problems import KINDS, Problem, condition_number, dense_noise, kinds_for, make_problem
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor
from torch.autograd import grad

from torch_kronlik import reference

Check = Callable[..., None]
NOISES = ("full", "diagonal")


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def condition_on_everything(p: Problem) -> tuple[Tensor, ...]:
    """The noise-free function at the first row, given all rows."""
    M = (p.M + p.M.mT) / 2
    posterior = reference.condition(p.Y, M, p.K, M[..., :1, :], M[..., :1, :1], **p.noise)
    assert posterior.covariance_matrix is not None
    return (*posterior[:4], posterior.covariance_matrix)


# Every function of a problem alone, to be called as f(problem).
FUNCTIONS: dict[str, Callable[[Problem], Any]] = {
    "covariance_matrix": lambda p: reference.covariance_matrix(p.M, p.K, **p.noise),
    "kron_matmul": lambda p: reference.kron_matmul(p.M, p.K, p.Y, **p.noise),
    "kron_solve": lambda p: reference.kron_solve(p.M, p.K, p.Y, **p.noise),
    "kron_logdet": lambda p: reference.kron_logdet(p.M, p.K, **p.noise),
    "kron_inv_quad_logdet": lambda p: reference.kron_inv_quad_logdet(p.M, p.K, p.Y, **p.noise),
    "inverse_block_diag_sum": lambda p: reference.inverse_block_diag_sum(p.M, p.K, **p.noise),
    "inverse_diagonal": lambda p: reference.inverse_diagonal(p.M, p.K, **p.noise),
    "kron_gaussian_nll": lambda p: reference.kron_gaussian_nll(p.Y, p.M, p.K, **p.noise),
    "condition": condition_on_everything,
    "leave_one_out": lambda p: reference.leave_one_out(p.Y, p.M, p.K, **p.noise),
    "leave_one_row_out": lambda p: reference.leave_one_row_out(p.Y, p.M, p.K, **p.noise),
}
WITHOUT_Y = {"covariance_matrix", "kron_logdet", "inverse_block_diag_sum", "inverse_diagonal"}
each_function = pytest.mark.parametrize("name", FUNCTIONS)
each_noise = pytest.mark.parametrize("noise", NOISES)


# ---------------------------------------------------------------- the model


def test_covariance_matrix_entries() -> None:
    p = make_problem(3, 2)
    U = reference.covariance_matrix(p.M, p.K, **p.noise)
    for t, d, u, e in np.ndindex(3, 2, 3, 2):
        expected = p.M[t, u] * p.K[d, e] + (t == u) * p.noise["Sigma"][d, e]
        assert U[2 * t + d, 2 * u + e] == expected


def test_kron_equals_torch_kron() -> None:
    A, B = torch.randn(2, 3).double(), torch.randn(4, 5).double()
    assert torch.equal(reference.kron(A.mT, B), torch.kron(A.mT.contiguous(), B))


@each_noise
def test_kron_matmul_is_two_products(noise: str, assert_close: Check) -> None:
    p = make_problem(5, 3, noise=noise)
    actual = reference.kron_matmul(p.M, p.K, p.Y, **p.noise)
    assert_close(actual, p.M @ p.Y @ p.K + p.Y @ dense_noise(p))


@pytest.mark.parametrize("shape", [(2, 3), (1, 4), (3, 1)])
def test_block_diag_sum_is_adjoint_of_repetition(shape: tuple[int, int]) -> None:
    m, n = shape
    A, S = torch.randn(2, 4 * m, 4 * n).double(), torch.randn(m, n).double()
    left = (reference.block_diag_sum(A, 4) * S).sum((-2, -1))
    right = (A * torch.kron(torch.eye(4).double(), S)).sum((-2, -1))
    torch.testing.assert_close(left, right)


def test_block_diag_is_a_view() -> None:
    A = torch.arange(24).reshape(4, 6)
    block = reference.block_diag(A, 1, 2)
    assert torch.equal(block, torch.tensor([[15, 16, 17], [21, 22, 23]]))
    assert block.untyped_storage().data_ptr() == A.untyped_storage().data_ptr()


# ---------------------------------------------------------------- independent values


@each_noise
@pytest.mark.parametrize("kind", kinds_for(torch.float32))  # scipy refuses the others as singular
def test_nll_equals_scipy(kind: str, noise: str, assert_close: Check) -> None:
    p = make_problem(5, 3, kind=kind, noise=noise)
    M, K, Sigma, y = (to_numpy(x) for x in (p.M, p.K, dense_noise(p), p.Y.reshape(-1)))
    U = np.kron(M, K) + np.kron(np.eye(5), Sigma)
    expected = -stats.multivariate_normal(cov=U).logpdf(y)
    actual = reference.kron_gaussian_nll(p.Y, p.M, p.K, **p.noise)
    assert_close(actual, torch.tensor(expected), condition=condition_number(p), dims=0)


@each_noise
@pytest.mark.parametrize("kind", KINDS)
def test_values_equal_high_precision(kind: str, noise: str, assert_close: Check) -> None:
    p = make_problem(5, 3, kind=kind, noise=noise)
    exact, kappa = evaluate(p), condition_number(p)
    inv_quad, logdet = FUNCTIONS["kron_inv_quad_logdet"](p)
    assert_close(logdet, exact.logdet, condition=kappa, floor=15.0)
    assert_close(inv_quad, exact.inv_quad, condition=kappa)
    assert_close(FUNCTIONS["kron_logdet"](p), exact.logdet, condition=kappa, floor=15.0)
    assert_close(FUNCTIONS["kron_gaussian_nll"](p), exact.nll, condition=kappa, floor=15.0)
    assert_close(FUNCTIONS["kron_solve"](p), exact.solve, condition=kappa)
    assert_close(FUNCTIONS["inverse_diagonal"](p), exact.inverse_diagonal, condition=kappa)
    B = FUNCTIONS["inverse_block_diag_sum"](p)
    assert_close(B, exact.inverse_block_diag_sum, condition=kappa)


@each_noise
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_analytic_formulas(kind: str, noise: str, assert_close: Check) -> None:
    p = make_problem(4, 3, kind=kind, noise=noise)
    exact, kappa = evaluate(p), condition_number(p)
    leaves = {"Y": p.Y, "M": p.M, "K": p.K, **p.noise}
    for leaf in leaves.values():
        leaf.requires_grad_()
    inv_quad, logdet = FUNCTIONS["kron_inv_quad_logdet"](p)
    for value, expected in ((inv_quad, exact.grad_inv_quad), (logdet, exact.grad_logdet)):
        grads = grad(value, list(leaves.values()), retain_graph=True, materialize_grads=True)
        for name, actual in zip(leaves, grads, strict=True):
            # Entries of a gradient cancel: its terms are as large as those of the whole.
            floor = float(expected[name].abs().max()) if kind != "zero_K" else 1.0
            assert_close(actual, expected[name], condition=kappa, quantity="gradient", floor=floor)


def test_high_precision_equals_mpmath_linear_algebra() -> None:
    p = make_problem(3, 2, kind="tiny_noise")
    exact = evaluate(p)
    with mpmath.workdps(50):
        U = mpmath.zeros(6)
        for i, j in np.ndindex(6, 6):
            (t, d), (u, e) = divmod(i, 2), divmod(j, 2)
            U[i, j] = mpmath.mpf(p.M[t, u].item()) * mpmath.mpf(p.K[d, e].item())
            U[i, j] += (t == u) * mpmath.mpf(p.noise["Sigma"][d, e].item())
        y = mpmath.matrix(p.Y.flatten().tolist())
        a = mpmath.lu_solve(U, y)
        assert exact.logdet.item() == float(mpmath.log(mpmath.det(U)))
        assert exact.inv_quad.item() == float((y.T * a)[0])
        assert exact.solve.flatten().tolist() == [float(x) for x in a]


def test_high_precision_refuses_indefinite() -> None:
    p = make_problem(2, 2)
    with pytest.raises(ValueError, match="not positive definite"):
        evaluate(p._replace(M=-100 * p.M))


# ---------------------------------------------------------------- closed forms


@each_noise
def test_one_row_is_a_sum_of_matrices(noise: str, assert_close: Check) -> None:
    p = make_problem(1, 4, noise=noise)
    U = p.M[0, 0] * p.K + dense_noise(p)
    assert_close(FUNCTIONS["kron_logdet"](p), torch.logdet(U), floor=4.0)
    assert_close(FUNCTIONS["kron_solve"](p), torch.linalg.solve(U, p.Y[0])[None], condition=100)
    assert_close(FUNCTIONS["inverse_block_diag_sum"](p), torch.linalg.inv(U), condition=100)


@each_noise
def test_one_output_has_scalar_noise(noise: str, assert_close: Check) -> None:
    p = make_problem(5, 1, noise=noise)
    s, P = torch.linalg.eigh(p.M)
    u = s * p.K[0, 0] + dense_noise(p)[0, 0]
    assert_close(FUNCTIONS["kron_logdet"](p), u.log().sum(), floor=5.0)
    expected = P @ torch.diag(1 / u) @ P.mT
    assert_close(FUNCTIONS["kron_solve"](p), expected @ p.Y, condition=100)
    assert_close(FUNCTIONS["inverse_diagonal"](p)[:, 0], expected.diagonal(), condition=100)


@each_noise
@pytest.mark.parametrize("kind", ["zero_M", "zero_K"])
def test_zero_factor_leaves_independent_rows(kind: str, noise: str, assert_close: Check) -> None:
    p = make_problem(5, 3, kind=kind, noise=noise)
    Sigma = dense_noise(p)
    normal = stats.multivariate_normal(cov=to_numpy(Sigma))
    expected = torch.tensor(-normal.logpdf(to_numpy(p.Y)).sum())
    assert_close(FUNCTIONS["kron_gaussian_nll"](p), expected)
    assert_close(FUNCTIONS["kron_logdet"](p), 5 * torch.logdet(Sigma), floor=15.0)
    assert_close(FUNCTIONS["inverse_block_diag_sum"](p), 5 * torch.linalg.inv(Sigma))
    mean, covariance = FUNCTIONS["leave_one_row_out"](p)
    assert_close(mean, torch.zeros_like(mean))
    assert_close(covariance, Sigma.expand(5, 3, 3))


def test_diagonal_everything_is_elementwise(assert_close: Check) -> None:
    p = make_problem(4, 3, noise="diagonal")
    m, k, v = p.M.diagonal(), p.K.diagonal(), p.noise["log_noise"].exp()
    p = p._replace(M=torch.diag(m), K=torch.diag(k))
    u = m[:, None] * k + v
    assert_close(FUNCTIONS["kron_solve"](p), p.Y / u)
    assert_close(FUNCTIONS["inverse_diagonal"](p), 1 / u)
    nll = (p.Y**2 / u + u.log() + math.log(2 * math.pi)).sum() / 2
    assert_close(FUNCTIONS["kron_gaussian_nll"](p), nll)
    mean, variance = FUNCTIONS["leave_one_out"](p)
    assert_close(mean, torch.zeros(4, 3).double())
    assert_close(variance, u)


@each_noise
@each_function
def test_empty_grid(name: str, noise: str) -> None:
    results = as_tuple(FUNCTIONS[name](make_problem(0, 3, noise=noise)))
    shapes: dict[str, list[tuple[int, ...]]] = {
        "covariance_matrix": [(0, 0)],
        "kron_logdet": [()],
        "kron_gaussian_nll": [()],
        "kron_inv_quad_logdet": [(), ()],
        "inverse_block_diag_sum": [(3, 3)],
        "condition": [(0, 3), (0, 3), (0, 3), (0, 3, 3), (0, 0)],
        "leave_one_out": [(0, 3), (0, 3)],
        "leave_one_row_out": [(0, 3), (0, 3, 3)],
    }
    assert [r.shape for r in results] == shapes.get(name, [(0, 3)])
    assert all((r == 0).all() for r in results)
