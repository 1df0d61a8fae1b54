"""The routes to a factorised U: pivoted Cholesky and what is made of it, and which route is taken.

That every route gives the right values on every kind of problem is tested with the functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from battery import NOISES, ROUTES, Recorder, double, from_leaves, gradients, leaves
from conftest import check_close
from devices import DEVICE, opcheck, to_numpy
from highprec import HighPrecision, evaluate
from problems import (
    LAYOUTS,
    Problem,
    condition_number,
    from_roots,
    make_problem,
    make_roots,
    matern12,
    normal,
    rbf,
    relayout,
)
from scipy.linalg import lapack  # type: ignore[import-untyped]
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

import torch_kronlik as tk
from torch_kronlik import reference
from torch_kronlik.factor import plan
from torch_kronlik.ops import pivoted_cholesky

LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
each_noise = pytest.mark.parametrize("noise", NOISES)
each_route = pytest.mark.parametrize("method", ROUTES)


def of_rank(T: int, r: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """F Fᵀ with integer entries: of rank r exactly, in either dtype."""
    F = (5 * normal(T, r, seed=seed)).round().clamp(-9, 9).to(dtype)
    return F @ F.mT


def kernel(build: Any, T: int) -> Tensor:
    with torch.device("cpu"):
        M: Tensor = build(T, (), torch.Generator().manual_seed(0))
    return M.to(DEVICE)


# ---------------------------------------------------------------- pivoted Cholesky

RANKS = [(1, 1), (5, 2), (12, 12), (65, 3), (300, 7)]


@pytest.mark.parametrize(("T", "r"), RANKS)
def test_pivoted_cholesky_reproduces_the_matrix(T: int, r: int, dtype: torch.dtype) -> None:
    M = of_rank(T, r, dtype=dtype)
    F, rank = pivoted_cholesky(M, min(T, r + 2))
    assert rank == r
    assert F.shape == (T, min(T, r + 2))
    assert not F[:, r:].any()
    check_close(F @ F.mT, M.double())


@pytest.mark.parametrize("kind", [rbf, matern12])
def test_pivoted_cholesky_equals_lapack(kind: Any) -> None:
    """Largest remaining diagonal entry first, as in LAPACK's dpstrf: the same factor."""
    T = 40
    scales = torch.linspace(1, 2, T)  # no equal diagonal entries, whose order would be arbitrary
    M = scales[:, None] * kernel(kind, T) * scales
    C, order, rank, _ = lapack.dpstrf(to_numpy(M), lower=1, tol=1e-6 * float(M.diagonal().max()))
    F, found = pivoted_cholesky(M, T)
    assert found >= rank
    expected = torch.tensor(C).tril()[:, :rank]
    actual = F[torch.tensor(order).long() - 1, :rank]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("r", [1, 12, 30])
def test_exact_rank_is_found_in_rounded_matrices(r: int, seed: int, dtype: torch.dtype) -> None:
    """F Fᵀ with rounded entries: what is left after r columns is rounding, not another column."""
    F = normal(100, r, seed=seed)
    _, rank = pivoted_cholesky((F @ F.mT).to(dtype), 100)
    assert rank == r


def test_smooth_kernel_is_of_low_rank_to_rounding() -> None:
    M = kernel(rbf, 256)
    F, rank = pivoted_cholesky(M, 32)
    assert 0 < rank <= 32
    rest = M - F @ F.mT
    assert rest.diagonal().abs().sum() <= 256 * 2.0**-51
    assert rest.abs().max() <= 256 * 2.0**-51


def test_rank_that_is_too_high(dtype: torch.dtype) -> None:
    M = of_rank(20, 5, dtype=dtype)
    for max_rank in range(5):
        assert pivoted_cholesky(M, max_rank)[1] == -1
    assert pivoted_cholesky(M, 5)[1] == 5


