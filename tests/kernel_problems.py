"""Kernels, the likelihood with M by columns, and the dense matrix to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import normal
from torch import Tensor

import torch_kronlik as tk
from torch_kronlik import reference
from torch_kronlik.rows import KernelColumns, as_rows

Kernel = Callable[[Tensor, Tensor], Tensor]
T, D = 48, 2


def rbf(theta: Tensor) -> Kernel:
    return lambda a, b: theta[1].exp() * torch.exp(-0.5 * squares(a, b) / theta[0].exp() ** 2)


def periodic(theta: Tensor) -> Kernel:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        angle = math.pi * (a[..., :, None] - b[..., None, :]) / 3.1
        return theta[1].exp() * torch.exp(-2 * torch.sin(angle).square() / theta[0].exp() ** 2)

    return kernel


def product(theta: Tensor) -> Kernel:
    return lambda a, b: rbf(theta)(a, b) * (1 + a[..., :, None] * b[..., None, :]) + 0.3


def rough(theta: Tensor) -> Kernel:
    return lambda a, b: theta[1].exp() * torch.exp(-(a[:, None] - b).abs() / theta[0].exp())


def squares(a: Tensor, b: Tensor) -> Tensor:
    if a.dim() == 1:
        return (a[:, None] - b).square()
    return (a[..., :, None, :] - b[..., None, :, :]).square().sum(-1)


def points(*shape: int, seed: int = 0) -> Tensor:
    return 1.5 * normal(*shape, seed=seed)


CASES = {
    "rbf on a line": (rbf, (T,)),
    "rbf, columns of one": (rbf, (T, 1)),
    "periodic": (periodic, (T,)),
    "sum and product": (product, (T,)),
}
each_case = pytest.mark.parametrize("case", CASES)
each_noise = pytest.mark.parametrize("scale", [1.0, 1e-4])


def leaves(case: str, scale: float) -> tuple[Callable[..., Kernel], list[Tensor]]:
    make, shape = CASES[case]
    K, Sigma = (normal(D, D, seed=s) for s in (1, 2))
    K, Sigma = (X @ X.mT + torch.eye(D, dtype=torch.float64) for X in (K, Sigma))
    theta = torch.tensor([0.1, 0.3], dtype=torch.float64)
    given = [points(*shape), theta, K, scale * Sigma, normal(T, D, seed=3)]
    return make, [x.requires_grad_() for x in given]


def nll(make: Any, x: Tensor, theta: Tensor, K: Tensor, Sigma: Tensor, Y: Tensor) -> Tensor:
    M = tk.KernelMatrix(make(theta), x, max_rank=x.shape[0])
    assert isinstance(as_rows(M), KernelColumns)
    return tk.kron_gaussian_nll(Y, M, K, Sigma=Sigma)


def dense(make: Any, x: Tensor, theta: Tensor, K: Tensor, Sigma: Tensor, Y: Tensor) -> Tensor:
    return reference.kron_gaussian_nll(Y, make(theta)(x, x), K, Sigma=Sigma)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    off = (found - expected).abs().max() / expected.abs().max()
    assert off <= tolerance, f"relative error {off:.1e}"
