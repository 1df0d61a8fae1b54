"""Whatever is asked of U, in any order: M is factorised once, K and Σ are whitened once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from battery import NOISES, ROUTES, Recorder, leaves
from problems import Problem, make_problem
from torch import Tensor

import torch_kronlik as tk
from torch_kronlik.rules import small

T, D = 8, 3

CALLS: dict[str, Callable[[tk.KroneckerPlusNoise, Problem], Any]] = {
    "nll": lambda U, p: U.nll(p.Y),
    "solve": lambda U, p: U.solve(p.Y),
    "B": lambda U, p: U.inverse_block_diag_sum(),
    "diagonal": lambda U, p: U.inverse_diagonal(),
    "variance": lambda U, p: U.condition(p.Y, p.M[:2], p.M.diagonal()[:2]).variance,
    "covariance": lambda U, p: U.condition(p.Y, p.M[:2], p.M[:2, :2]).covariance_matrix,
    "leave one out": lambda U, p: U.leave_one_out(p.Y)[1],
    "leave one row out": lambda U, p: U.leave_one_row_out(p.Y)[1],
    "sample": lambda U, p: U.sample(),
}
FACTORISING = ("eigen", "eigen_low_rank", "cholesky_factors", "basis_of_root")


def problem(noise: str, differentiable: bool) -> Problem:
    p = make_problem(T, D, noise=noise, kind="rank_deficient")
    for x in leaves(p).values():
        x.requires_grad_(differentiable)
    return p


def counts(p: Problem, M: Any, method: str, names: tuple[str, ...]) -> dict[str, int]:
    """How often each part of a factorisation was called."""
    with Recorder() as recorded:
        U = tk.KroneckerPlusNoise(M, p.K, **p.noise, method=method)
        for name in names:
            result: Tensor = CALLS[name](U, p)
            if result.requires_grad:
                result.sum().backward(retain_graph=True)
    return {name: n for name in (*FACTORISING, "whiten") if (n := recorded.count(name))}


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("method", ROUTES)
def test_once_in_any_order(method: str, noise: str, differentiable: bool) -> None:
    p = problem(noise, differentiable)
    by_route = {"spectral": "eigen", "low_rank": "eigen_low_rank", "cholesky": "cholesky_factors"}
    expected = {by_route[method]: 1, "whiten": 1}
    for first, second in itertools.permutations(CALLS, 2):
        # The Cholesky route has no basis of M: the first sample makes one, once.
        samples = method == "cholesky" and "sample" in (first, second)
        wanted = {**expected, **({"eigen": 1} if samples else {})}
        found = counts(p, p.M, method, (first, second, first, second))
        assert found == wanted, (first, second)


@pytest.mark.parametrize("differentiable", [False, True])
def test_a_root_is_diagonalised_once(differentiable: bool) -> None:
    p = problem("diagonal", differentiable)
    F = torch.randn(T, 2, dtype=torch.float64).requires_grad_(differentiable)
    found = counts(p, tk.LowRankRoot(F), "auto", tuple(CALLS))
    assert found == {"basis_of_root": 1, "whiten": 1}


def test_hessian_products_of_a_small_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirteen of them, one factorisation: none for the value and the gradient alone."""
    made: list[Any] = []

    def counted(*args: Any) -> Any:
        made.append(args)
        return small.factorise_(*args)  # type: ignore[attr-defined]

    monkeypatch.setattr(small, "factorise_", small.factorise, raising=False)
    monkeypatch.setattr(small, "factorise", counted)
    p = problem("diagonal", differentiable=True)
    inputs = [p.M, p.K, p.noise["log_noise"]]
    value = tk.kron_gaussian_nll(p.Y, p.M, p.K, **p.noise)
    torch.autograd.grad(value, inputs, retain_graph=True)
    assert not made
    first = torch.autograd.grad(value, inputs, create_graph=True)
    for i in range(13):
        torch.autograd.grad(first[0].flatten()[i], inputs, retain_graph=True)
    assert len(made) == 1


def test_information_of_a_low_rank_factorisation() -> None:
    p = problem("full", differentiable=False)

    def model(q: dict[str, Tensor]) -> tk.KroneckerPlusNoise:
        return tk.KroneckerPlusNoise(
            p.M * q["scale"], p.K, Sigma=p.noise["Sigma"], method="low_rank"
        )

    with Recorder() as recorded:
        tk.fisher_information(model, {"scale": torch.ones((), dtype=torch.float64)})
    assert recorded.count("eigen_low_rank") == recorded.count("whiten") == 1
    assert recorded.count("eigen") == 0
