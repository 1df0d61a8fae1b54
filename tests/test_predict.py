"""The posterior at new rows against the dense twin: moments, densities and their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from battery import NOISES, ROUTES, cotangents
from devices import to_numpy
from problems import BATCHES, LAYOUTS, NewRows, condition_number, kinds_for, make_new_rows, relayout
from scipy.stats import multivariate_normal
from torch import Tensor
from torch.autograd import grad

from torch_kronlik import condition, reference

Check = Callable[..., None]
Leaves = dict[str, Tensor]
MOMENTS = ("mean", "variance", "observation_variance", "row_covariance", "covariance_matrix")
each_noise = pytest.mark.parametrize("noise", NOISES)
each_route = pytest.mark.parametrize("method", ROUTES)


# ---------------------------------------------------------------- both sides


def leaves(n: NewRows) -> Leaves:
    p = n.problem
    return {"Y": p.Y, "M": p.M, "K": p.K, "M_cross": n.M_cross, "M_test": n.M_test, **p.noise}


def make_leaves(T: int, S: int, D: int, **options: Any) -> Leaves:
    return leaves(make_new_rows(T, S, D, **options))


def moments(post: Any) -> tuple[Tensor, ...]:
    return tuple(getattr(post, name) for name in MOMENTS)


def dense_log_prob(values: Leaves, Y_test: Tensor) -> Tensor:
    post = reference.condition(**values)
    noise = {key: x for key, x in values.items() if key in ("Sigma", "log_noise")}
    Sigma = reference._noise_matrix(**noise)
    eye = torch.eye(post.mean.shape[-2], dtype=torch.float64, device=Y_test.device)
    covariance = post.covariance_matrix + reference.kron(eye, Sigma)
    G = torch.linalg.cholesky(covariance)
    residual = (Y_test.double() - post.mean).flatten(-2)[..., None]
    white = torch.linalg.solve_triangular(G, residual, upper=False).square().sum((-2, -1))
    logdet = 2 * G.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -(white + logdet + covariance.shape[-1] * math.log(2 * math.pi)) / 2


def gradients(f: Callable[[Leaves], tuple[Tensor, ...]], values: Leaves) -> Leaves:
    inputs = {key: x.detach().requires_grad_() for key, x in values.items()}
    results = f(inputs)
    weights = [w.to(x.dtype) for w, x in zip(cotangents(results), results, strict=True)]
    found = grad(results, list(inputs.values()), weights, materialize_grads=True)
    return dict(zip(inputs, found, strict=True))


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def check(values: Leaves, kappa: float, method: str, assert_close: Check) -> None:
    """The moments and, in every argument, the gradient of a random combination of each."""
    wide = {key: x.double() for key, x in values.items()}
    actual, expected = condition(**values, method=method), reference.condition(**wide)
    prior = largest(wide["M_test"]) * largest(wide["K"])
    for name in MOMENTS:
        # the error of a variance is relative to the prior variance, whatever the noise
        options = {"condition": kappa} if name == "mean" else {"floor": prior}
        x = getattr(actual, name)
        assert x.dtype == values["K"].dtype
        assert_close(x, getattr(expected, name), **options)
        found = gradients(lambda v, n=name: (getattr(condition(**v, method=method), n),), values)
        wanted = gradients(lambda v, n=name: (getattr(reference.condition(**v), n),), wide)
        for key, g in wanted.items():
            dims = 1 if key == "log_noise" else 2
            assert_close(found[key], g, condition=kappa, quantity="gradient", dims=dims)


def check_log_prob(n: NewRows, method: str, assert_close: Check) -> None:
    values = {**leaves(n), "Y_test": n.Y_test}
    wide = {key: x.double() for key, x in values.items()}

    def structured(v: Leaves) -> tuple[Tensor, ...]:
        rest = {key: x for key, x in v.items() if key != "Y_test"}
        return (condition(**rest, method=method).log_prob(v["Y_test"]),)

    def dense(v: Leaves) -> tuple[Tensor, ...]:
        rest = {key: x for key, x in v.items() if key != "Y_test"}
        return (dense_log_prob(rest, v["Y_test"]),)

    joint = n.problem._replace(M=torch.cat([n.problem.M, n.M_cross.mT], -1))
    joint = joint._replace(M=torch.cat([joint.M, torch.cat([n.M_cross, n.M_test], -1)], -2))
    # Where it is the log density of all rows less that of the data, errors are relative to these.
    kappa = condition_number(joint)
    size = float(joint.M.shape[-1] * n.problem.K.shape[-1])
    assert_close(structured(values)[0], dense(wide)[0], condition=kappa, dims=0, floor=size)
    found, wanted = gradients(structured, values), gradients(dense, wide)
    of_data = gradients(log_prob_of_data, wide)
    of_data["M_cross"] = of_data["M_test"] = of_data["M"]
    for key, g in wanted.items():
        options = {"dims": 1 if key == "log_noise" else 2, "floor": largest(of_data[key])}
        assert_close(found[key], g, condition=kappa, quantity="gradient", **options)


def log_prob_of_data(v: Leaves) -> tuple[Tensor, ...]:
    noise = {key: x for key, x in v.items() if key in ("Sigma", "log_noise")}
    return (-reference.kron_gaussian_nll(v["Y"], v["M"], v["K"], **noise),)


# ---------------------------------------------------------------- values and gradients


@each_route
@each_noise
@pytest.mark.parametrize("kind", kinds_for(torch.float64))
def test_every_kind(
    kind: str, noise: str, method: str, dtype: torch.dtype, assert_close: Check
) -> None:
    if kind in kinds_for(dtype):
        n = make_new_rows(6, 3, 2, kind=kind, noise=noise, dtype=dtype)
        check(leaves(n), condition_number(n.problem), method, assert_close)


@pytest.mark.parametrize("size", [(9, 2), (4, 5)], ids=["dense", "joint"])
@each_noise
@pytest.mark.parametrize("kind", kinds_for(torch.float64))
def test_log_prob_of_every_kind(
    kind: str, noise: str, size: tuple[int, int], dtype: torch.dtype, assert_close: Check
) -> None:
    """Both ways of computing it: S·D ≤ T, and S·D > T."""
    if kind in kinds_for(dtype):
        n = make_new_rows(*size, 3, kind=kind, noise=noise, dtype=dtype)
        check_log_prob(n, "auto", assert_close)


@each_route
@each_noise
@pytest.mark.parametrize("batch", BATCHES)
def test_every_batch_pattern(batch: str, noise: str, method: str, assert_close: Check) -> None:
    n = make_new_rows(4, 2, 3, batch=BATCHES[batch], noise=noise)
    check(leaves(n), condition_number(n.problem), method, assert_close)


@pytest.mark.parametrize("size", [(6, 2), (3, 2)], ids=["dense", "joint"])
@pytest.mark.parametrize("batch", BATCHES)
def test_log_prob_of_every_batch_pattern(
    batch: str, size: tuple[int, int], assert_close: Check
) -> None:
    check_log_prob(make_new_rows(*size, 3, batch=BATCHES[batch]), "auto", assert_close)


@pytest.mark.parametrize(
    "size", [(0, 2, 3), (1, 1, 1), (3, 0, 2), (5, 7, 1), (2, 3, 5), (24, 4, 2)]
)
def test_every_size(size: tuple[int, int, int], dtype: torch.dtype, assert_close: Check) -> None:
    n = make_new_rows(*size, dtype=dtype)
    check(leaves(n), condition_number(n.problem), "auto", assert_close)
    check_log_prob(n, "auto", assert_close)


@pytest.mark.parametrize("how", LAYOUTS)
def test_every_memory_layout(how: str, dtype: torch.dtype, assert_close: Check) -> None:
    n = make_new_rows(5, 3, 2, batch=(2,), noise="diagonal", dtype=dtype)
    values = {key: relayout(x, how) for key, x in leaves(n).items()}
    check(values, condition_number(n.problem), "auto", assert_close)


@pytest.mark.parametrize("name", ["M_cross", "M_test"])
def test_batches_of_new_rows(name: str, assert_close: Check) -> None:
    """Several sets of new rows for one set of data; every result has the joint batch shape."""
    values = make_leaves(4, 2, 3)
    stacked = torch.stack([values[name], values[name] * 0.9, values[name] * 0.5])
    post = condition(**{**values, name: stacked})
    for i, x in enumerate(stacked):
        single = reference.condition(**{**values, name: x})
        for moment in MOMENTS:
            assert_close(getattr(post, moment)[i], getattr(single, moment))
    assert post.rsample((5,)).shape == (5, 3, 2, 3)
    assert post.log_prob(torch.zeros(2, 3).double()).shape == (3,)


def test_log_prob_equals_scipy(assert_close: Check) -> None:
    n = make_new_rows(5, 3, 2)
    values = leaves(n)
    post = condition(**values)
    covariance = post.covariance_matrix + torch.kron(torch.eye(3).double(), values["Sigma"])
    joint = multivariate_normal(to_numpy(post.mean.flatten()), to_numpy(covariance))
    expected = joint.logpdf(to_numpy(n.Y_test.flatten()))
    assert_close(post.log_prob(n.Y_test), torch.tensor(expected), dims=0)
