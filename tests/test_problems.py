"""The problem generator and the comparison are themselves what they say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import (
    KINDS,
    LAYOUTS,
    Problem,
    condition_number,
    dense_noise,
    from_roots,
    make_problem,
    make_roots,
    relayout,
)
from torch import Tensor

RANKS = {"rank_one_M": (1, 3), "rank_one_K": (6, 1), "zero_M": (0, 3), "zero_K": (6, 0)}
RANKS |= {"rank_deficient": (3, 2), "replicates": (3, 3)}


@pytest.mark.parametrize("noise", ["full", "diagonal"])
@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_semidefinite_and_of_the_rank_named(kind: str, noise: str) -> None:
    p = make_problem(6, 3, kind=kind, noise=noise)
    for X in (p.M, p.K, dense_noise(p)):
        assert torch.equal(X, X.mT)
        eigenvalues = torch.linalg.eigvalsh(X)
        assert eigenvalues[0] >= -1e-14 * eigenvalues[-1]
    torch.linalg.cholesky(dense_noise(p))
    ranks = (int(torch.linalg.matrix_rank(p.M)), int(torch.linalg.matrix_rank(p.K)))
    assert ranks == RANKS.get(kind, (6, 3))


def test_repeated_blocks_have_repeated_eigenvalues() -> None:
    p = make_problem(6, 4, kind="repeated_blocks")
    torch.testing.assert_close(
        torch.linalg.eigvalsh(p.M), torch.tensor([1.0, 1, 1, 3, 3, 3]).double()
    )


def test_seed_gives_the_same_problem_in_every_dtype(dtype: torch.dtype) -> None:
    p, q = make_problem(4, 3, dtype=dtype), make_problem(4, 3)
    assert torch.equal(p.M, q.M.to(dtype))
    assert not torch.equal(make_problem(4, 3, seed=1).M, q.M)


@pytest.mark.parametrize("kind", ["generic", "spread_noise", "tiny_noise"])
def test_condition_number_bounds_the_dense_one(kind: str) -> None:
    p = make_problem(4, 3, kind=kind, noise="diagonal")
    w = (-p.noise["log_noise"] / 2).exp()
    K = w[:, None] * p.K * w
    U = torch.kron(p.M, K) + torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(condition_number(p), float(torch.linalg.eigvalsh(U)[-1]))


def test_roots_give_definite_or_singular_factors() -> None:
    p = from_roots(*make_roots(4, 3))
    assert torch.linalg.eigvalsh(p.M.detach())[0] >= 1.0
    thin = from_roots(*make_roots(4, 3, rank=1, noise="diagonal"), noise="diagonal")
    assert int(torch.linalg.matrix_rank(thin.M.detach())) == 1
    assert list(thin.noise) == ["log_noise"]


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 4), (4,)])
@pytest.mark.parametrize("how", LAYOUTS)
def test_relayout_keeps_values_and_changes_strides(how: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    y = relayout(x, how)
    assert torch.equal(y, x.expand_as(y))
    unusual = {
        "contiguous": y.is_contiguous(),
        "transposed": y.dim() == 1 or y.stride(-2) == 1,
        "strided": y.stride(-1) == 2,
        "offset": y.storage_offset() == 1,
        "batch_inside": y.stride(0) == 1,
        "expanded": y.stride(0) == 0,
    }
    assert unusual[how]


@pytest.mark.parametrize("wrong", [1e-3, torch.nan, torch.inf])
def test_assert_close_refuses(wrong: float, assert_close: Callable[..., None]) -> None:
    expected = torch.ones(2, 3, 3, dtype=torch.float64)
    actual = expected.clone()
    assert_close(actual, expected)
    actual[1, 2, 0] += wrong
    with pytest.raises(AssertionError, match="largest error"):
        assert_close(actual, expected)


def test_assert_close_scales_matrix_by_matrix(assert_close: Callable[..., None]) -> None:
    expected: Tensor = torch.tensor([1.0, 1e-10], dtype=torch.float64)[:, None, None].expand(
        2, 2, 2
    )
    with pytest.raises(AssertionError, match="largest error"):
        assert_close(expected * torch.tensor([1.0, 1 + 1e-6])[:, None, None], expected)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(expected[0], expected)
    with pytest.raises(AssertionError, match="nothing would be checked"):
        assert_close(expected, expected, condition=1e14)


def test_unknown_names_raise() -> None:
    with pytest.raises(ValueError, match="noise: expected"):
        make_problem(2, 2, noise="none")
    with pytest.raises(ValueError, match="how: expected"):
        relayout(torch.zeros(2), "sideways")
    assert isinstance(make_problem(2, 2), Problem)
