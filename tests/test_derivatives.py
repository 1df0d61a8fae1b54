"""First and second derivatives of every structured function in every mode of autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from battery import (
    ALL,
    NOISES,
    ROUTES,
    Tensors,
    cotangents,
    double,
    from_leaves,
    leaves,
    symmetrised,
)
from problems import Problem, from_roots, make_problem, make_roots
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import jacfwd, jacrev, jvp, vjp

import torch_kronlik as tk
from torch_kronlik import reference

Transform = Callable[..., Callable[..., Any]]
each_function = pytest.mark.parametrize("name", ALL)
each_noise = pytest.mark.parametrize("noise", NOISES)
each_route = pytest.mark.parametrize("method", ROUTES)


def scalar(f: Callable[[Problem], Tensors], p: Problem) -> Callable[..., Tensor]:
    """A random combination of the results of ``f`` as a function of all arguments' entries."""
    weights, keys = cotangents(f(p)), list(leaves(p))

    def value(*values: Tensor) -> Tensor:
        results = f(symmetrised(from_leaves(dict(zip(keys, values, strict=True)))))
        return torch.stack([(w * x).sum() for w, x in zip(weights, results, strict=True)]).sum()

    return value


# ---------------------------------------------------------------- against finite differences


def check_both_orders(f: Callable[..., Any], inputs: Tensors) -> None:
    options = {"check_batched_forward_grad": True, "check_batched_grad": True}
    assert gradcheck(f, inputs, check_forward_ad=True, **options)
    # random projections of the second derivatives: each entry is compared with the dense twin below
    assert gradgradcheck(f, inputs, check_fwd_over_rev=True, fast_mode=True)


@each_route
@pytest.mark.parametrize(("rank", "noise"), [(None, "full"), (1, "diagonal")])
@each_function
def test_gradcheck_in_roots(name: str, rank: int | None, noise: str, method: str) -> None:
    """M = R Rᵀ (+ I) and likewise K; of rank one, so with zero eigenvalues, where R is a column."""
    f = ALL[name]
    roots = make_roots(2, 2, rank=rank, noise=noise)

    def of_roots(*roots: Tensor) -> Tensors:
        return f.structured(from_roots(*roots, noise=noise), method=method)

    check_both_orders(of_roots, roots)


@pytest.mark.parametrize("kind", ["identity", "zero_M", "zero_K", "repeated_blocks", "replicates"])
@each_function
def test_gradcheck_at_special_factors(name: str, kind: str) -> None:
    """Every entry of the factors is moved: repeated eigenvalues split, zeros become non-zero."""
    f, noise = ALL[name], "diagonal" if kind in ("identity", "zero_K") else "full"
    p = make_problem(3, 2, kind=kind, noise=noise)
    inputs = tuple(x.requires_grad_() for x in leaves(p).values())

    def of_entries(*values: Tensor) -> Tensors:
        q = from_leaves(dict(zip(leaves(p), values, strict=True)))
        return f.structured(symmetrised(q))

    check_both_orders(of_entries, inputs)


@each_function
def test_gradcheck_with_broadcast_batches(name: str) -> None:
    f = ALL[name]
    p = make_problem(2, 2, batch={"Y": (2, 1), "M": (2,), "K": (), "noise": (1, 1)})
    inputs = tuple(x.requires_grad_() for x in leaves(p).values())

    def of_entries(*values: Tensor) -> Tensors:
        q = from_leaves(dict(zip(leaves(p), values, strict=True)))
        return f.structured(symmetrised(q))

    check_both_orders(of_entries, inputs)


# ---------------------------------------------------------------- against the dense twin


def second_derivatives(
    f: Callable[..., Tensor], values: Tensors, inner: Transform, outer: Transform
) -> list[list[Tensor]]:
    every = tuple(range(len(values)))
    found: list[list[Tensor]] = outer(inner(f, every), every)(*values)
    return found


KINDS = {
    "full": ["generic", "identity", "rank_one_M", "zero_K"],
    "diagonal": ["generic", "repeated_blocks", "rank_one_K", "zero_M"],
}


