"""The routes to a factorised U: low rank, one Cholesky factor for each output, all together.

That every route gives the right values on every kind of problem is tested with the functions.
"""

from __future__ import annotations

import pytest
import torch
from battery import NOISES, ROUTES, Recorder, double, from_leaves, gradients, leaves
from conftest import check_close
from highprec import HighPrecision, evaluate
from problems import Problem, condition_number, from_roots, make_problem, make_roots
from test_pivoted_cholesky import HOLLOW, of_rank
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

import torch_kronlik as tk
from torch_kronlik import reference

LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
each_noise = pytest.mark.parametrize("noise", NOISES)
each_route = pytest.mark.parametrize("method", ROUTES)


# ---------------------------------------------------------------- the low-rank route


def nll(p: Problem, method: str) -> Tensor:
    return tk.kron_gaussian_nll(p.Y, p.M, p.K, **p.noise, method=method)


def dense(p: Problem) -> Tensor:
    return reference.kron_gaussian_nll(p.Y, p.M, p.K, **p.noise)


def used(p: Problem, method: str = "auto") -> str:
    return tk.KroneckerPlusNoise(p.M, p.K, **p.noise, method=method).method_used


@pytest.fixture(scope="module")
def nearly_noiseless() -> tuple[Problem, HighPrecision]:
    """M of rank 4 exactly, noise 1e-10: condition number 1e13."""
    p = make_problem(12, 2, kind="tiny_noise", noise="diagonal")
    p = p._replace(M=of_rank(12, 4) / 16)
    return p, evaluate(p)


def worst_error(p: Problem, exact: HighPrecision, method: str) -> float:
    """Of the value, the solve and every gradient, relative to its largest entry."""
    quad, logdet = exact.grad_inv_quad, exact.grad_logdet
    found = {key: x.clone().requires_grad_() for key, x in leaves(p).items()}
    value = nll(from_leaves(found), method)
    actual = [value, tk.kron_solve(p.M, p.K, p.Y, **p.noise, method=method)]
    actual += grad(value, list(found.values()))
    expected = [exact.nll, exact.solve, *((quad[key] + logdet[key]) / 2 for key in found)]
    scales = [e.abs().max() for e in expected]
    # Aᵀ M A is small because the large part of A is outside the range of M: terms that cancel.
    scales[2 + list(found).index("K")] = exact.solve.square().sum() * p.M.abs().max()
    triples = zip(actual, expected, scales, strict=True)
    return max(float((a.detach() - e).abs().max() / scale) for a, e, scale in triples)


def test_low_rank_route_keeps_all_digits(nearly_noiseless: tuple[Problem, HighPrecision]) -> None:
    """3e-16, where the eigendecomposition has 1e-5."""
    assert worst_error(*nearly_noiseless, "low_rank") < 4e-15
    assert worst_error(*nearly_noiseless, "spectral") > 1e-9  # so the problem is a hard one


def check(p: Problem, method: str) -> None:
    kappa = condition_number(p)
    floor = float(p.Y.shape[-2] * p.Y.shape[-1])
    check_close(nll(p, method), dense(double(p)), condition=kappa, dims=0, floor=floor)
    found = gradients(lambda q: (nll(q, method),), p)
    for key, expected in gradients(lambda q: (dense(q),), double(p)).items():
        dims = 1 if key == "log_noise" else 2
        check_close(found[key], expected, condition=kappa, quantity="gradient", dims=dims)


@each_noise
def test_low_rank_route_on_a_batch_of_ranks(noise: str, dtype: torch.dtype) -> None:
    p = make_problem(12, 3, batch=(4,), noise=noise, dtype=dtype)
    M = torch.stack([of_rank(12, r, dtype=dtype) / 64 for r in (0, 1, 5, 2)])
    p = p._replace(M=M)
    assert used(p, "low_rank") == "low_rank"
    check(p, "low_rank")
    shared = make_problem(12, 3, batch={"Y": (2,), "M": (), "K": (2,), "noise": ()}, noise=noise)
    check(shared._replace(M=of_rank(12, 4) / 64), "low_rank")


@each_noise
def test_low_rank_route_hands_over(noise: str) -> None:
    """An indefinite M (in a batch, one is enough) whose U is positive definite; too high a rank."""
    p = make_problem(8, 3, batch=(2,), noise=noise)
    M = torch.stack([of_rank(8, 2) / 64, 0.05 * torch.kron(torch.eye(2), torch.tensor(HOLLOW))])
    p = p._replace(M=M.double())
    assert torch.linalg.eigvalsh(p.M[1])[0] < -0.01
    assert used(p, "low_rank") == "spectral"
    check(p, "low_rank")
    full = make_problem(100, 2, noise=noise)
    assert used(full) != "low_rank"
    check(full, "auto")
    assert used(full, "low_rank") == "low_rank"  # asked for, it is tried to the end