HOLLOW = [[0.0, 1, -1, 0], [1, 0, 0, -1], [-1, 0, 0, 1], [0, -1, 1, 0]]
INDEFINITE = {
    "swap": torch.tensor([[0.0, 1], [1, 0]]),
    "correlation of two": torch.tensor([[1.0, 2], [2, 1]]),
    "negative": -torch.eye(3),
    "negative entry": torch.diag(torch.tensor([1.0, 0, -1e-3])),
    "one negative of many": torch.diag(torch.tensor([1.0] * 99 + [-1e-3])),
    "hollow": torch.tensor(HOLLOW),
    # each row's entries cancel against many vectors of ±1
    "repeated hollow": torch.kron(torch.eye(24), torch.tensor(HOLLOW)),
    "hollow everywhere": torch.kron(torch.ones(24, 24), torch.tensor(HOLLOW)),
    "beside a good block": torch.block_diag(torch.ones(4, 4), torch.tensor(HOLLOW)),
    "no diagonal": torch.ones(6, 6) - torch.eye(6),
    "Hankel": (torch.arange(8)[:, None] + torch.arange(8) == 7).float(),
}


@pytest.mark.parametrize("name", INDEFINITE)
def test_indefinite_matrix_is_refused(name: str, dtype: torch.dtype) -> None:
    for scale in (1.0, 1e-8, 1e8):
        M = scale * INDEFINITE[name].to(dtype)
        for max_rank in (0, 1, 2, len(M)):
            if max_rank <= len(M):
                assert pivoted_cholesky(M, max_rank)[1] == -1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_entry_that_is_not_finite_is_refused(bad: float, dtype: torch.dtype) -> None:
    """In either triangle and on the diagonal; the neighbours in the batch are as without it."""
    good = torch.stack([of_rank(4, r, dtype=dtype) for r in (0, 1, 3)])
    F, _ = pivoted_cholesky(good, 4)
    for i in range(4):
        for j in range(4):
            for b in range(3):
                M = good.clone()
                M[b, i, j] = bad
                found, ranks = pivoted_cholesky(M, 4)
                assert ranks.tolist() == [-1 if k == b else r for k, r in enumerate((0, 1, 3))]
                others = [k for k in range(3) if k != b]
                assert torch.equal(found[others], F[others])


def test_zero_and_empty(dtype: torch.dtype) -> None:
    for shape in ((3, 3), (0, 0), (2, 0, 0), (2, 1, 1)):
        F, rank = pivoted_cholesky(torch.zeros(shape, dtype=dtype), shape[-1])
        assert not rank.any()
        assert not F.any()
        assert F.shape == shape
    F, rank = pivoted_cholesky(torch.zeros(0, 3, 3, dtype=dtype), 2)
    assert F.shape == (0, 3, 2)
    assert rank.shape == (0,)
    for max_rank, size in ((-1, (3, 3)), (1, (3, 4)), (1, (3,))):
        with pytest.raises(RuntimeError, match="pivoted_cholesky"):
            pivoted_cholesky(torch.zeros(size), max_rank)


@pytest.mark.parametrize("how", LAYOUTS)
def test_batch_of_different_ranks_in_every_layout(how: str, dtype: torch.dtype) -> None:
    ranks = [0, 1, 5, 3]
    M = torch.stack([of_rank(30, r, seed=r, dtype=dtype) for r in ranks])
    F, found = pivoted_cholesky(relayout(M, how), 5)
    assert (found == torch.tensor(ranks)).all()
    for k, r in enumerate(ranks):
        alone, rank = pivoted_cholesky(M[k], 5)
        assert rank == r
        assert (F[..., k, :, :] == alone).all()


def test_rounded_symmetry_is_enough() -> None:
    """Only to rounding symmetric, as a computed Gram matrix is."""
    M = of_rank(50, 4) / 7
    M[3, 8] *= 1 + 2.0**-52
    assert pivoted_cholesky(M, 10)[1] == 4


def test_same_bits_whatever_the_threads(dtype: torch.dtype) -> None:
    M = of_rank(600, 6, dtype=dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            found.append(pivoted_cholesky(M, 10))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(F, found[0][0]) and rank == 6 for F, rank in found)


def test_opcheck() -> None:
    opcheck(pivoted_cholesky, (of_rank(6, 2), 3))
    opcheck(pivoted_cholesky, (of_rank(6, 2).expand(2, 6, 6).mT, 6))


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
    p = make_problem(120, 2, noise="diagonal")
    p = p._replace(M=of_rank(120, 5) / 64)
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


def padded(K: Tensor, D: int) -> Tensor:
    out = K.new_zeros(*K.shape[:-2], D, D)
    out[..., : K.shape[-1], : K.shape[-1]] = K
    return out


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


# ---------------------------------------------------------------- which one is taken

rough, smooth = kernel(matern12, 128), kernel(rbf, 256)


