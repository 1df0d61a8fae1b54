"""Small problems: the value and the gradients of the native kernel against the dense twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from battery import NOISES, double, from_leaves, laid_out, leaves
from conftest import check_close
from devices import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import BATCHES, LAYOUTS, Problem, condition_number, kinds_for, make_problem, relayout
from torch import Tensor
from torch.autograd import grad

import torch_kronlik as tk
from torch_kronlik import ops, reference
from torch_kronlik.factor import plan

FINE, NOISE, COVARIANCE, NOT_FINITE = range(4)  # what a problem's status says
each_noise = pytest.mark.parametrize("noise", NOISES)


def native(p: Problem, gradients: bool = True) -> tuple[Tensor, ...]:
    """nll, its gradients in (Y, M, K, noise) at the joint batch, and the status."""
    (noise,) = p.noise.values()
    outputs: tuple[Tensor, ...] = ops.small_nll(p.Y, p.M, p.K, noise, "Sigma" in p.noise, gradients)
    return outputs


def joint(p: Problem) -> Problem:
    """Every argument expanded to the joint batch: each problem then has gradients of its own."""
    cores = {key: 1 if key == "log_noise" else 2 for key in leaves(p)}
    shapes = [x.shape[: x.dim() - cores[key]] for key, x in leaves(p).items()]
    batch = torch.broadcast_shapes(*shapes)
    return from_leaves(
        {k: x.expand(*batch, *x.shape[x.dim() - cores[k] :]) for k, x in leaves(p).items()}
    )


def ones_backward(f: Callable[[Problem], Tensor], p: Problem) -> list[Tensor]:
    values = {key: x.detach().clone().requires_grad_() for key, x in leaves(p).items()}
    total = f(from_leaves(values)).sum()
    return list(grad(total, list(values.values()), materialize_grads=True))


def nll(p: Problem, **options: Any) -> Tensor:
    return tk.kron_gaussian_nll(p.Y, p.M, p.K, **p.noise, **options)


def dense(p: Problem) -> Tensor:
    return reference.kron_gaussian_nll(p.Y, p.M, p.K, **p.noise)


def check(p: Problem) -> None:
    """The kernel's value and gradients; no problem is found at fault."""
    wide, kappa = joint(double(p)), condition_number(p)
    value, *found, status = native(p)
    assert status.shape == value.shape
    assert (status == FINE).all()
    floor = float(p.Y.shape[-2] * p.Y.shape[-1])  # a log-determinant's terms may cancel
    check_close(value, dense(wide), condition=kappa, dims=0, floor=floor)
    for key, actual, expected in zip(leaves(p), found, ones_backward(dense, wide), strict=True):
        assert actual.dtype == p.Y.dtype
        assert actual.is_contiguous()
        dims = 1 if key == "log_noise" else 2
        check_close(actual, expected, condition=kappa, quantity="gradient", dims=dims)


# ---------------------------------------------------------------- against the dense twin


@each_noise
@pytest.mark.parametrize("kind", kinds_for(torch.float64))
def test_every_kind(kind: str, noise: str, dtype: torch.dtype) -> None:
    if kind in kinds_for(dtype):
        check(make_problem(6, 3, kind=kind, noise=noise, dtype=dtype))


# float64 has 8 lanes and float32 has 16: D = 9 and 16 take several passes, or one exactly; tiles
# are 4×4
SIZES = [(0, 1), (0, 3), (1, 1), (1, 16), (2, 3), (33, 3), (64, 2), (5, 8), (7, 9), (4, 16)]
SIZES += [(3, 2), (8, 1), (9, 4), (15, 2), (16, 5), (17, 3), (63, 2), (65, 2), (127, 1), (128, 2)]


# on a GPU a problem's matrices are in a block's shared memory
FITTING = [size for size in SIZES if plan.costs(DEVICE.type).fits_small(*size)]


@each_noise
@pytest.mark.parametrize("size", FITTING)
def test_every_size(size: tuple[int, int], noise: str, dtype: torch.dtype) -> None:
    check(make_problem(*size, noise=noise, dtype=dtype))
    check(make_problem(*size, batch=(2,), noise=noise, dtype=dtype))


@each_noise
@pytest.mark.parametrize("batch", BATCHES)
def test_every_batch_pattern(batch: str, noise: str, dtype: torch.dtype) -> None:
    check(make_problem(4, 3, batch=BATCHES[batch], noise=noise, dtype=dtype))


@each_noise
@pytest.mark.parametrize("how", LAYOUTS)
def test_every_memory_layout(how: str, noise: str, dtype: torch.dtype) -> None:
    check(laid_out(make_problem(5, 3, batch=(3,), noise=noise, dtype=dtype), how))


@st.composite
def _problems(draw: st.DrawFn) -> Problem:
    full = draw(st.lists(st.integers(0, 3), max_size=3))
    n = len(full)

    def own() -> tuple[int, ...]:
        """Some dimensions made 1, leading ones dropped."""
        return tuple(draw(st.sampled_from((1, k))) for k in full)[draw(st.integers(0, n)) :]

    batch = {key: own() for key in ("Y", "M", "K", "noise")}
    kinds = ("generic", "rank_one_M", "rank_deficient", "zero_K", "rbf")
    p = make_problem(
        draw(st.integers(0, 7)),
        draw(st.integers(1, 10)),
        batch=batch,
        noise=draw(st.sampled_from(NOISES)),
        kind=draw(st.sampled_from(kinds)),
        dtype=draw(st.sampled_from((torch.float32, torch.float64))),
        seed=draw(st.integers(0, 99)),
    )
    hows = st.sampled_from(("contiguous", "transposed", "strided", "offset"))
    return from_leaves({key: relayout(x, draw(hows)) for key, x in leaves(p).items()})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(p=_problems())
def test_any_shape_batch_and_layout(p: Problem) -> None:
    check(p)
