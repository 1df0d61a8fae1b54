"""exp(Diag(d) A) v: value and gradients against 50 digits, scipy and closed forms."""

from __future__ import annotations

from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import scipy.linalg  # type: ignore[import-untyped]
import torch
from devices import to_numpy
from expm_problems import MATRICES, METHODS, ROUTES, apply, assert_near, n, normal
from torch import Tensor

from torch_kronlik.expm import expm_diag_multiply
from torch_kronlik.expm.degrees import THETA, THETA_PADE

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")

# Error relative to the largest entry. Data that are rounded to eps move exp(X) by about ‖X‖ eps,
# and both routes stay within a small multiple of that up to ‖X‖ = 100 for float64; the gradient is
# the product of two such vectors. float32 the same with its own eps.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-4}


class Exact:
    """w, the gradients of ⟨g, w⟩ and the Jacobian at 50 digits, rounded once."""

    def __init__(self, d: Tensor, A: Tensor, v: Tensor, g: Tensor) -> None:
        with mpmath.workdps(50):
            dm, Am, vm, gm = (_exact(x) for x in (d, A, v, g))
            size = len(dm)
            X = dm[:, None] * Am
            E = np.outer(gm, vm)
            block = np.block([[X.T, E], [np.zeros_like(X), X.T]])
            power = mpmath.expm(mpmath.matrix(block.tolist()))
            both = np.array(power.tolist(), dtype=object).reshape(2 * size, 2 * size)
            F, G = both[:size, :size].T, both[:size, size:]
            self.w = _float64(F @ vm)
            self.grad_d = _float64((G * Am).sum(1))
            self.grad_A = _float64(dm[:, None] * G)
            self.grad_v = _float64(F.T @ gm)
            self.F = _float64(F)


def _exact(x: Tensor) -> Any:
    return np.vectorize(mpmath.mpf, otypes=[object])(to_numpy(x.double()))


def _float64(x: Any) -> Tensor:
    return torch.tensor(x.astype(np.float64))


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", MATRICES)
def test_value_and_gradients_match_50_digits(name: str, route: str, dtype: torch.dtype) -> None:
    A = MATRICES[name]().to(dtype)
    d = (0.2 + 0.8 * torch.rand(n)).to(dtype)
    v, g = (normal(n).to(dtype) for _ in range(2))
    exact = Exact(d, A, v, g)
    leaves = [x.clone().requires_grad_() for x in (d, A, v)]
    w = apply(route, *leaves)
    gd, gA, gv = torch.autograd.grad(w @ g, leaves)
    tolerance = TOLERANCE[dtype]
    # An entry of w may be a cancelling sum of terms of the size of exp(X) and v.
    floor = float(exact.F.abs().max())
    assert_near(w, exact.w, tolerance, floor)
    assert_near(gv, exact.grad_v, tolerance, floor)
    assert_near(gd, exact.grad_d, tolerance)
    assert_near(gA, exact.grad_A if route != "sparse" else exact.grad_A * (A != 0), tolerance)


@pytest.mark.parametrize("norm", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("size", [1, 2, 25, 60])
def test_matches_scipy_over_random_problems(size: int, norm: float) -> None:
    for _ in range(3):
        d, v, g = torch.randn(size).double(), normal(size), normal(size)
        A = normal(size, size)
        A *= norm / (d[:, None] * A).abs().sum(0).max()
        X = to_numpy(d[:, None] * A)
        F, G = scipy.linalg.expm_frechet(X.T, np.outer(to_numpy(g), to_numpy(v)))
        expected = torch.tensor((G * to_numpy(A)).sum(1))
        for route in ROUTES:
            leaf = d.clone().requires_grad_()
            w = apply(route, leaf, A, v)
            (gd,) = torch.autograd.grad(w @ g, leaf)
            assert_near(w, torch.tensor(F.T) @ v, 1e-11, floor=float(abs(F).max()))
            assert_near(gd, expected, 1e-11)


def test_nilpotent_matrix_is_its_finite_series() -> None:
    d = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    A = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    v = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    expected = torch.tensor([1 + 2 * 10 + 0.5 * 6 * 100, 10 + 3 * 100, 100]).double()
    for method in METHODS:
        assert_near(expm_diag_multiply(d, A, v, method=method), expected, 1e-15)


@pytest.mark.parametrize("route", ROUTES)
def test_semigroup(route: str) -> None:
    d, A, v = torch.rand(n).double(), normal(n, n), normal(n)
    twice = apply(route, d, A, apply(route, d, A, v))
    assert_near(apply(route, 2 * d, A, v), twice, 1e-12)


def test_negative_spectrum_keeps_small_components() -> None:
    # Long Taylor steps would lose all digits here to cancellation.
    d = torch.arange(1.0, 41.0, 3.0, dtype=torch.float64)
    A = -torch.eye(len(d), dtype=torch.float64)
    for route in ROUTES:
        for k in range(len(d)):
            v = torch.eye(len(d), dtype=torch.float64)[k]
            assert_near(apply(route, d, A, v), torch.exp(-d) * v, 1e-11)


# ---------------------------------------------------------------- truncation


def _log_ratio_series(numerator: list[Any], denominator: list[Any], terms: int) -> list[Any]:
    """The series of log(p/q) − x, by p'/p and q'/q."""

    def log_derivative(p: list[Any]) -> list[Any]:
        p = p + [mpmath.mpf(0)] * (terms + 2 - len(p))
        out: list[Any] = []
        for k in range(terms):
            rest = mpmath.fsum(p[i] * out[k - i] for i in range(1, k + 1))
            out.append(((k + 1) * p[k + 1] - rest) / p[0])
        return out

    pairs = zip(log_derivative(numerator), log_derivative(denominator), strict=True)
    series = [mpmath.mpf(0)] + [(a - b) / (k + 1) for k, (a, b) in enumerate(pairs)]
    series[1] -= 1
    return series


def _backward_error(series: list[Any], first: int, theta: float) -> Any:
    """The largest of h̃/θ, h̃', θ h̃''/2 at θ."""
    t, terms = mpmath.mpf(theta), list(enumerate(series))[first:]
    return max(
        mpmath.fsum(mpmath.binomial(i, k) * abs(h) * t ** (i - 1) for i, h in terms)
        for k in range(3)
    )


def test_degrees_keep_the_truncation_below_the_rounding(dtype: torch.dtype) -> None:
    unit = torch.finfo(dtype).eps / 2
    with mpmath.workdps(60):
        for m, theta in THETA[dtype].items():
            taylor = [1 / mpmath.factorial(k) for k in range(m + 1)]
            series = _log_ratio_series(taylor, [mpmath.mpf(1)], m + 60)
            # Tight too: a larger θ of three digits would break the bound.
            assert _backward_error(series, m + 1, theta) <= 1.01 * unit
            assert _backward_error(series, m + 1, 1.01 * theta) > unit


def test_pade_degree_keeps_the_truncation_below_the_rounding() -> None:
    with mpmath.workdps(60):
        f = mpmath.factorial
        p = [f(26 - j) * f(13) / (f(26) * f(13 - j) * f(j)) for j in range(14)]
        series = _log_ratio_series(p, [x * (-1) ** j for j, x in enumerate(p)], 90)
        assert _backward_error(series, 27, THETA_PADE) <= 2**-53
