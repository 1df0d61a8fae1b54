"""A whole training step, kernel, likelihood and backward: by columns, by the matrix, by GPyTorch.

    python benchmarks/training_step.py [--threads N] [--repeats N] [--seconds S] [--largest T]

Contestants take turns in one process; times are medians, ratios medians over turns. "by the matrix"
is ours with M = kernel(x, x). GPyTorch's step is that of a multitask model whose data covariance is
the same kernel, exact at every size (its default settings would use conjugate gradients), without
its mean and its priors. Then ours alone, with the rank and the memory that a step adds.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial

import torch
from common import error, markdown, peak_bytes, ratio, take_turns, warm_up
from peers import gpytorch
from torch import Tensor

import torch_kronlik as tk

Kernel = Callable[[Tensor, Tensor], Tensor]
Make = Callable[[Tensor], Kernel]
D = 4


def rbf(theta: Tensor) -> Kernel:
    return lambda a, b: theta[1].exp() * torch.exp(-0.5 * _squares(a, b) / theta[0].exp() ** 2)


def matern52(theta: Tensor) -> Kernel:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        d = math.sqrt(5) * (a - b.mT).abs() / theta[0].exp()
        return theta[1].exp() * (1 + d + d.square() / 3) * torch.exp(-d)

    return kernel


def _squares(a: Tensor, b: Tensor) -> Tensor:
    if a.shape[-1] == 1:
        return (a - b.mT).square()
    lengths = a.square().sum(-1)[:, None] + b.square().sum(-1)
    return (lengths - 2 * (a @ b.mT)).clamp(min=0)


CASES: dict[str, tuple[Make, int, float]] = {
    "RBF on a line": (rbf, 1, 1.0),
    "Matérn-5/2 on a line": (matern52, 1, 1.0),
    "RBF in 2 dimensions": (rbf, 2, 2.0),
    "RBF in 8 dimensions": (rbf, 8, 8.0),
}


def problem(T: int, dims: int, length: float) -> list[Tensor]:
    """x on a cube of edge 10, (θ, K, log noise), Y."""
    g = torch.Generator().manual_seed(T + dims)
    x = 10 * torch.rand(T, dims, generator=g)
    A = torch.randn(D, D, generator=g)
    Y = torch.sin(x[:, :1]) + 0.3 * torch.randn(T, D, generator=g)
    theta = torch.tensor([math.log(length), 0.0])
    return [x, theta, A @ A.mT / D + 0.1 * torch.eye(D), torch.full((D,), -2.0), Y]


def step(likelihood: Callable[..., Tensor], make: Make, by_columns: bool, *given: Tensor) -> Tensor:
    x, *parameters, Y = given
    theta, K, s = (p.detach().requires_grad_() for p in parameters)
    kernel = make(theta)
    M = tk.KernelMatrix(kernel, x) if by_columns else kernel(x, x)
    value = likelihood(Y, M, K, log_noise=s)
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, (theta, K, s))])


def compared(name: str, T: int, repeats: int, seconds: float) -> list[str]:
    make, dims, length = CASES[name]
    given = problem(T, dims, length)
    rank = tk.KernelMatrix(make(given[1]), given[0]).rank
    ours = tk.kron_gaussian_nll
    steps = [
        partial(step, f, make, by_columns, *given)
        for f, by_columns in ((ours, True), (ours, False), (gpytorch, False))
    ]
    turns = take_turns(steps, repeats, seconds)
    times = [f"{1e3 * statistics.median(x):.3g}" for x in zip(*turns, strict=True)]
    ratios = [f"{ratio(turns, i).median:.3g}" for i in (1, 2)]
    return [name, str(T), str(rank), *times, *ratios, f"{error(steps[0](), steps[1]()):.0e}"]


def alone(T: int) -> list[str]:
    given = problem(T, 1, 1.0)
    f = partial(step, tk.kron_gaussian_nll, rbf, True, *given)
    memory = peak_bytes(f)
    time = statistics.median(t for (t,) in take_turns([f], 3, 60))
    rank = tk.KernelMatrix(rbf(given[1]), given[0]).rank
    return [str(T), str(rank), f"{time:.3g}", "" if memory is None else f"{memory / 1e9:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--largest", type=int, default=1_000_000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_default_dtype(torch.float64)
    warm_up()
    header = ["kernel", "T", "rank", "by columns, ms", "by the matrix, ms", "GPyTorch, ms",
              "matrix, ratio", "GPyTorch, ratio", "gradients differ by"]  # fmt: skip
    sizes = [T for T in (250, 1000, 4000) if options.largest >= T]
    rows = (compared(n, T, options.repeats, options.seconds) for n in CASES for T in sizes)
    print(markdown(header, rows), flush=True)
    sizes = [T for T in (10_000, 100_000, 1_000_000) if options.largest >= T]
    print()
    print(markdown(["T", "rank", "s", "memory, GB"], map(alone, sizes)))


if __name__ == "__main__":
    main()
