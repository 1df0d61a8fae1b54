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
        6: 0.005459,
        8: 0.03193,
        10: 0.09683,
        12: 0.2093,
        14: 0.3708,
        16: 0.5784,
        18: 0.8274,
        20: 1.112,
        22: 1.428,
        24: 1.771,
        26: 2.137,
        28: 2.522,
        30: 2.925,
        32: 3.342,
        34: 3.771,
    },
    torch.float32: {
        4: 0.02882,
        6: 0.1513,
        8: 0.3754,
        10: 0.6781,
        12: 1.037,
        14: 1.437,
        16: 1.866,
        18: 2.317,
        20: 2.785,
    },
}
THETA_PADE = 4.299


class Steps(NamedTuple):
    """exp(X) = (e^(shift/number) T_degree((X − shift)/number))^number"""

    shift: Tensor  # (*batch, 1)
    degree: int
    number: int

    @property
    def products(self) -> int:
        return self.degree * self.number


def choose_steps(shift: Tensor, norm: float, dtype: torch.dtype, *, spread: bool = False) -> Steps:
    """The cheapest pair: fewest products with X, or least degree + number where ``spread``."""
    pairs = [(m, max(1, math.ceil(norm / theta))) for m, theta in THETA[dtype].items()]
    m, s = min(pairs, key=lambda p: p[0] + p[1] if spread else p[0] * p[1])
    return Steps(shift, m, s)


def squarings(norm: Tensor) -> Tensor:
    """The least q ≥ 0 with norm / 2^q ≤ THETA_PADE, elementwise, as integers."""
    mantissa, exponent = torch.frexp(norm / THETA_PADE)
    return (exponent - (mantissa == 0.5).to(exponent.dtype)).clamp_min(0)
