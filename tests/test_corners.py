"""Corners where a route, a mapped argument or a narrow dtype once gave a wrong answer."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from problems import make_problem
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

import torch_kronlik as tk
from torch_kronlik import reference

METHODS = ["spectral", "cholesky"]


def test_eigenvalue_beyond_float32_is_not_silently_infinite() -> None:
    s = torch.full((2,), -89.0)
    with pytest.raises(OverflowError):
        tk.kron_solve(torch.eye(3), torch.eye(2), torch.ones(3, 2), log_noise=s)


def test_batch_of_M_stays_where_K_is_zero() -> None:
    p = make_problem(5, 2, batch={"Y": (), "M": (2,), "K": (), "noise": ()}, kind="zero_K")
    found = tk.kron_inv_quad_logdet(p.M, p.K, p.Y, **p.noise, method="cholesky")
    expected = reference.kron_inv_quad_logdet(p.M, p.K, p.Y, **p.noise)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)
    A = tk.kron_solve(p.M, p.K, p.Y, **p.noise, method="cholesky")
    torch.testing.assert_close(A, reference.kron_solve(p.M, p.K, p.Y, **p.noise))


@pytest.mark.parametrize("method", METHODS)
def test_mapped_data_and_a_gradient_that_ignores_it(method: str) -> None:
    p = make_problem(4, 3)
    Ys = torch.stack([p.Y, 2 * p.Y])

    def logdet_gradient(Y: Tensor) -> Tensor:
        def logdet(K: Tensor) -> Tensor:
            return tk.kron_inv_quad_logdet(p.M, K, Y, **p.noise, method=method)[1]

        return grad(logdet)(p.K)

    expected = grad(lambda K: reference.kron_logdet(p.M, K, **p.noise))(p.K)
    torch.testing.assert_close(vmap(logdet_gradient)(Ys), torch.stack([expected] * 2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", [0, 1])
def test_one_cotangent_mapped(which: int, method: str) -> None:
    p = make_problem(4, 3)
    gs, one = torch.tensor([1.0, -2.0], dtype=p.Y.dtype), torch.ones((), dtype=p.Y.dtype)

    def pulled(module: Any, **method: str) -> Tensor:
        _, pull = vjp(lambda K: module.kron_inv_quad_logdet(p.M, K, p.Y, **p.noise, **method), p.K)
        pair = (lambda g: (g, one)) if which == 0 else (lambda g: (one, g))
        return vmap(lambda g: pull(pair(g))[0])(gs)

    torch.testing.assert_close(pulled(tk, method=method), pulled(reference))


@pytest.mark.parametrize("name", ["kron_logdet", "kron_matmul"])
def test_forward_mode_in_a_constant_factor_is_refused(name: str) -> None:
    p = make_problem(4, 3)
    s, P = tk.symmetric_eigen(p.M)
    data = () if name == "kron_logdet" else (p.Y,)
    with pytest.raises(ValueError, match="SymmetricEigen is a constant"):
        jvp(
            lambda s: getattr(tk, name)(tk.SymmetricEigen(s, P), p.K, *data, **p.noise),
            (s,),
            (torch.ones_like(s),),
        )


@pytest.mark.parametrize("name", ["inverse_diagonal", "inverse_block_diag_sum"])
def test_value_does_not_depend_on_a_gradient_being_possible(name: str) -> None:
    """exp(90) is beyond float32, exp(-90) is not."""
    s = torch.full((2,), 90.0)
    plain = getattr(tk, name)(torch.eye(3), torch.eye(2), log_noise=s)
    value = getattr(tk, name)(torch.eye(3), torch.eye(2), log_noise=s.clone().requires_grad_())
    assert torch.equal(value.detach(), plain)


def test_factorised_in_inference_mode_and_differentiated_later() -> None:
    p = make_problem(5, 3)
    K = p.K.clone().requires_grad_()
    U = tk.KroneckerPlusNoise(p.M, K, **p.noise, method="cholesky")
    with torch.inference_mode():
        U.inverse_diagonal()
    (found,) = torch.autograd.grad(U.inverse_diagonal().sum(), K)
    expected = grad(lambda K: reference.inverse_diagonal(p.M, K, **p.noise).sum())(p.K)
    torch.testing.assert_close(found, expected)


def test_threads_share_one_object() -> None:
    p = make_problem(4, 3)
    failures: list[BaseException] = []

    def use(U: tk.KroneckerPlusNoise) -> None:
        try:
            U.solve(p.Y)
        except RuntimeError as failure:
            failures.append(failure)

    for _ in range(50):
        U = tk.KroneckerPlusNoise(p.M, p.K, **p.noise)
        threads = [threading.Thread(target=use, args=(U,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_no_outputs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"K must have shape .* with D >= 1"):
        tk.kron_logdet(torch.eye(3), torch.zeros(0, 0), log_noise=torch.zeros(0))
