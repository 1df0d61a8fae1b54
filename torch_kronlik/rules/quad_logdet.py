"""yᵀU⁻¹y and log det U from one pass over the data, with what their gradients need.

Y = None asks for log det U alone.

The gradient is an operator of its own, so that reverse mode costs no more than the gradients that
are asked for. It is the gradient of φ = g_q·inv_quad + g_l·logdet, and its own derivative is the
Hessian of φ, which is symmetric and therefore one product for forward and reverse mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..derivatives import define, register
from ..factor.batch import broadcast, outer_to, sum_to, symmetric
from ..factor.columns import columns, noise_diagonal
from ..factor.diagnose import require_finite
from .common import (
    COVARIANCE,
    Covariance,
    Maybe,
    Shape,
    minus,
    plus,
    product_gradients,
    product_tangent,
)
from .logdet import directions, logdet_gradients, logdet_hvp, to_arguments
from .solve import solve

__all__ = ["hessian_product", "quad_logdet"]

# What the first pass leaves for the gradients: the scaled data W ⊙ PᵀYR, W λ, Wᵀ s and Wᵀ 1.
_SAVED = "Tensor scaled, Tensor row, Tensor col_s, Tensor col_1"


def _quad_logdet(Y: Maybe, *covariance: Any) -> tuple[Tensor, ...]:
    c = Covariance(*covariance)
    inv_quad, logdet, *saved = c.factor.quad_logdet(Y)
    require_finite(logdet, inv_quad, Y=Y, **c.named())
    return inv_quad, logdet, *saved


def _quad_logdet_fake(Y: Maybe, *covariance: Any) -> tuple[Tensor, ...]:
    c = Covariance(*covariance)
    batch, (T, D) = c.batch, c.shape
    scaled: tuple[int, ...] = (0,)
    if Y is not None:
        batch = torch.broadcast_shapes(Y.shape[:-2], batch)
        scaled = (*batch, T, D)
    row, column = (c.f0.shape[-1], D) if c.route == "spectral" else (0, 0)
    inner = c.batch
    shapes = [batch, inner, scaled, (*inner, row), (*inner, column), (*inner, column)]
    return tuple(c.K.new_empty(shape) for shape in shapes)


def _vjp(inputs: Any, outputs: Any, grads: Any, needs: Any) -> list[Maybe]:
    c = Covariance(*inputs[1:])
    to = [inputs[0].shape[:-2] if needs[0] else None, *c.targets(needs[1:5])]
    return [*_gradient_or_none(grads[:2], inputs, outputs[2:], to), *[None] * 6]


def _jvp(inputs: Any, outputs: Any, tangents: Any) -> list[Maybe]:
    return [*_first_order(inputs, outputs[2], tangents[:5]), *[None] * 4]


def _first_order(inputs: Any, scaled: Tensor, V: Sequence[Maybe]) -> tuple[Maybe, Maybe]:
    """The derivatives of (inv_quad, logdet) along V in (Y, M, K, Sigma, log_noise)."""
    c = Covariance(*inputs[1:])
    dq = None if inputs[0] is None else _first_order_q(solve(*inputs, scaled), c, V)
    along = directions(c, V[1:])
    if all(v is None for v in along):
        return dq, None
    pairs = zip(logdet_gradients(*c), along, strict=True)
    terms = [(g * v).sum((-2, -1)) for g, v in pairs if v is not None]
    return dq, sum(terms[1:], terms[0])


def _first_order_q(A: Tensor, c: Covariance, V: Sequence[Maybe]) -> Maybe:
    right = minus(None if V[0] is None else 2 * V[0], product_tangent(A, c, V[1:]))
    return None if right is None else (A * right).sum((-2, -1))


quad_logdet = define(
    f"quad_logdet(Tensor? Y, {COVARIANCE}) -> (Tensor inv_quad, Tensor logdet, {_SAVED})",
    _quad_logdet,
    _quad_logdet_fake,
)
register(
    quad_logdet,
    vjp=_vjp,
    jvp=_jvp,
    core_dims=lambda Y, *c: ([2, *Covariance(*c).core], [0, 0, 2, 1, 1, 1]),
)


# --- the gradient: quad_logdet_gradient(g_q, g_l, Y, *covariance, *saved, *to) -------------------
# ``to`` holds the batch shapes of the gradients in (Y, M, K, Sigma, log_noise), None for those that
# are not asked for; the sums over broadcast batch dimensions are taken inside.


def _gradient_or_none(g: Any, inputs: Any, saved: Any, to: Sequence[Shape | None]) -> list[Maybe]:
    found = quad_logdet_gradient(*g, *inputs, *saved, *to)
    return [x if b is not None else None for x, b in zip(found, to, strict=True)]


def _gradient(*args: Any) -> tuple[Tensor, ...]:
    g_q, g_l, Y, c, saved, to = *args[:3], Covariance(*args[3:13]), args[13:17], args[17:]
    g_q, g_l = _mapped(g_q, to), _mapped(g_l, to[1:])
    out: list[Maybe] = [None if to[0] is None else c.K.new_zeros((*to[0], *c.shape)), *[None] * 4]
    left = A = None
    if g_q is not None and Y is not None:
        A = c.factor.solve_scaled(saved[0])
        Z = -g_q[..., None, None] * A
        left = None if to[1] is None else Z @ c.K
        out[0] = None if to[0] is None else -2 * sum_to(Z, to[0], 2)
        own = c.route == "spectral"
        out[1:] = product_gradients(
            Z, A, c, [None, None if own else to[2], *to[3:]], symmetrise=False
        )
        if own and to[2] is not None:
            out[2] = _quadratic_in_K(-g_q, saved[0], c, to[2])
        if left is not None and to[1] is not None and g_l is None:
            out[1] = outer_to(left, A, to[1])
    if g_l is not None and any(b is not None for b in to[1:]):
        sums = c.factor.sums(c.M, saved if saved[1].shape[-1] else None)
        if to[1] is not None:
            out[1] = c.factor.rows(sums[0], g_l, left, A, to[1])
        columns = _columns_gradient(c, [g_l[..., None] * x for x in sums[1:]], to[2:])
        out[2:] = map(plus, out[2:], columns)
    return tuple(c.K.new_empty(0) if x is None else x.contiguous() for x in out)


def _mapped(g: Maybe, to: Sequence[Shape | None]) -> Maybe:
    """A mapped argument that the cotangent does not depend on maps the result all the same."""
    if g is None:
        return None
    return g.expand(broadcast(g.shape, *(b for b in to if b is not None)))


def _quadratic_in_K(g: Tensor, scaled: Tensor, c: Covariance, to_K: Shape) -> Tensor:
    """g Aᵀ M A as g (PᵀA)ᵀ S (PᵀA): what M annihilates in a large A then cancels exactly."""
    f = c.spectral()
    B = f.coordinates(scaled)
    weighted = (g[..., None] * f.s)[..., :, None] * B
    return outer_to(weighted.mT, B.mT, to_K)


def _columns_gradient(
    c: Covariance, sums: Sequence[Tensor], to: Sequence[Shape | None]
) -> list[Maybe]:
    """The log-det part in K and the noise; the batch is summed over vectors where it can be."""
    f, (col_s, col_1) = c.factor, sums
    to_K, to_Sigma, to_log = to
    gK = gSigma = glog = None
    if to_K is not None:
        gK = sum_to(columns(f.R, _sum_shared(f, col_s, to_K)), to_K, 2)
    if to_Sigma is not None:
        gSigma = sum_to(columns(f.R, _sum_shared(f, col_1, to_Sigma)), to_Sigma, 2)
    if to_log is not None and c.log_noise is not None:
        diagonal = noise_diagonal(f.R, _sum_shared(f, col_1, to_log), c.log_noise)
        glog = sum_to(diagonal, to_log, 1)
    return [gK, gSigma, glog]


def _sum_shared(f: Any, weights: Tensor, to: Shape) -> Tensor:
    """Summed as far as R allows: it has the batch shape that K and the noise share."""
    return sum_to(weights, broadcast(f.R.shape[:-2], to), 1)


def _gradient_fake(*args: Any) -> tuple[Tensor, ...]:
    c, to = Covariance(*args[3:13]), args[17:]
    T, D = c.shape
    cores = ((T, D), (T, T), (D, D), (D, D), (D,))
    shapes = [(0,) if b is None else (*b, *core) for b, core in zip(to, cores, strict=True)]
    return tuple(c.K.new_empty(shape) for shape in shapes)


def hessian_product(args: Any, to: Sequence[Shape | None], V: Sequence[Maybe]) -> list[Maybe]:
    """The derivative of φ's gradient along V in (Y, M, K, Sigma, log_noise), summed to ``to``."""
    g_q, g_l, c = args[0], args[1], Covariance(*args[3:13])
    out: list[Maybe] = [None] * 5
    if g_q is not None and args[2] is not None:
        out = _hessian_product_q(g_q[..., None, None], solve(*args[2:14]), c, to, V)
    along = directions(c, V[1:])
    if g_l is not None and any(v is not None for v in along):
        moved = [g_l[..., None, None] * h for h in logdet_hvp(*c, *along)]
        out[1:] = map(plus, out[1:], to_arguments(moved, c, to[1:]))
    if V[4] is not None and to[4] is not None:
        own = torch.broadcast_shapes(to[4], V[4].shape[:-1])
        glog = quad_logdet_gradient(*args[:17], *[None] * 4, own)[4]
        out[4] = plus(out[4], sum_to(V[4] * glog, to[4], 1))
    return out


