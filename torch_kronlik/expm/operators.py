"""The two differentiable operators, w = exp(Diag(d) A) v and its gradient, right at every order.

Each takes elements with nilpotent parts (``algebra``): d, g, v (*batch, c, n), A (*batch, c, n, n),
or the values (*batch, c, nnz) of a sparse A with ``crow`` and ``col``; c = 1 at the start. A
derivative along a direction is the same operator on x + ε dx, in its factor of ε. A gradient is the
gradient operator with the coefficients of the cotangent in reverse order, because ⟨g, w⟩ is the
last coefficient of reverse(g)·w. So the family is closed, and no rule approximates anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..derivatives import define_flat, register
from . import action as by_action
from . import dense as by_dense
from .algebra import join, lift
from .check import require_finite_input, require_finite_result
from .degrees import Steps, choose_steps
from .matrices import CsrMatrix, DenseMatrix, Matrix

__all__ = ["choose", "expm_action", "expm_gradient"]

Maybe = Tensor | None
Shape = Sequence[int]
_MATRIX = "Tensor? crow, Tensor? col, str method"


def _matrix(A: Tensor, crow: Maybe, col: Maybe) -> Matrix:
    if crow is None or col is None:
        return DenseMatrix(A)
    return CsrMatrix(A, crow, col)


def choose(matrix: Matrix, d: Tensor, A: Tensor, crow: Maybe, *, spread: bool = False) -> Steps:
    """Degree and number of steps for the matrix of the batch that needs the most."""
    d = d[..., 0, :]
    diagonal = d * matrix.diagonal()
    shift = diagonal.mean(-1, keepdim=True)
    moved = (diagonal - shift).abs() - diagonal.abs()
    norms = [(x + moved).amax(-1) for x in matrix.abs_products(d)]
    norm = float(torch.minimum(*norms).amax())
    require_finite_input(norm, **_named(d, A, crow))
    return choose_steps(shift, norm, d.dtype, spread=spread)


def _named(d: Tensor, A: Tensor, crow: Maybe) -> dict[str, Tensor]:
    """What the caller gave: the coefficient without ε."""
    return {"d": d, "A": A[..., 0, :, :]} if crow is None else {"d": d, "A.values()": A[..., 0, :]}


def _use_action(method: str, matrix: Matrix, steps: Steps, n: int) -> bool:
    """Whether products with vectors are fewer than those of scaling and squaring cost."""
    if method == "auto":
        return isinstance(matrix, CsrMatrix) or steps.products <= n
    return method == "action"


# --- w = exp(Diag(d) A) v ------------------------------------------------------------------------


def _action(d: Tensor, A: Tensor, v: Tensor, crow: Maybe, col: Maybe, method: str) -> Tensor:
    shape = _action_shape(d, A, v, crow)
    if 0 in shape:
        return v.new_empty(shape)
    matrix = _matrix(A, crow, col)
    steps = choose(matrix, d, A, crow)
    D, V = list(d.unbind(-2)), list(v.unbind(-2))
    if _use_action(method, matrix, steps, v.shape[-1]):
        w = by_action.action(matrix, D, V, steps)
    else:
        w = by_dense.action(list(A.unbind(-3)), D, V)
    out = torch.stack([x.expand(*shape[:-2], -1) for x in w], -2)
    require_finite_result(out[..., 0, :], v=v[..., 0, :])
    return out


def _action_shape(d: Tensor, A: Tensor, v: Tensor, crow: Maybe) -> tuple[int, ...]:
    return (*_joint(d, A, v, crow), *v.shape[-2:])


def _joint(d: Tensor, A: Tensor, v: Tensor, crow: Maybe) -> torch.Size:
    batch = (d.shape[:-2], A.shape[: _lead(A, crow)], v.shape[:-2])
    return torch.Size(torch.broadcast_shapes(*batch))


def _lead(A: Tensor, crow: Maybe) -> int:
    """The number of batch dimensions of A or of its values."""
    return A.dim() - (3 if crow is None else 2)


def _action_fake(d: Tensor, A: Tensor, v: Tensor, crow: Maybe, *_: Any) -> Tensor:
    return v.new_empty(_action_shape(d, A, v, crow))


def _action_vjp(inputs: Any, outputs: Any, grads: Any, needs: Any) -> list[Maybe]:
    shapes = _batch_shapes(inputs[:4], needs)
    found = expm_gradient(grads[0].flip(-2), *inputs, *shapes)
    return [*_cotangents(found, inputs[:4], shapes), None, None, None]


def _action_jvp(inputs: Any, outputs: Any, tangents: Any) -> list[Maybe]:
    return [_along(expm_action(*_lifted(inputs, tangents)), -2)]


expm_action = define_flat(
    f"expm_action(Tensor d, Tensor A, Tensor v, {_MATRIX}) -> Tensor", _action, _action_fake
)
register(
    expm_action,
    vjp=_action_vjp,
    jvp=_action_jvp,
    core_dims=lambda d, A, v, crow, *_: ([2, 3 if crow is None else 2, 2, 1, 1, None], [2]),
)


# --- what the rules share -------------------------------------------------------------------------


def _coefficient_dim(crow: Maybe) -> int:
    return -3 if crow is None else -2


def _lifted(inputs: Any, tangents: Any) -> list[Any]:
    """(d, A, v, crow, col, method) along tangents of (d, A, v)."""
    d, A, v, crow, *rest = inputs
    size, dv = v.shape[-2], torch.zeros_like(v) if tangents[2] is None else tangents[2]
    moved_A = lift(A, tangents[1], _coefficient_dim(crow), size)
    return [lift(d, tangents[0], -2, size), moved_A, join(v, dv, -2), crow, *rest]


def _along(x: Tensor, dim: int) -> Tensor:
    """The factor of the newest ε."""
    half = x.shape[dim] // 2
    return x.narrow(dim, half, half).clone(memory_format=torch.contiguous_format)


def _batch_shapes(inputs: Any, needs: Sequence[bool]) -> list[Shape | None]:
    d, A, v, crow = inputs
    shapes = [d.shape[:-2], A.shape[: _lead(A, crow)], v.shape[:-2]]
    return [shape if need else None for shape, need in zip(shapes, needs, strict=False)]


def _cotangents(found: Any, inputs: Any, shapes: Sequence[Shape | None]) -> list[Maybe]:
    """Coefficients reversed, those that the argument has not left away."""
    d, A, v, crow = inputs
    dims = (-2, _coefficient_dim(crow), -2)
    return [
        None if shape is None else x.flip(dim).narrow(dim, 0, argument.shape[dim])
        for x, argument, dim, shape in zip(found, (d, A, v), dims, shapes, strict=True)
    ]


# --- the gradient of reverse(g)·w: expm_gradient(g, d, A, v, crow, col, method, *to) --------------
# ``to`` holds the batch shapes of the three gradients, None for one that is not asked for.


def _gradient(
    g: Tensor, d: Tensor, A: Tensor, v: Tensor, crow: Maybe, col: Maybe, method: str, *to: Any
) -> tuple[Tensor, ...]:
    shapes = _gradient_shapes(g, A, crow, to)
    if 0 in v.shape[-1:] or 0 in _joint(d, A, v, crow) or 0 in g.shape:
        return tuple(g.new_zeros(shape) for shape in shapes)
    matrix = _matrix(A, crow, col)
    steps = choose(matrix, d, A, crow)
    G, D, V = (list(x.unbind(-2)) for x in (g, d, v))
    if _use_action(method, matrix, steps, v.shape[-1]):
        gd, gA, gv = _by_action(matrix, G, D, V, steps, to[1])
    else:
        gd, gA, gv = _by_dense(list(A.unbind(-3)), G, D, V, to)
    parts = zip((gd, gA, gv), shapes, (-2, _coefficient_dim(crow), -2), to, strict=True)
    return tuple(
        g.new_empty(0) if to_x is None else _summed(x, shape, dim) for x, shape, dim, to_x in parts
    )


def _summed(x: Any, shape: Any, dim: int) -> Tensor:
    """Coefficients stacked along ``dim`` and the batch summed, or expanded, to ``shape``."""
    out = torch.stack(torch.broadcast_tensors(*x), dim)
    out = out.expand(torch.broadcast_shapes(out.shape, shape))
    return out.sum_to_size(shape).contiguous()


def _by_action(
    matrix: Matrix, g: Any, d: Any, v: Any, steps: Steps, to_A: Shape | None
) -> tuple[Any, Any, Any]:
    found = by_action.action_gradient(matrix, g, d, v, steps, keep=to_A is not None)
    if to_A is None:
        return found.d, None, found.v
    x, y = (
        [torch.stack(torch.broadcast_tensors(*each), -1) for each in zip(*terms, strict=True)]
        for terms in (found.x, found.y)
    )
    return found.d, matrix.outer(x, y, tuple(to_A)), found.v


def _by_dense(A: Any, g: Any, d: Any, v: Any, to: Sequence[Shape | None]) -> tuple[Any, Any, Any]:
    summed = d[0].dim() == 1 and A[0].dim() == 2 and all(not shape for shape in to[:2])
    gd, G, gv = by_dense.action_gradient(A, g, d, v, summed=summed)
    return gd, None if to[1] is None else by_dense.scaled(d, G), gv


def _gradient_shapes(g: Tensor, A: Tensor, crow: Maybe, to: Any) -> list[tuple[int, ...]]:
    c, n = g.shape[-2:]
    core = A.shape[_lead(A, crow) + 1 :]
    cores = ((c, n), (c, *core), (c, n))
    return [(0,) if b is None else (*b, *x) for b, x in zip(to, cores, strict=True)]


def _gradient_fake(
    g: Any, d: Any, A: Any, v: Any, crow: Maybe, col: Any, method: str, *to: Any
) -> Any:
    return tuple(g.new_empty(shape) for shape in _gradient_shapes(g, A, crow, to))


def _gradient_vjp(inputs: Any, outputs: Any, grads: Any, needs: Any) -> list[Maybe]:
    g, (d, A, v, crow), to = inputs[0], inputs[1:5], inputs[7:]
    dims = (-2, _coefficient_dim(crow), -2)
    turned = [
        None if h is None or b is None else h.flip(dim)
        for h, dim, b in zip(grads, dims, to, strict=True)
    ]
    moved = _lifted(inputs[1:7], turned)
    out: list[Maybe] = [None]
    if needs[0]:
        back = _along(expm_action(*moved), -2).flip(-2)
        back = back.expand(torch.broadcast_shapes(back.shape, g.shape))
        out = [back.sum_to_size(g.shape)]
    shapes = _batch_shapes((d, A, v, crow), needs[1:4])
    if any(shape is not None for shape in shapes):
        found = expm_gradient(join(g, torch.zeros_like(g), -2), *moved, *shapes)
        halves = [
            x if b is None else _along(x, i) for x, i, b in zip(found, dims, shapes, strict=True)
        ]
        out += _cotangents(halves, (d, A, v, crow), shapes)
    return out + [None] * (len(inputs) - len(out))


def _gradient_jvp(inputs: Any, outputs: Any, tangents: Any) -> list[Maybe]:
    g, to, crow = inputs[0], inputs[7:], inputs[4]
    dg = torch.zeros_like(g) if tangents[0] is None else tangents[0]
    moved = _lifted(inputs[1:7], tangents[1:4])
    found = expm_gradient(join(g, dg, -2), *moved, *to)
    dims = (-2, _coefficient_dim(crow), -2)
    return [None if b is None else _along(x, i) for x, i, b in zip(found, dims, to, strict=True)]


def _gradient_core(g: Any, d: Any, A: Any, v: Any, crow: Maybe, *_: Any) -> Any:
    core = 3 if crow is None else 2
    return [2, 2, core, 2, 1, 1, *[None] * 4], [2, core, 2]


expm_gradient = define_flat(
    f"expm_gradient(Tensor g, Tensor d, Tensor A, Tensor v, {_MATRIX},"
    " SymInt[]? to_d, SymInt[]? to_A, SymInt[]? to_v) -> (Tensor gd, Tensor gA, Tensor gv)",
    _gradient,
    _gradient_fake,
)
register(
    expm_gradient,
    vjp=_gradient_vjp,
    jvp=_gradient_jvp,
    core_dims=_gradient_core,
    batch_shapes=range(7, 10),
)
