"""How many Taylor terms, how many steps, how many squarings: chosen by a bound that certifies.

T_m(Y) = exp(Y + h_m(Y)) with h_m(Y) = Σ_{k>m} c_k Y^k, so truncation is a perturbation of Y.
``THETA[dtype][m]`` is the largest θ at which h̃(θ) = Σ |c_k| θ^k keeps h̃/θ, h̃' and θ h̃''/2 below
the unit roundoff: for ‖Y‖ ≤ θ the exponential, its first and its second derivatives are those of
perturbed data, relative perturbation at most the rounding of Y (Al-Mohy & Higham 2009, 2011, there
for the exponential and its first derivative). Any operator norm serves. ``THETA_PADE`` is the same
for the [13/13] Padé approximant in float64; it serves float32 too.

The degrees end where e^(2θ), which bounds how much the terms of the series cancel, would cost
more than three digits in float64 and two in float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["THETA", "THETA_PADE", "Steps", "choose_steps", "squarings"]

THETA = {
    torch.float64: {
TABLE64
    },
    torch.float32: {
TABLE32
    },
}
THETA_PADE = PADE


class Steps(NamedTuple):
    """exp(X) = (e^(shift/count) T_degree((X − shift)/count))^count"""

    shift: Tensor  # (*batch, 1)
    degree: int
    count: int

    @property
    def products(self) -> int:
        return self.degree * self.count


def choose_steps(shift: Tensor, norm: float, dtype: torch.dtype, *, spread: bool = False) -> Steps:
    """The cheapest pair: fewest products with X, or least degree + count where ``spread``."""
    pairs = [(m, max(1, math.ceil(norm / theta))) for m, theta in THETA[dtype].items()]
    m, s = min(pairs, key=lambda p: p[0] + p[1] if spread else p[0] * p[1])
    return Steps(shift, m, s)


def squarings(norm: Tensor) -> Tensor:
    """The least q ≥ 0 with norm / 2^q ≤ THETA_PADE, elementwise, as integers."""
    mantissa, exponent = torch.frexp(norm / THETA_PADE)
    return (exponent - (mantissa == 0.5).to(exponent.dtype)).clamp_min(0)
