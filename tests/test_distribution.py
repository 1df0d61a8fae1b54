"""The distribution, against torch's MultivariateNormal over the dense covariance."""

from __future__ import annotations

import math

import pytest
import torch
from battery import NOISES, Recorder, laid_out
from conftest import check_close
from distributions import (
    KINDS,
    NON_EMPTY,
    SHAPE,
    D,
    T,
    check_whitened,
    dense,
    kronecker,
    shaped,
    values_for,
)
from problems import BATCHES, LAYOUTS, condition_number, make_problem
from torch.distributions import Independent, Normal, kl_divergence

from torch_kronlik.distribution import KroneckerNormal
from torch_kronlik.rows import symmetric_eigen

pytestmark = pytest.mark.usefixtures("validation_on")


# ---------------------------------------------------------------- value


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("kind", KINDS)
def test_density_entropy_and_moments_are_dense(
    kind: str, noise: str, dtype: torch.dtype, device: torch.device
) -> None:
    p = make_problem(*SHAPE, kind=kind, noise=noise, batch=(2,), dtype=dtype, device=device)
    d, expected, value = kronecker(p), dense(p), values_for(p, 5)
    kappa = condition_number(p)
    log_prob = expected.log_prob(value.double().flatten(-2))
    check_close(d.log_prob(value), log_prob, condition=kappa, dims=0)
    # the log determinant is a sum of logarithms of both signs, T·D of them
    check_close(d.entropy(), expected.entropy(), condition=kappa, dims=0, floor=float(T * D))
    check_close(d.variance, shaped(expected.variance))
    check_close(d.stddev, shaped(expected.stddev))
    check_close(d.covariance_matrix, expected.covariance_matrix)
    assert torch.equal(d.mean, p.Y)
    assert torch.equal(d.mode, p.Y)


@pytest.mark.parametrize("batch", NON_EMPTY)
def test_batches_broadcast(batch: str) -> None:
    p = make_problem(*SHAPE, batch=BATCHES[batch])
    d, expected, value = kronecker(p), dense(p), values_for(p, 2)
    assert d.batch_shape == expected.batch_shape
    assert d.event_shape == SHAPE
    pairs = [
        (d.log_prob(value), expected.log_prob(value.flatten(-2))),
        (d.entropy(), expected.entropy()),
        (d.mean, shaped(expected.mean)),
        (d.variance, shaped(expected.variance)),
        (d.covariance_matrix, expected.covariance_matrix),
    ]
    for actual, dense_result in pairs:
        torch.testing.assert_close(actual, dense_result)
    for sample in ((), (2,), (2, 1)):
        assert d.sample(sample).shape == (*sample, *expected.batch_shape, *SHAPE)
        assert d.rsample(torch.Size(sample)).shape == (*sample, *expected.batch_shape, *SHAPE)


@pytest.mark.parametrize("value_batch", [(), (3,), (1, 3), (5, 2, 1), (5, 1, 1)])
def test_values_broadcast_with_the_batch(value_batch: tuple[int, ...]) -> None:
    p = make_problem(*SHAPE, batch=(2, 3))
    value = torch.randn(*value_batch, *SHAPE).double()
    expected = dense(p).log_prob(value.flatten(-2))
    torch.testing.assert_close(kronecker(p).log_prob(value), expected)


@pytest.mark.parametrize("how", LAYOUTS)
def test_memory_layout_does_not_matter(how: str) -> None:
    p = make_problem(*SHAPE, batch=(2,))
    value = values_for(p)
    d, strided = kronecker(p), kronecker(laid_out(p, how))
    torch.testing.assert_close(
        strided.log_prob(laid_out(p._replace(Y=value), how).Y),
        d.log_prob(value).expand(strided.batch_shape),
    )
    torch.testing.assert_close(strided.variance, d.variance.expand_as(strided.variance))
    torch.testing.assert_close(kl_divergence(strided, d), torch.zeros(strided.batch_shape).double())


