"""Predictions of GPyTorch models with our likelihood: their derivatives and distribution."""

from __future__ import annotations

import math

import gpytorch
import pytest
import torch
from gpytorch.likelihoods import MultitaskGaussianLikelihood as Parent
from gpytorch_models import (
    MARKS,
    NOISES,
    Model,
    close,
    dense_gpytorch,
    each_noise,
    make,
    predict,
    synthetic,
)
from torch import Tensor

from torch_kronlik.gpytorch import MultitaskGaussianLikelihood

pytestmark = MARKS


# ---------------------------------------------------------------- derivatives of predictions


def prediction_gradients(model: Model, x: Tensor, *, of_parameters: bool) -> dict[str, Tensor]:
    model.eval()
    model.zero_grad()
    x = x.clone().requires_grad_()
    o = model.likelihood(model(x))
    total = (o.mean * o.mean.detach().cos()).sum() + o.variance.log().sum()
    (total + o.covariance_matrix.sin().sum()).backward()
    parameters = model.named_parameters() if of_parameters else ()
    return {"x": x.grad, **{n: p.grad.clone() for n, p in parameters}}


@each_noise
@pytest.mark.parametrize("detach", [True, False])
def test_gradients_of_predictions(noise: str, detach: bool) -> None:
    data = synthetic(15, 3, 5)
    with gpytorch.settings.detach_test_caches(detach):
        ours = make(MultitaskGaussianLikelihood, data, **NOISES[noise])
        actual = prediction_gradients(ours, data[2], of_parameters=not detach)
        with dense_gpytorch():
            theirs = make(Parent, data, **NOISES[noise])
            expected = prediction_gradients(theirs, data[2], of_parameters=not detach)
    close(actual, expected)


def test_predictions_may_be_differentiated_again_and_again() -> None:
    data = synthetic(10, 2, 4)
    model = make(MultitaskGaussianLikelihood, data)
    first = prediction_gradients(model, data[2], of_parameters=False)
    close(prediction_gradients(model, data[2], of_parameters=False), first, 0.0)


# ---------------------------------------------------------------- the distribution


def test_log_density_is_structured_and_exact() -> None:
    data = synthetic(8, 3, 30)  # more new observations than rows of data: the joint way
    model = make(MultitaskGaussianLikelihood, data)
    o = predict(model, *data[2:])
    residual = (data[3] - o["mean"]).flatten()
    C = o["noisy covariance"]
    inv_quad = residual @ torch.linalg.solve(C, residual)
    expected = -0.5 * (inv_quad + C.logdet() + residual.numel() * math.log(2 * math.pi))
    close({"": o["log density"]}, {"": expected})


def test_base_samples_span_the_covariance() -> None:
    data = synthetic(10, 3, 3)
    model = make(MultitaskGaussianLikelihood, data).eval()
    with torch.no_grad():
        o = model.likelihood(model(data[2]))
        columns = o.rsample(base_samples=torch.eye(9).view(9, 3, 3)) - o.mean
    F = columns.flatten(1).mT
    close({"": F @ F.mT}, {"": o.covariance_matrix})


def test_indexing_a_prediction() -> None:
    data = synthetic(10, 3, 5)
    model = make(MultitaskGaussianLikelihood, data).eval()
    with torch.no_grad():
        o = model.likelihood(model(data[2]))
    C, i = o.covariance_matrix, torch.arange(15).view(5, 3)
    for index in [(slice(None), 1), (2,), (slice(1, 4),), (slice(None), slice(0, 2))]:
        rows = i[index].flatten()
        close({"": o[index].covariance_matrix}, {"": C[rows][:, rows]})
    independent = o.to_data_independent_dist(jitter_val=0.0).covariance_matrix
    close({"": independent}, {"": torch.stack([C[r][:, r] for r in i])})


def test_samples_at_a_prior_and_a_posterior() -> None:
    data = synthetic(10, 3, 5)
    model = make(MultitaskGaussianLikelihood, data)
    assert model.likelihood(model(*model.train_inputs)).rsample(torch.Size([4])).shape == (4, 10, 3)
    model.eval()
    o = model.likelihood(model(data[2]))
    assert o.rsample(torch.Size([4])).shape == (4, 5, 3)
    assert model(data[2]).rsample().shape == (5, 3)
    torch.manual_seed(5)
    first = o.rsample()
    torch.manual_seed(5)
    assert o.rsample().equal(first)
