"""Leaving out entries or rows against the dense twin, which deletes them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from battery import NOISES, ROUTES, Function, Recorder, Tensors, double, gradients, laid_out
from problems import (
    BATCHES,
    LAYOUTS,
    Problem,
    condition_number,
    dense_noise,
    from_roots,
    kinds_for,
    make_problem,
    make_roots,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Normal
from torch.func import vmap

import torch_kronlik as tk
from torch_kronlik import reference, symmetric_eigen

Check = Callable[..., None]


def structured(name: str) -> Callable[..., Tensors]:
    f = getattr(tk, name)

    def call(p: Problem, **method: str) -> Tensors:
        result = f(p.Y, p.M, p.K, **p.noise, **method)
        return (result,) if isinstance(result, Tensor) else result

    return call


def dense_entries(p: Problem) -> Tensors:
    return reference.leave_one_out(p.Y, p.M, p.K, **p.noise)


def dense_rows(p: Problem) -> Tensors:
    return reference.leave_one_row_out(p.Y, p.M, p.K, **p.noise)


def dense_entries_log_prob(p: Problem) -> Tensors:
    mean, variance = dense_entries(p)
    return (Normal(mean, variance.sqrt()).log_prob(p.Y.double()).sum((-2, -1)),)


def dense_rows_log_prob(p: Problem) -> Tensors:
    mean, covariance = dense_rows(p)
    residual = (p.Y.double() - mean)[..., None]
    solved = torch.linalg.solve(covariance, residual) if p.Y.numel() else residual
    terms = (residual * solved).sum((-2, -1)) + torch.logdet(2 * math.pi * covariance)
    return (-terms.sum(-1) / 2,)


FUNCTIONS = {
    "leave_one_out": Function(structured("leave_one_out"), dense_entries, 2),
    "leave_one_row_out": Function(structured("leave_one_row_out"), dense_rows, 2),
    "leave_one_out_log_prob": Function(
        structured("leave_one_out_log_prob"), dense_entries_log_prob, 0
    ),
    "leave_one_row_out_log_prob": Function(
        structured("leave_one_row_out_log_prob"), dense_rows_log_prob, 0
    ),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)
each_noise = pytest.mark.parametrize("noise", NOISES)
each_route = pytest.mark.parametrize("method", ROUTES)


def in_units_of_noise(p: Problem, results: Tensors) -> Tensors:
    """Variances over those of the noise, of which the condition number speaks: outputs with little
    and with much noise are then held to the same relative accuracy."""
    if len(results) == 1:
        return results
    mean, variance = results
    noise = dense_noise(p).detach().double()
    unit = noise.diagonal(dim1=-2, dim2=-1)[..., None, :]
    if variance.dim() > mean.dim():
        unit = (unit.mT * unit).sqrt()[..., None, :, :]
    return mean, variance / unit.to(variance.dtype)


def check(name: str, p: Problem, method: str, assert_close: Check) -> None:
    """Values, and gradients in every argument."""
    wide, kappa = double(p), condition_number(p)
    size = float(p.Y.shape[-2] * p.Y.shape[-1])

    def actual_of(q: Problem) -> Tensors:
        return in_units_of_noise(q, FUNCTIONS[name].structured(q, method=method))

    def expected_of(q: Problem) -> Tensors:
        return in_units_of_noise(q, FUNCTIONS[name].dense(q))

    dims = FUNCTIONS[name].dims
    for actual, expected in zip(actual_of(p), expected_of(wide), strict=True):
        assert actual.dtype == p.K.dtype
        # a log density is a sum of T·D terms that cancel, a mean a difference with the data
        floor = size if dims == 0 else 1.0 if actual.shape == p.Y.shape else 0.0
        assert_close(actual, expected, condition=kappa, dims=dims, floor=floor)
    found = gradients(actual_of, p)
    for key, expected in gradients(expected_of, wide).items():
        # a mean is Y less a residual, its derivative in Y one less that of the residual
        options = {"dims": 1 if key == "log_noise" else 2, "floor": 1.0 if key == "Y" else 0.0}
        assert_close(found[key], expected, condition=kappa, quantity="gradient", **options)


# ---------------------------------------------------------------- values and gradients


@each_noise
@pytest.mark.parametrize("kind", kinds_for(torch.float64))
@each_function
def test_every_kind(
    name: str, kind: str, noise: str, dtype: torch.dtype, assert_close: Check
) -> None:
    if kind in kinds_for(dtype):
        p = make_problem(5, 2, kind=kind, noise=noise, dtype=dtype)
        check(name, p, "auto", assert_close)


@each_route
@each_noise
@each_function
def test_every_route(name: str, noise: str, method: str, assert_close: Check) -> None:
    check(name, make_problem(6, 3, noise=noise), method, assert_close)


@each_noise
@pytest.mark.parametrize("batch", BATCHES)
@each_function
def test_every_batch_pattern(name: str, batch: str, noise: str, assert_close: Check) -> None:
    check(name, make_problem(3, 2, batch=BATCHES[batch], noise=noise), "auto", assert_close)


@each_function
def test_empty_grid(name: str) -> None:
    for result in FUNCTIONS[name].structured(make_problem(0, 2, batch=(3,))):
        assert result.shape[0] == 3
        assert result.abs().sum() == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (7, 1), (2, 5)])
@each_function
def test_every_size(
    name: str, size: tuple[int, int], dtype: torch.dtype, assert_close: Check
) -> None:
    check(name, make_problem(*size, dtype=dtype), "auto", assert_close)


@pytest.mark.parametrize("how", LAYOUTS)
@each_function
def test_every_memory_layout(name: str, how: str, assert_close: Check) -> None:
    p = laid_out(make_problem(4, 3, batch=(2,), noise="diagonal"), how)
    check(name, p, "auto", assert_close)


@each_function
def test_constant_factor_by_its_eigenvalues(name: str, assert_close: Check) -> None:
    p = make_problem(5, 3)
    f, q = FUNCTIONS[name], p._replace(M=symmetric_eigen(p.M))  # type: ignore[arg-type]
    for actual, expected in zip(f.structured(q), f.dense(p), strict=True):
        assert_close(actual, expected, dims=f.dims, floor=15.0)


# ---------------------------------------------------------------- meaning


@each_noise
def test_row_left_out_is_the_posterior_without_it(noise: str, assert_close: Check) -> None:
    p = make_problem(5, 3, noise=noise)
    mean, covariance = tk.leave_one_row_out(p.Y, p.M, p.K, **p.noise)
    for t in range(5):
        rest = torch.arange(5) != t
        post = tk.condition(
            p.Y[rest], p.M[rest][:, rest], p.K, p.M[[t]][:, rest], p.M[[t], t], **p.noise
        )
        assert_close(mean[[t]], post.mean)
        assert_close(covariance[t].diagonal()[None], post.observation_variance)


@each_noise
def test_one_output_leaves_entries_and_rows_alike(noise: str, assert_close: Check) -> None:
    p = make_problem(6, 1, noise=noise)
    mean, variance = tk.leave_one_out(p.Y, p.M, p.K, **p.noise)
    row_mean, covariance = tk.leave_one_row_out(p.Y, p.M, p.K, **p.noise)
    assert_close(row_mean, mean)
    assert_close(covariance[..., 0], variance)


def test_prediction_ignores_the_entry_it_predicts(assert_close: Check) -> None:
    p = make_problem(4, 3)
    moved = p.Y.clone()
    moved[2, 1] += 10
    before, after = (tk.leave_one_out(Y, p.M, p.K, **p.noise)[0] for Y in (p.Y, moved))
    assert_close(after[2, 1], before[2, 1], dims=0, floor=10.0)
    assert (after - before).abs().max() > 0.1


def test_noise_of_each_output_is_found_by_the_density_as_a_loss() -> None:
    """Without signal each entry is predicted by zero, so the best variance is the mean square."""
    Y = torch.randn(50, 3, dtype=torch.float64) * torch.tensor([0.5, 1.0, 2.0])
    M, K = torch.zeros(50, 50).double(), torch.eye(3).double()
    log_noise = Y.square().mean(0).log().requires_grad_()
    loss = -tk.leave_one_out_log_prob(Y, M, K, log_noise=log_noise)
    (slope,) = torch.autograd.grad(loss, log_noise)
    torch.testing.assert_close(slope, torch.zeros(3).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("gradient", [False, True])
@each_function
def test_large_problem_in_bounded_memory(name: str, gradient: bool) -> None:
    """No T·D × T·D matrix, which would take 0.5 GB: nothing beyond T²."""
    T, D = 1000, 8
    x = torch.linspace(0, 1, T, dtype=torch.float64)
    p = make_problem(T, D)._replace(M=torch.exp(-(x[:, None] - x).abs() / 0.3))
    K = p.K.requires_grad_(gradient)
    with Recorder() as recorder:
        results = FUNCTIONS[name].structured(p._replace(K=K))
        if gradient:
            results[-1].sum().backward()
    assert max(torch.Size(s).numel() for s in recorder.shapes()) <= T * T
    assert recorder.count("linalg_eigh") == 1  # of M; K is diagonalised by our own kernel


@each_function
def test_rows_are_factorised_once(name: str) -> None:
    """Where the likelihood alone would take Cholesky factors of M too."""
    T = 128
    lag = (torch.arange(T)[:, None] - torch.arange(T)).abs()
    p = make_problem(T, 2)._replace(M=torch.exp(-lag.double() / 5))
    with Recorder() as recorder:
        FUNCTIONS[name].structured(p)
    assert recorder.shapes("linalg_eigh").count((T, T)) == 1
    assert (T, T) not in recorder.shapes("linalg_cholesky_ex")


# ---------------------------------------------------------------- derivatives


@pytest.mark.parametrize("rank", [None, 1])
@each_noise
@each_function
def test_derivatives(name: str, noise: str, rank: int | None) -> None:
    roots = make_roots(3, 2, rank=rank, noise=noise)

    def f(*roots: Tensor) -> Tensors:
        return FUNCTIONS[name].structured(from_roots(*roots, noise=noise))

    # random projections; every entry of the gradients is compared with the dense twin's above
    assert gradcheck(f, roots, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(f, roots, check_fwd_over_rev=True, fast_mode=True)


@each_function
def test_vmap_equals_batch(name: str) -> None:
    p = make_problem(4, 2, batch=(3,))

    def f(Y: Tensor, M: Tensor, K: Tensor, Sigma: Tensor) -> Tensors:
        return FUNCTIONS[name].structured(Problem(Y, M, K, {"Sigma": Sigma}))

    mapped = vmap(f)(p.Y, p.M, p.K, p.noise["Sigma"])
    torch.testing.assert_close(mapped, f(p.Y, p.M, p.K, p.noise["Sigma"]))


@each_function
def test_compiles_without_graph_breaks(name: str) -> None:
    p = make_problem(4, 2)
    compiled = torch.compile(FUNCTIONS[name].structured, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(p), FUNCTIONS[name].structured(p))


# ---------------------------------------------------------------- errors


@each_function
def test_errors_name_the_argument(name: str) -> None:
    f, p = FUNCTIONS[name].structured, make_problem(4, 2)
    with pytest.raises(ValueError, match="Y must have shape"):
        f(p._replace(Y=p.Y[:3]))
    with pytest.raises(ValueError, match="exactly one of Sigma and log_noise"):
        f(p._replace(noise={}))
    with pytest.raises(TypeError, match="Y must have the dtype of"):
        f(p._replace(Y=p.Y.float()))
    with pytest.raises(ValueError, match="method must be one of"):
        f(p, method="fast")
    with pytest.raises(torch.linalg.LinAlgError, match="Sigma is not positive definite"):  # type: ignore[attr-defined]
        f(p._replace(noise={"Sigma": -torch.eye(2).double()}))


@pytest.mark.parametrize("bad", ["Y", "M", "K"])
@each_function
def test_what_is_not_finite_is_named(name: str, bad: str) -> None:
    p = make_problem(4, 2)
    getattr(p, bad)[0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"{bad} must be finite"):
        FUNCTIONS[name].structured(p)
