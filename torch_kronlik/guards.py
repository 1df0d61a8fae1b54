"""A check that a result is finite, as an operator: a check on values cannot be traced or mapped."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .derivatives import define
from .errors import require_finite
from .records import Scalar

__all__ = ["finite"]

_MOST = 6


class Checked(NamedTuple):
    """A result and up to six arguments that it was computed from, with their names."""

    # A result has at least as many dimensions as each argument, so none are added to it.
    x: Scalar
    a: Scalar | None
    b: Scalar | None
    c: Scalar | None
    d: Scalar | None
    e: Scalar | None
    f: Scalar | None
    names: str


class Result(NamedTuple):
    out: Scalar


def _check(given: Checked) -> Tensor:
    require_finite(given.x, **dict(zip(given.names.split(), given[1:-1], strict=False)))
    return given.x.clone(memory_format=torch.contiguous_format)


_NOTHING: Any = (None,) * (_MOST + 1)
_finite = define(
    "finite",
    Checked,
    Result,
    _check,
    lambda given: given.x.new_empty(given.x.shape),
    vjp=lambda inputs, outputs, grads, needs: Checked(grads.out, *_NOTHING),
    jvp=lambda inputs, outputs, tangents: Result(tangents.x),
)


def finite(x: Tensor, **arguments: Tensor | None) -> Tensor:
    """x, after a check that x is finite; if not, the argument (of up to six) is named."""
    values = [*arguments.values(), *[None] * (_MOST - len(arguments))]
    out: Tensor = _finite(x, *values, " ".join(arguments))
    return out
