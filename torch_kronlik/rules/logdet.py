"""The gradients of log det U in M, K and Sigma, and their derivatives along a direction.

First and second derivatives of log det U are exact at repeated and zero eigenvalues; the third is
refused with an error that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..derivatives import define, register
from ..factor.batch import sum_to
from ..factor.columns import columns
from .common import COVARIANCE, Covariance, Maybe, Shape

__all__ = ["directions", "logdet_gradients", "logdet_hvp", "to_arguments"]


def directions(c: Covariance, V: Sequence[Maybe]) -> list[Maybe]:
    """(dM, dK, dΣ) for V = (dM, dK, dΣ, d log_noise), where dΣ = Diag(exp(s) ds)."""
    dM, dK, dSigma, dlog = V
    if dlog is not None and c.log_noise is not None:
        dSigma = torch.diag_embed(c.log_noise.exp() * dlog)
    return [dM, dK, dSigma]


def to_arguments(
    gradients: Sequence[Tensor], c: Covariance, to: Sequence[Shape | None]
) -> list[Maybe]:
    """Gradients in (M, K, Σ) summed to ``to``, and from Σ's the one in log_noise."""
    out = [None if b is None else sum_to(g, b, 2) for g, b in zip(gradients, to[:3], strict=True)]
    if to[3] is None or c.log_noise is None:
        return [*out, None]
    diagonal = gradients[2].diagonal(dim1=-2, dim2=-1)
    return [*out, c.log_noise.exp() * sum_to(diagonal, to[3], 1)]


# --- the gradients -------------------------------------------------------------------------------


def _gradients(*inputs: Any) -> tuple[Tensor, ...]:
    c = Covariance(*inputs)
    f, one = c.factor, c.K.new_ones(c.batch)
    row, col_s, col_1 = f.sums(c.M)
    gM = f.rows(row, one, None, None, c.batch)
    shapes = [x.shape for x in _gradients_fake(*inputs)]
    found = (gM, columns(f.R, col_s), columns(f.R, col_1))
    return tuple(x.expand(s).contiguous() for x, s in zip(found, shapes, strict=True))


def _gradients_fake(*inputs: Any) -> tuple[Tensor, ...]:
    c = Covariance(*inputs)
    T, D = c.shape
    return tuple(c.K.new_empty((*c.batch, n, n)) for n in (T, D, D))


def _gradients_vjp(inputs: Any, outputs: Any, grads: Any, needs: Any) -> list[Maybe]:
    c = Covariance(*inputs)
    return [*to_arguments(logdet_hvp(*c, *grads), c, c.targets(needs[:4])), *[None] * 6]


def _gradients_jvp(inputs: Any, outputs: Any, tangents: Any) -> list[Maybe]:
    c = Covariance(*inputs)
    along = directions(c, tangents[:4])
    if all(d is None for d in along):
        return [None] * 3
    return list(logdet_hvp(*c, *along))


logdet_gradients = define(
    f"logdet_gradients({COVARIANCE}) -> (Tensor gM, Tensor gK, Tensor gSigma)",
    _gradients,
    _gradients_fake,
)
register(
    logdet_gradients,
    vjp=_gradients_vjp,
    jvp=_gradients_jvp,
    core_dims=lambda *c: (Covariance(*c).core, [2, 2, 2]),
)


# --- their derivatives along a direction ---------------------------------------------------------


def _hvp(*inputs: Any) -> tuple[Tensor, ...]:
    c = Covariance(*inputs[:10])
    out = c.factor.logdet_hvp(c.M, *inputs[10:])
    return tuple(x.expand(s).contiguous() for x, s in zip(out, _hvp_shapes(inputs), strict=True))


def _hvp_shapes(inputs: Any) -> list[tuple[int, ...]]:
    c, V = Covariance(*inputs[:10]), inputs[10:]
    batch = torch.broadcast_shapes(c.batch, *(v.shape[:-2] for v in V if v is not None))
    T, D = c.shape
    return [(*batch, n, n) for n in (T, D, D)]


def _hvp_fake(*inputs: Any) -> tuple[Tensor, ...]:
    return tuple(inputs[1].new_empty(shape) for shape in _hvp_shapes(inputs))


def _refuse_third_order(asked: bool) -> None:
    if asked:
        raise NotImplementedError(
            "third derivatives of log det U are not implemented; first and second derivatives are"
        )


def _hvp_vjp(inputs: Any, outputs: Any, grads: Any, needs: Any) -> list[Maybe]:
    _refuse_third_order(any(needs[:4]))
    back = zip(logdet_hvp(*inputs[:10], *grads), inputs[10:], needs[10:], strict=True)
    along = [sum_to(b, v.shape[:-2], 2) if need else None for b, v, need in back]
    return [*[None] * 10, *along]


def _hvp_jvp(inputs: Any, outputs: Any, tangents: Any) -> list[Maybe]:
    _refuse_third_order(any(t is not None for t in tangents[:4]))
    if all(t is None for t in tangents[10:]):
        return [None] * 3
    out = logdet_hvp(*inputs[:10], *tangents[10:])
    return [x.expand_as(o) for x, o in zip(out, outputs, strict=True)]


logdet_hvp = define(
    f"logdet_hvp({COVARIANCE}, Tensor? dM, Tensor? dK, Tensor? dSigma)"
    " -> (Tensor hM, Tensor hK, Tensor hSigma)",
    _hvp,
    _hvp_fake,
)
register(
    logdet_hvp,
    vjp=_hvp_vjp,
    jvp=_hvp_jvp,
    core_dims=lambda *c: ([*Covariance(*c[:10]).core, 2, 2, 2], [2, 2, 2]),
)
