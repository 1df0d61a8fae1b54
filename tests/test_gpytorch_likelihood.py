"""The likelihood in GPyTorch models, against GPyTorch's own dense path.

Beyond its reach (n·t = 8000) the reference is one Cholesky factorisation of a T×T matrix for
each output, differentiated by plain autograd.
"""

from __future__ import annotations

import math
from typing import Any

import gpytorch
import pytest
import torch
from battery import Recorder
from gpytorch.likelihoods import MultitaskGaussianLikelihood as Parent
from gpytorch_models import (
    DATA,
    MARKS,
    NOISES,
    Model,
    close,
    dense_gpytorch,
    each_noise,
    make,
    no_approximation,
    noise_of,
    predict,
    synthetic,
    train,
)
from torch import Tensor

from torch_kronlik.gpytorch import MultitaskGaussianLikelihood

pytestmark = MARKS


# ---------------------------------------------------------------- against dense GPyTorch


@each_noise
@pytest.mark.parametrize("source", DATA)
def test_training_and_prediction_at_300(source: str, noise: str) -> None:
    data = DATA[source](100, 3, 20)
    ours = make(MultitaskGaussianLikelihood, data, **NOISES[noise])
    with no_approximation():
        actual = {**train(ours), **predict(ours, *data[2:])}
    with dense_gpytorch():
        theirs = make(Parent, data, **NOISES[noise])
        expected = {**train(theirs), **predict(theirs, *data[2:])}
    close(actual, expected)


@pytest.mark.parametrize("T", [266, 267])  # 798 and 801 observations: GPyTorch changes at 800
@pytest.mark.parametrize("noise", ["task and global", "rank 1 and global"])
def test_nothing_changes_at_800(noise: str, T: int) -> None:
    data = synthetic(T, 3, 30)
    ours = make(MultitaskGaussianLikelihood, data, **NOISES[noise])
    with no_approximation():
        actual = {**train(ours), **predict(ours, *data[2:])}
        ours.likelihood(ours(data[2])).rsample(torch.Size([2]))
    with dense_gpytorch():
        theirs = make(Parent, data, **NOISES[noise])
        expected = {**train(theirs), **predict(theirs, *data[2:])}
    close(actual, expected)


@pytest.mark.parametrize(
    "setting",
    [
        gpytorch.settings.fast_pred_var(),
        gpytorch.settings.fast_pred_var(False),
        gpytorch.settings.fast_pred_samples(),
        gpytorch.settings.max_cholesky_size(0),
        gpytorch.settings.max_eager_kernel_size(10_000),
        gpytorch.settings.fast_computations(False, False, False),
        gpytorch.settings.memory_efficient(),
    ],
    ids=lambda s: f"{type(s).__name__}-{getattr(s, 'state', '')}",
)
def test_settings_of_algorithms_change_nothing(setting: Any) -> None:
    data = synthetic(20, 3, 6)
    plain = make(MultitaskGaussianLikelihood, data)
    expected = {**train(plain), **predict(plain, *data[2:])}
    with setting, no_approximation():
        model = make(MultitaskGaussianLikelihood, data)
        close({**train(model), **predict(model, *data[2:])}, expected, 1e-11)


# ---------------------------------------------------------------- n·t = 8000


class Blocked:
    """U = M ⊗ K + I ⊗ Σ by one T×T Cholesky factor for each eigenvalue of K relative to Σ."""

    def __init__(self, M: Tensor, K: Tensor, Sigma: Tensor) -> None:
        self.K, self.Sigma, L = K, Sigma, torch.linalg.cholesky(Sigma)
        half = torch.linalg.solve_triangular(L, K, upper=False)
        lam, Q = torch.linalg.eigh(torch.linalg.solve_triangular(L, half.mT, upper=False))
        self.R = torch.linalg.solve_triangular(L.mT, Q, upper=True)
        eye = torch.eye(len(M))
        self.chols = [torch.linalg.cholesky(x * M + eye) for x in lam]
        self.logdet = len(M) * Sigma.logdet() + sum(
            2 * G.diagonal().log().sum() for G in self.chols
        )

    def solve(self, Y: Tensor) -> Tensor:
        columns = (Y @ self.R).split(1, -1)
        solved = [torch.cholesky_solve(y, G) for y, G in zip(columns, self.chols, strict=True)]
        return torch.cat(solved, -1) @ self.R.mT

    def log_density(self, Y: Tensor) -> Tensor:
        inv_quad = (Y * self.solve(Y)).sum()
        return -0.5 * (inv_quad + self.logdet + Y.numel() * math.log(2 * math.pi))

    def posterior_blocks(self, M_cross: Tensor, M_test: Tensor) -> Tensor:
        """The D×D covariance of each new row."""
        white = [torch.linalg.solve_triangular(G, M_cross.mT, upper=False) for G in self.chols]
        weights = torch.stack([w.square().sum(0) for w in white], -1)  # (S, D)
        KR = self.K @ self.R
        return M_test.diagonal()[:, None, None] * self.K - (KR * weights[:, None]) @ KR.mT


def blocked(model: Model, x: Tensor) -> dict[str, Tensor]:
    """What `train` and `predict` give, from `Blocked`."""
    model.zero_grad()
    (train_x,), y, T = model.train_inputs, model.train_targets, len(model.train_targets)
    data_kernel = model.covar_module.data_covar_module
    M = data_kernel(torch.cat([train_x, x[:, None]])).to_dense()
    K = model.covar_module.task_covar_module.covar_matrix.to_dense()
    U = Blocked(M[:T, :T], K, noise_of(model.likelihood))
    residual = y - model.mean_module(train_x)
    mll = U.log_density(residual) / y.numel()
    mll.backward(retain_graph=True)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        blocks = U.posterior_blocks(M[T:, :T], M[T:, T:])
        return {
            "mll": mll.detach(),
            **gradients,
            "mean": model.mean_module(x[:, None]) + M[T:, :T] @ U.solve(residual) @ K,
            "variance": blocks.diagonal(dim1=-2, dim2=-1),
            "noisy variance": (blocks + U.Sigma).diagonal(dim1=-2, dim2=-1),
        }


@pytest.mark.parametrize(
    ("T", "D", "noise"), [(40, 3, "rank 1 and global"), (2000, 4, "rank 1 and global")]
)
def test_training_and_prediction_at_8000(T: int, D: int, noise: str) -> None:
    x, y, new, _ = synthetic(T, D, 25)
    kernel = gpytorch.kernels.MultitaskKernel(
        gpytorch.kernels.MaternKernel(nu=1.5), num_tasks=D, rank=2
    )
    model = make(MultitaskGaussianLikelihood, (x, y), kernel, **NOISES[noise])
    with no_approximation():
        actual = train(model)
        model.eval()
        with torch.no_grad():
            f = model(new)
            actual |= {"mean": f.mean, "variance": f.variance}
            actual["noisy variance"] = model.likelihood(f).variance
    close(actual, blocked(model, new))


def test_memory_is_that_of_the_factors() -> None:
    T, D, S = 101, 8, 100
    data = synthetic(T, D, S)
    model = make(MultitaskGaussianLikelihood, data)
    recorder = Recorder()
    with recorder:
        train(model)
        model.eval()
        f = model(data[2])
        o = model.likelihood(f)
        o.mean, o.variance, o.log_prob(data[3]), o.rsample()
    largest = max(math.prod(shape) for shape in recorder.shapes())
    # a factor of T + S rows for each output; neither T·D × T·D nor S·D × T·D nor S·D × S·D
    assert largest <= D * (T + S) ** 2 < S * D * S * D
