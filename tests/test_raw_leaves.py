"""Every function is one of the symmetric parts of M, K and Sigma, on every route.

So gradcheck passes as users call it, on the arguments themselves, and a matrix that is not
symmetric gives what its symmetric part gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from battery import NOISES, ROUTES
from problems import make_problem
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

import torch_kronlik as tk
from torch_kronlik import reference

Call = Callable[..., Tensor]

FUNCTIONS: dict[str, Call] = {
    "kron_gaussian_nll": lambda lib, Y, M, K, **o: lib.kron_gaussian_nll(Y, M, K, **o),
    "kron_solve": lambda lib, Y, M, K, **o: lib.kron_solve(M, K, Y, **o),
    "kron_logdet": lambda lib, Y, M, K, **o: lib.kron_logdet(M, K, **o),
    "inverse_block_diag_sum": lambda lib, Y, M, K, **o: lib.inverse_block_diag_sum(M, K, **o),
    "inverse_diagonal": lambda lib, Y, M, K, **o: lib.inverse_diagonal(M, K, **o),
    "leave_one_out": lambda lib, Y, M, K, **o: lib.leave_one_out(Y, M, K, **o)[0],
    "leave_one_row_out": lambda lib, Y, M, K, **o: lib.leave_one_row_out(Y, M, K, **o)[1],
    "condition": lambda lib, Y, M, K, **o: (
        lib.condition(Y, M, K, M[..., :2, :] * 0 + 0.3, M[..., 0, :2] * 0 + 2, **o).row_covariance
    ),
}
each_noise = pytest.mark.parametrize("noise", NOISES)
each_method = pytest.mark.parametrize("method", ["auto", *ROUTES])


def arguments(T: int, D: int, noise: str) -> tuple[list[Tensor], str]:
    p = make_problem(T, D, noise=noise, seed=6)
    (name,) = p.noise
    return [p.Y, p.M, p.K, p.noise[name]], name


@each_noise
@each_method
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck_on_the_arguments(function: str, method: str, noise: str) -> None:
    values, name = arguments(4, 2, noise)

    def f(Y: Tensor, M: Tensor, K: Tensor, s: Tensor) -> Tensor:
        return FUNCTIONS[function](tk, Y, M, K, method=method, **{name: s})

    leaves = tuple(x.clone().requires_grad_() for x in values)
    assert gradcheck(f, leaves, check_forward_ad=True)
    assert gradgradcheck(f, leaves)


@each_noise
@pytest.mark.parametrize(("T", "D"), [(40, 2), (3, 17)])
def test_gradcheck_of_larger_problems(T: int, D: int, noise: str) -> None:
    """Beyond small problems and beyond the native whitening."""
    values, name = arguments(T, D, noise)
    leaves = tuple(x.clone().requires_grad_() for x in values)

    def f(Y: Tensor, M: Tensor, K: Tensor, s: Tensor) -> Tensor:
        return tk.kron_gaussian_nll(Y, M, K, **{name: s})

    assert gradcheck(f, leaves, fast_mode=True, check_forward_ad=True)


def skewed(X: Tensor, size: float) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(1)
    noise = torch.randn(X.shape, dtype=X.dtype, device="cpu", generator=generator).to(X.device)
    return X + size * X.abs().max() * (noise - noise.mT)


@each_noise
@pytest.mark.parametrize("size", [1e-15, 0.2])
@pytest.mark.parametrize(("T", "D"), [(5, 3), (4, 17), (100, 2)])
def test_asymmetry_changes_nothing(T: int, D: int, size: float, noise: str) -> None:
    """Values and gradients of every function on every route, against the dense reference."""
    (Y, M, K, s), name = arguments(T, D, noise)
    values = [Y, skewed(M, size), skewed(K, size), skewed(s, size) if noise == "full" else s]

    def results(library: Any, f: Call, **options: Any) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in values]
        value = f(library, *leaves[:3], **{name: leaves[3]}, **options)
        return [value, *grad(value.square().sum(), leaves, materialize_grads=True)]

    for what, f in FUNCTIONS.items():
        if T > 50 and what.startswith(("leave", "condition")):
            continue
        expected = results(reference, f)
        for method in ("auto", *ROUTES):
            for i, (a, b) in enumerate(zip(results(tk, f, method=method), expected, strict=True)):
                error = float((a - b).detach().abs().max()) / max(
                    float(b.detach().abs().max()), 1e-12
                )
                assert error < 1e-7, f"{what}, {method}, result {i}: {error:.1e}"


@each_noise
def test_product_of_any_square_matrices(noise: str) -> None:
    """U·Y alone takes the matrices as they stand, with the plain gradient."""
    (Y, M, K, s), name = arguments(4, 3, noise)
    values = [Y, skewed(M, 0.3), skewed(K, 0.3), skewed(s, 0.3) if noise == "full" else s]

    def f(Y: Tensor, M: Tensor, K: Tensor, s: Tensor) -> Tensor:
        return tk.kron_matmul(M, K, Y, **{name: s})

    leaves = tuple(x.clone().requires_grad_() for x in values)
    expected = reference.kron_matmul(values[1], values[2], values[0], **{name: values[3]})
    torch.testing.assert_close(f(*values), expected)
    assert gradcheck(f, leaves, check_forward_ad=True)
    assert gradgradcheck(f, leaves, check_fwd_over_rev=True)
