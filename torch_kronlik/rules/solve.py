"""A = U⁻¹·Y, differentiable to every order: each rule is made of solves and products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..derivatives import define, register
from ..factor.batch import sum_to
from ..factor.diagnose import require_finite
from .common import (
    COVARIANCE,
    Covariance,
    Maybe,
    minus,
    product_gradients,
    product_tangent,
)

__all__ = ["solve"]

# solve(Y, *covariance, scaled): ``scaled`` is what quad_logdet already made of Y, or None.


def _split(inputs: Any) -> tuple[Tensor, Covariance, Maybe]:
    return inputs[0], Covariance(*inputs[1:-1]), inputs[-1]


def _solve(*inputs: Any) -> Tensor:
    Y, c, scaled = _split(inputs)
    A: Tensor = c.factor.solve(Y) if scaled is None else c.factor.solve_scaled(scaled)
    require_finite(A, Y=Y, **c.named())
    return A.contiguous()


def _solve_fake(*inputs: Any) -> Tensor:
    Y, c, _ = _split(inputs)
    return Y.new_empty((*torch.broadcast_shapes(Y.shape[:-2], c.batch), *Y.shape[-2:]))


def _solve_vjp(inputs: Any, outputs: Any, grads: Any, needs: Any) -> list[Maybe]:
    Y, c, _ = _split(inputs)
    Z = solve(grads[0], *c, None)
    gY = sum_to(Z, Y.shape[:-2], 2) if needs[0] else None
    return [gY, *product_gradients(-Z, outputs[0], c, c.targets(needs[1:5])), *[None] * 7]


def _solve_jvp(inputs: Any, outputs: Any, tangents: Any) -> list[Maybe]:
    _, c, _ = _split(inputs)
    right = minus(tangents[0], product_tangent(outputs[0], c, tangents[1:5]))
    return [None if right is None else solve(right, *c, None).expand_as(outputs[0])]


solve = define(f"solve(Tensor Y, {COVARIANCE}, Tensor? scaled) -> Tensor", _solve, _solve_fake)
register(
    solve,
    vjp=_solve_vjp,
    jvp=_solve_jvp,
    core_dims=lambda Y, *c: ([2, *Covariance(*c[:-1]).core, 2], [2]),
)
