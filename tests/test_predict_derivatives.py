"""The posterior at new rows: derivatives to second order, transforms, and samples."""

from __future__ import annotations

import pytest
import torch
from devices import generator
from problems import psd, spd
from test_predict import Check, Leaves, each_noise, make_leaves, moments
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import vmap

from torch_kronlik import KroneckerPosterior, condition, reference

# ---------------------------------------------------------------- derivatives


def from_roots(T: int, noise: str, roots: tuple[Tensor, ...]) -> tuple[Leaves, Tensor]:
    """M of all rows as R Rᵀ + I, or R Rᵀ of low rank where R is thin."""
    Y, R, R_K, R_noise = roots
    M, K = (spd(X) if X.shape[-1] == X.shape[-2] else psd(X) for X in (R, R_K))
    s = {"Sigma": spd(R_noise)} if noise == "full" else {"log_noise": R_noise}
    values = {"Y": Y[:T], "M": M[:T, :T], "K": K, "M_cross": M[T:, :T], "M_test": M[T:, T:], **s}
    return values, Y[T:]


def make_roots(T: int, S: int, D: int, rank: int | None, noise: str) -> tuple[Tensor, ...]:
    n = T + S
    shapes = [(n, D), (n, rank or n), (D, rank or D), (D, D) if noise == "full" else (D,)]
    return tuple((torch.randn(s, dtype=torch.float64) / 2).requires_grad_() for s in shapes)


