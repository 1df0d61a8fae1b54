"""torch.func over the structured functions: vmap, and its compositions with derivatives."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, combinations

import pytest
import torch
from battery import ALL, FUNCTIONS, NOISES, ROUTES, Recorder, from_leaves, leaves, symmetrised
from problems import BATCHES, make_problem
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import torch_kronlik as tk
from torch_kronlik import reference

each_function = pytest.mark.parametrize("name", ALL)
each_noise = pytest.mark.parametrize("noise", NOISES)
each_route = pytest.mark.parametrize("method", ROUTES)
SUBSETS = list(chain.from_iterable(combinations(range(4), n) for n in range(1, 5)))
N = 2  # mapped over


def structured(name: str, keys: list[str], **method: str) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *values: ALL[name].structured(
        from_leaves(dict(zip(keys, values, strict=True))), **method
    )


def total(name: str, keys: list[str], **method: str) -> Callable[..., Tensor]:
    """The sum of squares of all results: a scalar with a gradient in everything."""
    f = structured(name, keys, **method)
    return lambda *values: torch.stack([x.square().sum() for x in f(*values)]).sum()


def mapped(noise: str, subset: tuple[int, ...], dim: int = 0) -> tuple[list[str], list[Tensor]]:
    """The arguments of a problem; those in ``subset`` with N different ones along ``dim``."""
    p = leaves(make_problem(4, 3, noise=noise))
    many = leaves(make_problem(4, 3, batch=(N,), noise=noise, seed=1))
    chosen = zip(p, p.values(), many.values(), range(4), strict=True)
    return list(p), [m.movedim(0, dim) if i in subset else x for _, x, m, i in chosen]


def select(values: list[Tensor], subset: tuple[int, ...], k: int, dim: int = 0) -> list[Tensor]:
    return [x.select(dim, k) if i in subset else x for i, x in enumerate(values)]


@each_route
@each_noise
@pytest.mark.parametrize("dim", [0, -1])
@each_function
def test_vmap_over_any_subset_is_a_loop(name: str, dim: int, noise: str, method: str) -> None:
    for subset in SUBSETS:
        keys, values = mapped(noise, subset, dim)
        f = structured(name, keys, method=method)
        in_dims = tuple(dim if i in subset else None for i in range(4))
        actual = vmap(f, in_dims)(*values)
        for k in range(N):
            for a, b in zip(actual, f(*select(values, subset, k, dim)), strict=True):
                torch.testing.assert_close(a[k], b, rtol=1e-12, atol=1e-12)


@each_route
@each_noise
@each_function
def test_vmap_of_grad_over_any_subset_is_a_loop(name: str, noise: str, method: str) -> None:
    """In every argument, mapped or not: an argument that is not mapped has N gradients too."""
    for subset in SUBSETS:
        keys, values = mapped(noise, subset)
        g = grad(total(name, keys, method=method), argnums=(0, 1, 2, 3))
        actual = vmap(g, tuple(0 if i in subset else None for i in range(4)))(*values)
        for k in range(N):
            for a, b in zip(actual, g(*select(values, subset, k)), strict=True):
                torch.testing.assert_close(a[k], b, rtol=1e-11, atol=1e-11)


@each_noise
@each_function
def test_vmap_of_hessian_is_a_loop(name: str, noise: str) -> None:
    for subset in ((0,), (1, 3), (0, 1, 2, 3)):
        keys, values = mapped(noise, subset)
        h = hessian(total(name, keys), argnums=(2, 3))
        actual = vmap(h, tuple(0 if i in subset else None for i in range(4)))(*values)
        for k in range(N):
            expected = h(*select(values, subset, k))
            for row, expected_row in zip(actual, expected, strict=True):
                for a, b in zip(row, expected_row, strict=True):
                    torch.testing.assert_close(a[k], b, rtol=1e-10, atol=1e-10)


@each_noise
@each_function
def test_nested_vmap_and_batches_inside(name: str, noise: str) -> None:
    """All arguments at the joint batch shape, of which two, one or no dimensions are mapped."""
    p = leaves(make_problem(3, 2, batch=BATCHES["crossed"], noise=noise))
    joint = {
        key: x.expand(2, 3, *x.shape[-(1 if key == "log_noise" else 2) :]) for key, x in p.items()
    }
    f = structured(name, list(joint))
    both, one, none = vmap(vmap(f)), vmap(f), f
    for a, b, c in zip(*(g(*joint.values()) for g in (both, one, none)), strict=True):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, c)


@each_noise
@each_function
def test_jacobians_agree_with_each_other(name: str, noise: str) -> None:
    keys, values = mapped(noise, ())
    f = structured(name, keys)
    forward, reverse = jacfwd(f, (0, 1, 2, 3))(*values), jacrev(f, (0, 1, 2, 3))(*values)
    for a, b in zip(forward, reverse, strict=True):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            # forward mode moves one entry alone, reverse mode gives the symmetric matrix, but not
            # for U·Y, which is defined for any square matrix
            symmetric = name != "kron_matmul" and keys[i] in ("M", "K", "Sigma")
            x = (x + x.mT) / 2 if symmetric else x
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@each_noise
def test_vmap_of_jvp_and_jvp_of_vmap(noise: str) -> None:
    keys, values = mapped(noise, (0, 3))
    drawn = dict(zip(keys, map(torch.randn_like, values), strict=True))
    tangents = list(leaves(symmetrised(from_leaves(drawn))).values())
    dims = (0, None, None, 0)
    f, g = total("kron_gaussian_nll", keys), FUNCTIONS["kron_gaussian_nll"].dense

    def dense(*xs: Tensor) -> Tensor:
        return g(from_leaves(dict(zip(keys, xs, strict=True))))[0].square().sum()

    expected = jvp(vmap(dense, dims), tuple(values), tuple(tangents))
    outside = jvp(vmap(f, dims), tuple(values), tuple(tangents))
    inside = vmap(lambda xs, vs: jvp(f, xs, vs), (dims, dims))(tuple(values), tuple(tangents))
    torch.testing.assert_close(outside, expected)
    torch.testing.assert_close(inside, expected)


# ---------------------------------------------------------------- sums over the mapped dimension


@each_route
@each_noise
@pytest.mark.parametrize("argument", [0, 1, 2, 3])
def test_second_derivative_through_per_sample_gradients(
    argument: int, noise: str, method: str
) -> None:
    """Σ_k |∂ nll(Y_k)|² in an argument that is shared by all k, differentiated once more."""

    def penalty(nll: Callable[..., Tensor], keys: list[str]) -> Callable[..., Tensor]:
        def of_values(*values: Tensor) -> Tensor:
            q = symmetrised(from_leaves(dict(zip(keys, values, strict=True))))
            return nll(q.Y, q.M, q.K, **q.noise)

        each = vmap(grad(of_values, argnums=argument), (0, None, None, None))
        return lambda *values: each(*values).square().sum()

    keys, values = mapped(noise, (0,))
    options = {"method": method}
    actual = penalty(lambda *a, **k: tk.kron_gaussian_nll(*a, **k, **options), keys)
    expected = penalty(reference.kron_gaussian_nll, keys)
    for k in range(4):
        torch.testing.assert_close(grad(actual, k)(*values), grad(expected, k)(*values))


# ---------------------------------------------------------------- what is not mapped stays single


@each_route
@each_noise
def test_vmap_does_not_copy_what_is_not_mapped(noise: str, method: str) -> None:
    """Data mapped over N: one factorisation of the single M and K, and no N-fold copy of either."""
    keys, values = mapped(noise, (0,))
    f = total("kron_gaussian_nll", keys, method=method)
    with Recorder() as recorded:
        vmap(f, (0, None, None, None))(*values)
    T, D = values[0].shape[-2:]
    assert recorded.count("linalg_eigh") + recorded.count("cholesky_factors") > 0
    for shape in recorded.shapes():
        assert shape not in ((N, T, T), (N, D, D))


@each_route
def test_broadcast_factors_are_factorised_once(method: str) -> None:
    p = make_problem(5, 3, batch={"Y": (7, 1), "M": (), "K": (2,), "noise": ()})
    with Recorder() as recorded:
        tk.kron_gaussian_nll(p.Y, p.M, p.K, **p.noise, method=method)
    found = recorded.shapes("linalg_eigh") + recorded.shapes("cholesky_factors")
    assert found
    # of M alone, or with the batch of K, as each route has it; never with that of Y
    assert {s for s in found if s[-2:] == (5, 5)} <= {(5, 5), (2, 5, 5), (2, 3, 5, 5)}
    assert not any(7 in s for s in found)
