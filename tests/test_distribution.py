"""The distribution, against torch's MultivariateNormal over the dense covariance."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from battery import NOISES, Recorder, laid_out
from conftest import check_close
from problems import (
    BATCHES,
    LAYOUTS,
    Problem,
    condition_number,
    from_roots,
    make_problem,
    make_roots,
    psd,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from torch_kronlik import reference
from torch_kronlik.distribution import KroneckerNormal
from torch_kronlik.symmetric_eigen import symmetric_eigen

T, D = 4, 3
# torch's dense distribution refuses an empty batch: see test_empty_batches
NON_EMPTY = [name for name in BATCHES if name != "empty"]
SHAPE = (T, D)
KINDS = ("generic", "rank_one_M", "zero_K", "repeated_blocks", "replicates", "tiny_factors")
LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def validation_on() -> Iterator[None]:
    """torch.compile switches the validation of distributions off for the whole process."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(True)
    yield
    Distribution.set_default_validate_args(before)


def kronecker(p: Problem, **options: Any) -> KroneckerNormal:
    """With the problem's Y for its mean."""
    return KroneckerNormal(p.Y, p.M, p.K, **p.noise, **options)


def dense(p: Problem) -> MultivariateNormal:
    """The same in float64, over vec(Y)."""
    U = reference.covariance_matrix(p.M, p.K, **p.noise)
    return MultivariateNormal(p.Y.double().flatten(-2), U)


def values_for(p: Problem, *sample: int) -> Tensor:
    batch = kronecker(p).batch_shape
    return 2 * torch.randn((*sample, *batch, *p.Y.shape[-2:]), dtype=p.Y.dtype, device=p.Y.device)


def shaped(x: Tensor) -> Tensor:
    return x.unflatten(-1, SHAPE)


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
    p, q = (make_problem(100, 2, kind=kind, seed=seed) for seed in (0, 1))
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


def test_draw_and_divergence_diagonalise_once() -> None:
    with Recorder() as recorder:
        d = kronecker(make_problem(100, 2, kind="rbf"))
        d.rsample(), d.expand((2,)).rsample(), kl_divergence(d, d), d.entropy()
    assert sum((100,) in shapes for name, shapes in recorder.calls if name == "eigen") == 1


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


# ---------------------------------------------------------------- samples


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("batch", ["only_Y", "singleton_covariance", "crossed"])
def test_samples_have_the_mean_and_covariance(batch: str, noise: str) -> None:
    singleton = {"Y": (2, 3), "M": (1,), "K": (2, 1), "noise": ()}
    shapes = singleton if batch == "singleton_covariance" else BATCHES[batch]
    p = make_problem(*SHAPE, batch=shapes, noise=noise, kind="rank_one_M")
    n = 4000
    check_whitened(kronecker(p).sample((n,)), dense(p))


def check_whitened(draws: Tensor, flat: MultivariateNormal) -> None:
    """Whitened by the dense Cholesky factor, n draws are standard normal, each batch element for
    itself and independent of the others. An entry of their mean then has standard deviation 1/√n,
    of their covariance 1/√n off the diagonal and √(2/n) on it: 6 of those are allowed, which a
    right sampler exceeds in one seed of 10³ (2·10⁴ entries, 2·10⁻⁹ each, more on the diagonal,
    whose upper tail is that of χ²)."""
    n = len(draws)
    residual = (draws.flatten(-2) - flat.loc).unsqueeze(-1)
    z = torch.linalg.solve_triangular(flat.scale_tril, residual, upper=False).reshape(n, -1)
    deviation = 1 / math.sqrt(n)
    assert z.shape[1] == flat.loc.numel()
    assert z.mean(0).abs().max() < 6 * deviation
    second = z.mT @ z / n - torch.eye(z.shape[1]).double()
    assert second.diagonal().abs().max() < 6 * math.sqrt(2) * deviation
    assert second.fill_diagonal_(0).abs().max() < 6 * deviation


