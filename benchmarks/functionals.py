"""What is asked of U⁻¹ beside the likelihood: B, its diagonal, a sample, posterior variances.

    python benchmarks/functionals.py [--threads N] [--repeats N] [--seconds S]

Each call makes the covariance, factorises it and asks once, without gradients. The peer is dense
torch, the Cholesky factor of U itself, where U has at most 3000 rows; the floor is ``eigh`` of M,
which a call that diagonalises M cannot beat. We, the peer and the floor take turns in one process.
Times are medians, ratios medians over turns. Error is against the dense reference, relative to the
largest entry.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from cases import Case, problem
from common import error, markdown, ratio, take_turns, warm_up
from torch import Tensor

import torch_kronlik as tk
from torch_kronlik import reference

CASES = [
    Case(T, D, kernel)
    for kernel in ("rbf", "matern12")
    for T, D in ((256, 4), (600, 4), (1000, 4), (1000, 16))
]
LARGEST_DENSE = 3000
FUNCTIONALS = ("B", "diagonal", "sample", "variance")


def ours(case: Case, name: str) -> Callable[[], Tensor]:
    Y, M, K, noise = problem(case)
    U = lambda: tk.KroneckerPlusNoise(M, K, **noise)  # noqa: E731
    calls: dict[str, Callable[[], Tensor]] = {
        "B": lambda: U().inverse_block_diag_sum(),
        "diagonal": lambda: U().inverse_diagonal(),
        "sample": lambda: U().sample(),
        "variance": lambda: U().condition(Y, M[:100], M.diagonal()[:100]).variance,
    }
    return calls[name]


def dense(case: Case, name: str) -> Callable[[], Tensor]:
    Y, M, K, noise = problem(case)
    calls: dict[str, Callable[[], Tensor]] = {
        "B": lambda: reference.inverse_block_diag_sum(M, K, **noise),
        "diagonal": lambda: reference.inverse_diagonal(M, K, **noise),
        "sample": lambda: (
            torch.linalg.cholesky(reference.covariance_matrix(M, K, **noise))
            @ torch.randn(Y.numel(), 1, dtype=Y.dtype)
        ),
        "variance": lambda: (
            reference.condition(Y, M, K, M[:100], M.diagonal()[:100], **noise).variance
        ),
    }
    return calls[name]


def row(case: Case, name: str, repeats: int, seconds: float) -> list[str]:
    M, mine = problem(case)[1], ours(case, name)
    has_peer = case.T * case.D <= LARGEST_DENSE
    steps: list[Callable[[], object]] = [mine, lambda: torch.linalg.eigh(M)]
    if has_peer:
        steps.append(dense(case, name))
    turns = take_turns(steps, repeats, seconds)
    times = [1e3 * statistics.median(turn[i] for turn in turns) for i in range(len(steps))]
    words = [name, str(case), f"{times[0]:.2f}", f"{times[1]:.2f}"]
    words.append(f"{ratio(turns, 1).median:.2g}")
    words.append(f"{ratio(turns, 2).median:.2g}" if has_peer else "-")
    exact = has_peer and name != "sample"
    words.append(f"{error(mine(), dense(case, name)()):.0e}" if exact else "-")
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warm_up()
    rows = []
    with torch.no_grad():
        for case in CASES:
            for name in FUNCTIONALS:
                rows.append(row(case, name, options.repeats, options.seconds))
                print(" | ".join(rows[-1]), flush=True)
    header = [
        "functional",
        "problem",
        "ours, ms",
        "eigh, ms",
        "eigh / ours",
        "dense / ours",
        "error",
    ]
    print("\n" + markdown(header, rows))


if __name__ == "__main__":
    main()
