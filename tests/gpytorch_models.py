"""GPyTorch models with either likelihood, data for them, and what is compared of the two.

Dense GPyTorch means: the parent likelihood, ``max_cholesky_size`` above every size here, fast
computations off.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from problems import normal
from statsmodels.datasets import macrodata
from torch import Tensor

MARKS = [
    pytest.mark.usefixtures("float64"),
    # GPyTorch adds jitter (and says so) to dense matrices that ours never forms.
    pytest.mark.filterwarnings("ignore:A not p.d."),
]

TOLERANCE = 1e-8  # relative to the largest entry of what is compared

NOISES: dict[str, dict[str, Any]] = {
    "task and global": {},
    "task": {"has_global_noise": False},
    "global": {"has_task_noise": False},
    "rank 1 and global": {"rank": 1},
    "rank 2 and global": {"rank": 2},
    "full rank": {"rank": 3, "has_global_noise": False},
}
each_noise = pytest.mark.parametrize("noise", NOISES)


class Model(gpytorch.models.ExactGP):
    """The model of GPyTorch's multitask tutorial."""

    def __init__(self, x: Tensor, y: Tensor, likelihood: Any, kernel: Any = None) -> None:
        super().__init__(x, y, likelihood)
        D = y.shape[-1]
        self.mean_module = gpytorch.means.MultitaskMean(gpytorch.means.ConstantMean(), num_tasks=D)
        self.covar_module = kernel or gpytorch.kernels.MultitaskKernel(
            gpytorch.kernels.RBFKernel(), num_tasks=D, rank=1
        )

    def forward(self, x: Tensor) -> MultitaskMultivariateNormal:
        return MultitaskMultivariateNormal(self.mean_module(x), self.covar_module(x))


def synthetic(T: int, D: int, S: int) -> tuple[Tensor, ...]:
    """(x, y, x_test, y_test)"""
    x = torch.linspace(0, 1, T + S)

    def f(x: Tensor) -> Tensor:
        waves = torch.stack([torch.sin((3 + 2 * d) * x + d) for d in range(D)], -1)
        return waves + 0.2 * torch.randn(len(x), D)

    y, new = f(x), torch.zeros(T + S, dtype=torch.bool)
    new[torch.randperm(T + S)[:S]] = True
    return x[~new], y[~new], x[new], y[new]


@functools.cache
def growth() -> Tensor:
    """Quarterly growth of US consumption, investment and income, 1959 to 2009, standardised."""
    data = macrodata.load_pandas().data[["realcons", "realinv", "realdpi"]]
    rates = torch.tensor(data.to_numpy()).log().diff(dim=0)
    return (rates - rates.mean(0)) / rates.std(0)


def real(T: int, D: int, S: int) -> tuple[Tensor, ...]:
    y = growth()[: T + S, :D]
    x = torch.arange(len(y)) / 40.0
    return x[:T], y[:T], x[T:], y[T:]


DATA = {"synthetic": synthetic, "real": real}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.add_(0.5 * normal(*p.shape, seed=100 * seed + k).to(p))


def make(cls: Any, data: tuple[Tensor, ...], kernel: Any = None, **options: Any) -> Model:
    """The same parameters whichever class."""
    torch.manual_seed(0)
    x, y, *_ = data
    model = Model(x, y, cls(num_tasks=y.shape[-1], **options), copy.deepcopy(kernel))
    model.to(x.dtype)
    randomise(model)
    return model


@contextmanager
def dense_gpytorch() -> Iterator[None]:
    with (
        gpytorch.settings.max_cholesky_size(10**9),
        gpytorch.settings.fast_computations(False, False, False),
    ):
        yield


def train(model: Model) -> dict[str, Tensor]:
    """The marginal log likelihood and its gradient in every parameter."""
    model.train()
    model.zero_grad()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    value = mll(model(*model.train_inputs), model.train_targets)
    value.sum().backward()
    return {"mll": value.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}


def predict(model: Model, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    model.eval()
    with torch.no_grad():
        f = model(x)
        o = model.likelihood(f)
        return {
            "mean": f.mean,
            "variance": f.variance,
            "covariance": f.covariance_matrix,
            "noisy mean": o.mean,
            "noisy variance": o.variance,
            "noisy covariance": o.covariance_matrix,
            "log density": o.log_prob(y),
        }


def close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE
) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        value = value.detach()
        assert actual[name].shape == value.shape, name
        error = float((actual[name].detach() - value).abs().max())
        assert error <= tolerance * float(value.abs().max()), f"{name}: {error:.1e}"


@contextmanager
def no_approximation() -> Iterator[None]:
    """Conjugate gradients, Lanczos, and Cholesky with added jitter raise."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an approximate method was called")

    names = ["utils.linear_cg", "utils.lanczos.lanczos_tridiag"]
    with pytest.MonkeyPatch.context() as patch:
        for name in [*names, "operators._linear_operator.psd_safe_cholesky"]:
            patch.setattr(f"linear_operator.{name}", refuse)
        yield


def noise_of(likelihood: Any) -> Tensor:
    """Σ, as the parent's documentation has it."""
    eye = torch.eye(likelihood.num_tasks)
    Sigma = likelihood.noise * eye if likelihood.has_global_noise else 0 * eye
    if not likelihood.has_task_noise:
        return Sigma
    own = torch.diag(likelihood.task_noises) if likelihood.rank == 0 else None
    return Sigma + (likelihood.task_noise_covar if own is None else own)