def _hessian_product_q(
    g: Tensor, A: Tensor, c: Covariance, to: Sequence[Shape | None], V: Sequence[Maybe]
) -> list[Maybe]:
    """The part of g·inv_quad, whose gradient is (2A, −A K Aᵀ, −Aᵀ M A, −Aᵀ A) times g."""
    out: list[Maybe] = [None] * 5
    right = minus(V[0], product_tangent(A, c, V[1:]))
    if right is not None:
        Z = 2 * g * solve(right, *c, None)
        out[0] = None if to[0] is None else sum_to(Z, to[0], 2)
        out[1:] = product_gradients(-Z, A, c, to[1:])
    if V[2] is not None and to[1] is not None:
        out[1] = minus(out[1], outer_to(g * A @ symmetric(V[2]), A, to[1]))
    if V[1] is not None and to[2] is not None:
        out[2] = minus(out[2], outer_to(g * A.mT, (symmetric(V[1]) @ A).mT, to[2]))
    return out


def _gradient_vjp(args: Any, outputs: Any, grads: Any, needs: Any) -> list[Maybe]:
    c = Covariance(*args[3:13])
    to = [args[2].shape[:-2] if needs[2] else None, *c.targets(needs[3:7])]
    V = [g if b is not None else None for g, b in zip(grads, args[17:], strict=True)]
    first = _first_order(args[2:13], args[13], V) if needs[0] or needs[1] else (None, None)
    return [*first, *hessian_product(args, to, V), *[None] * 15]


