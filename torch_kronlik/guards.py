"""Checks of values as operators, since a check on values cannot be traced or mapped otherwise."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .capture import is_captured
from .derivatives import define
from .errors import require_finite
from .records import Scalar

__all__ = ["finite", "positive"]

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


class Named(NamedTuple):
    x: Scalar
    name: str | None


def _require_positive(given: Named) -> Tensor:
    x, name = given
    if not is_captured(x) and bool((x <= 0).any()):
        index = tuple(int(i) for i in (x <= 0).nonzero()[0])
        raise ValueError(
            f"{name} must be positive, but {name}{list(index)} is {x.detach()[index].item()}"
        )
    return x.clone(memory_format=torch.contiguous_format)


positive = define(
    "positive",
    Named,
    Result,
    _require_positive,
    lambda given: given.x.new_empty(given.x.shape),
    vjp=lambda inputs, outputs, grads, needs: Named(grads.out, None),
    jvp=lambda inputs, outputs, tangents: Result(tangents.x),
)
"""``positive(x, name)`` is x, after a check that its entries are positive."""


def finite(x: Tensor, **arguments: Tensor | None) -> Tensor:
    """x, after a check that x is finite; if not, the argument (of up to six) is named."""
    values = [*arguments.values(), *[None] * (_MOST - len(arguments))]
    out: Tensor = _finite(x, *values, " ".join(arguments))
    return out
