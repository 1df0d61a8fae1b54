"""U·Y = M Y Kᵀ + Y Σᵀ for any square M, K and Σ, an operator of its own for the sake of its errors.

It is linear in each argument, so its rules are products too, and its gradients are the plain ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import outer_to, sum_to
from ..derivatives import define
from ..errors import require_finite
from ..records import Matrix
from .common import Covariance, Direction, Maybe, Targets, is_empty, total

__all__ = ["multiply"]


class Arguments(NamedTuple):
    Y: Matrix
    U: Covariance


class Results(NamedTuple):
    product: Matrix


def _multiply(given: Arguments) -> Tensor:
    Y, U = given
    out: Tensor = U.rows.matmul(Y @ U.K.mT) + U.noise.matmul(Y)
    require_finite(out, *U.noise.hidden(), Y=Y, **U.named())
    return out.contiguous()


def _fake(given: Arguments) -> Tensor:
    Y, U = given
    return Y.new_empty((*torch.broadcast_shapes(Y.shape[:-2], U.batch), *Y.shape[-2:]))


def _vjp(given: Arguments, made: Results, grads: Results, needs: Any) -> Arguments:
    (Y, U), G = given, grads.product
    to = Targets.of(Y, U, needs.Y, needs.U)
    gY = rows = K = noise = None
    if to.Y is not None:
        gY = U.rows.transposed_matmul(G @ U.K) + U.noise.transposed_matmul(G)
        gY = sum_to(gY, to.Y, 2)
    if to.rows is not None:
        rows = U.rows.matmul_pull_back(G, Y @ U.K.mT, to.rows)
    if to.K is not None:
        K = outer_to(G.mT, U.rows.matmul(Y).mT, to.K)
    if to.noise is not None:
        noise = U.noise.matmul_pull_back(G, Y, to.noise)
    return Arguments(gY, Direction(rows, K, noise))


def _jvp(given: Arguments, made: Results, along: Arguments) -> Results:
    Y, U = given
    terms: list[Maybe] = [None if along.Y is None else multiply(along.Y, U)]
    if not is_empty(along.U.rows):
        terms.append(U.rows.matmul_tangent(Y @ U.K.mT, along.U.rows))
    if along.U.K is not None:
        terms.append(U.rows.matmul(Y @ along.U.K.mT))
    if not is_empty(along.U.noise):
        terms.append(U.noise.matmul_tangent(Y, along.U.noise))
    out = total(terms)
    return Results(None if out is None else out.expand_as(made.product))


multiply = define("multiply", Arguments, Results, _multiply, _fake, vjp=_vjp, jvp=_jvp)
