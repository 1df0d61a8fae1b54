"""A constant M: the same model in the basis of its eigenvectors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from battery import gradients
from problems import Problem, condition_number, make_problem
from torch import Tensor

import torch_kronlik as tk
from torch_kronlik import reference

Check = Callable[..., None]


def decoupled(p: Problem) -> Tensor:
    rows, Z = tk.symmetric_eigen(p.M.detach()).decouple(p.Y)
    return tk.kron_gaussian_nll(Z, rows, p.K, **p.noise).sum(-1)


@pytest.mark.parametrize("noise", ["diagonal", "full"])
@pytest.mark.parametrize("kind", ["generic", "rank_deficient", "identity"])
def test_decoupled_rows_have_the_same_likelihood(
    kind: str, noise: str, dtype: torch.dtype, assert_close: Check
) -> None:
    p = make_problem(7, 3, kind=kind, noise=noise, dtype=dtype)
    wide = Problem(
        p.Y.double(), p.M.double(), p.K.double(), {k: x.double() for k, x in p.noise.items()}
    )
    actual = gradients(lambda q: [decoupled(q)], p)
    expected = gradients(
        lambda q: [reference.kron_gaussian_nll(q.Y, q.M.detach(), q.K, **q.noise)], wide
    )
    condition = condition_number(p)
    value = reference.kron_gaussian_nll(wide.Y, wide.M, wide.K, **wide.noise)
    assert_close(decoupled(p), value, condition=condition, dims=0)
    for name, g in actual.items():
        assert_close(g, expected[name], condition=condition, dims=min(g.dim(), 2))


def test_batches(assert_close: Check) -> None:
    p = make_problem(5, 2, batch={"Y": (4, 3), "M": (3,), "K": (), "noise": ()})
    expected = tk.kron_gaussian_nll(p.Y, p.M, p.K, **p.noise)
    assert_close(decoupled(p), expected, condition=condition_number(p), dims=0)


def test_data_that_do_not_fit() -> None:
    eigen = tk.symmetric_eigen(torch.eye(3))
    with pytest.raises(ValueError, match=r"Y must have shape .* T = 3 \(from M\), got \(2, 4\)"):
        eigen.decouple(torch.zeros(2, 4))
    with pytest.raises(TypeError, match="Y"):
        eigen.decouple(torch.zeros(3, 4, dtype=torch.float64))
    with pytest.raises(
        ValueError, match=r"the batch shapes must broadcast, got Y \(2,\), M \(3,\)"
    ):
        tk.symmetric_eigen(torch.eye(3).expand(3, 3, 3)).decouple(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"M.eigenvectors must be finite"):
        tk.SymmetricEigen(torch.ones(3), torch.full((3, 3), torch.nan)).decouple(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"M.eigenvalues must have shape \(3,\)"):
        tk.SymmetricEigen(torch.ones(5), torch.eye(3)).decouple(torch.zeros(3, 4))


@pytest.mark.parametrize("method", ["auto", "spectral", "cholesky", "low_rank"])
def test_every_method_is_spectral_for_what_is_diagonalised(method: str) -> None:
    eigen = tk.symmetric_eigen(torch.eye(3))
    U = tk.KroneckerPlusNoise(eigen, torch.eye(2), log_noise=torch.zeros(2), method=method)
    assert U.method_used == "spectral"
