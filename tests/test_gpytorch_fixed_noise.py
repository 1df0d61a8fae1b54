"""Known noise variances of every entry, in GPyTorch: against the matrices themselves."""

from __future__ import annotations

import gpytorch
import pytest
import torch
from devices import not_emulated
from gpytorch_models import MARKS, Model, close, no_approximation, randomise, synthetic, train
from problems import normal
from torch import Tensor

from torch_kronlik.gpytorch import FixedNoiseMultitaskGaussianLikelihood

pytestmark = MARKS
T, D, S = 12, 3, 4
emulated = not_emulated("GPyTorch's masks need the CPU's or CUDA's operators")


def model_of(holes: bool, learnt: bool) -> tuple[Model, tuple[Tensor, ...]]:
    torch.manual_seed(3)
    x, y, x_new, y_new = synthetic(T, D, S)
    if holes:
        y = torch.where(normal(T, D, seed=1) > 0.7, torch.nan, y)
    noise = 0.1 * normal(T, D, seed=2).exp()
    likelihood = FixedNoiseMultitaskGaussianLikelihood(noise, learn_additional_noise=learnt)
    model = Model(x, y, likelihood).double()
    randomise(model)
    return model, (x, y, x_new, y_new)


def matrices(model: Model, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, prior covariance, the variance that is learnt)"""
    kernel = model.covar_module
    M = kernel.data_covar_module(x).to_dense()
    K = kernel.task_covar_module.covar_matrix.to_dense()
    return model.mean_module(x).flatten(), torch.kron(M, K), model.likelihood.second_noise


def dense_train(model: Model, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    mean, prior, learnt = matrices(model, x)
    seen = ~y.isnan().flatten()
    U = prior + torch.diag((model.likelihood.fixed_noise + learnt).flatten())
    normal = torch.distributions.MultivariateNormal(mean[seen], U[seen][:, seen])
    value = normal.log_prob(y.flatten()[seen]) / y.numel()
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    pairs = zip(named.items(), grads, strict=True)
    return {"mll": value, **{n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}}


@emulated
@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("holes", [False, True])
def test_training(holes: bool, learnt: bool) -> None:
    model, (x, y, *_) = model_of(holes, learnt)
    expected = dense_train(model, x, y)
    policy = gpytorch.settings.observation_nan_policy("mask" if holes else "ignore")
    with policy, no_approximation(), gpytorch.settings.max_cholesky_size(1):
        actual = train(model)
    close(actual, expected)


@emulated
@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("holes", [False, True])
@torch.no_grad()
def test_predictions(holes: bool, learnt: bool) -> None:
    model, (x, y, x_new, _) = model_of(holes, learnt)
    mean, joint, second = matrices(model, torch.cat([x, x_new]))
    n, seen = T * D, ~y.isnan().flatten()
    U = joint[:n, :n] + torch.diag((model.likelihood.fixed_noise + second).flatten())
    gain = torch.linalg.solve(U[seen][:, seen], joint[:n, n:][seen]).mT
    f_mean = mean[n:] + gain @ (y.flatten() - mean[:n])[seen]
    covariance = joint[n:, n:] - gain @ joint[:n, n:][seen]
    noise_new = 0.2 * normal(S, D, seed=5).exp()
    noisy = covariance + torch.diag((noise_new + second).flatten())
    model.eval()
    with gpytorch.settings.observation_nan_policy("mask" if holes else "ignore"):
        f = model(x_new)
        o = model.likelihood(f, noise=noise_new)
        actual = {"mean": f.mean, "covariance": f.covariance_matrix, "noisy": o.covariance_matrix}
        actual["variance"] = o.variance
    expected = {"mean": f_mean.reshape(S, D), "covariance": covariance, "noisy": noisy}
    expected["variance"] = noisy.diagonal().reshape(S, D)
    close(actual, expected)


@emulated
def test_without_the_noise_of_new_rows_none_is_added() -> None:
    model, (_, _, x_new, _) = model_of(holes=False, learnt=False)
    model.eval()
    f = model(x_new)
    with pytest.warns(gpytorch.utils.warnings.GPInputWarning, match="pass noise="):
        o = model.likelihood(f)
    close({"variance": o.variance}, {"variance": f.variance})


@pytest.mark.parametrize("noise", [torch.ones(3), torch.zeros(3, 2), -torch.ones(3, 2)])
def test_what_is_no_variance_is_refused(noise: Tensor) -> None:
    with pytest.raises(ValueError, match="noise must be the positive, finite variances"):
        FixedNoiseMultitaskGaussianLikelihood(noise)


@emulated
def test_operator_is_its_matrix() -> None:
    """Products, diagonals, entries, samples of U itself."""
    model, (x, *_) = model_of(holes=False, learnt=False)
    model.train()
    U = model.likelihood(model(x)).lazy_covariance_matrix
    _, prior, _ = matrices(model, x)
    dense = (prior + torch.diag(model.likelihood.fixed_noise.flatten())).detach()
    b = normal(T * D, 2, seed=0)
    close(
        {"dense": U.to_dense(), "product": U @ b, "solve": U.solve(b), "diagonal": U.diagonal(),
         "entry": U[3, 5], "rows": U[2:5, 1:7].to_dense()},
        {"dense": dense, "product": dense @ b, "solve": torch.linalg.solve(dense, b),
         "diagonal": dense.diagonal(), "entry": dense[3, 5], "rows": dense[2:5, 1:7]},
    )  # fmt: skip
    assert U.zero_mean_mvn_samples(3).shape == (3, T * D)
