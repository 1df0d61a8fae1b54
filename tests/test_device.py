"""The same numbers on another device as on the CPU, in every function and gradient.

Collected with ``--device`` alone, see conftest.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from battery import (
    ALL,
    FUNCTIONS,
    NOISES,
    ROUTES,
    gradients,
    kernels,
    laid_out,
    map_problem,
    moved,
    value_and_gradients,
)
from conftest import check_close
from devices import generator, waits
from problems import Problem, condition_number, make_new_rows, make_problem
from torch import Tensor
from torch.distributions import kl_divergence

import torch_kronlik as tk
from torch_kronlik import ops

each_noise = pytest.mark.parametrize("noise", NOISES)


SIZES = [(6, 3), (64, 16), (40, 17), (130, 2), (150, 9)]  # each route, both ways to whiten
HARD = ["generic", "rank_one_M", "zero_K", "repeated_blocks", "rbf", "spread_noise"]


@each_noise
@pytest.mark.parametrize("method", ["auto", *ROUTES])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_function_and_gradient_as_on_the_cpu(
    size: tuple[int, int], method: str, noise: str, dtype: torch.dtype, device: torch.device
) -> None:
    p = make_problem(*size, noise=noise, dtype=dtype, device="cpu")
    check_as_on_the_cpu(p, device, method)


@each_noise
@pytest.mark.parametrize("kind", HARD)
def test_hard_problems_as_on_the_cpu(
    kind: str, noise: str, dtype: torch.dtype, device: torch.device
) -> None:
    for size in ((7, 3), (100, 3)):
        p = make_problem(*size, kind=kind, noise=noise, dtype=dtype, batch=(2,), device="cpu")
        if condition_number(p) * torch.finfo(dtype).eps < 1e-4:
            check_as_on_the_cpu(p, device, "auto")


def check_as_on_the_cpu(p: Problem, device: torch.device, method: str) -> None:
    wide, there = map_problem(torch.Tensor.double, p), moved(p, device)
    kappa, floor = condition_number(p), float(p.Y.shape[-2] * p.Y.shape[-1])
    for name, f in ALL.items():
        options = {"method": method} if name in FUNCTIONS else {}
        run = partial(f.structured, **options)
        for x, y in zip(run(there), run(wide), strict=True):
            assert x.device == there.Y.device
            check_close(x, y, condition=kappa, dims=f.dims, floor=0 if f.dims else floor)
        found, expected = gradients(run, there), gradients(run, wide)
        for key, x in found.items():
            dims = 1 if key == "log_noise" else 2
            check_close(x, expected[key], condition=kappa, quantity="gradient", dims=dims)


def others(p: Problem, rows: Any) -> dict[str, Tensor]:
    """What is built on these functions, by name."""
    U = tk.KroneckerPlusNoise(p.M, p.K, **p.noise)
    d = tk.KroneckerNormal(0 * p.Y, p.M, p.K, **p.noise)
    post = tk.condition(p.Y, p.M, p.K, rows.M_cross, rows.M_test, **p.noise)
    s, _ = tk.symmetric_eigen(p.M)
    a = p.K[0] / 3

    def scaled(c: Tensor) -> tk.KroneckerPlusNoise:
        return tk.KroneckerPlusNoise(c[0] * p.M, c[1] * p.K, **p.noise)

    return {
        "diagonal": U.diagonal(), "to_dense": U.to_dense(), "matmul": U.matmul(p.Y),
        "log_prob": d.log_prob(p.Y), "entropy": d.entropy(), "variance": d.variance,
        "kl": kl_divergence(d, tk.KroneckerNormal(p.Y, p.M, 2 * p.K, **p.noise)),
        "mean": post.mean, "observation_variance": post.observation_variance,
        "row_covariance": post.row_covariance, "test_log_prob": post.log_prob(rows.Y_test),
        "leave_one_out": torch.stack(tk.leave_one_out(p.Y, p.M, p.K, **p.noise)),
        "leave_one_row_out": tk.leave_one_row_out(p.Y, p.M, p.K, **p.noise)[1],
        "eigenvalues": s, "block": tk.block_diag(p.M, 1, 2), "blocks": tk.block_diag_sum(p.M, 2),
        "fisher": tk.fisher_information(scaled, p.K.new_ones(2)).matrix,
        "expm": tk.expm_diag_multiply(a, p.K, a), "jacobian": tk.expm_diag_jacobian(a, p.K, a),
    }  # fmt: skip


@each_noise
def test_what_is_built_on_them_as_on_the_cpu(
    noise: str, dtype: torch.dtype, device: torch.device
) -> None:
    rows = make_new_rows(20, 4, 3, noise=noise, dtype=dtype, device="cpu")
    there = rows._replace(
        problem=moved(rows.problem, device),
        **{k: getattr(rows, k).to(device) for k in rows._fields[1:]},
    )
    found, expected = others(there.problem, there), others(rows.problem, rows)
    rounding = 1e4 * torch.finfo(dtype).eps
    for name, x in found.items():
        assert x.device == there.problem.Y.device, name
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(
            x.cpu(), expected[name], rtol=rounding, atol=rounding * scale, msg=name
        )


@each_noise
def test_loss_and_samples(noise: str, device: torch.device) -> None:
    p = make_problem(20, 3, noise=noise)
    loss = tk.KroneckerGaussianNLLLoss(3).to(device, torch.float64)
    twin = tk.KroneckerGaussianNLLLoss(3, device="cpu").double()
    torch.testing.assert_close(loss(p.Y, p.M, p.K).cpu(), twin(*moved(p, "cpu")[:3]))
    U = tk.KroneckerPlusNoise(p.M, p.K, **p.noise)
    draws = U.sample((20_000,), generator=generator(0)).flatten(-2)
    dense = U.to_dense()
    assert draws.device == dense.device
    assert (torch.cov(draws.mT) - dense).abs().max() < 0.1 * dense.abs().max()


@pytest.mark.parametrize("where", ["cpu", None])
def test_draws_are_where_the_tensors_are(where: str | None) -> None:
    """Not on torch's default device, which is the one of the test run."""
    rows = make_new_rows(6, 2, 3, device=where)
    p = rows.problem
    post = tk.condition(p.Y, p.M, p.K, rows.M_cross, rows.M_test, **p.noise)
    U = tk.KroneckerPlusNoise(p.M, p.K, **p.noise)
    for x in (U.sample(), tk.KroneckerNormal(p.Y, p.M, p.K, **p.noise).sample(), post.rsample()):
        assert x.device == p.Y.device


