"""The posterior at new rows: properties, what is computed for it, and errors."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from battery import Recorder
from devices import to_numpy
from problems import make_new_rows, make_problem
from test_predict import (
    MOMENTS,
    Check,
    dense_log_prob,
    each_noise,
    each_route,
    gradients,
    largest,
    leaves,
    make_leaves,
    moments,
)

from torch_kronlik import (
    KroneckerPlusNoise,
    KroneckerPosterior,
    condition,
    reference,
    symmetric_eigen,
)

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