@each_route
@each_noise
@pytest.mark.parametrize("outer", [jacrev, jacfwd])
@pytest.mark.parametrize("inner", [jacrev, jacfwd])
@each_function
def test_hessian_in_every_nesting(
    name: str, inner: Transform, outer: Transform, noise: str, method: str
) -> None:
    """All blocks of the Hessian in (Y, M, K, noise), mixed ones included."""
    f = ALL[name]
    for kind in KINDS[noise]:
        p = make_problem(3, 2, kind=kind, noise=noise)
        values = tuple(leaves(p).values())
        expected = second_derivatives(scalar(f.dense, p), values, jacrev, jacrev)
        structured = scalar(lambda q: f.structured(q, method=method), p)
        actual = second_derivatives(structured, values, inner, outer)
        for row, expected_row in zip(actual, expected, strict=True):
            for block, expected_block in zip(row, expected_row, strict=True):
                torch.testing.assert_close(block, expected_block, rtol=1e-10, atol=1e-11)


@each_route
@each_noise
@each_function
def test_jvp_and_vjp(name: str, noise: str, method: str) -> None:
    p = make_problem(4, 3, noise=noise)
    f, values = ALL[name], tuple(leaves(p).values())
    tangents = tuple(leaves(make_problem(4, 3, noise=noise, seed=1)).values())
    structured, dense = scalar(lambda q: f.structured(q, method=method), p), scalar(f.dense, p)
    torch.testing.assert_close(jvp(structured, values, tangents), jvp(dense, values, tangents))
    actual, expected = vjp(structured, *values), vjp(dense, *values)
    one = torch.ones_like(expected[0])
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1](one), expected[1](one))


@each_noise
@each_function
def test_float32_second_derivatives(name: str, noise: str) -> None:
    p = make_problem(3, 2, noise=noise, dtype=torch.float32)
    f = ALL[name]
    wide = double(p)
    expected = second_derivatives(
        scalar(f.dense, wide), tuple(leaves(wide).values()), jacrev, jacrev
    )
    single = scalar(lambda q: tuple(x.double() for x in f.structured(q)), p)
    actual = second_derivatives(single, tuple(leaves(p).values()), jacrev, jacfwd)
    for row, expected_row in zip(actual, expected, strict=True):
        for block, expected_block in zip(row, expected_row, strict=True):
            scale = float(expected_block.abs().max())
            torch.testing.assert_close(
                block.double(), expected_block, rtol=1e-4, atol=1e-4 * scale + 1e-6
            )


# ---------------------------------------------------------------- one argument alone


@each_noise
@each_function
def test_each_argument_alone(name: str, noise: str) -> None:
    """What is asked for does not depend on what else is asked for."""
    f, p = ALL[name], make_problem(4, 3, noise=noise)
    keys = [key for key in leaves(p) if f.uses_Y or key != "Y"]

    def gradients_in(chosen: list[str]) -> list[Tensor]:
        values = {key: x.clone().requires_grad_(key in chosen) for key, x in leaves(p).items()}
        results = f.structured(from_leaves(values))
        return list(grad(results, [values[key] for key in chosen], cotangents(results)))

    together = dict(zip(keys, gradients_in(keys), strict=True))
    for key in keys:
        torch.testing.assert_close(gradients_in([key])[0], together[key], rtol=1e-13, atol=1e-13)


@each_noise
def test_each_result_alone(noise: str) -> None:
    """The gradient of inv_quad alone, of logdet alone, and of both with their own weights."""
    p = make_problem(4, 3, batch=(2,), noise=noise)
    for weights in ((1.0, 0.0), (0.0, 1.0), (-2.0, 3.0)):
        found = []
        for function in (tk.kron_inv_quad_logdet, reference.kron_inv_quad_logdet):
            values = {key: x.clone().requires_grad_() for key, x in leaves(p).items()}
            q = from_leaves(values)
            results = function(q.M, q.K, q.Y, **q.noise)
            loss = sum(w * x.sum() for w, x in zip(weights, results, strict=True) if w)
            found.append(grad(loss, list(values.values()), materialize_grads=True))
        torch.testing.assert_close(*found)