def _gradient_jvp(args: Any, outputs: Any, tangents: Any) -> list[Maybe]:
    to = args[17:]
    out = hessian_product(args, to, tangents[2:7])
    if tangents[0] is None and tangents[1] is None:
        return out
    return list(map(plus, out, _gradient_or_none(tangents[:2], args[2:13], args[13:17], to)))


def _gradient_core(*args: Any) -> tuple[list[Any], list[int]]:
    c = Covariance(*args[3:13])
    return [0, 0, 2, *c.core, 2, 1, 1, 1, *[None] * 5], [2, 2, 2, 2, 1]


quad_logdet_gradient = define(
    f"quad_logdet_gradient(Tensor? g_q, Tensor? g_l, Tensor? Y, {COVARIANCE}, {_SAVED},"
    " SymInt[]? to_Y, SymInt[]? to_M, SymInt[]? to_K, SymInt[]? to_Sigma, SymInt[]? to_log)"
    " -> (Tensor gY, Tensor gM, Tensor gK, Tensor gSigma, Tensor glog)",
    _gradient,
    _gradient_fake,
)
register(
    quad_logdet_gradient,
    vjp=_gradient_vjp,
    jvp=_gradient_jvp,
    core_dims=_gradient_core,
    batch_shapes=range(17, 22),
)
