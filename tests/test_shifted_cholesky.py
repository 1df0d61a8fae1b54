"""The factors of λ_j M + I and what gradients need of their inverses: by LAPACK and by torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from devices import DEVICE, opcheck
from problems import LAYOUTS, make_problem, relayout
from torch import Tensor

import torch_kronlik as tk
from torch_kronlik import ops
from torch_kronlik.factor import shifted as cholesky

Check = Callable[..., None]
native = pytest.mark.skipif(
    not ops.HAS_LAPACK or DEVICE.type != "cpu",
    reason="no LAPACK from this torch, or not for its CPU",
)


def problem(T: int, n: int, dtype: torch.dtype, batch: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
    M = make_problem(T, 1, batch=batch, dtype=dtype).M
    return M, torch.linspace(0.1, 20, n, dtype=dtype).expand(*batch, n)


def shifted(M: Tensor, lam: Tensor) -> Tensor:
    eye = torch.eye(M.shape[-1], dtype=M.dtype)
    return lam[..., :, None, None] * M[..., None, :, :] + eye


@native
@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0,)])
@pytest.mark.parametrize(("T", "n"), [(0, 2), (1, 1), (7, 0), (7, 3), (65, 5), (130, 2)])
def test_factors_and_inverses(
    T: int, n: int, batch: tuple[int, ...], dtype: torch.dtype, assert_close: Check
) -> None:
    M, lam = problem(T, n, dtype, batch)
    C = shifted(M, lam).double()
    L, logdet, status = ops.shifted_cholesky(M, lam)
    assert not bool(status.any())
    assert_close(L @ L.mT, C, condition=1e3)
    assert torch.equal(L, L.tril())
    assert_close(logdet, torch.linalg.cholesky(C).diagonal(dim1=-2, dim2=-1).log().sum(-1) * 2,
                 condition=1e3, dims=1)  # fmt: skip
    rows, with_M, plain = ops.shifted_inverses(L, M, lam)
    inverses = torch.cholesky_inverse(torch.linalg.cholesky(C)) if C.numel() else C
    assert_close(rows, (lam.double()[..., None, None] * inverses).sum(-3), condition=1e3)
    assert_close(with_M, (inverses * M.double()[..., None, :, :]).sum((-2, -1)), condition=1e3,
                 dims=1)  # fmt: skip
    assert_close(plain, inverses.diagonal(dim1=-2, dim2=-1).sum(-1), condition=1e3, dims=1)


@native
@pytest.mark.parametrize("how", LAYOUTS)
def test_any_layout(how: str) -> None:
    M, lam = problem(9, 3, torch.float64, (2, 3))
    given, expected = ops.shifted_cholesky(relayout(M, how), lam), ops.shifted_cholesky(M, lam)
    for actual, known in zip(given[:2], expected[:2], strict=True):
        torch.testing.assert_close(actual, known.expand(actual.shape), rtol=0, atol=0)
    inverses = ops.shifted_inverses(given[0], relayout(M, how), lam)
    for actual, known in zip(inverses, ops.shifted_inverses(expected[0], M, lam), strict=True):
        torch.testing.assert_close(actual, known.expand(actual.shape), rtol=0, atol=1e-14)


@native
def test_result_does_not_depend_on_how_many_run_together() -> None:
    """One matrix for each thread, or all threads for one after the other."""
    M, lam = problem(40, 5, torch.float64)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 8):
            torch.set_num_threads(n)
            L = ops.shifted_cholesky(M, lam)[0]
            results.append((L, *ops.shifted_inverses(L, M, lam)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_without_lapack_torch_gives_the_same(
    batch: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, assert_close: Check
) -> None:
    def everything() -> list[Tensor]:
        p = make_problem(8, 3, batch=batch, dtype=dtype, kind="rank_deficient")
        leaves = [x.requires_grad_() for x in (p.Y, p.M, p.K, *p.noise.values())]
        value = tk.kron_gaussian_nll(*leaves[:3], Sigma=leaves[3], method="cholesky")
        return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]

    first = everything()
    monkeypatch.setattr(ops, "HAS_LAPACK", False)
    for a, b in zip(first, everything(), strict=True):
        assert_close(a, b.double(), condition=1e3, dims=min(a.dim(), 2))


@native
@pytest.mark.parametrize("lapack", [True, False])
def test_indefinite_and_overflowing_matrices(lapack: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "HAS_LAPACK", lapack)
    M, lam = problem(5, 2, torch.float64, (3,))
    with pytest.raises(torch.linalg.LinAlgError, match=r"not positive definite \(batch element"):
        cholesky.factors(-100 * M, lam)
    with pytest.raises(OverflowError):
        cholesky.factors(1e200 * M, 1e200 * lam)


@native
def test_opcheck() -> None:
    M, lam = problem(6, 2, torch.float64, (2,))
    opcheck(ops.shifted_cholesky, (M, lam))
    opcheck(ops.shifted_inverses, (ops.shifted_cholesky(M, lam)[0], M, lam))
