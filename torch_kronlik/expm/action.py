"""exp(X) v and its gradient for X = Diag(d) A from products with A and Aᵀ alone.

Al-Mohy & Higham 2011: exp(X) v = (e^(μ/s) T_m(Y))^s v with Y = (X − μ)/s and T_m the Taylor
polynomial. The gradient is that of this very polynomial, so its truncation is the one that
``degrees`` bounds. In one step, with terms b_0 = w, b_j = Y b_{j−1}/j and the cotangent g of
Σ b_j, Horner's rule c_m = g, c_{j−1} = g + Yᵀ c_j/j gives ∂φ/∂Y = Σ_j c_j b_{j−1}ᵀ/j. All of it
holds for elements with nilpotent parts, whence all further derivatives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .algebra import Element, add, product, scale
from .degrees import Steps
from .matrices import Matrix

__all__ = ["Gradient", "action", "action_gradient"]


class Term(NamedTuple):
    """One term of the series: b_{j−1} and A b_{j−1}, and the factor 1/(s j)."""

    b: Element
    Ab: Element
    factor: float


class Gradient(NamedTuple):
    """The parts of ∂φ/∂(d, A, v): φ's gradient in X is Σ_k x_k y_kᵀ."""

    d: Element
    x: list[Element]  # Diag(d) is already on it
    y: list[Element]
    v: Element


def action(A: Matrix, d: Element, v: Element, steps: Steps) -> Element:
    """exp(Diag(d) A) v"""
    w = v
    for _ in range(steps.number):
        w = _step(A, d, w, steps, None)
    return w


def _step(A: Matrix, d: Element, w: Element, steps: Steps, terms: list[Term] | None) -> Element:
    b = w
    for j in range(1, steps.degree + 1):
        Ab, factor = A.matvec(b), 1 / (steps.number * j)
        if terms is not None:
            terms.append(Term(b, Ab, factor))
        b = _shifted(product(torch.mul, d, Ab), b, steps, factor)
        w = add(w, b)
    return scale(_growth(steps), w)


def action_gradient(
    A: Matrix, g: Element, d: Element, v: Element, steps: Steps, *, keep: bool
) -> Gradient:
    """The gradient of ⟨g, exp(Diag(d) A) v⟩; x and y only where ``keep``, for A's gradient."""
    terms: list[Term] = []
    w = v
    for _ in range(steps.number):
        w = _step(A, d, w, steps, terms)
    out = Gradient([g[0].new_zeros(())] * len(g), [], [], g)
    for _ in range(steps.number):
        out = _step_back(A, d, terms, steps, out, keep)
    return out


def _step_back(
    A: Matrix, d: Element, terms: list[Term], steps: Steps, out: Gradient, keep: bool
) -> Gradient:
    gd, x, y, g = out
    c = g = scale(_growth(steps), g)
    for _ in range(steps.degree):
        b, Ab, factor = terms.pop()
        gd = add(gd, scale(factor, product(torch.mul, c, Ab)))
        dc = product(torch.mul, d, c)
        if keep:
            x.append(scale(factor, dc))
            y.append(b)
        c = add(g, _shifted(A.rmatvec(dc), c, steps, factor))
    return Gradient(gd, x, y, c)


def _shifted(Xb: Element, b: Element, steps: Steps, factor: float) -> Element:
    """factor (X − μ) b"""
    return [factor * (p - steps.shift * q) for p, q in zip(Xb, b, strict=True)]


def _growth(steps: Steps) -> Tensor:
    return torch.exp(steps.shift / steps.number)
