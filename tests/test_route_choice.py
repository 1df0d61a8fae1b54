"""Which route to a factorised U is taken, and each of them traced by the compiler."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from battery import from_leaves, leaves
from problems import Problem, make_problem, matern12, rbf
from test_pivoted_cholesky import HOLLOW, kernel, of_rank
from test_routes import dense, nll, used
from torch import Tensor
from torch.autograd import grad

from torch_kronlik.factor import plan

# ---------------------------------------------------------------- which one is taken

rough, smooth = kernel(matern12, 256), kernel(rbf, 256)


def padded(K: Tensor, D: int) -> Tensor:
    out = K.new_zeros(*K.shape[:-2], D, D)
    out[..., : K.shape[-1], : K.shape[-1]] = K
    return out


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
        (with_rows(torch.zeros(256, 256).double(), 3), "low_rank"),
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
    for T in (at, 2 * at, 1000, 10**4):
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
