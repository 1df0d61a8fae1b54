"""Derivatives of M by columns, against those of the dense matrix that the kernel makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import opcheck
from kernel_problems import D, T, close, dense, each_case, each_noise, leaves, nll
from problems import normal
from torch import Tensor
from torch.autograd import forward_ad, grad

import torch_kronlik as tk


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
