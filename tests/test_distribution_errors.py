"""What the distribution refuses, with validation and without."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from distributions import SHAPE, D, T, kronecker
from problems import Problem, make_problem
from torch.distributions import Distribution, kl_divergence

from torch_kronlik.distribution import KroneckerNormal

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]
pytestmark = pytest.mark.usefixtures("validation_on")


def broken(name: str, entry: float) -> Problem:
    noise = "diagonal" if name == "log_noise" else "full"
    p = make_problem(*SHAPE, noise=noise)
    leaf = {"loc": p.Y, "M": p.M, "K": p.K, **p.noise}[name]
    leaf.view(-1)[0] = entry
    return p


@pytest.mark.parametrize("entry", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["loc", "M", "K", "Sigma", "log_noise"])
def test_validation_finds_values_that_are_not_finite(name: str, entry: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        kronecker(broken(name, entry))


@pytest.mark.parametrize("name", ["loc", "M", "K", "Sigma", "log_noise"])
def test_without_validation_the_density_finds_them(name: str) -> None:
    d = kronecker(broken(name, math.nan), validate_args=False)
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        d.log_prob(torch.zeros(SHAPE).double())


def test_without_validation_kl_names_the_mean() -> None:
    d, e = kronecker(broken("loc", math.nan), validate_args=False), kronecker(make_problem(*SHAPE))
    with pytest.raises(ValueError, match=r"p\.loc must be finite"):
        kl_divergence(d, e)
    with pytest.raises(ValueError, match=r"q\.loc must be finite"):
        kl_divergence(e, d)


@pytest.mark.parametrize("name", ["Sigma", "M"])
def test_not_positive_definite(name: str) -> None:
    p = broken(name, -1e6)
    what = "Sigma" if name == "Sigma" else "U = M ⊗ K"
    with pytest.raises(LinAlgError, match=f"{what}.* is not positive definite"):
        kronecker(p)
    d = kronecker(p, validate_args=False)
    with pytest.raises(LinAlgError, match=f"{what}.* is not positive definite"):
        d.log_prob(p.Y)


def test_default_validation_is_that_of_torch() -> None:
    p = broken("M", -1e6)
    Distribution.set_default_validate_args(False)
    kronecker(p)
    with pytest.raises(LinAlgError):
        kronecker(p, validate_args=True)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loc": torch.zeros(3, 4)}, ValueError, r"loc must have shape .* T = 4 .* got \(3, 4\)"),
        ({"loc": torch.zeros(D)}, ValueError, r"loc must have shape .* got \(3,\)"),
        ({"loc": torch.zeros(2, T, D)}, ValueError, r"must broadcast, got loc \(2,\), covariance"),
        ({"loc": torch.zeros(SHAPE).double()}, TypeError, "loc must have the dtype of K"),
        ({"loc": 0.0}, TypeError, "loc must be a tensor, got float"),
        ({"M": torch.zeros(4, 3)}, ValueError, r"M must have shape .* got \(4, 3\)"),
        ({"K": torch.zeros(3)}, ValueError, r"K must have shape .* got \(3,\)"),
        ({"Sigma": torch.eye(2)}, ValueError, r"Sigma must have shape .* D = 3, got \(2, 2\)"),
        ({"Sigma": None}, ValueError, "exactly one of Sigma and log_noise .* neither"),
        ({"log_noise": torch.zeros(D)}, ValueError, "exactly one of Sigma and log_noise .* both"),
    ],
)
def test_constructor_errors(
    change: dict[str, Any], error: type[Exception], message: str, validate: bool
) -> None:
    loc, M, K, noise = make_problem(*SHAPE, dtype=torch.float32)
    M = M.expand(3, T, T)
    arguments = {"loc": loc, "M": M, "K": K, **noise, **change}
    with pytest.raises(error, match=message):
        KroneckerNormal(**arguments, validate_args=validate)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.zeros(D), ValueError, r"value must have shape .* got \(3,\)"),
        (torch.zeros(1, 1), ValueError, r"value must have shape .* got \(1, 1\)"),
        (torch.zeros(3, T, D), ValueError, r"must broadcast, got value \(3,\), batch_shape \(2,\)"),
        (torch.zeros(T, D).double(), TypeError, "value must have the dtype of loc"),
        (torch.zeros(T, D).long(), TypeError, "value must be float32 or float64"),
        ([[0.0] * D] * T, TypeError, "value must be a tensor, got list"),
        (
            torch.full(SHAPE, math.nan),
            ValueError,
            r"value must be finite, but value\[0, 0\] is nan",
        ),
        (
            torch.full(SHAPE, math.inf),
            ValueError,
            r"value must be finite, but value\[0, 0\] is inf",
        ),
    ],
)
def test_density_errors(value: Any, error: type[Exception], message: str, validate: bool) -> None:
    d = kronecker(make_problem(*SHAPE, batch=(2,), dtype=torch.float32), validate_args=validate)
    with pytest.raises(error, match=message):
        d.log_prob(value)
