"""The gradients of log det U in M, K and Σ, and their derivatives along a direction.

First and second derivatives of log det U are exact at repeated and zero eigenvalues; the third is
refused with an error that says so. The gradient in M is the one in the own tensors of the row
covariance; that in Σ is a matrix for every noise: B, the sum of the diagonal blocks of U⁻¹, or the
blocks themselves where each row has a Σ of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import Shape, sum_to
from ..derivatives import define
from ..records import Matrix
from ..rows import Rows
from .common import (
    Direction,
    Factored,
    Maybe,
    Targets,
    add_records,
    batch_of,
    empty_record,
    is_empty,
)

__all__ = ["LogdetMoves", "inner", "logdet_gradients", "logdet_hvp", "moves_of", "to_parts"]


class LogdetMoves(NamedTuple):
    """A direction of (M, K, Σ), or gradients in them."""

    rows: Rows | None
    K: Matrix | None
    Sigma: Matrix | None


def moves_of(U: Any, along: Any) -> LogdetMoves:
    """The direction of (M, K, Σ) along one of the parts of U."""
    Sigma = None if is_empty(along.noise) else U.noise.tangent(along.noise)
    if U.rows.is_constant:
        U.rows.tangent(along.rows)  # refuses a direction
        return LogdetMoves(None, along.K, Sigma)
    return LogdetMoves(None if is_empty(along.rows) else along.rows, along.K, Sigma)


def to_parts(gradients: Any, U: Any, to: Targets) -> Direction:
    """Gradients in (M, K, Σ) as those in the parts of U, summed to ``to``."""
    rows = None if to.rows is None else _sum_record(gradients.rows, to.rows)
    K = None if to.K is None else sum_to(gradients.K, to.K, 2)
    noise = None if to.noise is None else U.noise.pull_back(gradients.Sigma, to.noise)
    return Direction(rows, K, noise)


def _sum_record(record: Any, to: Shape) -> Any:
    shapes = empty_record(record, to, record[0])
    return type(record)(*(x.sum_to_size(s.shape) for x, s in zip(record, shapes, strict=True)))


def inner(gradients: Any, along: Any) -> Maybe:
    """⟨gradients, direction⟩ over the parts that move: (*batch), None where nothing does."""
    pairs = [(gradients.K, along.K), (gradients.Sigma, along.Sigma)]
    if along.rows is not None:
        pairs += zip(gradients.rows, along.rows, strict=True)
    terms = [(g * v).sum((-2, -1)) for g, v in pairs if v is not None]
    return sum(terms[1:], terms[0]) if terms else None


# --- the gradients -------------------------------------------------------------------------------


class Arguments(NamedTuple):
    U: Factored


class Gradients(NamedTuple):
    rows: Rows
    K: Matrix
    Sigma: Matrix


def _gradients(given: Arguments) -> Gradients:
    U, shapes = given.U, _gradients_fake(given)
    G, K, Sigma = U.factor.logdet_gradients(U)
    rows = shapes.rows if U.rows.is_constant else U.rows.pull_back(G, U.batch)
    return _at(shapes, rows, K, Sigma)


def _at(shapes: Gradients, rows: Any, K: Tensor, Sigma: Tensor) -> Gradients:
    """Contiguous, at the shapes that were announced."""
    return Gradients(
        type(rows)(*(_as(x, s) for x, s in zip(rows, shapes.rows, strict=True))),
        _as(K, shapes.K),
        _as(Sigma, shapes.Sigma),
    )


def _as(x: Tensor, like: Tensor) -> Tensor:
    return x.expand(like.shape).contiguous()


def _shapes(U: Any, batch: Shape) -> Gradients:
    to = None if U.rows.is_constant else batch
    rows = empty_record(U.rows, to, U.K)
    new, D = U.K.new_empty, U.K.shape[-1]
    return Gradients(rows, new((*batch, D, D)), new((*batch, *U.noise.shape)))


def _gradients_fake(given: Arguments) -> Gradients:
    return _shapes(given.U, given.U.batch)


def _gradients_vjp(given: Arguments, made: Any, grads: Any, needs: Any) -> Arguments:
    U, to = given.U, Targets.of(None, given.U, False, needs.U)
    moves = LogdetMoves(None if U.rows.is_constant else grads.rows, grads.K, grads.Sigma)
    found = to_parts(logdet_hvp(U, moves), U, to)
    return Arguments(Factored(found, None))


def _gradients_jvp(given: Arguments, made: Any, along: Arguments) -> Any:
    moves = moves_of(given.U, along.U)
    return None if is_empty(moves) else logdet_hvp(given.U, moves)


logdet_gradients = define(
    "logdet_gradients",
    Arguments,
    Gradients,
    _gradients,
    _gradients_fake,
    vjp=_gradients_vjp,
    jvp=_gradients_jvp,
)


# --- their derivatives along a direction ---------------------------------------------------------


class HvpArguments(NamedTuple):
    U: Factored
    along: LogdetMoves


def _hvp(given: HvpArguments) -> Gradients:
    U, along = given
    moves = None if is_empty(along.rows) else along.rows
    dM = None if moves is None else U.rows.tangent(moves)
    HM, HK, HS = U.factor.logdet_hvp(U, dM, along.K, along.Sigma)
    shapes = _hvp_fake(given)
    rows = shapes.rows
    if not U.rows.is_constant:
        batch = shapes.K.shape[:-2]
        rows = U.rows.pull_back(HM, batch)
        if U.rows.is_curved and moves is not None:
            G = U.factor.logdet_gradients(U)[0]
            rows = add_records(rows, U.rows.curvature(G, moves, batch))
    return _at(shapes, rows, HK, HS)


def _hvp_fake(given: HvpArguments) -> Gradients:
    U, along = given
    matrices = [x.shape[:-2] for x in along[1:] if x is not None]
    return _shapes(U, torch.broadcast_shapes(U.batch, batch_of(along.rows), *matrices))


def _refuse_third_order(asked: bool) -> None:
    if asked:
        raise NotImplementedError(
            "third derivatives of log det U are not implemented; first and second derivatives are"
        )


def _hvp_vjp(given: HvpArguments, made: Any, grads: Any, needs: Any) -> HvpArguments:
    U, along = given
    _refuse_third_order(needs.U.K or any(needs.U.rows) or any(needs.U.noise))
    moves = LogdetMoves(None if U.rows.is_constant else grads.rows, grads.K, grads.Sigma)
    back = logdet_hvp(U, moves)
    rows = _sum_record(back.rows, batch_of(along.rows)) if any(needs.along.rows) else None
    matrices = zip(back[1:], along[1:], needs.along[1:], strict=True)
    K, Sigma = (
        sum_to(b, v.shape[:-2], 2) if v is not None and need else None for b, v, need in matrices
    )
    return HvpArguments(Factored(None, None), LogdetMoves(rows, K, Sigma))


def _hvp_jvp(given: HvpArguments, made: Any, along: HvpArguments) -> Any:
    _refuse_third_order(not is_empty(along.U.parts))
    if is_empty(along.along):
        return None
    out = logdet_hvp(given.U, along.along)
    return Gradients(
        type(out.rows)(*(x.expand_as(o) for x, o in zip(out.rows, made.rows, strict=True))),
        out.K.expand_as(made.K),
        out.Sigma.expand_as(made.Sigma),
    )


logdet_hvp = define(
    "logdet_hvp", HvpArguments, Gradients, _hvp, _hvp_fake, vjp=_hvp_vjp, jvp=_hvp_jvp
)
