"""Sigma with zero variances, down to none at all: exact wherever U is positive definite."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import make_problem, normal
from torch import Tensor
from torch.autograd import grad
from torch.func import jacfwd, jacrev

import torch_kronlik as tk

T, D = 5, 3
SIGMAS = {
    "none": torch.zeros(D, D),
    "one exact output": torch.diag(torch.tensor([0.0, 0.3, 0.2])),
    "rank one": torch.ones(D, D),
}
each_Sigma = pytest.mark.parametrize("name", SIGMAS)


def inputs(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p = make_problem(T, D, kind="matern12")
    return p.Y, p.M, p.K, SIGMAS[name].to(p.Y)


def dense(Y: Tensor, M: Tensor, K: Tensor, Sigma: Tensor) -> Tensor:
    M, K, Sigma = ((X + X.mT).contiguous() / 2 for X in (M, K, Sigma))
    eye = torch.eye(T, dtype=Y.dtype)
    L = torch.linalg.cholesky(torch.kron(M, K) + torch.kron(eye, Sigma))
    white = torch.linalg.solve_triangular(L, Y.reshape(-1, 1), upper=False)
    constant = Y.numel() * torch.log(2 * torch.tensor(torch.pi, dtype=Y.dtype))
    return 0.5 * (white.square().sum() + 2 * L.diagonal().log().sum() + constant)


def ours(Y: Tensor, M: Tensor, K: Tensor, Sigma: Tensor) -> Tensor:
    return tk.kron_gaussian_nll(Y, M, K, Sigma=Sigma)


@each_Sigma
@pytest.mark.parametrize("method", ["auto", "spectral", "cholesky", "low_rank"])
def test_value_and_gradients(name: str, method: str) -> None:
    def f(Y: Tensor, M: Tensor, K: Tensor, Sigma: Tensor) -> Tensor:
        return tk.kron_gaussian_nll(Y, M, K, Sigma=Sigma, method=method)

    leaves = [x.requires_grad_() for x in inputs(name)]
    torch.testing.assert_close(f(*leaves), dense(*leaves), rtol=1e-10, atol=0)
    for a, b in zip(grad(f(*leaves), leaves), grad(dense(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@each_Sigma
def test_second_derivatives(name: str) -> None:
    given = inputs(name)
    steps = [normal(*x.shape, seed=i) for i, x in enumerate(given)]
    steps[1:] = [X + X.mT for X in steps[1:]]

    def along(f: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda t: f(*(x + t * d for x, d in zip(given, steps, strict=True)))

    zero = torch.zeros((), dtype=torch.float64)
    expected = jacrev(jacrev(along(dense)))(zero)
    U = tk.KroneckerPlusNoise(*given[1:3], Sigma=given[3])
    assert U.method_used == "rotated"

    def at(t: Tensor) -> Tensor:
        Y, M, K, Sigma = (x + t * d for x, d in zip(given, steps, strict=True))
        every = torch.ones(T, D, dtype=torch.bool)
        return tk.kron_gaussian_nll(Y, M, K, Sigma=Sigma, observed=every)

    for outer, inner in ((jacrev, jacrev), (jacfwd, jacrev)):
        torch.testing.assert_close(outer(inner(at))(zero), expected, rtol=1e-8, atol=0)


@each_Sigma
def test_everything_else_in_any_order(name: str) -> None:
    """Each is the first question to a new covariance, which has to find out that Sigma is
    singular."""
    Y, M, K, Sigma = inputs(name)
    U = torch.kron(M, K) + torch.kron(torch.eye(T, dtype=Y.dtype), Sigma)
    inverse = torch.linalg.inv(U)
    blocks = inverse.unflatten(0, (T, D)).unflatten(2, (T, D)).diagonal(dim1=0, dim2=2)
    row = torch.linalg.inv(blocks[..., 0])
    cross = torch.kron(M[:2], K)
    posterior = torch.kron(M[:2, :2].contiguous(), K) - cross @ inverse @ cross.mT

    def new() -> tk.KroneckerPlusNoise:
        return tk.KroneckerPlusNoise(M, K, Sigma=Sigma)

    def condition() -> tk.KroneckerPosterior:
        return new().condition(Y, M[:2], M[:2, :2])

    pairs: list[tuple[Tensor, Tensor]] = [
        (new().logdet(), U.logdet()),
        (new().solve(Y), (inverse @ Y.flatten()).reshape(T, D)),
        (new().inverse_diagonal(), inverse.diagonal().reshape(T, D)),
        (new().inverse_block_diag_sum(), blocks.sum(-1)),
        (new().diagonal(), U.diagonal().reshape(T, D)),
        (new().to_dense(), U),
        (new().leave_one_out(Y)[1], (1 / inverse.diagonal()).reshape(T, D)),
        (new().leave_one_row_out(Y)[1][0], row),
        (condition().mean, (cross @ inverse @ Y.flatten()).reshape(2, D)),
        (condition().covariance_matrix, posterior),
        (condition().variance, posterior.diagonal().reshape(2, D)),
    ]
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@each_Sigma
def test_draws_have_the_covariance(name: str) -> None:
    Y, M, K, Sigma = inputs(name)
    U = tk.KroneckerPlusNoise(M, K, Sigma=Sigma)
    draws = U.sample((100_000,), torch.Generator(Y.device).manual_seed(0)).flatten(1)
    dense_U = U.to_dense()
    assert (draws.mT.cov() - dense_U).abs().max() < 0.05 * dense_U.abs().max()


def test_matrix_normal_density() -> None:
    Y, M, K, Sigma = inputs("none")
    rows, columns = torch.linalg.cholesky(M), torch.linalg.cholesky(K)
    white = torch.linalg.solve_triangular(rows, Y, upper=False)
    white = torch.linalg.solve_triangular(columns, white.mT, upper=False)
    logdet = D * M.logdet() + T * K.logdet()
    constant = T * D * torch.log(2 * torch.tensor(torch.pi, dtype=Y.dtype))
    expected = -0.5 * (white.square().sum() + logdet + constant)
    density = tk.KroneckerNormal(torch.zeros_like(Y), M, K, Sigma=Sigma)
    torch.testing.assert_close(density.log_prob(Y), expected)


def test_batches_with_one_singular_noise() -> None:
    Y, M, K, Sigma = inputs("none")
    both = torch.stack([Sigma, torch.eye(D, dtype=Y.dtype)])
    found = tk.kron_gaussian_nll(Y, M, K, Sigma=both)
    torch.testing.assert_close(found, torch.stack([dense(Y, M, K, S) for S in both]))


def test_where_U_is_singular_too_it_is_named() -> None:
    Y, M, K, Sigma = inputs("none")
    with pytest.raises(torch.linalg.LinAlgError, match=r"U = M ⊗ K .* is not positive definite"):
        tk.kron_gaussian_nll(Y, torch.ones_like(M), K, Sigma=Sigma)
    with pytest.raises(torch.linalg.LinAlgError, match="Sigma is not positive definite"):
        tk.kron_gaussian_nll(Y, M, K, Sigma=Sigma - torch.eye(D, dtype=Y.dtype))
