"""Which route factorises U: a cost model with measured constants, for ``method="auto"``.

All routes are exact to rounding, so the choice is about time alone, and it is made from the sizes,
the numerical rank of M, the rank of K and the type of device. The constants were read off
``benchmarks/likelihood.py --full`` and, for GPUs, off ``benchmarks/gpu.py``.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..machine import shortage

__all__ = [
    "METHODS",
    "OBSERVED_METHODS",
    "WITH_BASIS",
    "Costs",
    "check_method",
    "check_observed_method",
    "costs",
    "max_features",
    "require_memory",
]

METHODS = ("auto", "spectral", "cholesky", "low_rank")
# As "auto", but never the Cholesky route: for what is asked of diagonal blocks of U⁻¹ and of their
# derivatives, which a basis of M gives for less.
WITH_BASIS = "auto, with a basis of M"


def check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


OBSERVED_METHODS = ("auto", "capacitance", "border", "dense")


def check_observed_method(method: str) -> None:
    if method not in OBSERVED_METHODS:
        raise ValueError(
            "with observed or a noise for each row, method must be one of "
            f"{', '.join(OBSERVED_METHODS)}, got {method!r}"
        )


def max_features(T: int, D: int, q: int) -> int:
    """The rank of M up to which the capacitance matrix, r q square, is small beside U."""
    return min(T, T * D // (3 * max(q, 1)))


def require_memory(n: int, T: int, D: int, like: Tensor) -> None:
    """Raise where the factor of n observed entries, U⁻¹ and its copy do not fit."""
    short = shortage((n * n + 2 * (T * D) ** 2) * like.element_size(), like.device)
    if short:
        raise ValueError(
            f"M is of full rank, and {n} observed entries need matrices of size {T * D} "
            f"(T = {T}, D = {D}), {short}: a smooth kernel (KernelMatrix), M of low rank "
            "(LowRankRoot), the same noise in all rows or fewer rows would fit"
        )


class Costs(NamedTuple):
    """What decides on one type of device.

    Args:
        smallest_low_rank: the T below which an eigendecomposition is cheaper than finding out that
            it is not needed.
        rank_fraction, easy_rank: the pivoted Cholesky is tried up to rank T / rank_fraction, and
            where T is small up to T/2 and easy_rank.
        eigh_in_choleskys: how many T×T Cholesky factorisations with inverses, one for each non-zero
            λ_j, cost as much as the eigendecomposition of a full-rank M.
        dense_step: how much longer a multiplication takes in the factorisation of the observed
            entries themselves than in that of the complete U with a border of the missing ones.
        small_T, small_D: up to which sizes one native call for value and gradients serves best.
    """

    smallest_low_rank: int
    rank_fraction: int
    easy_rank: int
    eigh_in_choleskys: float
    dense_step: float
    small_T: int
    small_D: int

    def max_rank(self, method: str, T: int) -> int:
        """The rank up to which the low-rank route is tried; 0 for not at all."""
        if method == "low_rank":
            return T
        if method not in ("auto", WITH_BASIS) or self.smallest_low_rank > T:
            return 0
        return max(T // self.rank_fraction, min(T // 2, self.easy_rank))

    def prefers_cholesky(self, method: str, T: int, nonzero: int) -> bool:
        """Whether full-rank M goes to one Cholesky factorisation per non-zero λ."""
        if method != "auto":
            return method == "cholesky"
        return self.smallest_low_rank <= T and nonzero < self.eigh_in_choleskys

    def prefers_border(self, T: int, D: int, m: int) -> bool:
        """Whether the complete U and a border of m missing entries take less than U at the
        others."""
        border = D * T**3 + 4 * T**2 * D * m + T * D * m**2 + m**3
        return border < self.dense_step * (T * D - m) ** 3

    def fits_small(self, T: int, D: int) -> bool:
        """Whether one native call for value and gradients serves best."""
        return self.small_T >= T and self.small_D >= D


# Measured on two cores with AVX-512, float64, value and gradients.
# Rank T/8 costs a few hundredths of what the full-rank routes take, and rank 64 at T = 256 0.08 ms
# against 0.7 for one Cholesky factor with its inverse and 2 for the eigendecomposition.
# Spectral to Cholesky route with five non-zero λ_j: 1.3, 1.1, 1.6 times at T = 150, 256, 512; with
# six 1.2, 1.2, 1.4, and 1.0 at 1000; with seven 1.0, 0.95, 1.1. Each λ_j is a T×T matrix of memory
# too, and with six they would be eight in all, as much as a large problem is to take.
# One native call at T = 128, D = 4: 0.6 ms against 1.1 (smooth M) and 1.8 (rough); in batches of 32
# 0.36 ms each against 0.31 and 1.1, and with T the general routes win on smooth M.
# Missing entries at T = 1000, D = 4 with a rough M: the border 0.26 s with 10 % missing and 0.71
# with 30 %, the others themselves 0.99 with 30 %.
CPU = Costs(
    smallest_low_rank=96,
    rank_fraction=8,
    easy_rank=64,
    eigh_in_choleskys=5.5,
    dense_step=1.5,
    small_T=128,
    small_D=16,
)

# Measured on an H100, float64, value and gradients: benchmarks/results/gpu.md.
# Up to T = 128 the low-rank route takes as long as the spectral one: 5 ms, most of them the host's.
# At T = 256 it takes 0.9 times as long, at 1024 a third, at 4096 a twentieth. To seek a rank of T/8
# in vain costs 3 to 5 % of what follows.
# Spectral to Cholesky route cross at 5 non-zero λ_j for T = 512, at 6 for 1024 and 2048, at 9 for
# 4096, where each λ_j is a T×T matrix of memory too.
# A matrix of a small problem has to fit into shared memory.
# Missing entries at D = 4, border and the others themselves: 15 and 15 ms with 10 % of T = 1000
# missing, 17 and 12 with 30 %, 39 and 37 with 30 % of T = 2000.
CUDA = Costs(
    smallest_low_rank=256,
    rank_fraction=8,
    easy_rank=64,
    eigh_in_choleskys=6.5,
    dense_step=1.0,
    small_T=64,
    small_D=16,
)

BY_DEVICE = {"cpu": CPU, "cuda": CUDA}
_ELSEWHERE = CPU._replace(small_T=-1)


def costs(device: str) -> Costs:
    """By the type of a device."""
    return BY_DEVICE.get(device, _ELSEWHERE)
