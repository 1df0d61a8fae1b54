"""Numbers with nilpotent parts, so that a derivative of a function is the same function again.

ℝ[ε₁, …, ε_k] with ε_i² = 0 is commutative, and f(x + ε dx) = f(x) + ε f'(x; dx) exactly. An element
has c = 2^k coefficients, one for each set of ε's; the newest ε divides the coefficients into two
halves, the part without it and its factor. For matrices it is the textbook identity
exp([[X, E], [0, X]]) = [[F, L(X, E)], [0, F]] without the repeated blocks.

Here an element is the list of its coefficients. A list of length one is an element of ℝ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Element", "add", "join", "lift", "product", "scale"]

Element = list[Tensor]


def product(f: Callable[[Any, Any], Tensor], x: list[Any], y: list[Any]) -> Element:
    """x·y for coefficients multiplied by the bilinear ``f``; (x₀ + εx₁)(y₀ + εy₁)."""
    if len(x) == 1:
        return [f(x[0], t) for t in y]
    if len(y) == 1:
        return [f(t, y[0]) for t in x]
    h = len(x) // 2
    mixed = add(product(f, x[:h], y[h:]), product(f, x[h:], y[:h]))
    return product(f, x[:h], y[:h]) + mixed


def add(x: Element, y: Element) -> Element:
    return [a + b for a, b in zip(x, y, strict=True)]


def scale(factor: Tensor | float, x: Element) -> Element:
    return [factor * a for a in x]


def lift(x: Tensor, dx: Tensor | None, dim: int, size: int) -> Tensor:
    """x + ε dx, coefficients along ``dim``, of an element with ``size`` coefficients.

    An element without any ε keeps its single coefficient, which `product` takes as constant.
    """
    if dx is None and x.shape[dim] == 1:
        return x
    return join(_pad(x, dim, size), torch.zeros_like(x) if dx is None else dx, dim)


def join(x: Tensor, dx: Tensor, dim: int) -> Tensor:
    """x + ε dx where dx may have fewer coefficients, and the batch dimensions broadcast."""
    dx = _pad(dx, dim, x.shape[dim])
    batch = torch.broadcast_shapes(x.shape[:dim], dx.shape[:dim])
    return torch.cat([part.expand(*batch, *x.shape[dim:]) for part in (x, dx)], dim)


def _pad(x: Tensor, dim: int, size: int) -> Tensor:
    missing = size - x.shape[dim]
    if missing == 0:
        return x
    zeros = torch.zeros_like(x).narrow(dim, 0, 1)
    return torch.cat([x, *[zeros] * missing], dim)
