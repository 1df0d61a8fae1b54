"""Gradient in d of w = exp(Diag(d) A) v: time and error, against torch and scipy.

    python benchmarks/expm.py [--threads N] [--repeats N] [--sizes 200 1000 2000] [--norms 1 10 100]

"torch" is autograd through ``torch.linalg.matrix_exp``. One turn is a forward and a backward pass
of each contestant, one after the other in one process; times and ratios are medians over turns.
A is a dense random matrix, scaled to the 1-norm of Diag(d) A given. Errors are the largest ones
relative to the largest entry, against scipy's ``expm_frechet`` up to n = 1000.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import numpy as np
import scipy.linalg
import torch
from common import error, ratio, take_turns
from torch import Tensor

import torch_kronlik as tk

LARGEST_CHECKED = 1000


def problem(n: int, norm: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    d = torch.rand(n, generator=generator, dtype=torch.float64) + 0.5
    A, v, g = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((n, n), (n,), (n,))
    )
    return d, A * (norm / (d[:, None] * A).abs().sum(0).max()), v, g


def ours(d: Tensor, A: Tensor, v: Tensor, g: Tensor) -> Tensor:
    d = d.detach().requires_grad_()
    return torch.autograd.grad(tk.expm_diag_multiply(d, A, v) @ g, d)[0]


def by_matrix_exp(d: Tensor, A: Tensor, v: Tensor, g: Tensor) -> Tensor:
    d = d.detach().requires_grad_()
    return torch.autograd.grad(torch.linalg.matrix_exp(d[:, None] * A) @ v @ g, d)[0]


def by_scipy(d: Tensor, A: Tensor, v: Tensor, g: Tensor) -> Tensor:
    G = scipy.linalg.expm_frechet((d[:, None] * A).numpy().T, np.outer(g, v), compute_expm=False)
    return torch.from_numpy((G * A.numpy()).sum(1))


def row(n: int, norm: float, repeats: int) -> str:
    inputs = problem(n, norm)
    expected = by_scipy(*inputs) if n <= LARGEST_CHECKED else None
    contestants = (ours, by_matrix_exp)
    errors = [
        "-" if expected is None else f"{error(f(*inputs), expected):.0e}" for f in contestants
    ]
    turns = take_turns([partial(f, *inputs) for f in contestants], repeats)
    fast, slow = (1e3 * statistics.median(x) for x in zip(*turns, strict=True))
    by = ratio(turns, of=1).median
    return f"| {n} | {norm:g} | {fast:.1f} | {slow:.0f} | {by:.1f} | {errors[0]} | {errors[1]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[200, 1000, 2000])
    parser.add_argument("--norms", type=float, nargs="+", default=[1.0, 10.0, 100.0])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| n | norm of X | ms | torch, ms | ratio | error | torch, error |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for n in arguments.sizes:
        for norm in arguments.norms:
            print(row(n, norm, arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
