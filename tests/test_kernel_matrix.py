"""M from a kernel by columns on demand, against the dense matrix that the kernel makes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gpytorch
import pytest
import torch
from devices import opcheck
from problems import normal
from torch import Tensor
from torch.autograd import forward_ad, grad

import torch_kronlik as tk
from torch_kronlik import machine, reference
from torch_kronlik.rows import KernelColumns, as_rows

Kernel = Callable[[Tensor, Tensor], Tensor]
T, D = 48, 2


def rbf(theta: Tensor) -> Kernel:
    return lambda a, b: theta[1].exp() * torch.exp(-0.5 * _squares(a, b) / theta[0].exp() ** 2)


def periodic(theta: Tensor) -> Kernel:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        angle = math.pi * (a[..., :, None] - b[..., None, :]) / 3.1
        return theta[1].exp() * torch.exp(-2 * torch.sin(angle).square() / theta[0].exp() ** 2)

    return kernel


def product(theta: Tensor) -> Kernel:
    return lambda a, b: rbf(theta)(a, b) * (1 + a[..., :, None] * b[..., None, :]) + 0.3


def rough(theta: Tensor) -> Kernel:
    return lambda a, b: theta[1].exp() * torch.exp(-(a[:, None] - b).abs() / theta[0].exp())


def _squares(a: Tensor, b: Tensor) -> Tensor:
    if a.dim() == 1:
        return (a[:, None] - b).square()
    return (a[..., :, None, :] - b[..., None, :, :]).square().sum(-1)


def points(*shape: int, seed: int = 0) -> Tensor:
    return 1.5 * normal(*shape, seed=seed)


CASES = {
    "rbf on a line": (rbf, (T,)),
    "rbf, columns of one": (rbf, (T, 1)),
    "periodic": (periodic, (T,)),
    "sum and product": (product, (T,)),
}
each_case = pytest.mark.parametrize("case", CASES)
each_noise = pytest.mark.parametrize("scale", [1.0, 1e-4])


def leaves(case: str, scale: float) -> tuple[Callable[..., Kernel], list[Tensor]]:
    make, shape = CASES[case]
    K, Sigma = (normal(D, D, seed=s) for s in (1, 2))
    K, Sigma = (X @ X.mT + torch.eye(D, dtype=torch.float64) for X in (K, Sigma))
    theta = torch.tensor([0.1, 0.3], dtype=torch.float64)
    given = [points(*shape), theta, K, scale * Sigma, normal(T, D, seed=3)]
    return make, [x.requires_grad_() for x in given]


def nll(make: Any, x: Tensor, theta: Tensor, K: Tensor, Sigma: Tensor, Y: Tensor) -> Tensor:
    M = tk.KernelMatrix(make(theta), x, max_rank=x.shape[0])
    assert isinstance(as_rows(M), KernelColumns)
    return tk.kron_gaussian_nll(Y, M, K, Sigma=Sigma)


def dense(make: Any, x: Tensor, theta: Tensor, K: Tensor, Sigma: Tensor, Y: Tensor) -> Tensor:
    return reference.kron_gaussian_nll(Y, make(theta)(x, x), K, Sigma=Sigma)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    off = (found - expected).abs().max() / expected.abs().max()
    assert off <= tolerance, f"relative error {off:.1e}"


# ---------------------------------------------------------------- derivatives


@each_noise
@each_case
def test_value_and_gradients(case: str, scale: float) -> None:
    make, given = leaves(case, scale)
    values = [f(make, *given) for f in (nll, dense)]
    close(values[0], values[1], 1e-13 / scale)
    # what a dense float64 computation gives at a condition number of some 10 / scale
    for found, expected in zip(*(grad(v, given) for v in values), strict=True):
        close(found, expected, 1e-10 / scale)


@each_noise
@each_case
def test_second_derivatives(case: str, scale: float) -> None:
    make, given = leaves(case, scale)
    weights = [normal(*x.shape, seed=7 + i) for i, x in enumerate(given)]

    def along(f: Any) -> tuple[Tensor, ...]:
        first = grad(f(make, *given), given, create_graph=True)
        return grad(sum((g * w).sum() for g, w in zip(first, weights, strict=True)), given)

    for found, expected in zip(along(nll), along(dense), strict=True):
        close(found, expected, 1e-8 / scale)


def test_forward_mode() -> None:
    make, given = leaves("rbf on a line", 1.0)
    weights = [normal(*x.shape, seed=7 + i) for i, x in enumerate(given)]
    found = []
    for f in (nll, dense):
        with forward_ad.dual_level():
            dual = [
                forward_ad.make_dual(x.detach(), w) for x, w in zip(given, weights, strict=True)
            ]
            found.append(forward_ad.unpack_dual(f(make, *dual)).tangent)
    close(found[0], found[1], 1e-10)


@pytest.mark.parametrize(
    "what",
    ["logdet", "solve", "matmul", "B", "diagonal of U", "dense", "diagonal", "leave one out"],
)
def test_functionals(what: str) -> None:
    """Values, first and second derivatives. Those in x move every point by itself."""
    make, (x, theta, K, Sigma, Y) = leaves("sum and product", 1.0)
    functions: dict[str, Callable[[Any], Tensor]] = {
        "logdet": lambda M: tk.kron_logdet(M, K, Sigma=Sigma),
        "solve": lambda M: tk.kron_solve(M, K, Y, Sigma=Sigma),
        "matmul": lambda M: tk.kron_matmul(M, K, Y, Sigma=Sigma),
        "B": lambda M: tk.inverse_block_diag_sum(M, K, Sigma=Sigma),
        "diagonal of U": lambda M: tk.KroneckerPlusNoise(M, K, Sigma=Sigma).diagonal(),
        "dense": lambda M: tk.KroneckerPlusNoise(M, K, Sigma=Sigma).to_dense(),
        "diagonal": lambda M: tk.inverse_diagonal(M, K, Sigma=Sigma),
        "leave one out": lambda M: tk.leave_one_out(Y, M, K, Sigma=Sigma)[1],
    }
    f = functions[what]
    found = []
    for M in (tk.KernelMatrix(make(theta), x, max_rank=T), make(theta)(x, x)):
        value = f(M)
        weights = normal(*value.shape, seed=5)
        (first,) = grad((value * weights).sum(), x, create_graph=True)
        along = normal(*x.shape, seed=6)
        found.append((value, first, *grad((first * along).sum(), (theta, x))))
    for mine, expected in zip(*found, strict=True):
        close(mine, expected, 1e-8)


@pytest.mark.parametrize("what", ["solve", "matmul"])
def test_second_derivative_of_a_gradient_in_K(what: str) -> None:
    """Third order in all, of which two are in M."""
    make, (x, theta, K, Sigma, Y) = leaves("rbf on a line", 1.0)
    along = normal(*x.shape, seed=6)
    f = {"solve": tk.kron_solve, "matmul": tk.kron_matmul}[what]
    found = []
    for M in (tk.KernelMatrix(make(theta), x, max_rank=T), make(theta)(x, x)):
        A = f(M, K, Y, Sigma=Sigma)
        (gK,) = grad((A * normal(T, D, seed=5)).sum(), K, create_graph=True)
        (first,) = grad((gK * normal(D, D, seed=11)).sum(), x, create_graph=True)
        found.append(grad((first * along).sum(), x)[0])
    close(found[0], found[1], 1e-8)


@pytest.mark.parametrize("what", ["nll", "solve"])
def test_forward_over_forward(what: str) -> None:
    make, (x, theta, K, Sigma, Y) = leaves("rbf on a line", 1.0)
    along = normal(*x.shape, seed=6)
    found = []
    for exact in (False, True):

        def f(x: Tensor, exact: bool = exact) -> Tensor:
            M = make(theta)(x, x) if exact else tk.KernelMatrix(make(theta), x, max_rank=T)
            if what == "solve":
                return tk.kron_solve(M, K, Y, Sigma=Sigma)
            return tk.kron_gaussian_nll(Y, M, K, Sigma=Sigma)

        def df(x: Tensor, f: Any = f) -> Tensor:
            return torch.func.jvp(f, (x,), (along,))[1]

        found.append(torch.func.jvp(df, (x.detach(),), (along,))[1])
    close(found[0], found[1], 1e-8)


@pytest.mark.parametrize("what", ["nll", "inv_quad", "solve", "diagonal of U"])
def test_third_derivatives_are_refused(what: str) -> None:
    make, (x, theta, K, Sigma, Y) = leaves("rbf on a line", 1.0)
    U = tk.KroneckerPlusNoise(tk.KernelMatrix(make(theta), x, max_rank=T), K, Sigma=Sigma)
    functions: dict[str, Callable[[], Tensor]] = {
        "nll": lambda: U.nll(Y),
        "inv_quad": lambda: U.inv_quad_logdet(Y)[0],
        "solve": lambda: U.solve(Y).square().sum(),
        "diagonal of U": lambda: U.diagonal().square().sum(),
    }
    (first,) = grad(functions[what](), x, create_graph=True)
    (second,) = grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives"):
        grad(second.sum(), x)


def test_opcheck() -> None:
    C, X = (normal(5, 3, seed=i).requires_grad_() for i in (1, 2))
    W = normal(3, 3, seed=3).requires_grad_()
    ops = torch.ops.torch_kronlik
    opcheck(ops.kernel_residual.default, (C, W, X.detach(), 2))
    opcheck(ops.limited.default, (X, C.detach(), W.detach(), 1))


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
            return torch.exp(-0.5 * _squares(self.layer(a), self.layer(b)))

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