def test_low_rank_route_makes_no_large_eigenproblem() -> None:
    p = make_problem(256, 2, noise="diagonal")
    p = p._replace(M=of_rank(256, 5) / 64)
    with Recorder() as recorded:
        nll(p, "auto")
    assert max(shape[-1] for shape in recorded.shapes("linalg_eigh")) == 5
    assert recorded.count("pivoted_cholesky") == 1
    assert recorded.count("eigen") == 0


# ---------------------------------------------------------------- one Cholesky factor per output


def factorised(p: Problem) -> int:
    """How many T×T matrices."""
    with Recorder() as recorded:
        tk.KroneckerPlusNoise(p.M, p.K, **p.noise, method="cholesky").logdet()
    T = p.M.shape[-1]
    return next(s[-3] for s in recorded.shapes("cholesky_factors") if s[-2:] == (T, T))


@pytest.mark.parametrize("rank", [0, 1, 3, 5])
@each_noise
def test_only_outputs_with_signal_are_factorised(noise: str, rank: int) -> None:
    """Exact zeros among the eigenvalues; rounding above zero is not taken for one."""
    p = make_problem(7, 5, noise=noise)
    silent = p._replace(K=torch.diag((torch.arange(5) < rank).double()))
    if noise == "diagonal" or rank == 0:
        assert factorised(silent) == rank
    check(silent, "cholesky")
    singular = p._replace(K=of_rank(5, rank) / 64)
    assert rank <= factorised(singular) <= 5
    check(singular, "cholesky")


def test_batch_is_factorised_up_to_its_largest_rank() -> None:
    K = torch.tensor([[0.0, 2, 0, 0, 0], [1, 0, 0, 3, 1], [2, 0, 1, 0, 0]]).double().diag_embed()
    p = make_problem(6, 5, batch={"Y": (3,), "M": (), "K": (3,), "noise": ()}, noise="diagonal")
    p = p._replace(K=K)
    assert factorised(p) == 3
    check(p, "cholesky")


@each_noise
def test_cholesky_route_names_the_indefinite_element(noise: str) -> None:
    p = make_problem(6, 3, batch=(2, 2), noise=noise)
    p.K[1, 0] *= -50
    with pytest.raises(LinAlgError, match=r"^U = .* positive definite \(batch element \(1, 0\)\)"):
        nll(p, "cholesky")
    weak = p._replace(K=1e-4 * p.K)  # negative eigenvalues that the noise outweighs
    check(weak, "cholesky")


@each_route
def test_overflow_is_not_taken_for_an_indefinite_matrix(method: str) -> None:
    p = make_problem(6, 3)
    with pytest.raises(OverflowError, match="exceeds the range"):
        nll(p._replace(M=1e200 * p.M, K=1e200 * p.K), method)


# ---------------------------------------------------------------- all routes together


@each_route
@each_noise
@pytest.mark.parametrize("rank", [None, 2])
def test_first_and_second_derivatives(method: str, noise: str, rank: int | None) -> None:
    """rank 2: M of rank 2 and K of full rank, so that every route has its complement."""
    roots = make_roots(4, 2, rank=rank, noise=noise)
    f = lambda *r: nll(from_roots(*r, noise=noise), method)  # noqa: E731
    assert gradcheck(f, roots, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(f, roots, fast_mode=True, check_fwd_over_rev=True)


@each_noise
@pytest.mark.parametrize("M", ["rank_one_M", "rbf", "matern12"])
def test_routes_agree_at_second_order(M: str, noise: str) -> None:
    """At T = 40 each route takes its own way, not another's."""
    p = make_problem(40, 3, kind=M, noise=noise)
    direction = make_problem(40, 3, noise=noise, seed=1)
    found = []
    for method in ROUTES:
        values = {key: x.clone().requires_grad_() for key, x in leaves(p).items()}
        q = from_leaves(values)
        first = grad(nll(q, method), list(values.values()), create_graph=True)
        along = sum((g * v).sum() for g, v in zip(first, leaves(direction).values(), strict=True))
        found.append(grad(along, list(values.values())))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * float(b.abs().max()))