def test_row_factor_may_be_diagonalised_once() -> None:
    p = make_problem(*SHAPE, batch=(2,))
    d, value = kronecker(p), values_for(p)
    constant = kronecker(p._replace(M=symmetric_eigen(p.M)))  # type: ignore[arg-type]
    for name in ("variance", "covariance_matrix", "mean"):
        torch.testing.assert_close(getattr(constant, name), getattr(d, name))
    torch.testing.assert_close(constant.log_prob(value), d.log_prob(value))
    torch.testing.assert_close(constant.entropy(), d.entropy())
    q = kronecker(make_problem(*SHAPE, seed=1))
    torch.testing.assert_close(kl_divergence(constant, q), kl_divergence(d, q))
    torch.testing.assert_close(kl_divergence(q, constant), kl_divergence(q, d))
    assert repr(constant) == repr(d)
    assert constant.expand((5, 2)).M.eigenvectors.shape == (5, 2, T, T)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "route"),
    [("rank_one_M", "low_rank"), ("matern12", "cholesky"), ("identity", "cholesky")],
)
def test_rows_in_number_enough_for_another_route(kind: str, route: str) -> None:
    p, q = (make_problem(256, 2, kind=kind, seed=seed) for seed in (0, 1))
    d, e, value = kronecker(p), kronecker(q), values_for(p, 2)
    assert d._covariance.method_used == route
    kappa = max(condition_number(p), condition_number(q))
    pairs = [
        (d.log_prob(value), dense(p).log_prob(value.flatten(-2))),
        (d.entropy(), dense(p).entropy()),
        (kl_divergence(d, e), kl_divergence(dense(p), dense(q))),
    ]
    for actual, expected in pairs:
        check_close(actual, expected, condition=kappa, dims=0, floor=200.0)
    check_whitened(d.sample((2000,)), dense(p))


@pytest.mark.parametrize(("kind", "diagonalised"), [("rbf", 0), ("matern12", 1)])
def test_draw_and_divergence_use_the_factorisation(kind: str, diagonalised: int) -> None:
    """Of low rank, or by Cholesky factors: then the first draw needs the eigenvectors of M."""
    with Recorder() as recorder:
        d = kronecker(make_problem(256, 2, kind=kind))
        d.rsample(), d.expand((2,)).rsample(), kl_divergence(d, d), d.entropy()
    assert recorder.count("eigen") == diagonalised
    assert recorder.count("whiten") == 1


def test_large_problem_without_its_covariance() -> None:
    """T·D = 10⁵: U would take 80 GB. With M = aI, K = bI every entry is independent."""
    T, D, a, b, c = 1000, 100, 2.0, 0.5, 0.25
    loc, eye = torch.ones(T, D), torch.eye
    d = KroneckerNormal(loc, a * eye(T), b * eye(D), log_noise=torch.full((D,), math.log(c)))
    q = KroneckerNormal(0 * loc, eye(T), eye(D), Sigma=eye(D))
    expected = Independent(Normal(loc, math.sqrt(a * b + c)), 2)
    expected_q = Independent(Normal(0 * loc, math.sqrt(2.0)), 2)
    value = d.sample()
    torch.testing.assert_close(d.log_prob(value), expected.log_prob(value))
    torch.testing.assert_close(d.entropy(), expected.entropy())
    torch.testing.assert_close(d.variance, expected.variance)
    torch.testing.assert_close(kl_divergence(d, q), kl_divergence(expected, expected_q))


@pytest.mark.parametrize("noise", NOISES)
def test_no_rows(noise: str) -> None:
    p = make_problem(0, D, noise=noise, batch=(2,))
    d = kronecker(p)
    zero = torch.zeros(2).double()
    assert torch.equal(d.log_prob(p.Y), zero)
    assert torch.equal(d.entropy(), zero)
    assert torch.equal(kl_divergence(d, d), zero)
    assert d.sample((5,)).shape == (5, 2, 0, D)


def test_empty_batches() -> None:
    p, q = make_problem(*SHAPE, batch=(0,)), make_problem(*SHAPE, seed=1)
    for d in (kronecker(p), kronecker(q).expand((0,))):
        results = [d.log_prob(values_for(q, 5, 1)), d.entropy(), d.variance, d.sample((2,))]
        shapes = [(5, 0), (0,), (0, *SHAPE), (2, 0, *SHAPE)]
        assert [tuple(x.shape) for x in results] == shapes
        assert kl_divergence(d, kronecker(q)).shape == (0,)
        assert kl_divergence(kronecker(q), d).shape == (0,)


