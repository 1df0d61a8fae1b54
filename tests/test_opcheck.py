"""torch.library.opcheck, all of its tests, on every operator of the library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import BATCHES, make_problem
from torch import Tensor

from torch_kronlik import ops
from torch_kronlik.rules import expansion, factorise, logdet, quad_logdet, solve
from torch_kronlik.rules.common import Covariance

SHAPES = {"none": (4, 3), "crossed": (3, 2)}
# opcheck is slow, and what it checks does not depend on the dtype
each_case = pytest.mark.parametrize(("batch", "noise"), [("none", "diagonal"), ("crossed", "full")])


def covariance(batch: str, noise: str) -> tuple[Tensor, Covariance]:
    """Y and the arguments of an operator on a factorised U; what has a derivative requires it."""
    p = make_problem(*SHAPES[batch], batch=BATCHES[batch], noise=noise)
    M, K = p.M.requires_grad_(), p.K.requires_grad_()
    Sigma, log_noise = p.noise.get("Sigma"), p.noise.get("log_noise")
    s, P = factorise.eigen(M)
    lam, R, logdet_noise = factorise.whiten(K, Sigma, log_noise, s)
    for x in p.noise.values():
        x.requires_grad_()
    Y = p.Y.requires_grad_()
    return Y, Covariance(M, K, Sigma, log_noise, s, P, lam, R, logdet_noise, "spectral")


def check(op: Any, *args: Any) -> None:
    results = torch.library.opcheck(op, args)
    assert set(results.values()) == {"SUCCESS"}


@each_case
def test_factorisation(batch: str, noise: str) -> None:
    _, c = covariance(batch, noise)
    check(factorise.eigen, c.M)
    check(factorise.whiten, c.K, c.Sigma, c.log_noise, c.f0)


@each_case
def test_quad_logdet_and_its_gradient(batch: str, noise: str) -> None:
    Y, c = covariance(batch, noise)
    check(quad_logdet.quad_logdet, Y, *c)
    check(quad_logdet.quad_logdet, None, *c)
    with torch.no_grad():
        inv_quad, value, *saved = quad_logdet.quad_logdet(Y, *c)
    to = [list(Y.shape[:-2]), *c.targets([True] * 4)]
    g = torch.ones_like(inv_quad), torch.ones_like(value)
    check(quad_logdet.quad_logdet_gradient, *g, Y, *c, *saved, *to)
    check(quad_logdet.quad_logdet_gradient, None, g[1], Y, *c, *saved, None, to[1], *[None] * 3)


@each_case
def test_solve(batch: str, noise: str) -> None:
    Y, c = covariance(batch, noise)
    check(solve.solve, Y, *c, None)
    with torch.no_grad():
        scaled = quad_logdet.quad_logdet(Y, *c)[2]
    check(solve.solve, Y, *c, scaled)


@each_case
def test_logdet_derivatives(batch: str, noise: str) -> None:
    _, c = covariance(batch, noise)
    check(logdet.logdet_gradients, *c)
    with torch.no_grad():
        directions = [x.clone() for x in logdet.logdet_gradients(*c)]
    # derivatives along the directions only: in the factors it would be the third
    constant = [x.detach() if isinstance(x, Tensor) else x for x in c]
    for x in directions:
        x.requires_grad_()
    check(logdet.logdet_hvp, *constant, *directions)
    check(logdet.logdet_hvp, *constant, None, directions[1], None)


@pytest.mark.parametrize("shape", [(), (3,), (0, 2)])
def test_vanishing(shape: tuple[int, ...]) -> None:
    check(expansion.vanishing, torch.randn(shape, requires_grad=True), 2, "x")


@pytest.mark.parametrize("batch", [(), (2,)])
def test_native(batch: tuple[int, ...]) -> None:
    dtype = torch.float64
    s, lam = torch.rand(*batch, 4, dtype=dtype), torch.rand(3, dtype=dtype)
    Y = torch.randn(*batch, 4, 3, dtype=dtype)
    for x in (s, lam, Y):
        x.requires_grad_()
    check(ops.kron_diag_sums, s, lam)
    check(ops.kron_diag_scale, s, lam, Y)
    A = torch.randn(*batch, 6, 9, dtype=dtype, requires_grad=True)
    check(ops.block_diag_sum, A, 3)
    check(ops.block_diag_sum, A.detach().mT.requires_grad_(), 3)
    check(ops.block_diag_expand, torch.randn(*batch, 2, 3, dtype=dtype, requires_grad=True), 3)
