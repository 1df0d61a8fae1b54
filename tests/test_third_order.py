"""Third derivatives: right where they exist, refused with a clear error where they do not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from battery import FUNCTIONS, NOISES, ROUTES, from_leaves, leaves, symmetrised
from problems import Problem, make_problem
from torch import Tensor
from torch.func import jacfwd, jacrev

import torch_kronlik as tk
from torch_kronlik import reference

Transform = Callable[..., Callable[..., Any]]
MODES: dict[str, Transform] = {"reverse": jacrev, "forward": jacfwd}
NESTINGS = [pytest.param(n, id="-".join(n)) for n in product(MODES, repeat=3)]
each_nesting = pytest.mark.parametrize("nesting", NESTINGS)
each_route = pytest.mark.parametrize("method", ROUTES)
each_noise = pytest.mark.parametrize("noise", NOISES)


def along(f: Callable[[Problem], Any], p: Problem, key: str) -> Callable[[Tensor], Any]:
    """f on a line through ``p`` in one argument: a function of a scalar."""
    direction = leaves(symmetrised(make_problem(3, 2, noise="full", seed=5)))
    direction |= leaves(make_problem(3, 2, noise="diagonal", seed=5))

    def of_step(t: Tensor) -> Any:
        return f(from_leaves({**leaves(p), key: leaves(p)[key] + t * direction[key]}))

    return of_step


def third(f: Callable[..., Any], nesting: tuple[str, ...]) -> Any:
    for mode in nesting:
        f = MODES[mode](f)
    return f(torch.zeros((), dtype=torch.float64))


@each_noise
@each_nesting
@pytest.mark.parametrize("name", [name for name, f in FUNCTIONS.items() if not f.third])
def test_refused(name: str, nesting: tuple[str, ...], noise: str) -> None:
    """In every factor, in every mode: never a number that could be wrong."""
    p = make_problem(3, 2, noise=noise)
    for key in ["M", "K", *p.noise]:
        f = along(FUNCTIONS[name].structured, p, key)
        with pytest.raises(NotImplementedError, match=r"derivatives? .*not implemented"):
            third(f, nesting)


@each_route
@each_noise
@each_nesting
def test_right_for_solve(nesting: tuple[str, ...], noise: str, method: str) -> None:
    p = make_problem(3, 2, noise=noise)
    for key in ["Y", "M", "K", *p.noise]:
        f = along(lambda q: tk.kron_solve(q.M, q.K, q.Y, **q.noise, method=method), p, key)
        g = along(lambda q: reference.kron_solve(q.M, q.K, q.Y, **q.noise), p, key)
        expected = third(g, ("reverse",) * 3)
        torch.testing.assert_close(third(f, nesting), expected, rtol=1e-10, atol=1e-10)


@each_noise
@each_nesting
def test_right_or_refused_for_inv_quad(nesting: tuple[str, ...], noise: str) -> None:
    p = make_problem(3, 2, noise=noise)
    for key in ["Y", "M", "K", *p.noise]:
        g = along(lambda q: reference.kron_inv_quad_logdet(q.M, q.K, q.Y, **q.noise)[0], p, key)
        f = along(lambda q: tk.kron_inv_quad_logdet(q.M, q.K, q.Y, **q.noise)[0], p, key)
        try:
            actual = third(f, nesting)
        except NotImplementedError:
            continue
        torch.testing.assert_close(actual, third(g, ("reverse",) * 3), rtol=1e-10, atol=1e-10)


@each_route
@pytest.mark.parametrize("first", ["Y", "M", "K", "Sigma"])
def test_mixed_orders_are_right_or_refused(first: str, method: str) -> None:
    """∂³/∂a ∂b ∂c of the likelihood for all a, b, c, once in each argument at most."""
    p = make_problem(3, 2)
    keys = ["Y", "M", "K", "Sigma"]

    def of_steps(nll: Callable[..., Tensor], **options: str) -> Callable[..., Tensor]:
        def value(*steps: Tensor) -> Tensor:
            q = p
            for key, t in zip(keys, steps, strict=True):
                q = from_leaves({**leaves(q), key: leaves(p)[key] * (1 + t)})
            return nll(q.Y, q.M, q.K, **q.noise, **options)

        return value

    zeros = tuple(torch.zeros((), dtype=torch.float64) for _ in keys)
    refused = 0
    for b, c in product(range(4), repeat=2):
        a = keys.index(first)
        expected = jacrev(jacrev(jacrev(of_steps(reference.kron_gaussian_nll), a), b), c)(*zeros)
        try:
            f = of_steps(tk.kron_gaussian_nll, method=method)
            actual = jacrev(jacfwd(jacrev(f, a), b), c)(*zeros)
        except NotImplementedError:
            refused += 1
            continue
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    # the log-determinant is not a function of Y
    assert (refused == 0) == (first == "Y")


def test_plain_autograd_refuses_too() -> None:
    p = make_problem(3, 2)
    M = p.M.clone().requires_grad_()
    (first,) = torch.autograd.grad(tk.kron_logdet(M, p.K, **p.noise), M, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), M, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives"):
        torch.autograd.grad(second.square().sum(), M)


def test_sampling_is_differentiable_once() -> None:
    p = make_problem(3, 2)
    K = p.K.clone().requires_grad_()
    draw = tk.KroneckerPlusNoise(p.M, K, **p.noise).sample((2,))
    (first,) = torch.autograd.grad(draw.square().sum(), K, create_graph=True)
    with pytest.raises(NotImplementedError, match="sample"):
        torch.autograd.grad(first.square().sum(), K)
