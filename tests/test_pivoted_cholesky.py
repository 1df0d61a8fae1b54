"""The pivoted Cholesky factorisation: the factor, the rank that is found, what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import check_close
from devices import DEVICE, opcheck, to_numpy
from problems import LAYOUTS, matern12, normal, rbf, relayout
from scipy.linalg import lapack  # type: ignore[import-untyped]
from torch import Tensor

from torch_kronlik.ops import pivoted_cholesky


def of_rank(T: int, r: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """F Fᵀ with integer entries: of rank r exactly, in either dtype."""
    F = (5 * normal(T, r, seed=seed)).round().clamp(-9, 9).to(dtype)
    return F @ F.mT


def kernel(build: Any, T: int) -> Tensor:
    with torch.device("cpu"):
        M: Tensor = build(T, (), torch.Generator().manual_seed(0))
    return M.to(DEVICE)


RANKS = [(1, 1), (5, 2), (12, 12), (65, 3), (300, 7)]


@pytest.mark.parametrize(("T", "r"), RANKS)
def test_pivoted_cholesky_reproduces_the_matrix(T: int, r: int, dtype: torch.dtype) -> None:
    M = of_rank(T, r, dtype=dtype)
    F, rank = pivoted_cholesky(M, min(T, r + 2))
    assert rank == r
    assert F.shape == (T, min(T, r + 2))
    assert not F[:, r:].any()
    check_close(F @ F.mT, M.double())


@pytest.mark.parametrize("kind", [rbf, matern12])
def test_pivoted_cholesky_equals_lapack(kind: Any) -> None:
    """Largest remaining diagonal entry first, as in LAPACK's dpstrf: the same factor."""
    T = 40
    scales = torch.linspace(1, 2, T)  # no equal diagonal entries, whose order would be arbitrary
    M = scales[:, None] * kernel(kind, T) * scales
    C, order, rank, _ = lapack.dpstrf(to_numpy(M), lower=1, tol=1e-6 * float(M.diagonal().max()))
    F, found = pivoted_cholesky(M, T)
    assert found >= rank
    expected = torch.tensor(C).tril()[:, :rank]
    actual = F[torch.tensor(order).long() - 1, :rank]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("r", [1, 12, 30])
def test_exact_rank_is_found_in_rounded_matrices(r: int, seed: int, dtype: torch.dtype) -> None:
    """F Fᵀ with rounded entries: what is left after r columns is rounding, not another column."""
    F = normal(100, r, seed=seed)
    _, rank = pivoted_cholesky((F @ F.mT).to(dtype), 100)
    assert rank == r


def test_smooth_kernel_is_of_low_rank_to_rounding() -> None:
    M = kernel(rbf, 256)
    F, rank = pivoted_cholesky(M, 32)
    assert 0 < rank <= 32
    rest = M - F @ F.mT
    assert rest.diagonal().abs().sum() <= 256 * 2.0**-51
    assert rest.abs().max() <= 256 * 2.0**-51


def test_the_first_of_equal_pivots(dtype: torch.dtype) -> None:
    eye = torch.eye(70, dtype=dtype)
    assert torch.equal(pivoted_cholesky(eye, 70)[0], eye)


def test_rank_that_is_too_high(dtype: torch.dtype) -> None:
    M = of_rank(20, 5, dtype=dtype)
    for max_rank in range(5):
        assert pivoted_cholesky(M, max_rank)[1] == -1
    assert pivoted_cholesky(M, 5)[1] == 5