def test_sampling_repeats_under_a_seed_and_needs_no_graph() -> None:
    p = make_problem(*SHAPE)
    p.M.requires_grad_()
    d = kronecker(p)
    torch.manual_seed(1)
    first = d.sample((3,))
    torch.manual_seed(1)
    assert torch.equal(d.sample((3,)), first)
    assert not first.requires_grad
    assert d.rsample().requires_grad
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("noise", NOISES)
def test_draws_differentiate_as_functions_of_the_parameters(noise: str) -> None:
    leaves = make_roots(3, 2, noise=noise)

    def draw(*roots: Tensor) -> Tensor:
        torch.manual_seed(3)
        return kronecker(from_roots(*roots, noise=noise)).rsample((2,))

    assert gradcheck(draw, leaves, check_forward_ad=True)


def test_second_derivatives_of_a_draw_are_refused() -> None:
    p = make_problem(*SHAPE)
    p.M.requires_grad_()
    (g,) = torch.autograd.grad(kronecker(p).rsample().square().sum(), p.M, create_graph=True)
    with pytest.raises(NotImplementedError, match="a sample"):
        torch.autograd.grad(g.square().sum(), p.M)


def test_a_draw_is_the_mean_plus_noise_free_of_it() -> None:
    p = make_problem(*SHAPE)
    torch.manual_seed(1)
    first = kronecker(p).sample((3,))
    torch.manual_seed(1)
    shifted = kronecker(p._replace(Y=p.Y + 5)).sample((3,))
    torch.testing.assert_close(shifted, first + 5)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("moved", ["loc", "M", "K", "noise"])
def test_pathwise_gradient_of_an_expectation(moved: str, noise: str) -> None:
    """E ‖Y‖² = ‖loc‖² + tr U. Its derivative along a direction is the mean of the draws' own, which
    may be off by 6 of its standard errors."""
    loc, M, K, kwargs = make_problem(*SHAPE, noise=noise, seed=2)
    (name,) = kwargs
    names = {"loc": loc, "M": M, "K": K, "noise": kwargs[name]}
    direction = names[moved].sign() + 1  # with a derivative that is not small
    if moved in ("M", "K") or (moved == "noise" and noise == "full"):
        direction = psd(torch.randn(names[moved].shape).double())

    def distribution(x: Tensor) -> KroneckerNormal:
        loc, M, K, noise = (x if key == moved else names[key] for key in names)
        return KroneckerNormal(loc, M, K, **{name: noise}, validate_args=False)

    def squared_draws(x: Tensor) -> Tensor:
        return distribution(x).rsample((20000,)).square().sum((-2, -1))

    def exact(x: Tensor) -> Tensor:
        d = distribution(x)
        return d.mean.square().sum() + d.covariance_matrix.diagonal().sum()

    _, pathwise = torch.func.jvp(squared_draws, (names[moved],), (direction,))
    _, expected = torch.func.jvp(exact, (names[moved],), (direction,))
    standard_error = pathwise.std() / math.sqrt(len(pathwise))
    assert standard_error < 0.05 * expected.abs()
    assert (pathwise.mean() - expected).abs() < 6 * standard_error


# ---------------------------------------------------------------- Kullback–Leibler divergence


@pytest.mark.parametrize("noises", [("full", "diagonal"), ("diagonal", "full")])
@pytest.mark.parametrize("kind_p", KINDS)
@pytest.mark.parametrize("kind_q", ["generic", "rank_one_M"])
def test_kl_is_dense(
    kind_p: str, kind_q: str, noises: tuple[str, str], dtype: torch.dtype, device: torch.device
) -> None:
    options: dict[str, Any] = {"batch": (2,), "dtype": dtype, "device": device}
    p = make_problem(*SHAPE, kind=kind_p, noise=noises[0], **options)
    q = make_problem(*SHAPE, kind=kind_q, noise=noises[1], seed=1, **options)
    kappa = max(condition_number(p), condition_number(q))
    # traces and log determinants that nearly cancel, each of the size of T·D
    check_close(
        kl_divergence(kronecker(p), kronecker(q)),
        kl_divergence(dense(p), dense(q)),
        condition=kappa,
        dims=0,
        floor=float(T * D),
    )


@pytest.mark.parametrize("batch_q", NON_EMPTY)
@pytest.mark.parametrize("batch_p", ["none", "only_Y", "only_M", "crossed"])
def test_kl_broadcasts(batch_p: str, batch_q: str) -> None:
    p = make_problem(*SHAPE, batch=BATCHES[batch_p])
    q = make_problem(*SHAPE, batch=BATCHES[batch_q], seed=1)
    expected = kl_divergence(dense(p), dense(q))
    torch.testing.assert_close(kl_divergence(kronecker(p), kronecker(q)), expected)


