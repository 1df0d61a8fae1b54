"""Draws of the distribution: moments, repeatability, derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from battery import NOISES
from distributions import SHAPE, check_whitened, dense, kronecker
from problems import BATCHES, from_roots, make_problem, make_roots, psd
from torch import Tensor
from torch.autograd import gradcheck

from torch_kronlik.distribution import KroneckerNormal

pytestmark = pytest.mark.usefixtures("validation_on")


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("batch", ["only_Y", "singleton_covariance", "crossed"])
def test_samples_have_the_mean_and_covariance(batch: str, noise: str) -> None:
    singleton = {"Y": (2, 3), "M": (1,), "K": (2, 1), "noise": ()}
    shapes = singleton if batch == "singleton_covariance" else BATCHES[batch]
    p = make_problem(*SHAPE, batch=shapes, noise=noise, kind="rank_one_M")
    n = 4000
    check_whitened(kronecker(p).sample((n,)), dense(p))


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