# ---------------------------------------------------------------- parameters


def test_parameters_have_the_batch_shape() -> None:
    p = make_problem(*SHAPE, batch=BATCHES["crossed"], noise="diagonal")
    d = kronecker(p)
    shapes = {"loc": SHAPE, "M": (T, T), "K": (D, D), "Sigma": (D, D), "log_noise": (D,)}
    assert set(shapes) == set(KroneckerNormal.arg_constraints)
    for name, core in shapes.items():
        value = getattr(d, name)
        assert value.shape == (2, 3, *core)
        assert KroneckerNormal.arg_constraints[name].check(value).all()
    torch.testing.assert_close(d.Sigma[0, 0], torch.diag(p.noise["log_noise"][0, 0].exp()))
    full = make_problem(*SHAPE)
    assert kronecker(full).log_noise is None
    assert torch.equal(kronecker(full).Sigma, full.noise["Sigma"])


def test_repr_names_parameters_and_sizes() -> None:
    p = make_problem(*SHAPE, noise="diagonal", batch={"Y": (2,), "M": (), "K": (), "noise": ()})
    assert repr(kronecker(p)) == (
        "KroneckerNormal(loc: torch.Size([2, 4, 3]), M: torch.Size([2, 4, 4]), "
        "K: torch.Size([2, 3, 3]), log_noise: torch.Size([2, 3]))"
    )


# ---------------------------------------------------------------- one factorisation


def test_one_factorisation_for_everything() -> None:
    p = make_problem(*SHAPE)
    for x in (p.M, p.K, p.noise["Sigma"]):
        x.requires_grad_()
    with Recorder() as recorder:
        d = kronecker(p)
        larger = d.expand((5,))
        results = [d.log_prob(p.Y + 1), d.entropy(), larger.log_prob(p.Y), kl_divergence(d, d)]
        total = sum((x.sum() for x in results), larger.rsample((2,)).sum())
        total.backward()
    assert recorder.count("eigen") == 1
    assert recorder.count("whiten") == 1


def test_factorisation_made_by_an_expanded_copy_is_shared() -> None:
    with Recorder() as recorder:
        d = kronecker(make_problem(*SHAPE), validate_args=False)
        d.expand((5,)).entropy()
        d.entropy()
    assert recorder.count("eigen") == 1


def test_nothing_is_factorised_without_validation_or_need() -> None:
    with Recorder() as recorder:
        d = kronecker(make_problem(*SHAPE), validate_args=False)
        d.mean, d.variance, d.stddev, d.covariance_matrix, repr(d)
    assert recorder.count("eigen") == 0


# ---------------------------------------------------------------- expand


@pytest.mark.parametrize("batch", [(2, 3), (5, 2, 3)])
def test_expand_is_that_of_the_dense_distribution(batch: tuple[int, ...]) -> None:
    p = make_problem(*SHAPE, batch=(2, 1))
    d, expected = kronecker(p).expand(batch), dense(p).expand(torch.Size(batch))
    assert d.batch_shape == expected.batch_shape
    assert d.event_shape == SHAPE
    value = torch.randn(*batch, *SHAPE).double()
    torch.testing.assert_close(d.log_prob(value), expected.log_prob(value.flatten(-2)))
    torch.testing.assert_close(d.entropy(), expected.entropy())
    torch.testing.assert_close(d.mean, shaped(expected.mean))
    torch.testing.assert_close(d.variance, shaped(expected.variance))
    torch.testing.assert_close(d.covariance_matrix, expected.covariance_matrix)
    assert d.M.shape == (*batch, T, T)  # type: ignore[union-attr]
    assert d.sample((7,)).shape == (7, *batch, *SHAPE)


@pytest.mark.parametrize("validate", [True, False])
def test_expand_keeps_validation(validate: bool) -> None:
    d = kronecker(make_problem(*SHAPE), validate_args=validate).expand((2,))
    assert d._validate_args is validate


def test_expand_refuses_a_smaller_batch() -> None:
    with pytest.raises(RuntimeError, match="expanded size"):
        kronecker(make_problem(*SHAPE, batch=(2,))).expand((3,))
