"""Missing entries under ``observation_nan_policy("mask")``, in training and in prediction."""

from __future__ import annotations

import gpytorch
import torch
from devices import not_emulated
from gpytorch_models import (
    MARKS,
    NOISES,
    Model,
    close,
    dense_gpytorch,
    each_noise,
    make,
    no_approximation,
    noise_of,
    synthetic,
    train,
)
from linear_operator.operators import DenseLinearOperator, MaskedLinearOperator
from problems import normal
from torch import Tensor

from torch_kronlik.gpytorch import MultitaskGaussianLikelihood

pytestmark = MARKS
T, D, S = 14, 3, 5
Parent = gpytorch.likelihoods.MultitaskGaussianLikelihood


def with_holes(share: float = 0.3) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    x, y, x_new, y_new = synthetic(T, D, S)
    holes = normal(T * D, seed=1).argsort().argsort().reshape(T, D) < share * T * D
    return x, torch.where(holes, torch.nan, y), x_new, y_new


def dense_posterior(model: Model, x: Tensor, x_new: Tensor, y: Tensor) -> dict[str, Tensor]:
    """From the matrices themselves."""
    kernel, noise = model.covar_module, noise_of(model.likelihood)
    M = kernel.data_covar_module(torch.cat([x, x_new])).to_dense()
    K, seen = kernel.task_covar_module.covar_matrix.to_dense(), ~y.isnan().flatten()
    joint = torch.kron(M, K)
    n = T * D
    U = joint[:n, :n] + torch.kron(torch.eye(T), noise)
    cross = joint[n:, :n][:, seen]
    gain = torch.linalg.solve(U[seen][:, seen], cross.mT).mT
    mean = model.mean_module(x).flatten()[seen]
    f = model.mean_module(x_new).flatten() + gain @ (y.flatten()[seen] - mean)
    covariance = joint[n:, n:] - gain @ cross.mT
    noisy = covariance + torch.kron(torch.eye(S), noise)
    return {
        "mean": f.reshape(S, D),
        "variance": covariance.diagonal().reshape(S, D),
        "covariance": covariance,
        "noisy variance": noisy.diagonal().reshape(S, D),
    }


@not_emulated("GPyTorch's masks need the CPU's or CUDA's operators")
@each_noise
def test_training_as_dense_gpytorch(noise: str) -> None:
    data = with_holes()
    with gpytorch.settings.observation_nan_policy("mask"):
        with dense_gpytorch():
            expected = train(make(Parent, data, **NOISES[noise]))
        with no_approximation(), gpytorch.settings.max_cholesky_size(1):
            actual = train(make(MultitaskGaussianLikelihood, data, **NOISES[noise]))
    close(actual, expected)


@not_emulated("GPyTorch's masks need the CPU's or CUDA's operators")
@each_noise
@torch.no_grad()
def test_predictions_as_dense(noise: str) -> None:
    """GPyTorch's own variances are those of complete data."""
    x, y, x_new, y_new = data = with_holes()
    model = make(MultitaskGaussianLikelihood, data, **NOISES[noise])
    expected = dense_posterior(model, x, x_new, y)
    model.eval()
    with gpytorch.settings.observation_nan_policy("mask"), no_approximation():
        f = model(x_new)
        o = model.likelihood(f)
        actual = {
            "mean": f.mean,
            "variance": f.variance,
            "covariance": f.covariance_matrix,
            "noisy variance": o.variance,
        }
        log_prob = o.log_prob(y_new)
    close(actual, expected)
    noise_matrix = torch.kron(torch.eye(S), noise_of(model.likelihood))
    dense = torch.distributions.MultivariateNormal(
        expected["mean"].flatten(), expected["covariance"] + noise_matrix
    )
    close({"log density": log_prob}, {"log density": dense.log_prob(y_new.flatten())})


@not_emulated("GPyTorch's masks need the CPU's or CUDA's operators")
def test_complete_data_are_as_without_the_policy() -> None:
    data = synthetic(T, D, S)
    plain = train(make(MultitaskGaussianLikelihood, data))
    with gpytorch.settings.observation_nan_policy("mask"):
        close(train(make(MultitaskGaussianLikelihood, data)), plain)


@not_emulated("GPyTorch's masks need the CPU's or CUDA's operators")
def test_masks_of_other_operators_are_as_before() -> None:
    X = normal(6, 8, seed=0)
    A, mask = X @ X.mT, torch.tensor([True, False, True, True, False, True])
    masked = MaskedLinearOperator(DenseLinearOperator(A), mask, mask)
    b, own = normal(4, 1, seed=1), A[mask][:, mask]
    quad, logdet = masked.inv_quad_logdet(b, logdet=True)
    expected = {"quad": (b.mT @ torch.linalg.solve(own, b)).squeeze(), "logdet": own.logdet()}
    close({"quad": quad, "logdet": logdet}, expected)
    close({"solve": masked.solve(b)}, {"solve": torch.linalg.solve(own, b)})
