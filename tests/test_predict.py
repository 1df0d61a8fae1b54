"""The posterior at new rows against the dense twin: values, derivatives, samples, densities."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from battery import NOISES, ROUTES, Recorder, cotangents
from devices import generator, to_numpy
from problems import (
    BATCHES,
    LAYOUTS,
    NewRows,
    condition_number,
    kinds_for,
    make_new_rows,
    make_problem,
    psd,
    relayout,
    spd,
)
from scipy.stats import multivariate_normal
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import vmap

from torch_kronlik import KroneckerPlusNoise, reference, symmetric_eigen
from torch_kronlik.predict import KroneckerPosterior, condition

Check = Callable[..., None]
Leaves = dict[str, Tensor]
MOMENTS = ("mean", "variance", "observation_variance", "row_covariance", "covariance_matrix")
each_noise = pytest.mark.parametrize("noise", NOISES)
each_route = pytest.mark.parametrize("method", ROUTES)


# ---------------------------------------------------------------- both sides


def leaves(n: NewRows) -> Leaves:
    p = n.problem
    return {"Y": p.Y, "M": p.M, "K": p.K, "M_cross": n.M_cross, "M_test": n.M_test, **p.noise}


def make_leaves(T: int, S: int, D: int, **options: Any) -> Leaves:
    return leaves(make_new_rows(T, S, D, **options))


def moments(post: Any) -> tuple[Tensor, ...]:
    return tuple(getattr(post, name) for name in MOMENTS)


def dense_log_prob(values: Leaves, Y_test: Tensor) -> Tensor:
    post = reference.condition(**values)
    noise = {key: x for key, x in values.items() if key in ("Sigma", "log_noise")}
    Sigma = reference._noise_matrix(**noise)
    eye = torch.eye(post.mean.shape[-2], dtype=torch.float64, device=Y_test.device)
    covariance = post.covariance_matrix + reference.kron(eye, Sigma)
    G = torch.linalg.cholesky(covariance)
    residual = (Y_test.double() - post.mean).flatten(-2)[..., None]
    white = torch.linalg.solve_triangular(G, residual, upper=False).square().sum((-2, -1))
    logdet = 2 * G.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -(white + logdet + covariance.shape[-1] * math.log(2 * math.pi)) / 2


def gradients(f: Callable[[Leaves], tuple[Tensor, ...]], values: Leaves) -> Leaves:
    inputs = {key: x.detach().requires_grad_() for key, x in values.items()}
    results = f(inputs)
    weights = [w.to(x.dtype) for w, x in zip(cotangents(results), results, strict=True)]
    found = grad(results, list(inputs.values()), weights, materialize_grads=True)
    return dict(zip(inputs, found, strict=True))


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def check(values: Leaves, kappa: float, method: str, assert_close: Check) -> None:
    """The moments and, in every argument, the gradient of a random combination of each."""
    wide = {key: x.double() for key, x in values.items()}
    actual, expected = condition(**values, method=method), reference.condition(**wide)
    prior = largest(wide["M_test"]) * largest(wide["K"])
    for name in MOMENTS:
        # the error of a variance is relative to the prior variance, whatever the noise
        options = {"condition": kappa} if name == "mean" else {"floor": prior}
        x = getattr(actual, name)
        assert x.dtype == values["K"].dtype
        assert_close(x, getattr(expected, name), **options)
        found = gradients(lambda v, n=name: (getattr(condition(**v, method=method), n),), values)
        wanted = gradients(lambda v, n=name: (getattr(reference.condition(**v), n),), wide)
        for key, g in wanted.items():
            dims = 1 if key == "log_noise" else 2
            assert_close(found[key], g, condition=kappa, quantity="gradient", dims=dims)


def check_log_prob(n: NewRows, method: str, assert_close: Check) -> None:
    values = {**leaves(n), "Y_test": n.Y_test}
    wide = {key: x.double() for key, x in values.items()}

    def structured(v: Leaves) -> tuple[Tensor, ...]:
        rest = {key: x for key, x in v.items() if key != "Y_test"}
        return (condition(**rest, method=method).log_prob(v["Y_test"]),)

    def dense(v: Leaves) -> tuple[Tensor, ...]:
        rest = {key: x for key, x in v.items() if key != "Y_test"}
        return (dense_log_prob(rest, v["Y_test"]),)

    joint = n.problem._replace(M=torch.cat([n.problem.M, n.M_cross.mT], -1))
    joint = joint._replace(M=torch.cat([joint.M, torch.cat([n.M_cross, n.M_test], -1)], -2))
    # Where it is the log density of all rows less that of the data, errors are relative to these.
    kappa = condition_number(joint)
    size = float(joint.M.shape[-1] * n.problem.K.shape[-1])
    assert_close(structured(values)[0], dense(wide)[0], condition=kappa, dims=0, floor=size)
    found, wanted = gradients(structured, values), gradients(dense, wide)
    of_data = gradients(log_prob_of_data, wide)
    of_data["M_cross"] = of_data["M_test"] = of_data["M"]
    for key, g in wanted.items():
        options = {"dims": 1 if key == "log_noise" else 2, "floor": largest(of_data[key])}
        assert_close(found[key], g, condition=kappa, quantity="gradient", **options)


def log_prob_of_data(v: Leaves) -> tuple[Tensor, ...]:
    noise = {key: x for key, x in v.items() if key in ("Sigma", "log_noise")}
    return (-reference.kron_gaussian_nll(v["Y"], v["M"], v["K"], **noise),)


# ---------------------------------------------------------------- values and gradients


@each_route
@each_noise
@pytest.mark.parametrize("kind", kinds_for(torch.float64))
def test_every_kind(
    kind: str, noise: str, method: str, dtype: torch.dtype, assert_close: Check
) -> None:
    if kind in kinds_for(dtype):
        n = make_new_rows(6, 3, 2, kind=kind, noise=noise, dtype=dtype)
        check(leaves(n), condition_number(n.problem), method, assert_close)


@pytest.mark.parametrize("size", [(9, 2), (4, 5)], ids=["dense", "joint"])
@each_noise
@pytest.mark.parametrize("kind", kinds_for(torch.float64))
def test_log_prob_of_every_kind(
    kind: str, noise: str, size: tuple[int, int], dtype: torch.dtype, assert_close: Check
) -> None:
    """Both ways of computing it: S·D ≤ T, and S·D > T."""
    if kind in kinds_for(dtype):
        n = make_new_rows(*size, 3, kind=kind, noise=noise, dtype=dtype)
        check_log_prob(n, "auto", assert_close)


@each_route
@each_noise
@pytest.mark.parametrize("batch", BATCHES)
def test_every_batch_pattern(batch: str, noise: str, method: str, assert_close: Check) -> None:
    n = make_new_rows(4, 2, 3, batch=BATCHES[batch], noise=noise)
    check(leaves(n), condition_number(n.problem), method, assert_close)


@pytest.mark.parametrize("size", [(6, 2), (3, 2)], ids=["dense", "joint"])
@pytest.mark.parametrize("batch", BATCHES)
def test_log_prob_of_every_batch_pattern(
    batch: str, size: tuple[int, int], assert_close: Check
) -> None:
    check_log_prob(make_new_rows(*size, 3, batch=BATCHES[batch]), "auto", assert_close)


@pytest.mark.parametrize(
    "size", [(0, 2, 3), (1, 1, 1), (3, 0, 2), (5, 7, 1), (2, 3, 5), (24, 4, 2)]
)
def test_every_size(size: tuple[int, int, int], dtype: torch.dtype, assert_close: Check) -> None:
    n = make_new_rows(*size, dtype=dtype)
    check(leaves(n), condition_number(n.problem), "auto", assert_close)
    check_log_prob(n, "auto", assert_close)


@pytest.mark.parametrize("how", LAYOUTS)
def test_every_memory_layout(how: str, dtype: torch.dtype, assert_close: Check) -> None:
    n = make_new_rows(5, 3, 2, batch=(2,), noise="diagonal", dtype=dtype)
    values = {key: relayout(x, how) for key, x in leaves(n).items()}
    check(values, condition_number(n.problem), "auto", assert_close)


@pytest.mark.parametrize("name", ["M_cross", "M_test"])
def test_batches_of_new_rows(name: str, assert_close: Check) -> None:
    """Several sets of new rows for one set of data; every result has the joint batch shape."""
    values = make_leaves(4, 2, 3)
    stacked = torch.stack([values[name], values[name] * 0.9, values[name] * 0.5])
    post = condition(**{**values, name: stacked})
    for i, x in enumerate(stacked):
        single = reference.condition(**{**values, name: x})
        for moment in MOMENTS:
            assert_close(getattr(post, moment)[i], getattr(single, moment))
    assert post.rsample((5,)).shape == (5, 3, 2, 3)
    assert post.log_prob(torch.zeros(2, 3).double()).shape == (3,)


def test_log_prob_equals_scipy(assert_close: Check) -> None:
    n = make_new_rows(5, 3, 2)
    values = leaves(n)
    post = condition(**values)
    covariance = post.covariance_matrix + torch.kron(torch.eye(3).double(), values["Sigma"])
    joint = multivariate_normal(to_numpy(post.mean.flatten()), to_numpy(covariance))
    expected = joint.logpdf(to_numpy(n.Y_test.flatten()))
    assert_close(post.log_prob(n.Y_test), torch.tensor(expected), dims=0)


# ---------------------------------------------------------------- properties


@each_noise
def test_diagonal_of_M_test_is_enough_for_the_rows(noise: str) -> None:
    values = make_leaves(5, 3, 2, batch=(2,), noise=noise)
    full = condition(**values)
    values["M_test"] = values["M_test"].diagonal(dim1=-2, dim2=-1)
    post = condition(**values)
    for name in MOMENTS[:-1]:
        assert torch.equal(getattr(post, name), getattr(full, name))


def test_new_rows_at_the_data_are_smoothed(assert_close: Check) -> None:
    """mean Y − U⁻¹·Y Σ, covariance of f (I ⊗ Σ) − (I ⊗ Σ) U⁻¹ (I ⊗ Σ): f and noise add up to Y."""
    p = make_problem(5, 3)
    Sigma = p.noise["Sigma"]
    post = condition(p.Y, p.M, p.K, p.M, p.M, **p.noise)
    U = KroneckerPlusNoise(p.M, p.K, **p.noise)
    assert_close(post.mean, p.Y - U.solve(p.Y) @ Sigma)
    noise = torch.kron(torch.eye(5).double(), Sigma)
    expected = noise - noise @ torch.linalg.inv(U.to_dense()) @ noise
    prior = largest(p.M) * largest(p.K)
    assert_close(post.covariance_matrix, expected, floor=prior)


def test_noise_below_rounding_leaves_the_documented_error(dtype: torch.dtype) -> None:
    """Variances at the data are at most the noise, here zero to rounding, and not clamped."""
    p = make_problem(6, 2, kind="matern12", noise="diagonal", dtype=dtype)
    eps = torch.finfo(dtype).eps
    log_noise = torch.full((2,), eps * 1e-3, dtype=dtype).log()
    post = condition(p.Y, p.M, p.K, p.M, p.M, log_noise=log_noise)
    prior = largest(p.M) * largest(p.K)
    assert largest(post.variance) <= 100 * eps * prior
    assert (post.variance < 0).any()  # the rounding shows: nothing is clamped


def test_independent_new_rows_keep_the_prior(assert_close: Check) -> None:
    values = make_leaves(4, 3, 2)
    values["M_cross"].zero_()
    post = condition(**values)
    assert not post.mean.any()
    assert_close(post.covariance_matrix, torch.kron(values["M_test"], values["K"]))


def test_constant_factor_by_its_eigenvalues(assert_close: Check) -> None:
    n = make_new_rows(5, 4, 2, batch=(2,))
    values = leaves(n)
    pair = symmetric_eigen(values.pop("M"))
    structured, dense = condition(M=pair, **values), reference.condition(M=pair, **values)
    for name in MOMENTS:
        assert_close(getattr(structured, name), getattr(dense, name))
    expected = dense_log_prob({"M": pair, **values}, n.Y_test)  # type: ignore[dict-item]
    assert_close(structured.log_prob(n.Y_test), expected, dims=0)
    structured.rsample().sum()
    found = gradients(lambda v: moments(condition(M=pair, **v)), values)
    wanted = gradients(lambda v: moments(reference.condition(M=pair, **v)), values)
    for key, g in wanted.items():
        assert_close(found[key], g, quantity="gradient")


# ---------------------------------------------------------------- what is computed


@each_route
def test_one_factorisation_serves_likelihood_and_posterior(method: str) -> None:
    n = make_new_rows(24, 3, 2)
    p = n.problem
    U = KroneckerPlusNoise(p.M, p.K, **p.noise, method=method)
    U.logdet()
    with Recorder() as recorder:
        post = KroneckerPosterior(U, p.Y, n.M_cross, n.M_test)
        _ = post.mean
    assert recorder.count("linalg_eigh") == recorder.count("linalg_cholesky_ex") == 0
    if method == "spectral":
        with Recorder() as recorder:
            moments(post)
        assert recorder.count("linalg_eigh") == recorder.count("linalg_cholesky_ex") == 0


def test_mean_needs_no_variance() -> None:
    n = make_new_rows(6, 5, 3)
    with Recorder() as recorder:
        _ = condition(**leaves(n)).mean
    assert (5, 3, 3) not in recorder.shapes()
    assert (5, 5) not in recorder.shapes()


def test_samples_share_the_factorisation_of_all_rows() -> None:
    post = condition(**make_leaves(6, 5, 2))
    post.rsample()
    with Recorder() as recorder:
        post.rsample((7,))
    assert (11, 11) not in recorder.shapes("linalg_eigh")


def test_large_problem_in_bounded_memory() -> None:
    """U would take 0.6 GB; nothing beyond the largest of T², S·T and S·D² is made, four times."""
    T, S, D = 1500, 500, 6
    x = torch.linspace(0, 1, T + S, dtype=torch.float64)[torch.randperm(T + S)]
    M = torch.exp(-(x[:, None] - x).abs() / 0.3)
    p = make_problem(T, D)._replace(M=M[:T, :T])
    with Recorder() as recorder:
        # on a GPU "auto" takes one T×T factor for each output
        options = {**p.noise, "method": "spectral"}
        post = condition(p.Y, p.M, p.K, M[T:, :T], M[T:, T:].diagonal(), **options)
        mean, blocks = post.mean, post.row_covariance
    assert max(torch.Size(s).numel() for s in recorder.shapes()) <= max(T * T, S * T, S * D * D)
    U = post.U
    torch.testing.assert_close(U.matmul(U.solve(p.Y)), p.Y)
    torch.testing.assert_close(mean, M[T:, :T] @ U.solve(p.Y) @ p.K)
    for t in (0, 250):
        C = torch.stack([M[T + t, :T, None] * k for k in p.K])  # (D, T, D)
        explained = torch.einsum("atd,btd->ab", C, U.solve(C))
        torch.testing.assert_close(blocks[t], p.K - explained)


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

    # random projections; every entry of the gradients is compared with the dense twin's above
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


# ---------------------------------------------------------------- errors


SHAPES = {
    "M_cross": (torch.zeros(3, 4), "M_cross must have shape (*batch, S, T) with T = 5"),
    "M_test": (torch.zeros(4), "M_test must have shape (*batch, S, S), or (*batch, S)"),
    "Y": (torch.zeros(4, 2), "Y must have shape (*batch, T, D) with T = 5"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_wrong_shape_names_the_argument(name: str) -> None:
    bad, message = SHAPES[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        condition(**{**make_leaves(5, 3, 2), name: bad.double()})


@pytest.mark.parametrize("name", ["M_cross", "M_test", "Y"])
def test_wrong_dtype_names_the_argument(name: str) -> None:
    values = make_leaves(5, 3, 2)
    with pytest.raises(TypeError, match=f"{name} must have the dtype of"):
        condition(**{**values, name: values[name].float()})
    with pytest.raises(TypeError, match=f"{name} must be a tensor"):
        condition(**{**values, name: to_numpy(values[name])})


def test_batches_that_do_not_broadcast() -> None:
    values = make_leaves(5, 3, 2, batch=(2,))
    values["M_cross"] = values["M_cross"][[0, 0, 0]]
    with pytest.raises(ValueError, match=r"batch shapes must broadcast.*M_cross \(3,\)"):
        condition(**values)


NEEDS_FULL: dict[str, Callable[[KroneckerPosterior], object]] = {
    "covariance_matrix": lambda post: post.covariance_matrix,
    "rsample": lambda post: post.rsample(),
    "log_prob": lambda post: post.log_prob(torch.zeros(3, 2).double()),
}


@pytest.mark.parametrize("what", NEEDS_FULL)
def test_what_needs_the_full_M_test_says_so(what: str) -> None:
    values = make_leaves(5, 3, 2)
    post = condition(**{**values, "M_test": values["M_test"].diagonal()})
    with pytest.raises(ValueError, match=f"{what} needs the full M_test"):
        NEEDS_FULL[what](post)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["Y", "M", "K", "M_cross", "M_test", "Sigma"])
def test_what_is_not_finite_is_named(name: str, bad: float) -> None:
    values = make_leaves(5, 3, 2)
    values[name].view(-1)[0] = bad
    post = condition(**values)
    Y_test = torch.zeros(3, 2).double()
    results: list[Callable[[], object]] = [
        lambda: post.rsample(),
        lambda: post.log_prob(Y_test),
        lambda: post.mean if name != "M_test" else post.variance,
        lambda: post.covariance_matrix if name != "Y" else post.mean,
    ]
    for result in results:
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            result()


@pytest.mark.parametrize("T", [5, 9])
def test_log_prob_names_its_argument(T: int) -> None:
    post = condition(**make_leaves(T, 3, 2))
    with pytest.raises(ValueError, match=re.escape("Y_test must have shape (*batch, S, D)")):
        post.log_prob(torch.zeros(2, 2).double())
    with pytest.raises(ValueError, match="Y_test must be finite"):
        post.log_prob(torch.full((3, 2), torch.nan).double())
    with pytest.raises(TypeError, match="Y_test must have the dtype"):
        post.log_prob(torch.zeros(3, 2))


def test_rows_that_no_data_could_have_are_refused() -> None:
    values = make_leaves(5, 3, 2)
    values["M_test"] = values["M_test"] - 10 * torch.eye(3)
    with pytest.raises(torch.linalg.LinAlgError, match="is not positive semidefinite"):  # type: ignore[attr-defined]
        condition(**values).rsample()


def test_repr_says_what_it_is() -> None:
    assert "event_shape=(3, 2), M_test=full" in repr(condition(**make_leaves(5, 3, 2)))