def test_other_devices_are_refused_by_name(device: torch.device) -> None:
    p = make_problem(4, 2)
    with pytest.raises(ValueError, match="K must be on the device of M"):
        tk.kron_gaussian_nll(p.Y, p.M, p.K.cpu(), **p.noise)
    with pytest.raises(RuntimeError, match="on different devices"):
        ops.kron_diag_sums(p.M[0], p.K[0].cpu())


MIXED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "add": torch.add, "matmul": torch.matmul, "einsum": partial(torch.einsum, "ij,jk->ik"),
    "cat": lambda x, y: torch.cat([x, y]), "where": lambda x, y: torch.where(x > 0, x, y),
    "gather": lambda x, y: x.gather(0, y.long()),
    "solve_triangular": lambda x, y: torch.linalg.solve_triangular(x, y, upper=True),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_the_cpu_do_not_mix_with_the_devices(name: str) -> None:
    """As the other tests take for granted."""
    x = torch.ones(2, 2)
    for pair in ((x, x.cpu()), (x.cpu(), x)):
        with pytest.raises(RuntimeError, match="same device"):
            MIXED[name](*pair)


@pytest.mark.parametrize("how", ["transposed", "strided", "offset", "batch_inside"])
def test_layouts_of_every_kernel(how: str, dtype: torch.dtype, device: torch.device) -> None:
    p = make_problem(32, 4, batch=(6,), dtype=dtype)
    found, expected = kernels(laid_out(p, how)), kernels(p)
    for x, y in zip(found, expected, strict=True):
        check_close(x, y.double(), condition=100.0)


# ---------------------------------------------------------------- waiting for the device


@each_noise
def test_operators_never_wait(noise: str, device: torch.device) -> None:
    p = make_problem(32, 4, batch=(6,), noise=noise)
    for waiting in (lambda: torch.ones(1).item(), lambda: torch.ones(1).equal(torch.ones(1))):
        assert waits(waiting) == 1, "waits are counted"
    assert waits(lambda: kernels(p)) == 0
    assert waits(lambda: tk.block_diag_sum(p.M, 8)) == 0


@each_noise
def test_functions_wait_for_their_checks_alone(noise: str) -> None:
    """Once for a product's result and for a small problem's status. With constant rows thrice: for
    the whitening's status, for the eigenvalues, for the results."""
    p = make_problem(32, 4, batch=(6,), noise=noise)
    M = tk.symmetric_eigen(p.M)
    assert waits(lambda: tk.kron_matmul(p.M, p.K, p.Y, **p.noise)) == 1
    assert waits(lambda: value_and_gradients(p)) == 1
    assert waits(lambda: value_and_gradients(p, M)) == 3
