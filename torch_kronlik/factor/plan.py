"""Which route factorises U: a cost model with measured constants, for ``method="auto"``.

All routes are exact to rounding, so the choice is about time alone. On full-rank M of size T the
eigendecomposition costs about as much as ``EIGH_IN_CHOLESKYS`` Cholesky factorisations with
inverses, and one of these is needed for each non-zero eigenvalue λ_j.
"""

from __future__ import annotations

__all__ = ["METHODS", "check_method", "fits_small", "max_rank", "prefers_cholesky"]

METHODS = ("auto", "spectral", "cholesky", "low_rank")

# Below this T an eigendecomposition is cheaper than finding out that it is not needed.
SMALLEST_LOW_RANK = 96
# The pivoted Cholesky is tried up to rank T/8, for a few hundredths of what the full-rank routes
# take, and where T is small up to T/2 and 64: there it runs in cache (T = 256, rank 64: 0.12 ms,
# against 0.7 for one T×T Cholesky factor with its inverse and 2 for the eigendecomposition).
LARGEST_RANK_FRACTION = 8
EASY_RANK = 64
EIGH_IN_CHOLESKYS = 6.0
# The native kernel for small problems takes a Cholesky factorisation for each output, in vector
# lanes. On a CPU, T = 128, D = 4, one thread: 0.6 ms against 1.1 (smooth M) and 1.8 (rough), and in
# batches of 32 0.36 ms each against 0.31 and 1.1; with T the general routes win on smooth M. On a
# GPU: one matrix in shared memory.
LARGEST_SMALL_T = {"cpu": 128, "cuda": 64}
LARGEST_SMALL_D = {"cpu": 16, "cuda": 8}


def check_method(method: str, diagonalised: bool = False) -> None:
    methods = METHODS[:2] if diagonalised else METHODS
    if method not in methods:
        given = " for a SymmetricEigen" if diagonalised else ""
        raise ValueError(f"method must be one of {', '.join(methods)}{given}, got {method!r}")


def max_rank(method: str, T: int) -> int:
    """The rank up to which the low-rank route is tried; 0 for not at all."""
    if method == "low_rank":
        return T
    if method != "auto" or T < SMALLEST_LOW_RANK:
        return 0
    return max(T // LARGEST_RANK_FRACTION, min(T // 2, EASY_RANK))


def prefers_cholesky(method: str, T: int, nonzero: int) -> bool:
    """Whether full-rank M goes to one Cholesky factorisation per non-zero λ."""
    if method != "auto":
        return method == "cholesky"
    return T >= SMALLEST_LOW_RANK and nonzero < EIGH_IN_CHOLESKYS


def fits_small(T: int, D: int, device: str) -> bool:
    """Whether one native call for value and gradients serves best on this type of device."""
    rows, outputs = LARGEST_SMALL_T.get(device, -1), LARGEST_SMALL_D.get(device, -1)
    return rows >= T and outputs >= D