@each_noise
@pytest.mark.parametrize("rank", [None, 1])
def test_derivatives(rank: int | None, noise: str) -> None:
    roots = make_roots(2, 2, 2, rank, noise)

    def f(*roots: Tensor) -> tuple[Tensor, ...]:
        post = condition(**from_roots(2, noise, roots)[0])
        return post.mean, post.observation_variance, post.row_covariance, post.covariance_matrix

    # random projections; test_predict.py compares every entry of the gradients with the dense twin
    assert gradcheck(f, roots, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(f, roots, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("T", [3, 2], ids=["dense", "joint"])
@each_noise
def test_derivatives_of_log_prob(noise: str, T: int) -> None:
    roots = make_roots(T, 1 if T == 3 else 2, 2, None, noise)

    def f(*roots: Tensor) -> Tensor:
        values, Y_test = from_roots(T, noise, roots)
        return condition(**values).log_prob(Y_test)

    assert gradcheck(f, roots, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, roots, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize(("observation_noise", "rank"), [(False, None), (True, None), (True, 1)])
@each_noise
def test_derivatives_of_samples(noise: str, observation_noise: bool, rank: int | None) -> None:
    """Exact and of first order, for observations at singular M and K too."""
    roots = make_roots(2, 2, 2, rank, noise)

    def f(*roots: Tensor) -> Tensor:
        post = condition(**from_roots(2, noise, roots)[0])
        return post.rsample((), generator(0), observation_noise=observation_noise)

    assert gradcheck(f, roots, check_forward_ad=True, check_batched_grad=True)
    with pytest.raises(NotImplementedError, match="sample of this order"):
        gradgradcheck(f, roots)


def test_samples_of_singular_factors_along_directions_of_constant_rank() -> None:
    """Scaling M and K keeps their rank: d(√a f)/da = f / 2 at a = 1, for a prior draw."""
    values = make_leaves(3, 2, 2, kind="rank_deficient")
    values["Y"].zero_()
    values["M_cross"].zero_()  # the new rows know nothing of the data: a draw from the prior

    def draw(a: Tensor) -> Tensor:
        moved = {**values, "M_test": a * values["M_test"], "M": a * values["M"]}
        return condition(**moved).rsample((), generator(0))

    one = torch.ones((), dtype=torch.float64)
    sample, slope = torch.func.jvp(draw, (one,), (one,))
    torch.testing.assert_close(slope, sample / 2)


def test_calls_without_gradients_leave_no_mark() -> None:
    """Nothing is kept from a call under no_grad that a later derivative would miss."""
    inputs = {key: x.requires_grad_() for key, x in make_leaves(3, 2, 2).items()}

    def losses(post: KroneckerPosterior) -> list[Tensor]:
        sample = post.rsample((), generator(0))
        return [*moments(post), post.log_prob(torch.zeros(2, 2).double()), sample]

    def slopes(x: Tensor) -> tuple[Tensor, ...]:
        return grad(x.sum(), list(inputs.values()), materialize_grads=True)

    used = condition(**inputs)
    with torch.no_grad():
        losses(used)
    for _ in range(2):  # and a backward pass frees nothing that the next one needs
        for x, expected in zip(losses(used), losses(condition(**inputs)), strict=True):
            torch.testing.assert_close(slopes(x), slopes(expected))


def test_vmap_equals_loop() -> None:
    values = make_leaves(4, 2, 2, batch=(3,))
    keys = list(values)

    def f(*args: Tensor) -> tuple[Tensor, ...]:
        return moments(condition(**dict(zip(keys, args, strict=True))))

    mapped = vmap(f)(*values.values())
    torch.testing.assert_close(mapped, f(*values.values()))
    only_new = [0 if key in ("M_cross", "M_test") else None for key in keys]
    args = [
        values[key] if d == 0 else values[key][0] for key, d in zip(keys, only_new, strict=True)
    ]
    torch.testing.assert_close(vmap(f, tuple(only_new))(*args), f(*args))


def test_compiles_without_graph_breaks() -> None:
    values = make_leaves(4, 2, 2)

    def f(v: Leaves) -> tuple[Tensor, ...]:
        return moments(condition(**v))

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(values), f(values))


# ---------------------------------------------------------------- samples


@pytest.mark.parametrize("observation_noise", [False, True])
@each_noise
def test_samples_are_the_right_linear_map_of_white_noise(
    noise: str, observation_noise: bool, monkeypatch: pytest.MonkeyPatch, assert_close: Check
) -> None:
    """sample = mean + F ε with F Fᵀ the posterior covariance, to rounding."""
    T, S, D = 4, 3, 2
    values = make_leaves(T, S, D, noise=noise)
    sizes = [(T + S) * D] if observation_noise else [(T + S) * D, T * D]
    parts = iter(torch.eye(sum(sizes), dtype=torch.float64).split(sizes, 1))
    monkeypatch.setattr(torch, "randn", lambda shape, **_: next(parts).reshape(shape))
    post = condition(**values)
    F = (post.rsample((sum(sizes),), observation_noise=observation_noise) - post.mean).flatten(-2)
    expected = reference.condition(**values).covariance_matrix
    if observation_noise:
        given = {key: x for key, x in values.items() if key in ("Sigma", "log_noise")}
        expected = expected + torch.kron(torch.eye(S).double(), reference._noise_matrix(**given))
    assert_close(F.mT @ F, expected)


def test_moments_of_samples() -> None:
    """Five standard errors: a right sampler fails one of the 27 comparisons in 7e4 seeds."""
    post = condition(**make_leaves(4, 3, 2))
    N, C = 20_000, post.covariance_matrix
    draws = post.rsample((N,)).flatten(-2)
    variance = C.diagonal()
    assert ((draws.mean(0) - post.mean.flatten()).abs() <= 5 * (variance / N).sqrt()).all()
    error = (variance[:, None] * variance + C.square()) / N  # of a Gaussian's sample covariance
    assert ((draws.T.cov() - C).abs() <= 5 * error.sqrt()).all()


def test_samples_repeat_with_the_generator_and_differ_within_a_batch(dtype: torch.dtype) -> None:
    post = condition(
        **make_leaves(4, 3, 2, batch={"Y": (2,), "M": (), "K": (), "noise": ()}, dtype=dtype)
    )
    draws = [post.rsample((5,), generator(seed)) for seed in (0, 0, 1)]
    assert draws[0].shape == (5, 2, 3, 2)
    assert draws[0].dtype == dtype
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    centred = draws[0] - post.mean
    assert not torch.allclose(centred[:, 0], centred[:, 1])
