"""The likelihood in GPyTorch models, against GPyTorch's own dense path.

Dense means: the parent likelihood, ``max_cholesky_size`` above every size here, fast computations
off. Beyond its reach (n·t = 8000) the reference is one Cholesky factorisation of a T×T matrix for
each output, differentiated by plain autograd.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gpytorch
import pytest
import torch
from battery import Recorder
from devices import no_sparse
from gpytorch.distributions import MultitaskMultivariateNormal
from gpytorch.likelihoods import MultitaskGaussianLikelihood as Parent
from gpytorch.models.exact_prediction_strategies import DefaultPredictionStrategy
from linear_operator.operators import KroneckerProductLinearOperator
from problems import normal
from statsmodels.datasets import macrodata
from torch import Tensor

from torch_kronlik.gpytorch import (
    KroneckerPlusNoiseLinearOperator,
    KroneckerPosteriorLinearOperator,
    KroneckerPredictionStrategy,
    MultitaskGaussianLikelihood,
)

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

# GPyTorch adds jitter (and says so) to dense matrices that ours never forms.
pytestmark = pytest.mark.filterwarnings("ignore:A not p.d.")


# ---------------------------------------------------------------- models and data


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


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


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


def noise_of(likelihood: Any) -> Tensor:
    """Σ, as the parent's documentation has it."""
    eye = torch.eye(likelihood.num_tasks)
    Sigma = likelihood.noise * eye if likelihood.has_global_noise else 0 * eye
    if not likelihood.has_task_noise:
        return Sigma
    own = torch.diag(likelihood.task_noises) if likelihood.rank == 0 else None
    return Sigma + (likelihood.task_noise_covar if own is None else own)


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
        gpytorch.settings.observation_nan_policy("mask"),
        pytest.raises(NotImplementedError, match="observation_nan_policy must be 'ignore'"),
    ):
        predict(model, *data[2:])


def test_a_copied_model_predicts_the_same() -> None:
    data = synthetic(10, 3, 5)
    model = make(MultitaskGaussianLikelihood, data)
    expected = predict(model, *data[2:])
    close(predict(copy.deepcopy(model), *data[2:]), expected, 0.0)
