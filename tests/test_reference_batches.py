"""The dense twin: batches, memory layouts, dtypes, noise arguments, and derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from problems import (
    BATCHES,
    LAYOUTS,
    Problem,
    dense_noise,
    from_roots,
    make_new_rows,
    make_problem,
    make_roots,
    relayout,
)
from test_reference import FUNCTIONS, WITHOUT_Y, Check, as_tuple, each_function, each_noise
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import jacfwd, jacrev

from torch_kronlik import reference

Transform = Callable[..., Callable[..., Tensor]]


# ---------------------------------------------------------------- batches, layouts, dtypes


def element(p: Problem, batch: torch.Size, index: tuple[int, ...]) -> Problem:
    def pick(x: Tensor, dims: int) -> Tensor:
        return x.expand(*batch, *x.shape[x.dim() - dims :])[index]

    noise = {name: pick(x, 2 if name == "Sigma" else 1) for name, x in p.noise.items()}
    return Problem(pick(p.Y, 2), pick(p.M, 2), pick(p.K, 2), noise)


@each_noise
@pytest.mark.parametrize("shapes", BATCHES)
@each_function
def test_batch_equals_loop(name: str, shapes: str, noise: str, assert_close: Check) -> None:
    p = make_problem(3, 2, batch=BATCHES[shapes], noise=noise)
    if name in WITHOUT_Y:
        p = p._replace(Y=torch.zeros(3, 2))
    tensors = (p.Y[..., 0, 0], p.M[..., 0, 0], p.K[..., 0, 0], dense_noise(p)[..., 0, 0])
    batch = torch.broadcast_tensors(*tensors)[0].shape
    for k, actual in enumerate(as_tuple(FUNCTIONS[name](p))):
        assert actual.shape[: len(batch)] == batch
        for index in np.ndindex(*batch):
            assert_close(actual[index], as_tuple(FUNCTIONS[name](element(p, batch, index)))[k])


def test_condition_broadcasts(assert_close: Check) -> None:
    p, M_cross, M_test, _ = make_new_rows(3, 2, 2)
    K = torch.stack([p.K, 2 * p.K])
    Y = torch.stack([p.Y, 3 * p.Y, -p.Y])[:, None]
    posterior = reference.condition(Y, p.M, K, M_cross, M_test, **p.noise)
    for i, j in np.ndindex(3, 2):
        single = reference.condition(Y[i, 0], p.M, K[j], M_cross, M_test, **p.noise)
        for actual, expected in zip(posterior, single, strict=True):
            assert actual is not None
            assert_close(actual[i, j], expected)


@pytest.mark.parametrize("how", [h for h in LAYOUTS if h != "expanded"])
@each_function
def test_layout_does_not_matter(name: str, how: str, assert_close: Check) -> None:
    p = make_problem(4, 3, batch=(2,), noise="diagonal")
    noise = {key: relayout(x, how) for key, x in p.noise.items()}
    q = Problem(relayout(p.Y, how), relayout(p.M, how), relayout(p.K, how), noise)
    results = zip(as_tuple(FUNCTIONS[name](q)), as_tuple(FUNCTIONS[name](p)), strict=True)
    for actual, expected in results:
        assert_close(actual, expected)


@each_function
def test_results_are_float64(name: str, dtype: torch.dtype) -> None:
    p = make_problem(3, 2, dtype=dtype)
    wide = Problem(p.Y.double(), p.M.double(), p.K.double(), {"Sigma": p.noise["Sigma"].double()})
    results = zip(as_tuple(FUNCTIONS[name](p)), as_tuple(FUNCTIONS[name](wide)), strict=True)
    for actual, expected in results:
        assert actual.dtype == torch.float64
        assert torch.equal(actual, expected)


class Pair(NamedTuple):
    eigenvalues: Tensor
    eigenvectors: Tensor


def test_factor_as_eigenpair(assert_close: Check) -> None:
    p = make_problem(4, 3, batch=(2,))
    pair = Pair(*torch.linalg.eigh(p.M))
    actual = reference.kron_gaussian_nll(p.Y, pair, p.K, **p.noise)
    assert_close(actual, FUNCTIONS["kron_gaussian_nll"](p), dims=0)


@pytest.mark.parametrize("names", [(), ("Sigma", "log_noise")])
def test_exactly_one_noise(names: tuple[str, ...]) -> None:
    p = make_problem(2, 2)
    noise = {"Sigma": torch.eye(2), "log_noise": torch.zeros(2)}
    with pytest.raises(ValueError, match="exactly one of Sigma= and log_noise="):
        reference.kron_logdet(p.M, p.K, **{name: noise[name] for name in names})


def test_indefinite_covariance_raises() -> None:
    p = make_problem(2, 2)
    with pytest.raises(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        reference.kron_logdet(-100 * p.M, p.K, **p.noise)


# ---------------------------------------------------------------- derivatives


@each_noise
@each_function
def test_derivatives(name: str, noise: str) -> None:
    def f(*roots: Tensor) -> tuple[Tensor, ...]:
        return as_tuple(FUNCTIONS[name](from_roots(*roots, noise=noise)))

    roots = make_roots(2, 2, noise=noise)
    assert gradcheck(f, roots, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, roots, check_fwd_over_rev=True)


@pytest.mark.parametrize("outer", [jacrev, jacfwd])
@pytest.mark.parametrize("inner", [jacrev, jacfwd])
@each_function
def test_second_derivatives_agree_in_all_modes(
    name: str, inner: Transform, outer: Transform
) -> None:
    roots = tuple(root.detach() for root in make_roots(2, 2, seed=1))
    weights = [torch.randn_like(x) for x in as_tuple(FUNCTIONS[name](from_roots(*roots)))]

    def f(R_K: Tensor) -> Tensor:
        results = as_tuple(FUNCTIONS[name](from_roots(roots[0], roots[1], R_K, roots[3])))
        return torch.stack([(w * x).sum() for w, x in zip(weights, results, strict=True)]).sum()

    step = 1e-5 * torch.eye(4, dtype=torch.float64).reshape(4, 2, 2)
    slopes = [(jacrev(f)(roots[2] + h) - jacrev(f)(roots[2] - h)) / 2e-5 for h in step]
    expected = torch.stack(slopes).reshape(2, 2, 2, 2)
    # Central differences: error step² · third derivative, and eps/step.
    torch.testing.assert_close(outer(inner(f))(roots[2]), expected, rtol=1e-6, atol=1e-7)


@each_function
def test_gradients_are_symmetric(name: str) -> None:
    if name == "kron_matmul":
        return  # the one function that is defined for any square matrix
    p = make_problem(3, 2)
    leaves = [p.M.requires_grad_(), p.K.requires_grad_(), p.noise["Sigma"].requires_grad_()]
    loss = sum((torch.randn_like(x) * x).sum() for x in as_tuple(FUNCTIONS[name](p)))
    for G in grad(loss, leaves):  # type: ignore[arg-type]
        torch.testing.assert_close(G, G.mT)
        assert G.abs().max() > 0
