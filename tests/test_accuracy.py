"""Errors measured against 50 digits, beside those of the careful dense float64 computation.

The bound is a small multiple of the dense computation's largest error over all quantities (one
alone may be right by luck), or some units in the last place: a structured route must not lose
digits that the problem itself does not lose.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from battery import FUNCTIONS, NOISES, double, from_leaves, gradients, leaves
from highprec import HighPrecision, evaluate
from problems import KINDS, Problem, make_problem
from torch import Tensor
from torch.autograd import grad

import torch_kronlik as tk
from torch_kronlik import reference
from torch_kronlik.factor.plan import METHODS

EPS = torch.finfo(torch.float64).eps
FACTOR = 10  # times the dense error: the constants of two eigendecompositions against one Cholesky
UNITS = 50  # in the last place, allowed where the dense computation is as good as exact

each_route = pytest.mark.parametrize("method", METHODS)
each_noise = pytest.mark.parametrize("noise", NOISES)


def results(p: Problem, functions: Any, **method: str) -> dict[str, Tensor]:
    """Values and first gradients, by name."""
    values = {key: x.detach().requires_grad_() for key, x in leaves(p).items()}
    q = from_leaves(values)
    inv_quad, logdet = functions.kron_inv_quad_logdet(q.M, q.K, q.Y, **q.noise, **method)
    found = {
        "inv_quad": inv_quad,
        "logdet": logdet,
        "solve": functions.kron_solve(q.M, q.K, q.Y, **q.noise, **method),
        "diagonal": functions.inverse_diagonal(q.M, q.K, **q.noise, **method),
        "block_sum": functions.inverse_block_diag_sum(q.M, q.K, **q.noise, **method),
    }
    for name in ("inv_quad", "logdet"):
        inputs = list(values.values())
        grads = grad(found[name], inputs, retain_graph=True, materialize_grads=True)
        found |= {f"grad_{name}_{key}": g for key, g in zip(values, grads, strict=True)}
    return {name: x.detach() for name, x in found.items()}


def exact_results(exact: HighPrecision) -> dict[str, Tensor]:
    return {
        "inv_quad": exact.inv_quad,
        "logdet": exact.logdet,
        "solve": exact.solve,
        "diagonal": exact.inverse_diagonal,
        "block_sum": exact.inverse_block_diag_sum,
        **{f"grad_inv_quad_{key}": g for key, g in exact.grad_inv_quad.items()},
        **{f"grad_logdet_{key}": g for key, g in exact.grad_logdet.items()},
    }


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative to the largest entry; NaN where there is one."""
    scale = float(expected.abs().max()) or 1.0
    return float((actual.double() - expected).abs().max()) / scale


def check(p: Problem, method: str) -> None:
    expected = exact_results(evaluate(p))
    dense, actual = results(p, reference), results(p, tk, method=method)
    lost = max(error(dense[name], value) for name, value in expected.items())
    for name, value in expected.items():
        # a log-determinant near zero is a sum of terms that cancel
        cancelled = max(1.0, p.Y.numel() / abs(float(value))) if name == "logdet" else 1.0
        allowed = max(FACTOR * lost, UNITS * EPS * cancelled)
        found = error(actual[name], value)
        assert found <= allowed, f"{name}: error {found:.1e}, allowed {allowed:.1e}"


@each_route
@each_noise
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str, noise: str, method: str) -> None:
    check(make_problem(6, 3, kind=kind, noise=noise), method)


def scaled_noise(p: Problem, scale: float) -> Problem:
    noise = {
        key: x + math.log(scale) if key == "log_noise" else scale * x for key, x in p.noise.items()
    }
    return p._replace(noise=noise)


SINGULAR = ["rank_one_M", "rank_one_K", "rank_deficient", "zero_M", "zero_K", "replicates", "rbf"]


@each_route
@each_noise
@pytest.mark.parametrize("kind", ["generic", "identity", "repeated_blocks", *SINGULAR])
def test_noise_from_tiny_to_huge(kind: str, noise: str, method: str) -> None:
    for scale in (1e-10, 1e-5, 1e5, 1e10):
        check(scaled_noise(make_problem(6, 3, kind=kind, noise=noise), scale), method)


@each_route
@each_noise
@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1e30, 1e150])
def test_units_do_not_matter(scale: float, noise: str, method: str) -> None:
    """Data in other units: K and Sigma scaled together, from underflow to overflow of squares."""
    p = scaled_noise(make_problem(5, 3, noise=noise), scale)
    check(p._replace(K=scale * p.K, Y=math.sqrt(scale) * p.Y), method)


@each_route
@each_noise
def test_float32_is_as_good_as_its_data(noise: str, method: str) -> None:
    """Long sums in float32: the error does not grow with the number of terms."""
    p = make_problem(400, 6, noise=noise, dtype=torch.float32)
    expected, actual = results(double(p), tk, method=method), results(p, tk, method=method)
    for name, value in expected.items():
        assert error(actual[name], value) < 3e-5, name
    for name in ("inv_quad", "logdet"):
        assert error(actual[name], expected[name]) < 5e-6, name


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1)])
@each_route
@each_noise
def test_spread_noise_in_any_order_of_outputs(
    noise: str, order: tuple[int, ...], method: str
) -> None:
    """Noise variances from 1e-10 to 1e10: what is graded keeps its small parts, in any order."""
    p = make_problem(6, 3, kind="spread_noise", noise=noise)
    o = list(order)
    Sigma = {key: x[o][:, o] if key == "Sigma" else x[o] for key, x in p.noise.items()}
    check(Problem(p.Y[:, o].clone(), p.M, p.K[o][:, o].clone(), Sigma), method)


@pytest.mark.parametrize("shift", [90.0, -90.0])
def test_float32_gradient_at_extreme_log_noise(shift: float) -> None:
    """exp(s) overflows or vanishes where exp(-s/2) does not: ∂ log det/∂s is T all the same."""
    p = make_problem(4, 3, noise="diagonal", kind="zero_K", dtype=torch.float32)
    q = p._replace(Y=0 * p.Y, noise={"log_noise": torch.full((3,), shift)})
    got = gradients(lambda r: FUNCTIONS["kron_logdet"].structured(r), q)["log_noise"]
    expected = gradients(FUNCTIONS["kron_logdet"].dense, double(q))["log_noise"]
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
