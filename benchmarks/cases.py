"""The problems that are timed: the grid, and the rows that have a target."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["TARGETS", "Case", "Target", "curves", "grid", "mask", "problem"]

LENGTH = 0.1  # of the kernels, on a line from 0 to 1


class Case(NamedTuple):
    T: int
    D: int
    kernel: str = "rbf"  # or "matern12", or "rbf8d": points at random in 8 dimensions
    noise: str = "diagonal"  # or "full"
    batch: int = 0  # 0 for a single problem
    dtype: torch.dtype = torch.float64
    constant: bool = False  # M, diagonalised beforehand where a contestant can use that
    gradients: bool = True  # in M (unless constant), K and the noise

    def __str__(self) -> str:
        words = [f"{self.batch} × " if self.batch else "", f"T = {self.T}, D = {self.D}"]
        words += [f", {self.kernel}", ", full noise" if self.noise == "full" else ""]
        words += [", float32" if self.dtype == torch.float32 else ""]
        words += [", constant M" if self.constant else "", "" if self.gradients else ", value only"]
        return "".join(words)


class Target(NamedTuple):
    case: Case
    peer: str
    ratio: float


TARGETS = [
    Target(Case(64, 4), "gpytorch", 12),
    Target(Case(256, 4), "gpytorch", 15),
    Target(Case(1000, 4), "gpytorch", 60),
    Target(Case(2000, 8), "gpytorch", 140),
    Target(Case(1000, 4, noise="full"), "gpytorch", 60),
    Target(Case(1000, 4, "matern12"), "gpytorch", 2.5),
    Target(Case(2000, 4, "matern12"), "gpytorch", 3),
    Target(Case(1000, 4, "matern12", noise="full"), "gpytorch", 3),
    Target(Case(1000, 16, "rbf8d"), "gpytorch", 1.8),
    Target(Case(300, 50, "matern12"), "gpytorch", 3),
    Target(Case(1000, 8, constant=True), "gpytorch", 30),
    Target(Case(32, 4, batch=256), "dense", 30),
    Target(Case(16, 3, batch=1024), "dense", 20),
]


def curves(largest: int) -> list[Case]:
    """Time against T, a smooth and a rough kernel."""
    sizes = [T for T in (8, 16, 32, 64, 128, 256, 512, 1000, 2000, 4000) if largest >= T]
    return [Case(T, 4, kernel) for kernel in ("rbf", "matern12") for T in sizes]


def grid(largest: int) -> list[Case]:
    """What else can vary, one thing at a time."""
    cases = [Case(300, D, kernel) for D in (1, 16, 64) for kernel in ("rbf", "matern12")]
    cases += [Case(T, 4, kernel, noise="full") for T in (64, 256, 1000, 2000)
              for kernel in ("rbf", "matern12")]  # fmt: skip
    cases += [Case(T, 4, dtype=torch.float32) for T in (64, 256, 1000, 2000)]
    cases += [Case(1000, 4, "matern12", dtype=torch.float32), Case(1000, 16, "rbf8d")]
    cases += [Case(T, 8, constant=True) for T in (256, 1000, 2000)]
    cases += [Case(T, 4, gradients=False) for T in (64, 256, 1000, 2000)]
    cases += [Case(1000, 4, "matern12", gradients=False)]
    cases += [Case(8, 2, batch=4096), Case(16, 3, batch=1024), Case(32, 4, batch=256)]
    cases += [Case(32, 4, batch=256, noise="full"), Case(32, 4, batch=256, dtype=torch.float32)]
    cases += [Case(64, 16, batch=16), Case(200, 4, batch=8)]
    return [c for c in cases if largest >= c.T]


def problem(case: Case) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """(Y, M, K, noise), the same in every run; drawn in float64 and then rounded."""
    generator = torch.Generator().manual_seed(1000 * case.T + case.D)
    batch = (case.batch,) if case.batch else ()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=generator, dtype=torch.float64)

    M = _kernel(case, generator).expand(*batch, case.T, case.T).contiguous()
    K = _covariance(normal(case.D, case.D))
    Sigma = 0.1 * _covariance(normal(case.D, case.D))
    Y = normal(case.T, case.D)
    log_noise = Sigma.diagonal(dim1=-2, dim2=-1).log().contiguous()
    noise = {"Sigma": Sigma} if case.noise == "full" else {"log_noise": log_noise}
    cast = {name: x.to(case.dtype) for name, x in noise.items()}
    return Y.to(case.dtype), M.to(case.dtype), K.to(case.dtype), cast


def mask(case: Case, share: float) -> Tensor:
    """(T, D), True where an entry is observed, the same in every run: ``share`` are missing."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(case.T, case.D, generator=generator) > share


def _kernel(case: Case, generator: torch.Generator) -> Tensor:
    if case.kernel == "rbf8d":
        x = torch.randn(case.T, 8, generator=generator, dtype=torch.float64)
        return _exp(-0.5 * (x[:, None] - x).square().sum(-1))
    x = torch.linspace(0, 1, case.T, dtype=torch.float64)
    distance = (x[:, None] - x).abs() / LENGTH
    return _exp(-distance if case.kernel == "matern12" else -0.5 * distance**2)


def _exp(X: Tensor) -> Tensor:
    """By numpy: with several threads torch's first exponential in a process was seen to be off by
    3e-9 in float64, which is no smooth kernel any more and not the same problem in every run."""
    return torch.from_numpy(np.exp(X.numpy()))


def _covariance(X: Tensor) -> Tensor:
    D = X.shape[-1]
    return X @ X.mT / D + 0.1 * torch.eye(D, dtype=X.dtype)
