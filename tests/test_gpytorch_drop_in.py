"""The likelihood takes the place of GPyTorch's: parameters, options, kernels, other models."""

from __future__ import annotations

import copy

import gpytorch
import pytest
import torch
from devices import no_sparse
from gpytorch.distributions import MultitaskMultivariateNormal
from gpytorch.likelihoods import MultitaskGaussianLikelihood as Parent
from gpytorch.models.exact_prediction_strategies import DefaultPredictionStrategy
from gpytorch_models import (
    MARKS,
    NOISES,
    close,
    dense_gpytorch,
    each_noise,
    make,
    no_approximation,
    noise_of,
    predict,
    randomise,
    synthetic,
    train,
)
from linear_operator.operators import KroneckerProductLinearOperator

from torch_kronlik.gpytorch import (
    KroneckerPlusNoiseLinearOperator,
    KroneckerPosteriorLinearOperator,
    KroneckerPredictionStrategy,
    MultitaskGaussianLikelihood,
)

pytestmark = MARKS


# ---------------------------------------------------------------- drop-in


@each_noise
@pytest.mark.parametrize("batch_shape", [(), (2,)])
def test_state_dict_is_the_parents(noise: str, batch_shape: tuple[int, ...]) -> None:
    options = {**NOISES[noise], "batch_shape": torch.Size(batch_shape)}
    ours, theirs = (cls(num_tasks=3, **options) for cls in (MultitaskGaussianLikelihood, Parent))
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert [n for n, _ in ours.named_constraints()] == [n for n, _ in theirs.named_constraints()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, actual), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert actual.equal(expected), name
    theirs.load_state_dict(ours.state_dict())


def test_prediction_after_loading_and_changing_parameters() -> None:
    data = synthetic(10, 3, 5)
    model, other = make(MultitaskGaussianLikelihood, data), make(Parent, data)
    predict(model, *data[2:])  # caches are made
    randomise(other, seed=1)
    model.load_state_dict(other.state_dict())
    with dense_gpytorch():
        close(predict(model, *data[2:]), predict(other, *data[2:]))


def test_noise_prior_and_constraint() -> None:
    data, options = synthetic(10, 3, 5), {}
    options["noise_prior"] = gpytorch.priors.GammaPrior(2.0, 3.0)
    options["noise_constraint"] = gpytorch.constraints.Interval(0.01, 2.0)
    ours, theirs = (make(cls, data, **options) for cls in (MultitaskGaussianLikelihood, Parent))
    with dense_gpytorch():
        expected = train(theirs)
    close(train(ours), expected)


def test_task_prior_is_counted() -> None:
    data = synthetic(10, 3, 5)
    prior = gpytorch.priors.LKJCovariancePrior(3, 0.5, gpytorch.priors.SmoothedBoxPrior(0.1, 2.0))
    ours = make(MultitaskGaussianLikelihood, data, rank=2, task_prior=prior)
    plain = make(MultitaskGaussianLikelihood, data, rank=2)
    expected = train(plain)["mll"] + prior.log_prob(noise_of(plain.likelihood)) / 30
    close({"": train(ours)["mll"]}, {"": expected})


@pytest.mark.parametrize("noise", ["task and global", "rank 1 and global"])
def test_a_batch_of_data_sets(noise: str) -> None:
    x, y, new, y_new = synthetic(12, 3, 5)
    batch = [torch.stack([t, t.flip(0)]) for t in (x[:, None], y, new[:, None], y_new)]
    options = {**NOISES[noise], "batch_shape": torch.Size([2])}
    ours, theirs = (
        make(cls, (*batch,), **options) for cls in (MultitaskGaussianLikelihood, Parent)
    )
    with no_approximation():
        actual = {**train(ours), **predict(ours, *batch[2:])}
    with dense_gpytorch():
        expected = {**train(theirs), **predict(theirs, *batch[2:])}
    close(actual, expected)


