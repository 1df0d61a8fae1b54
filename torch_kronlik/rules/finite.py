"""A check that a result is finite, as an operator: a check on values cannot be traced or mapped."""

from __future__ import annotations

import torch
from torch import Tensor

from ..derivatives import define, register
from ..factor.diagnose import require_finite
from .common import Maybe

__all__ = ["finite"]

_MOST = 5


def _check(x: Tensor, a: Maybe, b: Maybe, c: Maybe, d: Maybe, e: Maybe, names: str) -> Tensor:
    require_finite(x, **dict(zip(names.split(), (a, b, c, d, e), strict=False)))
    return x.clone(memory_format=torch.contiguous_format)


_finite = define(
    "finite(Tensor x, Tensor? a, Tensor? b, Tensor? c, Tensor? d, Tensor? e, str names) -> Tensor",
    _check,
    lambda x, a, b, c, d, e, names: x.new_empty(x.shape),
)
register(
    _finite,
    vjp=lambda inputs, outputs, grads, needs: [grads[0], *[None] * (_MOST + 1)],
    jvp=lambda inputs, outputs, tangents: [tangents[0]],
    # x has at least the dimensions of what it was computed from, so none are added to it
    core_dims=lambda *_: ([*[0] * (_MOST + 1), None], [0]),
)


def finite(x: Tensor, **arguments: Maybe) -> Tensor:
    """x, after a check that it is finite; if not, the argument (of up to five) is named."""
    values = [*arguments.values(), *[None] * (_MOST - len(arguments))]
    out: Tensor = _finite(x, *values, " ".join(arguments))
    return out
