"""The negative log likelihood of small problems: value and gradients in one native call.

The gradients are outputs of the operator, so reverse mode only scales them. Where they are to be
differentiated themselves, reverse mode goes through the general operators instead, on one
factorisation made then, which every later Hessian product uses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..batch import sum_to
from ..capture import is_captured
from ..derivatives import define, is_plain_eager
from ..errors import COVARIANCE, OVERFLOW, not_positive_definite, raise_if_not_finite
from ..factor.plan import costs
from ..noise import Noise
from ..records import Matrix, Scalar
from ..rows import Dense
from .common import Covariance, Targets, add_records, is_empty
from .factorise import factorise
from .quad_logdet import Arguments as QuadLogdetArguments
from .quad_logdet import (
    GradientArguments,
    Gradients,
    gradients_or_none,
    hessian_product,
    quad_logdet,
)

__all__ = ["is_small", "small_likelihood", "small_nll"]


class Arguments(NamedTuple):
    Y: Matrix
    M: Matrix
    K: Matrix
    noise: Noise
    gradients: bool


class Results(NamedTuple):
    nll: Scalar
    Y: Matrix
    M: Matrix
    K: Matrix
    noise: Noise


def _small_nll(given: Arguments) -> Results:
    Y, M, K, noise, gradients = given
    (tensor,) = noise
    *out, gnoise, status = ops.small_nll(Y, M, K, tensor, noise.is_matrix, gradients)
    if not is_captured(status) and bool(status.any()):
        _raise(status, Y=Y, M=M, K=K, **noise.named())
    return Results(*out, type(noise)(gnoise))


def _raise(status: Tensor, **arguments: Tensor) -> None:
    raise_if_not_finite(**arguments)
    for code, what in ((1, "Sigma"), (2, COVARIANCE)):
        if bool((status == code).any()):
            not_positive_definite(what, status == code)
    raise OverflowError(OVERFLOW)


def _fake(given: Arguments) -> Results:
    Y, M, K, noise, gradients = given
    batch = torch.broadcast_shapes(Y.shape[:-2], M.shape[:-2], K.shape[:-2], noise.batch)
    (tensor,) = noise
    cores = [X.shape[-2:] for X in (Y, M, K)] + [tensor.shape[len(noise.batch) :]]
    *found, gnoise = (Y.new_empty((*batch, *core) if gradients else (0,)) for core in cores)
    return Results(Y.new_empty(batch), *found, type(noise)(gnoise))


def _vjp(given: Arguments, made: Results, grads: Results, needs: Any) -> Arguments:
    moves = any(g is not None for g in (grads.Y, grads.M, grads.K, *grads.noise))
    if moves or torch.is_grad_enabled():
        along = Gradients(grads.Y, Dense(grads.M), grads.K, grads.noise)
        return _by_general_operators(given, grads.nll, along, needs)
    g, (wants_noise,) = grads.nll[..., None, None], needs.noise
    found = (
        sum_to(g * x, argument.shape[:-2], 2) if need else None
        for x, argument, need in zip(made[1:4], given[:3], needs[:3], strict=True)
    )
    noise = given.noise.scaled_gradient(made.noise, grads.nll) if wants_noise else None
    return Arguments(*found, noise, None)


def _by_general_operators(
    given: Arguments, g: Tensor | None, along: Gradients, needs: Any
) -> Arguments:
    """g times the gradients, to be differentiated again, and their derivative along a direction."""
    U, _ = factorise(Covariance(Dense(given.M), given.K, given.noise), "auto")
    made = quad_logdet(given.Y, U)
    to = Targets(
        *(X.shape[:-2] if need else None for X, need in zip(given[:3], needs[:3], strict=True)),
        given.noise.batch if any(needs.noise) else None,
    )
    found = None
    if g is not None:
        found = gradients_or_none(0.5 * g, 0.5 * g, QuadLogdetArguments(given.Y, U), made, to)
    if not is_empty(along):
        half = torch.full_like(made.logdet, 0.5)
        point = GradientArguments(half, half, given.Y, U, made, to)
        found = add_records(found, hessian_product(point, to, along.Y, along.parts))
    assert found is not None
    M = None if found.rows is None else found.rows.M
    return Arguments(found.Y, M, found.K, found.noise, None)


small_nll = define("gaussian_nll_small", Arguments, Results, _small_nll, _fake, vjp=_vjp)


def is_small(parts: Covariance, batch: torch.Size) -> bool:
    """Whether one native call for value and gradients serves: M is a matrix that no two problems of
    the batch share."""
    T, D = parts.shape
    return (
        type(parts.rows) is Dense
        and costs(parts.K.device.type).fits_small(T, D)
        and parts.rows.batch == batch
        and is_plain_eager()
    )


def small_likelihood(Y: Tensor, parts: Covariance) -> Tensor:
    """−log N(vec Y; 0, U) where :func:`is_small` says that one native call serves."""
    M, K, noise = parts.rows.M, parts.K, parts.noise
    needed = torch.is_grad_enabled() and any(x.requires_grad for x in (Y, M, K, *noise))
    value: Tensor = small_nll(Y, M, K, noise, needed).nll
    return value
