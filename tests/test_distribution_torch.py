"""The distribution in torch: kl_divergence, autograd, copies, mixtures, vmap and the compiler."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from battery import NOISES
from conftest import check_close
from distributions import KINDS, NON_EMPTY, SHAPE, D, T, dense, kronecker, shaped, values_for
from problems import BATCHES, condition_number, from_roots, make_problem, make_roots
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Categorical, Independent, MixtureSameFamily, kl_divergence

from torch_kronlik.distribution import KroneckerNormal

pytestmark = pytest.mark.usefixtures("validation_on")


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
