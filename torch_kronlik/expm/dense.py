"""exp(X) and its derivatives by scaling and squaring, for small matrices and for large norms.

Higham 2005 and Al-Mohy & Higham 2009: the [13/13] Padé approximant of X/2^q, squared q times. Over
elements with nilpotent parts the same lines give the Fréchet derivative: the coefficient of ε in
exp(X + ε E) is L(X, E). The matrix is shifted by its mean eigenvalue first.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .algebra import Element, add, product, scale
from .degrees import squarings
from .matrices import sum_outer

__all__ = ["action", "action_gradient", "exponential", "scaled"]

_PADE = [  # of degree 13, the constant coefficient being one
    math.factorial(26 - j) * math.comb(13, j) / math.factorial(26) for j in range(14)
]


def action(A: Element, d: Element, v: Element) -> Element:
    """exp(Diag(d) A) v"""
    return product(_matvec, exponential(scaled(d, A)), v)


def action_gradient(
    A: Element, g: Element, d: Element, v: Element, *, summed: bool
) -> tuple[Element, Element, Element]:
    """The gradient of ⟨g, exp(X) v⟩ in d, X = Diag(d) A, and v: (rows of G ⊙ A, G, exp(X)ᵀ g).

    G = L(Xᵀ, g vᵀ). L is linear in the direction, so that where one X serves the
    whole batch and the gradient is ``summed`` over it, the directions are.
    """
    X = [x.mT for x in scaled(d, A)]
    direction = product(_sum_outer if summed else _outer, g, v)
    X = X + [torch.zeros_like(X[0])] * (len(direction) - len(X))
    shapes = torch.broadcast_shapes(X[0].shape, direction[0].shape)
    both = exponential([x.expand(shapes) for x in X + direction])
    F, G = both[: len(g)], both[len(g) :]
    return product(lambda a, b: (a * b).sum(-1), G, A), G, product(_matvec, F, g)


def exponential(X: Element) -> Element:
    """exp(X) for coefficients (*batch, n, n)."""
    eye = torch.eye(X[0].shape[-1], dtype=X[0].dtype, device=X[0].device)
    shift = X[0].diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    X = [X[0] - shift * eye, *X[1:]]
    norm = torch.minimum(*(X[0].abs().sum(dim).amax(-1) for dim in (-1, -2)))
    q = squarings(norm)[..., None, None]
    down = torch.ldexp(torch.ones_like(shift), -q)
    F = scale(torch.exp(down * shift), _pade(scale(down, X), eye))
    for i in range(int(q.max())):
        F = [
            torch.where(i < q, f2, f) for f2, f in zip(product(torch.matmul, F, F), F, strict=True)
        ]
    return F


def _pade(X: Element, eye: Tensor) -> Element:
    """(V − U)⁻¹ (V + U), with U and V the odd and the even part of the numerator."""
    X2 = product(torch.matmul, X, X)
    X4 = product(torch.matmul, X2, X2)
    powers = [X2, X4, product(torch.matmul, X4, X2)]
    U = product(torch.matmul, X, _even(_PADE[1::2], powers, eye))
    V = _even(_PADE[0::2], powers, eye)
    below = add(V, scale(-1.0, U))
    return _solve(torch.linalg.lu_factor(below[0]), below, add(V, U))


def _even(b: list[float], powers: list[Element], eye: Tensor) -> Element:
    """Σ_k b_k X^(2k) for k up to 6, from X², X⁴ and X⁶."""
    low, high = _combine(b[1:4], powers), _combine(b[4:7], powers)
    out = add(product(torch.matmul, powers[2], high), low)
    return [out[0] + b[0] * eye, *out[1:]]


def _combine(b: list[float], powers: list[Element]) -> Element:
    terms = [scale(factor, power) for factor, power in zip(b, powers, strict=True)]
    return add(add(terms[0], terms[1]), terms[2])


def _solve(lu: Any, Q: Element, P: Element) -> Element:
    """Z with Q·Z = P: Q₀ Z₀ = P₀, and Q₀ Z₁ = P₁ − Q₁ Z₀ for the factor of the newest ε."""
    if len(Q) == 1:
        return [torch.linalg.lu_solve(*lu, p) for p in P]
    h = len(Q) // 2
    low = _solve(lu, Q[:h], P[:h])
    mixed = product(torch.matmul, Q[h:], low)
    return low + _solve(lu, Q[:h], add(P[h:], scale(-1.0, mixed)))


def _outer(x: Tensor, y: Tensor) -> Tensor:
    return x.unsqueeze(-1) * y.unsqueeze(-2)


def _sum_outer(x: Tensor, y: Tensor) -> Tensor:
    return sum_outer(x.unsqueeze(-1), y.unsqueeze(-1), ())


def _matvec(F: Tensor, x: Tensor) -> Tensor:
    return (F @ x.unsqueeze(-1)).squeeze(-1)


def scaled(d: Element, A: Element) -> Element:
    """Diag(d) A"""
    return product(lambda x, B: x.unsqueeze(-1) * B, d, A)
