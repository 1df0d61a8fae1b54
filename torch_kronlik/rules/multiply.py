"""U·Y = M Y K + Y Σ, an operator of its own for the sake of symmetric gradients and its errors."""

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
    noise_matmul,
    plus,
    product_gradients,
    product_tangent,
    refuse_rows,
    rows_matmul,
)

__all__ = ["multiply"]


def _multiply(Y: Tensor, *covariance: Any) -> Tensor:
    c = Covariance(*covariance)
    out = rows_matmul(c, Y @ c.K) + noise_matmul(c, Y)
    hidden = [] if c.log_noise is None else [c.log_noise]  # exp(-inf) is finite
    require_finite(out, *hidden, Y=Y, **c.named())
    return out.contiguous()


def _multiply_fake(Y: Tensor, *covariance: Any) -> Tensor:
    c = Covariance(*covariance)
    return Y.new_empty((*torch.broadcast_shapes(Y.shape[:-2], c.batch), *Y.shape[-2:]))


def _multiply_vjp(inputs: Any, outputs: Any, grads: Any, needs: Any) -> list[Maybe]:
    Y, c, G = inputs[0], Covariance(*inputs[1:]), grads[0]
    if c.M is None and (needs[5] or needs[6]):
        refuse_rows()
    gY = sum_to(multiply(G, *c), Y.shape[:-2], 2) if needs[0] else None
    return [gY, *product_gradients(G, Y, c, c.targets(needs[1:5])), *[None] * 6]


def _multiply_jvp(inputs: Any, outputs: Any, tangents: Any) -> list[Maybe]:
    Y, c = inputs[0], Covariance(*inputs[1:])
    moved = None if tangents[0] is None else multiply(tangents[0], *c)
    if c.M is None and (tangents[5] is not None or tangents[6] is not None):
        refuse_rows()
    out = plus(moved, product_tangent(Y, c, tangents[1:5]))
    return [None if out is None else out.expand_as(outputs[0])]


multiply = define(f"multiply(Tensor Y, {COVARIANCE}) -> Tensor", _multiply, _multiply_fake)
register(
    multiply,
    vjp=_multiply_vjp,
    jvp=_multiply_jvp,
    core_dims=lambda Y, *c: ([2, *Covariance(*c).core], [2]),
)
