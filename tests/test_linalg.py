"""Every structured function against the dense twin: values and all gradients.

Each test is one property, run for every function, route and noise form, kron_gaussian_nll included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from battery import (
    ALL,
    FUNCTIONS,
    NOISES,
    ROUTES,
    Function,
    double,
    gradients,
    laid_out,
    leaves,
    map_problem,
)
from conftest import check_close
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import BATCHES, LAYOUTS, Problem, condition_number, kinds_for, make_problem
from torch import Tensor

import torch_kronlik as tk
from torch_kronlik.factor.plan import METHODS

Check = Callable[..., None]
each_function = pytest.mark.parametrize("name", ALL)
each_noise = pytest.mark.parametrize("noise", NOISES)
each_route = pytest.mark.parametrize("method", METHODS)


def check(f: Function, p: Problem, method: str, assert_close: Check) -> None:
    """Values and gradients in every argument."""
    wide, kappa = double(p), condition_number(p)
    # a log-determinant is a sum of T·D terms, which may cancel
    floor = 0.0 if f.dims else float(p.Y.shape[-2] * p.Y.shape[-1])
    for actual, expected in zip(f.structured(p, method=method), f.dense(wide), strict=True):
        assert actual.dtype == p.K.dtype
        assert actual.device == p.K.device
        assert_close(actual, expected, condition=kappa, dims=f.dims, floor=floor)
    found = gradients(lambda q: f.structured(q, method=method), p)
    for key, expected in gradients(f.dense, wide).items():
        dims = 1 if key == "log_noise" else 2
        assert_close(found[key], expected, condition=kappa, quantity="gradient", dims=dims)


@each_route
@each_noise
@pytest.mark.parametrize("kind", kinds_for(torch.float64))
@each_function
def test_every_kind(
    name: str, kind: str, noise: str, method: str, dtype: torch.dtype, assert_close: Check
) -> None:
    if kind in kinds_for(dtype):
        p = make_problem(6, 3, kind=kind, noise=noise, dtype=dtype)
        check(ALL[name], p, method, assert_close)


@each_route
@each_noise
@pytest.mark.parametrize("batch", BATCHES)
@each_function
def test_every_batch_pattern(
    name: str, batch: str, noise: str, method: str, assert_close: Check
) -> None:
    p = make_problem(4, 3, batch=BATCHES[batch], noise=noise)
    check(ALL[name], p, method, assert_close)


SIZES = [(0, 1), (0, 3), (1, 1), (1, 4), (5, 1), (2, 7), (33, 2), (12, 12)]


@each_route
@each_noise
@pytest.mark.parametrize("size", SIZES)
@each_function
def test_every_size(
    name: str, size: tuple[int, int], noise: str, method: str, dtype: torch.dtype,
    assert_close: Check,
) -> None:  # fmt: skip
    check(ALL[name], make_problem(*size, noise=noise, dtype=dtype), method, assert_close)


@each_route
@each_noise
@each_function
def test_empty_grid_in_a_batch(name: str, noise: str, method: str, assert_close: Check) -> None:
    check(ALL[name], make_problem(0, 2, batch=(2, 3), noise=noise), method, assert_close)
    check(ALL[name], make_problem(3, 2, batch=(2, 0), noise=noise), method, assert_close)


@each_route
@pytest.mark.parametrize("how", LAYOUTS)
@each_function
def test_every_memory_layout(
    name: str, how: str, method: str, dtype: torch.dtype, assert_close: Check
) -> None:
    for noise in NOISES:
        p = make_problem(5, 3, batch=(2,), noise=noise, dtype=dtype)
        check(ALL[name], laid_out(p, how), method, assert_close)


@each_function
def test_arguments_in_different_layouts(name: str, assert_close: Check) -> None:
    p = make_problem(5, 3, batch=(2,))
    for Y, M in (("expanded", "contiguous"), ("strided", "transposed")):
        q = p._replace(Y=laid_out(p, Y).Y, M=laid_out(p, M).M)
        check(ALL[name], q, ROUTES[0], assert_close)


def _broadcast_shapes(full: tuple[int, ...]) -> st.SearchStrategy[tuple[int, ...]]:
    """A shape that broadcasts to ``full``: some dimensions made 1, leading ones dropped."""
    some = st.tuples(*(st.sampled_from((1, n)) for n in full))
    return st.tuples(some, st.integers(0, len(full))).map(lambda drawn: drawn[0][drawn[1] :])


@st.composite
def _problems(draw: st.DrawFn) -> tuple[Problem, str]:
    full = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    batch: Mapping[str, tuple[int, ...]] = {
        key: draw(_broadcast_shapes(full)) for key in ("Y", "M", "K", "noise")
    }
    noise = draw(st.sampled_from(NOISES))
    T, D, seed = draw(st.integers(0, 6)), draw(st.integers(1, 5)), draw(st.integers(0, 99))
    p = make_problem(T, D, batch=batch, noise=noise, seed=seed)
    how = draw(st.sampled_from(["contiguous", "transposed", "strided", "offset"]))
    return laid_out(p, how), draw(st.sampled_from(list(ALL)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(drawn=_problems())
def test_any_shape_batch_and_layout(drawn: tuple[Problem, str]) -> None:
    p, name = drawn
    for method in ROUTES:
        check(ALL[name], p, method, check_close)


# ---------------------------------------------------------------- M as a constant eigenpair


@each_route
@each_noise
@pytest.mark.parametrize("batch", ["none", "one", "crossed", "empty"])
@each_function
def test_constant_factor_by_its_eigenvalues(
    name: str, batch: str, noise: str, method: str, assert_close: Check
) -> None:
    p = make_problem(5, 3, batch=BATCHES[batch], noise=noise)
    pair, f, kappa = tk.symmetric_eigen(p.M), ALL[name], condition_number(p)

    def structured(q: Problem) -> tuple[Tensor, ...]:
        return f.structured(q._replace(M=pair), method=method)

    for actual, expected in zip(structured(p), f.dense(p), strict=True):
        assert_close(actual, expected, condition=kappa, dims=f.dims, floor=0 if f.dims else 15.0)
    found = gradients(structured, p)
    for key, expected in gradients(f.dense, p).items():
        if key == "M":
            assert not found[key].any()  # a constant
        else:
            dims = 1 if key == "log_noise" else 2
            assert_close(found[key], expected, condition=kappa, quantity="gradient", dims=dims)


@pytest.mark.parametrize("kind", ["generic", "rank_one_M", "zero_M", "rbf"])
def test_symmetric_eigen_reproduces_the_matrix(
    kind: str, dtype: torch.dtype, assert_close: Check
) -> None:
    M = make_problem(8, 1, kind=kind, batch=(2,), dtype=dtype).M
    s, P = tk.symmetric_eigen(M)
    wide = P.double()
    assert_close((wide * s.double()[..., None, :] @ wide.mT).to(dtype), M.double(), floor=1e-300)
    assert_close((wide.mT @ wide).to(dtype), torch.eye(8).double().expand(2, 8, 8))
    assert (s[..., 1:] >= s[..., :-1]).all()
    assert (s >= 0).all()  # M is semidefinite
    assert not s.requires_grad
    assert tk.symmetric_eigen(torch.zeros(0, 3, 3)).eigenvalues.shape == (0, 3)


# ---------------------------------------------------------------- the same bits again


@each_route
@each_noise
@each_function
def test_repeated_calls_agree_bit_for_bit(
    name: str, noise: str, method: str, dtype: torch.dtype
) -> None:
    p = make_problem(40, 6, batch=(3,), noise=noise, dtype=dtype)
    f = ALL[name]

    def run() -> list[Tensor]:
        grads = gradients(lambda q: f.structured(q, method=method), p)
        return [*f.structured(p, method=method), *grads.values()]

    first = run()
    for _ in range(3):
        again = run()
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@each_function
def test_arguments_are_left_alone(name: str) -> None:
    p = make_problem(5, 3, batch=(2,))
    before = map_problem(torch.clone, p)
    gradients(lambda q: ALL[name].structured(q), p)
    for key, x in leaves(p).items():
        assert torch.equal(x, leaves(before)[key])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_auto_is_one_of_the_routes(name: str) -> None:
    p, f = make_problem(5, 3), ALL[name]
    used = tk.KroneckerPlusNoise(p.M, p.K, **p.noise).method_used
    assert used in ROUTES
    assert "auto" in METHODS
    for a, b in zip(f.structured(p), f.structured(p, method=used), strict=True):
        if name == "kron_gaussian_nll":  # "auto" has a kernel for small problems
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)
