"""A smooth kernel's matrix keeps its low rank when its entries are rounded, as they always are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from battery import gradients
from problems import Problem, condition_number, make_problem, normal
from torch import Tensor

import torch_kronlik as tk
from torch_kronlik.ops import pivoted_cholesky

Check = Callable[..., None]


def rounded_rbf(T: int, dtype: torch.dtype, seed: int, eps: float = 2.0) -> Tensor:
    """A Gram matrix whose entries are off by some eps, symmetrically."""
    M = make_problem(T, 1, kind="rbf", dtype=dtype, seed=seed).M
    E = normal(T, T, seed=seed).to(dtype).triu(1)
    return M * (1 + eps * torch.finfo(dtype).eps * (E + E.mT))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("T", [128, 400])
def test_rank_is_found(T: int, seed: int, dtype: torch.dtype) -> None:
    exact = pivoted_cholesky(make_problem(T, 1, kind="rbf", dtype=dtype, seed=seed).M, T)[1]
    found = pivoted_cholesky(rounded_rbf(T, dtype, seed), T // 2)[1]
    assert 0 < int(found) <= 40
    assert abs(int(found) - int(exact)) <= 8


def test_distances_by_a_quadratic_expansion() -> None:
    """|x|² − 2xᵀy + |y|², as libraries compute them: entries off by a dozen eps."""
    x = torch.linspace(0, 1, 300, dtype=torch.float64)[:, None]
    expanded = torch.cdist(x, x, compute_mode="use_mm_for_euclid_dist").square()
    M = torch.exp(-50 * expanded)
    U = tk.KroneckerPlusNoise(M, torch.eye(2).double(), log_noise=torch.zeros(2).double())
    assert U.method_used == "low_rank"


def test_same_accuracy_as_the_eigendecomposition(dtype: torch.dtype, assert_close: Check) -> None:
    """The dropped rest is rounding: value and gradients agree as well as they do on exact M."""
    p = make_problem(120, 3, kind="rbf", dtype=dtype)
    p = Problem(p.Y, rounded_rbf(120, dtype, 0), p.K, p.noise)

    def value_and_gradients(method: str) -> list[Tensor]:
        def value(q: Problem) -> list[Tensor]:
            return [tk.kron_gaussian_nll(q.Y, q.M, q.K, **q.noise, method=method)]

        assert tk.KroneckerPlusNoise(p.M, p.K, **p.noise, method=method).method_used == method
        return [*value(p), *gradients(value, p).values()]

    pairs = zip(value_and_gradients("low_rank"), value_and_gradients("spectral"), strict=True)
    for actual, expected in pairs:
        dims = min(actual.dim(), 2)
        assert_close(actual, expected.double(), condition=condition_number(p), dims=dims)


def test_indefinite_matrices_are_still_refused() -> None:
    M = rounded_rbf(128, torch.float64, 0)
    M[3, 5] = M[5, 3] = M[3, 5] + 1e-8
    assert int(pivoted_cholesky(M, 64)[1]) == -1


@pytest.mark.parametrize("eps", [5.0, 20.0, 60.0])
def test_a_small_multiple_of_the_identity_is_part_of_M(eps: float, dtype: torch.dtype) -> None:
    """As it is added to many a kernel's diagonal: no rounding, though not much larger."""
    jitter = eps * torch.finfo(dtype).eps
    M = make_problem(200, 1, kind="rbf", dtype=torch.float64).M + jitter * torch.eye(200).double()
    U = tk.KroneckerPlusNoise(
        M.to(dtype), torch.eye(2, dtype=dtype), log_noise=torch.full((2,), -7.0, dtype=dtype)
    )
    assert U.method_used != "low_rank"