KERNELS = {
    "scaled": gpytorch.kernels.ScaleKernel(
        gpytorch.kernels.MultitaskKernel(gpytorch.kernels.RBFKernel(), num_tasks=3)
    ),
    "sum of data kernels": gpytorch.kernels.MultitaskKernel(
        gpytorch.kernels.RBFKernel() + gpytorch.kernels.MaternKernel(), num_tasks=3, rank=2
    ),
    "product of data kernels": gpytorch.kernels.MultitaskKernel(
        gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
        * gpytorch.kernels.PeriodicKernel(),
        num_tasks=3,
    ),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_around_and_inside(kernel: str) -> None:
    data = synthetic(15, 3, 5)
    ours = make(MultitaskGaussianLikelihood, data, KERNELS[kernel])
    with no_approximation():
        actual = {**train(ours), **predict(ours, *data[2:])}
    assert isinstance(ours.prediction_strategy, KroneckerPredictionStrategy)
    with dense_gpytorch():
        theirs = make(Parent, data, KERNELS[kernel])
        expected = {**train(theirs), **predict(theirs, *data[2:])}
    close(actual, expected)


@pytest.mark.filterwarnings("ignore:.*[Ss]parse:UserWarning")
@no_sparse
def test_slices_of_an_evaluated_kernel() -> None:
    """With lazy evaluation off GPyTorch hands over slices of the joint covariance, no products."""
    data = synthetic(20, 3, 6)
    plain = make(MultitaskGaussianLikelihood, data)
    expected = {**train(plain), **predict(plain, *data[2:])}
    with gpytorch.settings.lazily_evaluate_kernels(False):
        model = make(MultitaskGaussianLikelihood, data)
        close({**train(model), **predict(model, *data[2:])}, expected)


def test_fantasies_are_new_rows() -> None:
    data = synthetic(10, 3, 6)
    x, y, new, y_new = data
    model = make(MultitaskGaussianLikelihood, data)
    predict(model, new, y_new)
    with torch.no_grad():
        fantasy = model.get_fantasy_model(new[:2], y_new[:2])
    full = make(MultitaskGaussianLikelihood, (torch.cat([x, new[:2]]), torch.cat([y, y_new[:2]])))
    close(predict(fantasy, new[2:], y_new[2:]), predict(full, new[2:], y_new[2:]))


def test_skipped_variances_and_prior_mode() -> None:
    data = synthetic(10, 3, 5)
    model = make(MultitaskGaussianLikelihood, data)
    expected = predict(model, *data[2:])
    noise = noise_of(model.likelihood)
    with torch.no_grad(), gpytorch.settings.skip_posterior_variances():
        o = model.likelihood(model(data[2]))
        close({"": o.mean}, {"": expected["mean"]})
        close({"": o.covariance_matrix}, {"": torch.kron(torch.eye(5), noise)})
    with torch.no_grad(), gpytorch.settings.prior_mode():
        f = model(data[2])
        o = model.likelihood(f)
        assert isinstance(o.lazy_covariance_matrix, KroneckerPlusNoiseLinearOperator)
        close(
            {"": o.covariance_matrix}, {"": f.covariance_matrix + torch.kron(torch.eye(5), noise)}
        )


def test_conditional_and_expected_log_prob_are_the_parents() -> None:
    data = synthetic(6, 3, 5)
    ours, theirs = make(MultitaskGaussianLikelihood, data), make(Parent, data)
    f = torch.randn(6, 3)
    close({"": ours.likelihood(f).log_prob(data[1])}, {"": theirs.likelihood(f).log_prob(data[1])})
    prior = theirs(*theirs.train_inputs)
    actual = ours.likelihood.expected_log_prob(data[1], prior)
    close({"": actual}, {"": theirs.likelihood.expected_log_prob(data[1], prior)})


def test_float32() -> None:
    data = synthetic(60, 3, 10)
    model = make(MultitaskGaussianLikelihood, tuple(x.float() for x in data))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    actual = {**train(model), **predict(model, *(x.float() for x in data[2:]))}
    with dense_gpytorch():
        exact = make(Parent, tuple(x.float().double() for x in data))
        exact.load_state_dict(model.state_dict())
        expected = {**train(exact), **predict(exact, *(x.float().double() for x in data[2:]))}
    assert {x.dtype for x in actual.values()} == {torch.float32}
    # condition number of U about 60, and the kernel's own rounding of distances
    close(actual, expected, 1e-4)


# ---------------------------------------------------------------- where there is no such structure


def test_a_sum_of_kernels_is_left_to_gpytorch() -> None:
    data = synthetic(15, 3, 5)
    kernel = gpytorch.kernels.LCMKernel(
        [gpytorch.kernels.RBFKernel(), gpytorch.kernels.MaternKernel()], num_tasks=3, rank=1
    )
    ours, theirs = (make(c, data, kernel) for c in (MultitaskGaussianLikelihood, Parent))
    with dense_gpytorch():
        expected = {**train(theirs), **predict(theirs, *data[2:])}
        close({**train(ours), **predict(ours, *data[2:])}, expected)
    assert type(ours.prediction_strategy) is DefaultPredictionStrategy


@pytest.mark.parametrize(("T", "interleaved"), [(6, True), (6, False), (3, False)])
def test_tasks_first_are_left_to_gpytorch(T: int, interleaved: bool) -> None:
    data = synthetic(6, 3, 5)
    ours, theirs = make(MultitaskGaussianLikelihood, data), make(Parent, data)
    covariance = KroneckerProductLinearOperator(torch.eye(3) + 0.5, torch.eye(T) + 0.2)
    f = MultitaskMultivariateNormal(torch.zeros(T, 3), covariance, interleaved=interleaved)
    actual, expected = ours.likelihood(f), theirs.likelihood(f)
    close({"": actual.covariance_matrix}, {"": expected.covariance_matrix})
    assert type(actual.lazy_covariance_matrix) is type(expected.lazy_covariance_matrix)


def test_other_models_predict_as_before() -> None:
    x, y, new, y_new = synthetic(10, 3, 5)
    parent = make(Parent, (x, y))
    predict(parent, new, y_new)
    assert type(parent.prediction_strategy) is DefaultPredictionStrategy
    ours = make(MultitaskGaussianLikelihood, (x, y))
    predict(ours, new, y_new)
    assert type(ours.prediction_strategy) is KroneckerPredictionStrategy
    assert isinstance(ours(new).lazy_covariance_matrix, KroneckerPosteriorLinearOperator)


def test_errors() -> None:
    data = synthetic(10, 3, 5)
    singular = make(MultitaskGaussianLikelihood, data, rank=1, has_global_noise=False)
    with pytest.raises(ValueError, match=r"noise of rank 1 for num_tasks=3 is singular: pass"):
        train(singular)
    with pytest.raises(ValueError, match="At least one of has_task_noise or has_global_noise"):
        MultitaskGaussianLikelihood(3, has_global_noise=False, has_task_noise=False)
    model = make(MultitaskGaussianLikelihood, data)
    with (
        gpytorch.settings.observation_nan_policy("fill"),
        pytest.raises(NotImplementedError, match="observation_nan_policy must be 'ignore' or"),
    ):
        predict(model, *data[2:])


def test_a_copied_model_predicts_the_same() -> None:
    data = synthetic(10, 3, 5)
    model = make(MultitaskGaussianLikelihood, data)
    expected = predict(model, *data[2:])
    close(predict(copy.deepcopy(model), *data[2:]), expected, 0.0)
