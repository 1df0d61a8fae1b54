"""yᵀU⁻¹y and log det U from one pass over the data, with what their gradients need.

Y = None asks for log det U alone.

The gradient is an operator of its own, so that reverse mode costs no more than the gradients that
are asked for. It is the gradient of φ = g_q·inv_quad + g_l·logdet, and its own derivative is the
Hessian of φ, which is symmetric and therefore one product for forward and reverse mode.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import broadcast, outer_to, sum_to, symmetric
from ..derivatives import define
from ..errors import require_finite
from ..noise import Noise
from ..records import Matrix, Scalar, Vector
from ..rows import Rows
from .common import (
    Direction,
    Factored,
    Maybe,
    Targets,
    add_records,
    empty_record,
    is_empty,
    minus,
    product_gradients,
    product_row_matrix,
    product_tangent,
)
from .logdet import inner, logdet_gradients, logdet_hvp, moves_of, to_parts
from .solve import solve

__all__ = [
    "Arguments",
    "GradientArguments",
    "Gradients",
    "Pass",
    "gradients_or_none",
    "hessian_product",
    "quad_logdet",
]


class Arguments(NamedTuple):
    Y: Matrix | None
    U: Factored


class Pass(NamedTuple):
    """The two values, and what the pass leaves for their gradients."""

    inv_quad: Scalar
    logdet: Scalar
    scaled: Matrix  # W ⊙ PᵀYR
    row: Vector  # W λ
    col_s: Vector  # Wᵀ s
    col_1: Vector  # Wᵀ 1

    @property
    def sums(self) -> tuple[Tensor, Tensor, Tensor] | None:
        return (self.row, self.col_s, self.col_1) if self.row.shape[-1] else None


def _quad_logdet(given: Arguments) -> Pass:
    Y, U = given
    made = Pass(*U.factor.quad_logdet(Y))
    require_finite(made.logdet, made.inv_quad, Y=Y, **U.named())
    return made


def _fake(given: Arguments) -> Pass:
    Y, U = given
    batch, inside = U.batch, U.batch
    scaled: tuple[int, ...] = (0,)
    if Y is not None:
        batch = torch.broadcast_shapes(Y.shape[:-2], batch)
        scaled = (*batch, *U.shape)
    sums = ((*inside, n) for n in U.factor.sizes_of_sums())
    return Pass(*map(U.K.new_empty, (batch, inside, scaled, *sums)))


def _vjp(given: Arguments, made: Pass, grads: Pass, needs: Any) -> Arguments:
    to = Targets.of(given.Y, given.U, needs.Y, needs.U)
    found = gradients_or_none(grads.inv_quad, grads.logdet, given, made, to)
    return Arguments(found.Y, Factored(found.parts, None))


def _jvp(given: Arguments, made: Pass, along: Arguments) -> Pass:
    dq, dl = _first_order(given, made.scaled, along.Y, along.U)
    return Pass(dq, dl, *[None] * 4)


def _first_order(given: Arguments, scaled: Tensor, dY: Maybe, along: Any) -> tuple[Maybe, Maybe]:
    """The derivatives of (inv_quad, logdet) along a direction."""
    Y, U = given
    dq = None
    if Y is not None:
        A = solve(Y, U, scaled)
        right = minus(None if dY is None else 2 * dY, product_tangent(A, U, along))
        dq = None if right is None else (A * right).sum((-2, -1))
    moves = moves_of(U, along)
    return dq, None if is_empty(moves) else inner(logdet_gradients(U), moves)


quad_logdet = define("quad_logdet", Arguments, Pass, _quad_logdet, _fake, vjp=_vjp, jvp=_jvp)


# --- the gradient --------------------------------------------------------------------------------


class GradientArguments(NamedTuple):
    g_q: Scalar | None
    g_l: Scalar | None
    Y: Matrix | None
    U: Factored
    made: Pass
    to: Targets  # the sums over broadcast batch dimensions are taken inside


class Gradients(NamedTuple):
    """Of shape (0,) where not asked for."""

    Y: Matrix
    rows: Rows
    K: Matrix
    noise: Noise

    @property
    def parts(self) -> Direction:
        return Direction(self.rows, self.K, self.noise)


def gradients_or_none(g_q: Maybe, g_l: Maybe, given: Any, made: Pass, to: Targets) -> Gradients:
    found = quad_logdet_gradient(g_q, g_l, given.Y, given.U, made, to)
    return Gradients(*(x if b is not None else None for x, b in zip(found, to, strict=True)))


def _gradient(given: GradientArguments) -> Gradients:
    U, to = given.U, given.to
    g_q, g_l = _mapped(given.g_q, to), _mapped(given.g_l, to._replace(Y=None))
    gY: Maybe = None if to.Y is None else U.K.new_zeros((*to.Y, *U.shape))
    parts = Direction(None, None, None)
    left = A = None
    if g_q is not None and given.Y is not None:
        A = U.factor.solve_scaled(given.made.scaled)
        left = -g_q[..., None, None] * A
        gY = None if to.Y is None else -2 * sum_to(left, to.Y, 2)
        K = U.factor.quadratic_in_K(-g_q, given.made.scaled, to.K)
        others = to._replace(K=to.K if K is None else None)
        if g_l is not None:  # with the log-det part, in one pass over the gradient in M
            others = others._replace(rows=None)
        parts = product_gradients(left, A, U, others, symmetrise=False)
        parts = parts if K is None else parts._replace(K=K)
    if g_l is not None and any(b is not None for b in to[1:]):
        G, K, noise = U.factor.logdet_gradient(U, g_l, to, given.made.sums)
        if G is not None:
            if A is not None:
                assert left is not None
                G = G.plus(product_row_matrix(left, A, U, symmetrise=False))
            parts = parts._replace(rows=U.rows.pull_back(G, to.rows))
        parts = add_records(parts, Direction(None, K, noise))
    return _filled(Gradients(gY, *parts), U)


def _mapped(g: Maybe, to: Targets) -> Maybe:
    """A mapped argument that the cotangent does not depend on maps the result all the same."""
    if g is None:
        return None
    return g.expand(broadcast(g.shape, *(b for b in to if b is not None)))


def _filled(found: Gradients, U: Any) -> Gradients:
    """Contiguous, and of shape (0,) where nothing was asked for."""
    return Gradients(
        U.K.new_empty(0) if found.Y is None else found.Y.contiguous(),
        _filled_record(found.rows, U.rows, U.K),
        U.K.new_empty(0) if found.K is None else found.K.contiguous(),
        _filled_record(found.noise, U.noise, U.K),
    )


def _filled_record(found: Any, like: Any, new: Tensor) -> Any:
    if found is None:
        return empty_record(like, None, new)
    return type(found)(*(x.contiguous() for x in found))


def _gradient_fake(given: GradientArguments) -> Gradients:
    U, to, D = given.U, given.to, given.U.shape[1]
    return Gradients(
        U.K.new_empty((0,) if to.Y is None else (*to.Y, *U.shape)),
        empty_record(U.rows, to.rows, U.K),
        U.K.new_empty((0,) if to.K is None else (*to.K, D, D)),
        empty_record(U.noise, to.noise, U.K),
    )


def hessian_product(given: Any, to: Targets, dY: Maybe, along: Any) -> Gradients:
    """The derivative of φ's gradient along a direction in (Y, parts of U), summed to ``to``.

    ``given`` has the fields of :class:`GradientArguments`.
    """
    U, gY, parts = given.U, None, Direction(None, None, None)
    if given.g_q is not None and given.Y is not None:
        A = solve(given.Y, U, given.made.scaled)
        gY, parts = _hessian_product_q(given.g_q[..., None, None], A, U, to, dY, along)
    moves = moves_of(U, along)
    if given.g_l is not None and not is_empty(moves):
        found = logdet_hvp(U, moves)
        weighted = type(found)(*_times(given.g_l[..., None, None], found))
        parts = add_records(parts, to_parts(weighted, U, to))
    if U.noise.is_curved and not is_empty(along.noise) and to.noise is not None:
        batch = torch.broadcast_shapes(to.noise, along.noise.batch)
        own = quad_logdet_gradient(*given[:5], Targets(None, None, None, batch)).noise
        curved = U.noise.curvature(own, along.noise)
        summed = type(curved)(
            *(
                x.sum_to_size(like.shape)
                for x, like in zip(curved, empty_record(U.noise, to.noise, U.K), strict=True)
            )
        )
        parts = parts._replace(noise=add_records(parts.noise, summed))
    return Gradients(gY, *parts)


def _times(g: Tensor, record: Any) -> list[Any]:
    return [type(x)(*_times(g, x)) if isinstance(x, tuple) else g * x for x in record]


def _hessian_product_q(
    g: Tensor, A: Tensor, U: Any, to: Targets, dY: Maybe, along: Any
) -> tuple[Maybe, Direction]:
    """The part of g·inv_quad, whose gradient is (2A, −A K Aᵀ, −Aᵀ M A, −Aᵀ A) times g."""
    gY, parts = None, Direction(None, None, None)
    right = minus(dY, product_tangent(A, U, along))
    if right is not None:
        Z = 2 * g * solve(right, U, None)
        gY = None if to.Y is None else sum_to(Z, to.Y, 2)
        parts = product_gradients(-Z, A, U, to)
    rows, K = parts.rows, parts.K
    moves = None if is_empty(along.rows) else along.rows
    if along.K is not None and to.rows is not None:
        G = product_row_matrix(
            -g * A, A, U._replace(parts=U.parts._replace(K=symmetric(along.K))), symmetrise=False
        )
        rows = add_records(rows, U.rows.pull_back(G, to.rows))
    if moves is not None and U.rows.is_curved and to.rows is not None:
        G = product_row_matrix(-g * A, A, U, symmetrise=False)
        rows = add_records(rows, U.rows.curvature(G, moves, to.rows))
    if moves is not None and to.K is not None:
        K = minus(K, outer_to(g * A.mT, U.rows.tangent(moves).apply(A).mT, to.K))
    return gY, parts._replace(rows=rows, K=K)


def _gradient_vjp(
    given: GradientArguments, made: Gradients, grads: Gradients, needs: Any
) -> GradientArguments:
    to = Targets.of(given.Y, given.U, needs.Y, needs.U)
    dY, along = _asked(grads.Y, grads.parts, given.to)
    first: tuple[Maybe, Maybe] = (None, None)
    if needs.g_q or needs.g_l:
        first = _first_order(Arguments(given.Y, given.U), given.made.scaled, dY, along)
    found = hessian_product(given, to, dY, along)
    return GradientArguments(*first, found.Y, Factored(found.parts, None), None, None)


def _asked(Y: Maybe, parts: Direction, to: Targets) -> tuple[Maybe, Direction]:
    """The cotangents of the gradients that were asked for."""
    kept = (x if b is not None else None for x, b in zip(parts, to[1:], strict=True))
    return Y if to.Y is not None else None, Direction(*kept)


def _gradient_jvp(given: GradientArguments, made: Gradients, along: GradientArguments) -> Gradients:
    out = hessian_product(given, given.to, along.Y, along.U)
    if along.g_q is None and along.g_l is None:
        return out
    more = gradients_or_none(along.g_q, along.g_l, given, given.made, given.to)
    return add_records(out, more)


quad_logdet_gradient = define(
    "quad_logdet_gradient",
    GradientArguments,
    Gradients,
    _gradient,
    _gradient_fake,
    vjp=_gradient_vjp,
    jvp=_gradient_jvp,
)