HOLLOW = [[0.0, 1, -1, 0], [1, 0, 0, -1], [-1, 0, 0, 1], [0, -1, 1, 0]]
INDEFINITE = {
    "swap": torch.tensor([[0.0, 1], [1, 0]]),
    "correlation of two": torch.tensor([[1.0, 2], [2, 1]]),
    "negative": -torch.eye(3),
    "negative entry": torch.diag(torch.tensor([1.0, 0, -1e-3])),
    "one negative of many": torch.diag(torch.tensor([1.0] * 99 + [-1e-3])),
    "hollow": torch.tensor(HOLLOW),
    # each row's entries cancel against many vectors of ±1
    "repeated hollow": torch.kron(torch.eye(24), torch.tensor(HOLLOW)),
    "hollow everywhere": torch.kron(torch.ones(24, 24), torch.tensor(HOLLOW)),
    "beside a good block": torch.block_diag(torch.ones(4, 4), torch.tensor(HOLLOW)),
    "far below a good block": torch.block_diag(torch.ones(40, 40), torch.tensor(HOLLOW)),
    "no diagonal": torch.ones(6, 6) - torch.eye(6),
    "Hankel": (torch.arange(8)[:, None] + torch.arange(8) == 7).float(),
}


@pytest.mark.parametrize("name", INDEFINITE)
def test_indefinite_matrix_is_refused(name: str, dtype: torch.dtype) -> None:
    for scale in (1.0, 1e-8, 1e8):
        M = scale * INDEFINITE[name].to(dtype)
        for max_rank in (0, 1, 2, len(M)):
            if max_rank <= len(M):
                assert pivoted_cholesky(M, max_rank)[1] == -1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_entry_that_is_not_finite_is_refused(bad: float, dtype: torch.dtype) -> None:
    """In either triangle and on the diagonal; the neighbours in the batch are as without it."""
    good = torch.stack([of_rank(4, r, dtype=dtype) for r in (0, 1, 3)])
    F, _ = pivoted_cholesky(good, 4)
    for i in range(4):
        for j in range(4):
            for b in range(3):
                M = good.clone()
                M[b, i, j] = bad
                found, ranks = pivoted_cholesky(M, 4)
                assert ranks.tolist() == [-1 if k == b else r for k, r in enumerate((0, 1, 3))]
                others = [k for k in range(3) if k != b]
                assert torch.equal(found[others], F[others])


def test_zero_and_empty(dtype: torch.dtype) -> None:
    for shape in ((3, 3), (0, 0), (2, 0, 0), (2, 1, 1)):
        F, rank = pivoted_cholesky(torch.zeros(shape, dtype=dtype), shape[-1])
        assert not rank.any()
        assert not F.any()
        assert F.shape == shape
    F, rank = pivoted_cholesky(torch.zeros(0, 3, 3, dtype=dtype), 2)
    assert F.shape == (0, 3, 2)
    assert rank.shape == (0,)
    for max_rank, size in ((-1, (3, 3)), (1, (3, 4)), (1, (3,))):
        with pytest.raises(RuntimeError, match="pivoted_cholesky"):
            pivoted_cholesky(torch.zeros(size), max_rank)


@pytest.mark.parametrize("how", LAYOUTS)
def test_batch_of_different_ranks_in_every_layout(how: str, dtype: torch.dtype) -> None:
    ranks = [0, 1, 5, 3]
    M = torch.stack([of_rank(30, r, seed=r, dtype=dtype) for r in ranks])
    F, found = pivoted_cholesky(relayout(M, how), 5)
    assert (found == torch.tensor(ranks)).all()
    for k, r in enumerate(ranks):
        alone, rank = pivoted_cholesky(M[k], 5)
        assert rank == r
        assert (F[..., k, :, :] == alone).all()


def test_rounded_symmetry_is_enough() -> None:
    """Only to rounding symmetric, as a computed Gram matrix is."""
    M = of_rank(50, 4) / 7
    M[3, 8] *= 1 + 2.0**-52
    assert pivoted_cholesky(M, 10)[1] == 4


def test_same_bits_whatever_the_threads(dtype: torch.dtype) -> None:
    M = of_rank(600, 6, dtype=dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            found.append(pivoted_cholesky(M, 10))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(F, found[0][0]) and rank == 6 for F, rank in found)


def test_opcheck() -> None:
    opcheck(pivoted_cholesky, (of_rank(6, 2), 3))
    opcheck(pivoted_cholesky, (of_rank(6, 2).expand(2, 6, 6).mT, 6))