def test_kl_of_expanded_copies_has_the_full_batch() -> None:
    d = kronecker(make_problem(*SHAPE))
    assert kl_divergence(d.expand((3,)), d).shape == (3,)
    assert kl_divergence(d, d.expand((3,))).shape == (3,)


def test_kl_from_itself_is_zero_with_zero_gradient() -> None:
    p = make_problem(*SHAPE)
    leaves = [p.Y, p.M, p.K, p.noise["Sigma"]]
    d = kronecker(p._replace(Y=p.Y.clone()))
    for leaf in leaves:
        leaf.requires_grad_()
    kl = kl_divergence(kronecker(p), d)
    torch.testing.assert_close(kl, torch.zeros_like(kl), atol=1e-12, rtol=0)
    for g in torch.autograd.grad(kl, leaves):
        torch.testing.assert_close(g, torch.zeros_like(g), atol=1e-12, rtol=0)


def test_kl_refuses_different_events_batches_and_dtypes() -> None:
    d = kronecker(make_problem(*SHAPE))
    with pytest.raises(ValueError, match=r"must broadcast, got p \(2,\), q \(3,\)"):
        kl_divergence(d.expand((2,)), d.expand((3,)))
    with pytest.raises(ValueError, match=r"got p \(4, 3\) and q \(5, 3\)"):
        kl_divergence(d, kronecker(make_problem(5, 3)))
    with pytest.raises(TypeError, match="q must have the dtype of p"):
        kl_divergence(d, kronecker(make_problem(*SHAPE, dtype=torch.float32)))


# ---------------------------------------------------------------- derivatives


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("rank", [None, 1])
def test_derivatives_of_density_and_entropy(noise: str, rank: int | None) -> None:
    leaves = make_roots(3, 2, noise=noise, rank=rank)
    value = torch.randn(2, 3, 2).double().requires_grad_()

    def f(value: Tensor, *roots: Tensor) -> tuple[Tensor, Tensor]:
        d = kronecker(from_roots(*roots, noise=noise))
        return d.log_prob(value), d.entropy()

    assert gradcheck(f, (value, *leaves), check_forward_ad=True)
    assert gradgradcheck(f, (value, *leaves), check_fwd_over_rev=True)


@pytest.mark.parametrize(
    ("noises", "ranks"), [(("full", "diagonal"), (None, 1)), (("diagonal", "full"), (1, None))]
)
def test_derivatives_of_kl(noises: tuple[str, str], ranks: tuple[int | None, int | None]) -> None:
    leaves_p = make_roots(2, 2, noise=noises[0], rank=ranks[0])
    leaves_q = make_roots(2, 2, noise=noises[1], rank=ranks[1], seed=1)

    def f(*roots: Tensor) -> Tensor:
        p = kronecker(from_roots(*roots[:4], noise=noises[0]))
        q = kronecker(from_roots(*roots[4:], noise=noises[1]))
        return kl_divergence(p, q)

    assert gradcheck(f, (*leaves_p, *leaves_q), check_forward_ad=True)
    # along random directions: the full Hessian of 32 numbers takes its time
    assert gradgradcheck(f, (*leaves_p, *leaves_q), check_fwd_over_rev=True, fast_mode=True)


def test_derivatives_of_moments() -> None:
    leaves = make_roots(3, 2)

    def f(*roots: Tensor) -> tuple[Tensor, ...]:
        d = kronecker(from_roots(*roots))
        return d.mean, d.variance, d.covariance_matrix

    assert gradcheck(f, leaves, check_forward_ad=True)


# ---------------------------------------------------------------- with the rest of torch


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_equal(copied: Any) -> None:
    p = make_problem(*SHAPE, batch=(2,))
    d = kronecker(p)
    twin = copied(d)
    assert torch.equal(twin.log_prob(p.Y + 1), d.log_prob(p.Y + 1))
    assert repr(twin) == repr(d)