def with_rows(M: Tensor, D: int, K: Tensor | None = None) -> Problem:
    p = make_problem(1, D, noise="diagonal")
    Y = torch.zeros(len(M), D, dtype=torch.float64)
    return Problem(Y, M, p.K if K is None else K, p.noise)


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (with_rows(smooth, 2), "low_rank"),
        (with_rows(smooth, 30), "low_rank"),
        (with_rows(rough, 2), "cholesky"),
        (with_rows(rough, 30), "spectral"),
        (with_rows(rough, 30, padded(of_rank(2, 2), 30)), "cholesky"),
        (with_rows(rough[:90, :90], 2), "spectral"),
        (with_rows(torch.zeros(100, 100).double(), 3), "low_rank"),
    ],
)  # fmt: skip
def test_auto_takes_the_cheapest(p: Problem, expected: str) -> None:
    assert used(p) == expected
    torch.testing.assert_close(nll(p, "auto"), nll(p, "spectral"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plan_by_its_numbers(device: str) -> None:
    costs = plan.costs(device)
    at = costs.smallest_low_rank
    assert costs.max_rank("low_rank", 7) == 7
    for T in (at, 200, 1000, 10**4):
        assert T // costs.rank_fraction <= costs.max_rank("auto", T) <= T // 2
    assert costs.max_rank("auto", at - 1) == 0
    assert costs.max_rank("spectral", 10**4) == costs.max_rank("cholesky", 10**4) == 0
    assert costs.prefers_cholesky("cholesky", 1, 10**4)
    assert not costs.prefers_cholesky("spectral", 10**4, 0)
    assert costs.prefers_cholesky("auto", at, 0)
    assert not costs.prefers_cholesky("auto", at, math.ceil(costs.eigh_in_choleskys))
    assert not costs.prefers_cholesky("auto", at - 1, 1)
    assert costs.fits_small(costs.small_T, costs.small_D)
    assert not costs.fits_small(costs.small_T + 1, 1)
    assert not costs.fits_small(1, costs.small_D + 1)


def test_small_problems_elsewhere_take_the_general_routes() -> None:
    assert not plan.costs("mps").fits_small(1, 1)


def test_methods_by_name() -> None:
    for method in plan.METHODS:
        plan.check_method(method)
    with pytest.raises(ValueError, match="got 'dense'"):
        plan.check_method("dense")


# ---------------------------------------------------------------- traced


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_gradients(f: Callable[[Problem], Tensor], p: Problem) -> list[Tensor]:
    keys = list(leaves(p))
    compiled = torch.compile(
        lambda *x: f(from_leaves(dict(zip(keys, x, strict=True)))),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    values = [x.clone().requires_grad_() for x in leaves(p).values()]
    value = compiled(*values)
    return [value.detach(), *grad(value.sum(), values)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("M", ["low", "full", "indefinite", "batch"])
@pytest.mark.usefixtures("fresh_compiler")
def test_low_rank_route_compiles(M: str) -> None:
    """Shapes cannot depend on the rank there: the factors are padded to T columns."""
    mixed = torch.stack([of_rank(8, 2), of_rank(8, 0)]) / 64
    rows = {
        "low": of_rank(8, 2) / 64,
        "full": rough[:64:8, :64:8],
        "indefinite": 0.05 * torch.kron(torch.eye(2), torch.tensor(HOLLOW)).double(),
        "batch": mixed,
    }[M]
    p = make_problem(8, 2, batch=rows.shape[:-2], noise="diagonal")._replace(M=rows)
    actual = compiled_gradients(lambda q: nll(q, "low_rank"), p)
    torch.testing.assert_close(actual[0], dense(p))
    values = [x.clone().requires_grad_() for x in leaves(p).values()]
    expected = grad(dense(from_leaves(dict(zip(leaves(p), values, strict=True)))).sum(), values)
    torch.testing.assert_close(actual[1:], list(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
def test_cholesky_route_compiles_with_singular_K() -> None:
    p = make_problem(6, 3, noise="diagonal")
    p = p._replace(K=padded(of_rank(1, 1), 3))
    actual = compiled_gradients(lambda q: nll(q, "cholesky"), p)
    values = [x.clone().requires_grad_() for x in leaves(p).values()]
    value = dense(from_leaves(dict(zip(leaves(p), values, strict=True))))
    expected = grad(value, values)
    torch.testing.assert_close(actual, [value.detach(), *expected], rtol=1e-9, atol=1e-9)
