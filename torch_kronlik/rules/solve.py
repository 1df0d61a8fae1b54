"""A = U⁻¹·Y, differentiable to every order: each rule is made of solves and products."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import sum_to
from ..derivatives import define
from ..errors import require_finite
from ..records import Matrix
from .common import Factored, Targets, minus, product_gradients, product_tangent

__all__ = ["solve"]


class Arguments(NamedTuple):
    Y: Matrix
    U: Factored
    scaled: Matrix | None  # what quad_logdet already made of Y


class Results(NamedTuple):
    A: Matrix


def _solve(given: Arguments) -> Tensor:
    Y, U, scaled = given
    A: Tensor = U.factor.solve(Y) if scaled is None else U.factor.solve_scaled(scaled)
    require_finite(A, Y=Y, **U.named())
    return A.contiguous()


def _fake(given: Arguments) -> Tensor:
    Y, U, _ = given
    return Y.new_empty((*torch.broadcast_shapes(Y.shape[:-2], U.batch), *Y.shape[-2:]))


def _vjp(given: Arguments, made: Results, grads: Results, needs: Any) -> Arguments:
    Y, U, _ = given
    Z = solve(grads.A, U, None)
    to = Targets.of(Y, U, needs.Y, needs.U)
    gY = None if to.Y is None else sum_to(Z, to.Y, 2)
    return Arguments(gY, Factored(product_gradients(-Z, made.A, U, to), None), None)


def _jvp(given: Arguments, made: Results, along: Arguments) -> Results:
    right = minus(along.Y, product_tangent(made.A, given.U, along.U))
    return Results(None if right is None else solve(right, given.U, None).expand_as(made.A))


solve = define("solve", Arguments, Results, _solve, _fake, vjp=_vjp, jvp=_jvp)