def test_inside_independent() -> None:
    p, q = make_problem(*SHAPE, batch=(5, 2)), make_problem(*SHAPE, batch=(5, 2), seed=1)
    d, e = (Independent(kronecker(x), 1) for x in (p, q))
    dense_d, dense_e = (Independent(dense(x), 1) for x in (p, q))
    assert d.event_shape == (2, *SHAPE)
    value = values_for(p)
    torch.testing.assert_close(d.log_prob(value), dense_d.log_prob(value.flatten(-2)))
    torch.testing.assert_close(d.entropy(), dense_d.entropy())
    torch.testing.assert_close(kl_divergence(d, e), kl_divergence(dense_d, dense_e))
    assert d.expand((7, 5)).rsample().shape == (7, 5, 2, *SHAPE)


def test_as_component_of_a_mixture() -> None:
    p = make_problem(*SHAPE, batch=(3,))
    weights = Categorical(torch.tensor([0.2, 0.3, 0.5]).double())
    mixture = MixtureSameFamily(weights, kronecker(p))
    expected = MixtureSameFamily(weights, dense(p))
    value = torch.randn(6, *SHAPE).double()
    torch.testing.assert_close(mixture.log_prob(value), expected.log_prob(value.flatten(-2)))
    torch.testing.assert_close(mixture.mean, shaped(expected.mean))
    torch.testing.assert_close(mixture.variance, shaped(expected.variance))
    assert mixture.sample((4,)).shape == (4, *SHAPE)


def test_subclass_needs_its_own_expand() -> None:
    class Standard(KroneckerNormal):
        def __init__(self) -> None:
            super().__init__(*make_problem(*SHAPE)[:3], log_noise=torch.zeros(D).double())

    with pytest.raises(NotImplementedError, match=r"must also define a custom \.expand"):
        Standard().expand((2,))


def test_maps_over_parameters_and_values() -> None:
    p = make_problem(*SHAPE, batch=(5,), noise="diagonal")
    q = make_problem(*SHAPE, seed=1)

    def f(loc: Tensor, M: Tensor, K: Tensor, log_noise: Tensor) -> tuple[Tensor, ...]:
        d = KroneckerNormal(loc, M, K, log_noise=log_noise, validate_args=False)
        return d.log_prob(q.Y), d.entropy(), kl_divergence(d, kronecker(q))

    d = kronecker(p)
    expected = d.log_prob(q.Y), d.entropy(), kl_divergence(d, kronecker(q))
    actual = torch.vmap(f)(p.Y, p.M, p.K, p.noise["log_noise"])
    torch.testing.assert_close(actual, expected)


# What torch's compiler says to itself
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled:UserWarning")
@pytest.mark.parametrize("what", ["density", "draw", "divergence"])
def test_compiles_without_graph_breaks(what: str) -> None:
    p, q = make_problem(*SHAPE, noise="diagonal"), make_problem(*SHAPE, seed=1)
    p.M.requires_grad_()

    def f(loc: Tensor, M: Tensor, K: Tensor, log_noise: Tensor) -> tuple[Tensor, ...]:
        d = KroneckerNormal(loc, M, K, log_noise=log_noise, validate_args=False)
        if what == "density":
            return d.log_prob(q.Y), d.entropy(), d.variance
        if what == "draw":
            return (d.rsample((2,)),)
        return (kl_divergence(d, KroneckerNormal(q.Y, q.M, q.K, **q.noise, validate_args=False)),)

    arguments = (p.Y, p.M, p.K, p.noise["log_noise"])
    # the graph is this library's, the code made of it is not
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    results = []
    for g in (compiled, f):
        torch.manual_seed(0)
        out = g(*arguments)
        results.append((out, torch.autograd.grad(sum(x.square().sum() for x in out), p.M)))
    torch.testing.assert_close(results[0], results[1])


# ---------------------------------------------------------------- errors


def broken(name: str, entry: float) -> Problem:
    noise = "diagonal" if name == "log_noise" else "full"
    p = make_problem(*SHAPE, noise=noise)
    leaf = {"loc": p.Y, "M": p.M, "K": p.K, **p.noise}[name]
    leaf.view(-1)[0] = entry
    return p


