"""What the tests of exp(Diag(d) A) v share: routes, matrices of many kinds, how to compare."""

from __future__ import annotations

from collections.abc import Callable

import torch
from devices import DEVICE
from torch import Tensor

from torch_kronlik.expm import expm_diag_multiply

METHODS = ("action", "dense")
ROUTES = METHODS if DEVICE.type == "emulated" else (*METHODS, "sparse")  # no sparse tensors there

n = 7


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def jordan(value: float) -> Tensor:
    return value * torch.eye(n, dtype=torch.float64) + torch.diag(torch.ones(n - 1).double(), 1)


def _path() -> Tensor:
    off = torch.diag(torch.ones(n - 1).double(), 1)
    A = off + off.T
    return A - torch.diag(A.sum(0))


def _scaled(X: Tensor, norm: float) -> Tensor:
    return X * (norm / X.abs().sum(0).max())


MATRICES: dict[str, Callable[[], Tensor]] = {
    "random": lambda: normal(n, n),
    "norm_100": lambda: _scaled(normal(n, n), 100),
    "tiny": lambda: 1e-9 * normal(n, n),
    "zero": lambda: torch.zeros(n, n).double(),
    "nilpotent": lambda: torch.triu(normal(n, n), 1),
    "nilpotent_norm_100": lambda: _scaled(torch.triu(normal(n, n), 1), 100),
    "defective": lambda: jordan(-2.0),
    "defective_norm_100": lambda: _scaled(jordan(1.0), 100),
    "skew_norm_100": lambda: _scaled((X := normal(n, n)) - X.T, 100),
    "diffusion": _path,
    "stiff_diffusion": lambda: 25 * _path(),
    "positive_norm_100": lambda: _scaled(torch.rand(n, n).double(), 100),
    "nonnormal": lambda: -jordan(1.0) + 20 * torch.triu(torch.rand(n, n).double(), 2),
    "one_large_row": lambda: torch.cat([80 * normal(1, n) / n, 0.1 * normal(n - 1, n)]),
    "rank_one": lambda: normal(n, 1) @ normal(1, n),
}


def apply(route: str, d: Tensor, A: Tensor, v: Tensor) -> Tensor:
    if route == "sparse":
        return expm_diag_multiply(d, A.to_sparse_csr(), v)
    return expm_diag_multiply(d, A, v, method=route)


def small_inputs(size: int = 3) -> list[Tensor]:
    inputs = (torch.rand(size).double(), normal(size, size), normal(size))
    return [x.requires_grad_() for x in inputs]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, floor: float = 0.0) -> None:
    assert actual.shape == expected.shape
    error = (actual.detach().double() - expected).abs().max()
    scale = max(float(expected.abs().max()), floor)
    assert error <= tolerance * scale, f"error {error:.2e}, largest entry {scale:.2e}"
