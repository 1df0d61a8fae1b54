"""M from a kernel by columns on demand: where it goes, what the kernel is called for, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gpytorch
import pytest
import torch
from kernel_problems import D, T, close, dense, leaves, nll, points, rbf, rough, squares
from problems import normal
from torch import Tensor
from torch.autograd import grad

import torch_kronlik as tk
from torch_kronlik import machine, reference
from torch_kronlik.rows import KernelColumns, as_rows

# ---------------------------------------------------------------- what it is for


def test_the_kernel_is_called_for_columns_alone() -> None:
    sizes: list[tuple[int, int]] = []
    x = torch.linspace(0, 4, 1000, dtype=torch.float64)
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        sizes.append((len(a), len(b)))
        return rbf(theta)(a, b)

    M = tk.KernelMatrix(kernel, x)
    K, s = torch.eye(D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    grad(tk.kron_gaussian_nll(normal(1000, D, seed=1), M, K, log_noise=s), theta)
    r = M.rank
    assert r < 40
    pivots = [(1000, 1)] * r
    blocks = [(256, 256)] * 3 + [(232, 232)]
    assert sizes == [*blocks, *pivots, (1000, r), (r, r)]


def test_chunks_are_evaluated_again_in_backward() -> None:
    make, (x, theta, K, Sigma, Y) = leaves("rbf on a line", 1.0)
    calls: list[int] = []

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        calls.append(len(a))
        return make(theta)(a, b)

    M = tk.KernelMatrix(kernel, x, max_rank=T, chunk_rows=20)
    value = tk.kron_gaussian_nll(Y, M, K, Sigma=Sigma)
    before = len(calls)
    found = grad(value, (theta, x))
    assert calls[before:] == [8, 20, 20]
    expected = grad(nll(make, x, theta, K, Sigma, Y), (theta, x))
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_first_use_without_gradients(mode: Any) -> None:
    make, (x, theta, K, Sigma, Y) = leaves("rbf on a line", 1.0)
    M = tk.KernelMatrix(make(theta), x, max_rank=T)
    with mode():
        assert M.rank < T
    found = grad(tk.kron_gaussian_nll(Y, M, K, Sigma=Sigma), theta)
    close(found[0], grad(dense(make, x, theta, K, Sigma, Y), theta)[0], 1e-10)


def test_points_made_in_inference_mode() -> None:
    make, (x, theta, K, Sigma, Y) = leaves("rbf on a line", 1.0)
    with torch.inference_mode():
        found = nll(make, x.clone(), theta, K, Sigma, Y)
    close(found, dense(make, x, theta, K, Sigma, Y), 1e-12)


def test_batch_of_different_ranks() -> None:
    x = torch.stack([points(T, 1), 0.2 * points(T, 1, seed=1)]).requires_grad_()
    Y, K = normal(2, T, D, seed=3), torch.eye(D, dtype=torch.float64)
    s = torch.zeros(D, dtype=torch.float64)
    kernel = rbf(torch.zeros(2, dtype=torch.float64))
    M = tk.KernelMatrix(kernel, x, max_rank=T)
    one_by_one = [tk.KernelMatrix(kernel, x[i].detach(), max_rank=T).rank for i in range(2)]
    assert one_by_one[0] != one_by_one[1]
    assert abs(M.rank - max(one_by_one)) <= 1  # the last pivot is near rounding
    found = tk.kron_gaussian_nll(Y, M, K, log_noise=s)
    expected = reference.kron_gaussian_nll(Y, kernel(x, x), K, log_noise=s)
    close(found, expected, 1e-12)
    close(grad(found.sum(), x)[0], grad(expected.sum(), x)[0], 1e-10)


def test_repeated_points_and_one_point() -> None:
    K, s = torch.eye(D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    kernel = rbf(torch.zeros(2, dtype=torch.float64))
    for x in (points(3).repeat(5), points(1)):
        M = tk.KernelMatrix(kernel, x, max_rank=len(x))
        assert M.rank == len(x.unique())
        close(
            tk.kron_logdet(M, K, log_noise=s), tk.kron_logdet(kernel(x, x), K, log_noise=s), 1e-13
        )


def test_no_rows() -> None:
    K, s = torch.eye(D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    M = tk.KernelMatrix(rbf(torch.zeros(2)), torch.zeros(0, dtype=torch.float64))
    assert tk.kron_logdet(M, K, log_noise=s) == 0


def test_float32() -> None:
    make, given = leaves("rbf on a line", 1.0)
    single = [x.detach().float().requires_grad_() for x in given]
    found = nll(make, *single)
    close(found, dense(make, *given).float(), 1e-5)
    for a, b in zip(grad(found, single), grad(dense(make, *given), given), strict=True):
        close(a, b.float(), 2e-3)


def test_gpytorch_kernel() -> None:
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(ard_num_dims=2)).double()
    x = points(T, 2)
    K, s = torch.eye(D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    Y = normal(T, D, seed=3)
    M = tk.KernelMatrix(kernel, x, max_rank=T)
    assert isinstance(as_rows(M), KernelColumns)
    found = tk.kron_gaussian_nll(Y, M, K, log_noise=s)
    expected = tk.kron_gaussian_nll(Y, kernel(x).to_dense(), K, log_noise=s)
    close(found, expected, 1e-12)
    parameters = list(kernel.parameters())
    for a, b in zip(grad(found, parameters), grad(expected, parameters), strict=True):
        close(a, b, 1e-9)


def test_missing_entries_and_noise_by_row() -> None:
    make, (x, theta, K, _, Y) = leaves("rbf on a line", 1.0)
    observed = normal(T, D, seed=9) > -0.5
    noise = normal(T, D, seed=10).requires_grad_()
    found = []
    for M in (tk.KernelMatrix(make(theta), x, max_rank=T), make(theta)(x, x)):
        U = tk.KroneckerPlusNoise(M, K, row_log_noise=noise, observed=observed)
        value = U.nll(Y)
        found.append((value, *grad(value, (theta, x, K, noise)), U.impute(Y)[1]))
    for mine, expected in zip(*found, strict=True):
        close(mine, expected, 1e-10)


def test_row_scale() -> None:
    make, (x, theta, K, Sigma, Y) = leaves("rbf on a line", 1.0)
    scale = normal(T, seed=4).exp().requires_grad_()
    found = []
    for M in (tk.KernelMatrix(make(theta), x, max_rank=T), make(theta)(x, x)):
        value = tk.KroneckerPlusNoise(M, K, Sigma=Sigma, row_scale=scale).nll(Y)
        found.append((value, *grad(value, (theta, x, scale))))
    for mine, expected in zip(*found, strict=True):
        close(mine, expected, 1e-10)


def test_conditioning_on_new_points() -> None:
    make, (x, theta, K, Sigma, Y) = leaves("rbf on a line", 1.0)
    x_new = points(5, seed=8)
    M = tk.KernelMatrix(make(theta), x, max_rank=T)
    found = tk.KroneckerPlusNoise(M, K, Sigma=Sigma).condition(Y, x_new)
    k = make(theta)
    U = tk.KroneckerPlusNoise(k(x, x), K, Sigma=Sigma)
    expected = U.condition(Y, k(x_new, x), k(x_new, x_new))
    for name in ("mean", "variance", "covariance_matrix"):
        close(getattr(found, name), getattr(expected, name), 1e-11)
    close(found.log_prob(Y[:5]), expected.log_prob(Y[:5]), 1e-11)
    diagonal = tk.KroneckerPlusNoise(M, K, Sigma=Sigma).condition(
        Y, M.cross(x_new), M.variance(x_new)
    )
    close(diagonal.variance, expected.variance, 1e-11)
    with pytest.raises(TypeError, match="KernelMatrix"):
        U.condition(Y, x_new)


def test_distribution() -> None:
    make, (x, theta, K, Sigma, Y) = leaves("rbf on a line", 1.0)
    M = tk.KernelMatrix(make(theta), x, max_rank=T)
    found = tk.KroneckerNormal(torch.zeros_like(Y), M, K, Sigma=Sigma)
    expected = tk.KroneckerNormal(torch.zeros_like(Y), make(theta)(x, x), K, Sigma=Sigma)
    close(found.log_prob(Y), expected.log_prob(Y), 1e-12)
    close(found.entropy(), expected.entropy(), 1e-12)
    assert found.M is M


# ---------------------------------------------------------------- rough kernels


def test_a_rough_kernel_becomes_a_matrix() -> None:
    x = points(200).requires_grad_()
    kernel = rough(torch.zeros(2, dtype=torch.float64))
    M = tk.KernelMatrix(kernel, x)
    assert M.rank == 200
    assert torch.equal(as_rows(M).M, kernel(x, x))


def test_max_rank() -> None:
    make, (x, theta, *_) = leaves("rbf on a line", 1.0)
    rank = tk.KernelMatrix(make(theta), x, max_rank=T).rank
    assert rank < T
    assert tk.KernelMatrix(make(theta), x, max_rank=rank).rank == rank
    assert tk.KernelMatrix(make(theta), x, max_rank=rank - 1).rank == T


def test_what_does_not_fit_names_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory", lambda device: 10**5)
    with pytest.raises(ValueError, match="rank above 66 with T = 200"):
        tk.KernelMatrix(rough(torch.zeros(2, dtype=torch.float64)), points(200)).rows()


# ---------------------------------------------------------------- errors


def _made(f: Callable[[Tensor, Tensor], Any], x: Tensor | None = None) -> Any:
    return tk.KernelMatrix(f, points(9) if x is None else x).rows()


def test_errors() -> None:
    x = points(9)
    with pytest.raises(TypeError, match="kernel must be callable, got float"):
        tk.KernelMatrix(1.0, x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x must"):
        tk.KernelMatrix(rbf(x), [1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x must have shape .* got \(\)"):
        tk.KernelMatrix(rbf(x), x[0])
    with pytest.raises(ValueError, match="max_rank must be a positive integer or None, got 0"):
        tk.KernelMatrix(rbf(x), x, max_rank=0)
    with pytest.raises(TypeError, match=r"kernel\(a, b\) must return a tensor, got float"):
        _made(lambda a, b: 1.0)
    with pytest.raises(ValueError, match=r"must have shape \(\*batch, 9, 9\).* got \(9,\)"):
        _made(lambda a, b: a)
    with pytest.raises(TypeError, match=r"dtype and device, torch\.float64"):
        _made(lambda a, b: a.float()[:, None] * b.float())
    with pytest.raises(ValueError, match="diagonal has NaN"):
        _made(lambda a, b: a[:, None] * b * math.nan)
    with pytest.raises(torch.linalg.LinAlgError, match="negative variances"):
        _made(lambda a, b: -a[:, None] * b)
    with pytest.raises(torch.linalg.LinAlgError, match=r"kernel\(x, x\) is not positive definite"):
        _made(lambda a, b: 2.0 - (a[:, None] == b).double())


def test_infinite_columns() -> None:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a[:, None] == b, torch.ones_like(a[0]), math.nan)

    with pytest.raises(ValueError, match="NaN or infinity"):
        tk.KernelMatrix(kernel, points(9), max_rank=9).rows()


def test_module_as_kernel() -> None:
    class Deep(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 2, dtype=torch.float64)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.exp(-0.5 * squares(self.layer(a), self.layer(b)))

    kernel, x = Deep(), points(T, 1)
    Y, K, s = (
        normal(T, D, seed=1),
        torch.eye(D, dtype=torch.float64),
        torch.zeros(D, dtype=torch.float64),
    )
    found, expected = (
        grad(
            tk.kron_gaussian_nll(Y, M, K, log_noise=s), list(kernel.parameters()), allow_unused=True
        )
        for M in (tk.KernelMatrix(kernel, x, max_rank=T), kernel(x, x))
    )
    close(found[0], expected[0], 1e-9)
    M = tk.KernelMatrix(kernel, x, max_rank=T)
    before = M.rank
    assert M.rank == before
    with torch.no_grad():
        kernel.layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="make a new one"):
        tk.kron_logdet(M, K, log_noise=s)
