"""The likelihood with missing entries and noise by row, against U at the observed entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from dense_observed import (
    EPS,
    PATTERNS,
    Observed,
    by_route,
    close,
    condition,
    each_noise,
    each_route,
    make_observed,
    skip_border,
    value_and_gradients,
)
from highprec import _exact, _float64, _inverse_and_logdet
from problems import KINDS, normal
from torch import Tensor
from torch.autograd import grad
from torch.func import jacfwd, jacrev, vmap

import torch_kronlik as tk

# ---------------------------------------------------------------- the likelihood


@each_route
@each_noise
@pytest.mark.parametrize("mask", PATTERNS)
def test_value_and_gradients(mask: str, noise: str, method: str) -> None:
    skip_border(noise, method)
    p = make_observed(7, 3, mask=mask, noise=noise)
    expected = value_and_gradients(Observed.nll, p)
    actual = value_and_gradients(by_route(method), p)
    for a, b in zip(actual, expected, strict=True):
        close(a, b, 1e3 * EPS * condition(p))


@each_route
@pytest.mark.parametrize("noise", ["full", "row_diagonal"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("tiny_noise", "spread_noise")])
def test_every_structure(kind: str, noise: str, method: str) -> None:
    """Singular and repeated M and K, smooth and rough, in all units."""
    skip_border(noise, method)
    p = make_observed(6, 3, mask="random_60", noise=noise, kind=kind)
    expected = value_and_gradients(Observed.nll, p)
    actual = value_and_gradients(by_route(method), p)
    for a, b in zip(actual, expected, strict=True):
        close(a, b, 3e4 * EPS * condition(p))  # both are as far off as that


@each_route
@each_noise
def test_float32(noise: str, method: str) -> None:
    skip_border(noise, method)
    p = make_observed(7, 3, noise=noise, dtype=torch.float32)
    expected = value_and_gradients(Observed.nll, p.double())
    actual = value_and_gradients(by_route(method), p)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        close(a, b, 1e3 * torch.finfo(torch.float32).eps * condition(p) ** 0.5)


@each_route
@each_noise
def test_second_derivatives(noise: str, method: str) -> None:
    """Along a line, in both mixed modes and in reverse twice."""
    skip_border(noise, method)
    p = make_observed(4, 2, mask="one_missing", noise=noise)
    d = {key: normal(*x.shape, seed=i) for i, (key, x) in enumerate(p.leaves().items())}

    def along(f: Callable[[Observed], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda t: f(p.at({key: x + t * d[key] for key, x in p.leaves().items()}))

    zero = torch.zeros((), dtype=torch.float64)
    expected = jacrev(jacrev(along(Observed.nll)))(zero)
    for outer, inner in ((jacrev, jacrev), (jacfwd, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)):
        close(outer(inner(along(by_route(method))))(zero), expected, 1e-10)


@each_route
def test_a_third_derivative_is_refused(method: str) -> None:
    p = make_observed(3, 2, mask="one_missing")
    with pytest.raises(NotImplementedError, match="third derivatives"):
        jacrev(jacrev(jacrev(lambda K: p._replace(K=K).covariance(method=method).logdet())))(p.K)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e300])
@each_route
def test_what_is_not_observed_is_not_looked_at(garbage: float, method: str) -> None:
    p = make_observed(6, 2, mask="random_60")
    q = p._replace(Y=torch.where(p.observed, p.Y, garbage))
    for a, b in zip(*(value_and_gradients(by_route(method), x) for x in (p, q)), strict=True):
        assert torch.equal(a, b)
    gY = value_and_gradients(by_route(method), q)[1]
    assert (gY[~p.observed] == 0).all()
    assert (gY[p.observed] != 0).all()


@each_route
@each_noise
def test_batches_with_different_entries(noise: str, method: str) -> None:
    """As many problems of their own, an empty one among them."""
    skip_border(noise, method)
    p = make_observed(5, 2, noise=noise)
    masks = [make_observed(5, 2, mask=mask).observed for mask in PATTERNS]
    masks.append(torch.zeros_like(masks[0]))
    joint = p._replace(observed=torch.stack(masks))
    value = by_route(method)(joint)
    each = torch.stack([by_route(method)(p._replace(observed=m)) for m in masks])
    close(value, each)
    assert value[-1] == 0
    mapped = vmap(lambda m: by_route(method)(p._replace(observed=m)))(torch.stack(masks))
    close(mapped, each)


@pytest.mark.parametrize("mask", ["all", "row"])
@each_route
def test_complete_rows_are_the_complete_problem(mask: str, method: str) -> None:
    p = make_observed(6, 3, mask=mask, noise="diagonal")
    rows = p.observed.all(-1)
    expected = tk.kron_gaussian_nll(p.Y[rows], p.M[rows][:, rows], p.K, **p.noise)
    close(by_route(method)(p), expected)


BATCHES: list[dict[str, tuple[int, ...]]] = [
    {"Y": (3,), "M": (), "K": (), "noise": ()},
    {"Y": (), "M": (3,), "K": (), "noise": ()},
    {"Y": (), "M": (), "K": (2,), "noise": (2,)},
    {"Y": (2, 1), "M": (3,), "K": (2, 3), "noise": (1, 1)},
]


@each_route
@pytest.mark.parametrize("noise", ["full", "diagonal", "scaled", "row_diagonal"])
@pytest.mark.parametrize("batch", BATCHES)
def test_gradients_in_batches(batch: Any, noise: str, method: str) -> None:
    """Of whatever has a batch, summed over what it is broadcast with; M = F Fᵀ too."""
    skip_border(noise, method)
    p = make_observed(5, 2, noise=noise, batch=batch, kind="rank_deficient")
    masks = torch.stack([make_observed(5, 2, mask=m).observed for m in ("row", "one_missing")])
    p = p._replace(observed=masks[:, None])
    roots = {"F": normal(*batch["M"], 5, 2, seed=3)}
    leaves = {k: x.clone().requires_grad_() for k, x in {**p.leaves(), **roots}.items()}
    F = leaves.pop("F")

    def structured(rows: Any, q: Observed) -> Tensor:
        return q.covariance(rows, method=method).nll(q.Y)

    def dense(q: Observed) -> Tensor:
        parts = torch.broadcast_shapes(
            q.Y.shape[:-2], q.M.shape[:-2], q.K.shape[:-2], q.row_noise().shape[:-3], (2, 1)
        )
        shaped = [x.expand(*parts, *x.shape[-2:]) for x in (q.Y, q.M, q.K, q.observed)]
        noises = q.row_noise().expand(*parts, 5, 2, 2)
        flat = zip(*(x.flatten(0, len(parts) - 1) for x in (*shaped, noises)), strict=True)
        each = [Observed(Y, M, K, {"row_Sigma": N}, o).nll() for Y, M, K, o, N in flat]
        return torch.stack(each).reshape(parts)

    q = p.at(leaves)
    for rows, other in ((q.M, q), (tk.LowRankRoot(F), q._replace(M=F @ F.mT))):
        wanted = [*leaves.values(), F]
        values = structured(rows, q), dense(other)
        close(values[0].detach().expand(values[1].shape), values[1].detach())
        weights = normal(*values[1].shape, seed=9)
        found = [grad((v * weights).sum(), wanted, allow_unused=True) for v in values]
        for a, b in zip(*found, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                close(a, b, 1e-9)


@each_route
def test_low_rank_root_and_eigen_as_rows(method: str) -> None:
    p = make_observed(7, 3, mask="random_60", kind="rank_deficient")
    F = normal(7, 2, seed=1).requires_grad_()
    q = p._replace(M=F @ F.mT)
    value = p.covariance(tk.LowRankRoot(F), method=method).nll(p.Y)
    close(value.detach(), q.nll().detach())
    close(grad(value, F)[0], grad(q.nll(), F)[0])
    eigen = tk.symmetric_eigen(p.M)
    close(p.covariance(eigen, method=method).nll(p.Y), p.nll())


def test_auto_finds_the_structure() -> None:
    complete = make_observed(256, 2, kind="matern12", noise="scaled")._replace(observed=None)
    assert complete.covariance().method_used == "cholesky"
    smooth = make_observed(80, 2, kind="rbf")
    assert smooth.covariance().method_used == "capacitance"
    rough = make_observed(40, 2, kind="matern12")
    assert rough.covariance().method_used == "border"
    few = make_observed(40, 2, kind="matern12", mask="all_but_one")
    assert few.covariance().method_used == "dense"
    by_row = make_observed(40, 2, kind="matern12", noise="row_full")
    assert by_row.covariance().method_used == "dense"


def test_zero_noise_where_U_is_positive_definite() -> None:
    """An exact observation, and the matrix normal, with no noise at all."""
    p = make_observed(5, 2, kind="matern12", mask="one_missing", noise="row_full")
    for rows in (slice(0, 1), slice(None)):
        Sigma = p.noise["row_Sigma"].clone()
        Sigma[rows] = 0
        q = p._replace(noise={"row_Sigma": Sigma})
        assert q.covariance().method_used == "dense"
        for a, b in zip(
            value_and_gradients(by_route("auto"), q),
            value_and_gradients(Observed.nll, q),
            strict=True,
        ):
            close(a, b, 1e-10)


@pytest.mark.parametrize("scale", [1e-10, 1e-5, 1.0, 1e10])
def test_smooth_rows_against_60_digits(scale: float) -> None:
    """With tiny noise, and M of low rank, far better than the Cholesky factor of U."""
    p, F = make_observed(12, 2), normal(12, 3, seed=2)
    signal = F @ normal(3, 2, seed=6) @ torch.linalg.cholesky(p.K).mT
    p = p._replace(
        M=F @ F.mT,
        Y=signal + scale**0.5 * normal(12, 2, seed=7),
        noise={"Sigma": scale * p.noise["Sigma"]},
    )
    with mpmath.workdps(60):
        exact = [_exact(x) for x in (F, p.K, p.noise["Sigma"], p.Y, torch.eye(12).double())]
        F_, K, Sigma, Y, eye = exact
        seen = p.places().cpu().numpy()
        U = (np.kron(F_ @ F_.T, K) + np.kron(eye, Sigma))[np.ix_(seen, seen)]
        inverse, logdet = _inverse_and_logdet(U)
        y = Y.reshape(-1)[seen]
        expected = [_float64((y * (inverse @ y)).sum()), _float64(logdet)]
    found = p.covariance(tk.LowRankRoot(F), method="capacitance").inv_quad_logdet(p.Y)
    for a, b, bound in zip(found, expected, (1e-10, 1e-14), strict=True):
        close(a, b, bound)