@pytest.mark.parametrize("entry", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["loc", "M", "K", "Sigma", "log_noise"])
def test_validation_finds_values_that_are_not_finite(name: str, entry: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        kronecker(broken(name, entry))


@pytest.mark.parametrize("name", ["loc", "M", "K", "Sigma", "log_noise"])
def test_without_validation_the_density_finds_them(name: str) -> None:
    d = kronecker(broken(name, math.nan), validate_args=False)
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        d.log_prob(torch.zeros(SHAPE).double())


def test_without_validation_kl_names_the_mean() -> None:
    d, e = kronecker(broken("loc", math.nan), validate_args=False), kronecker(make_problem(*SHAPE))
    with pytest.raises(ValueError, match=r"p\.loc must be finite"):
        kl_divergence(d, e)
    with pytest.raises(ValueError, match=r"q\.loc must be finite"):
        kl_divergence(e, d)


@pytest.mark.parametrize("name", ["Sigma", "M"])
def test_not_positive_definite(name: str) -> None:
    p = broken(name, -1e6)
    what = "Sigma" if name == "Sigma" else "U = M ⊗ K"
    with pytest.raises(LinAlgError, match=f"{what}.* is not positive definite"):
        kronecker(p)
    d = kronecker(p, validate_args=False)
    with pytest.raises(LinAlgError, match=f"{what}.* is not positive definite"):
        d.log_prob(p.Y)


def test_default_validation_is_that_of_torch() -> None:
    p = broken("M", -1e6)
    Distribution.set_default_validate_args(False)
    kronecker(p)
    with pytest.raises(LinAlgError):
        kronecker(p, validate_args=True)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loc": torch.zeros(3, 4)}, ValueError, r"loc must have shape .* T = 4 .* got \(3, 4\)"),
        ({"loc": torch.zeros(D)}, ValueError, r"loc must have shape .* got \(3,\)"),
        ({"loc": torch.zeros(2, T, D)}, ValueError, r"must broadcast, got loc \(2,\), covariance"),
        ({"loc": torch.zeros(SHAPE).double()}, TypeError, "loc must have the dtype of K"),
        ({"loc": 0.0}, TypeError, "loc must be a tensor, got float"),
        ({"M": torch.zeros(4, 3)}, ValueError, r"M must have shape .* got \(4, 3\)"),
        ({"K": torch.zeros(3)}, ValueError, r"K must have shape .* got \(3,\)"),
        ({"Sigma": torch.eye(2)}, ValueError, r"Sigma must have shape .* D = 3, got \(2, 2\)"),
        ({"Sigma": None}, ValueError, "exactly one of Sigma and log_noise .* neither"),
        ({"log_noise": torch.zeros(D)}, ValueError, "exactly one of Sigma and log_noise .* both"),
    ],
)
def test_constructor_errors(
    change: dict[str, Any], error: type[Exception], message: str, validate: bool
) -> None:
    loc, M, K, noise = make_problem(*SHAPE, dtype=torch.float32)
    M = M.expand(3, T, T)
    arguments = {"loc": loc, "M": M, "K": K, **noise, **change}
    with pytest.raises(error, match=message):
        KroneckerNormal(**arguments, validate_args=validate)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.zeros(D), ValueError, r"value must have shape .* got \(3,\)"),
        (torch.zeros(1, 1), ValueError, r"value must have shape .* got \(1, 1\)"),
        (torch.zeros(3, T, D), ValueError, r"must broadcast, got value \(3,\), batch_shape \(2,\)"),
        (torch.zeros(T, D).double(), TypeError, "value must have the dtype of loc"),
        (torch.zeros(T, D).long(), TypeError, "value must be float32 or float64"),
        ([[0.0] * D] * T, TypeError, "value must be a tensor, got list"),
        (
            torch.full(SHAPE, math.nan),
            ValueError,
            r"value must be finite, but value\[0, 0\] is nan",
        ),
        (
            torch.full(SHAPE, math.inf),
            ValueError,
            r"value must be finite, but value\[0, 0\] is inf",
        ),
    ],
)
def test_density_errors(value: Any, error: type[Exception], message: str, validate: bool) -> None:
    d = kronecker(make_problem(*SHAPE, batch=(2,), dtype=torch.float32), validate_args=validate)
    with pytest.raises(error, match=message):
        d.log_prob(value)
