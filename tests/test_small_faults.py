"""Small problems among others: the same bits, a fault stays its own; the range of the numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from battery import NOISES, from_leaves, leaves
from highprec import evaluate
from problems import Problem, make_problem
from test_small import COVARIANCE, FINE, NOISE, NOT_FINITE, dense, native, nll, ones_backward
from torch import Tensor

from torch_kronlik.noise import make_noise
from torch_kronlik.rules import small as small_rule
from torch_kronlik.rules.small import small_nll

LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
each_noise = pytest.mark.parametrize("noise", NOISES)


# ---------------------------------------------------------------- one problem among others


def pick(p: Problem, b: int) -> Problem:
    return from_leaves({key: x[b] for key, x in leaves(p).items()})


@each_noise
@pytest.mark.parametrize("D", [1, 2, 3, 5, 8, 9, 16])
def test_same_bits_whatever_shares_the_lanes(D: int, noise: str, dtype: torch.dtype) -> None:
    """19 problems leave a remainder in groups of every size, 16 to 1."""
    p = make_problem(5, D, batch=(19,), noise=noise, dtype=dtype)
    together = native(p)
    for b in range(19):
        alone = native(pick(p, b))
        assert all(torch.equal(x[b], y) for x, y in zip(together, alone, strict=True))


def test_same_bits_whatever_the_threads(dtype: torch.dtype) -> None:
    p = make_problem(33, 3, batch=(41,), dtype=dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            found.append(native(p))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def faults(noise: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[int, ...], Any, int, str]]:
    """(argument, position in it or () for all of it, value or factor, status, error)."""
    for key in ("Y", "M", "K", *(["Sigma"] if noise == "full" else ["log_noise"])):
        positions = [(0,), (2,)] if key == "log_noise" else [(0, 0), (0, 2), (2, 0)]
        for position in positions:
            for bad in (math.nan, math.inf, -math.inf):
                yield key, position, bad, NOT_FINITE, rf"^{key} must be finite, but {key}\[3, "
    if noise == "full":
        yield "Sigma", (), -1.0, NOISE, r"^Sigma is not positive definite \(batch element 3\)"
    for key in ("M", "K"):
        yield key, (), -50.0, COVARIANCE, r"^U = .* not positive definite \(batch element 3\)"
    if dtype == torch.float32:
        yield "Y", (), 1e30, NOT_FINITE, "^the result exceeds the range"


@each_noise
@pytest.mark.parametrize("D", [3, 9])
def test_a_fault_is_told_and_stays_in_its_problem(D: int, noise: str, dtype: torch.dtype) -> None:
    p = make_problem(4, D, batch=(5,), noise=noise, dtype=dtype)
    good = native(p)
    others = [0, 1, 2, 4]
    for key, position, bad, code, message in faults(noise, dtype):
        x = leaves(p)[key].clone()
        x[(3, *position)] = bad if position else bad * x[3]
        q = from_leaves({**leaves(p), key: x})
        found = native(q)
        assert found[-1].tolist() == [code if b == 3 else FINE for b in range(5)], (key, bad)
        assert all(torch.equal(a[others], b[others]) for a, b in zip(found, good, strict=True))
        # not a number that could be taken for a result
        assert not found[0][3].isfinite(), (key, bad)
        error: Any = {NOT_FINITE: (ValueError, OverflowError)}.get(code, LinAlgError)
        with pytest.raises(error, match=message):
            small_nll(q.Y, q.M, q.K, make_noise(**q.noise), True)


@each_noise
def test_a_fault_inside_a_captured_graph_is_no_result(
    noise: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host cannot wait for the status then, and a replay cannot raise."""
    monkeypatch.setattr(small_rule, "is_captured", lambda x: True)
    p = make_problem(4, 3, batch=(5,), noise=noise, dtype=dtype)
    for key, position, bad, _, _ in faults(noise, dtype):
        x = leaves(p)[key].clone()
        x[(3, *position)] = bad if position else bad * x[3]
        value = nll(from_leaves({**leaves(p), key: x}))
        assert not value[3].isfinite(), (key, bad)
        assert value[[0, 1, 2, 4]].isfinite().all()


@each_noise
def test_batch_element_of_two_dimensions(noise: str) -> None:
    p = make_problem(4, 3, batch=(2, 3), noise=noise)
    p.M[1, 2] *= -50
    p.M[1, 1] *= -50
    with pytest.raises(LinAlgError, match=re.escape("(batch element (1, 1))")):
        nll(p)


def test_singular_covariance_is_refused(dtype: torch.dtype) -> None:
    eye = torch.eye(3, dtype=dtype)
    p = Problem(eye, eye, -eye, {"log_noise": torch.zeros(3, dtype=dtype)})
    assert native(p)[-1] == COVARIANCE
    with pytest.raises(LinAlgError, match=r"^U = .* is not positive definite"):
        nll(p)


def test_indefinite_factor_that_the_noise_outweighs() -> None:
    p = make_problem(4, 3)
    p = p._replace(M=p.M - 0.5 * torch.eye(4), K=0.1 * p.K)
    assert torch.linalg.eigvalsh(p.M)[0] < 0
    torch.testing.assert_close(native(p)[0], dense(p))
    torch.testing.assert_close(list(native(p)[1:-1]), ones_backward(dense, p))


# ---------------------------------------------------------------- the range of the numbers


@each_noise
@pytest.mark.parametrize("exponent", [-290, -180, -160, 160, 180, 290])
def test_units_of_the_factors_do_not_matter(exponent: int, noise: str) -> None:
    """M·c and K/c: products of two entries of either leave the range of doubles."""
    c = 10.0**exponent
    p = make_problem(4, 3, noise=noise)
    q = p._replace(M=p.M * c, K=p.K / c)
    expected = native(p)
    scales = (1.0, 1.0, 1 / c, c, 1.0)
    for actual, wanted, scale in zip(native(q)[:-1], expected, scales, strict=False):
        torch.testing.assert_close(actual / scale, wanted, rtol=1e-12, atol=1e-12)


def test_finite_entries_whose_sum_is_not() -> None:
    p = make_problem(20, 2, kind="identity", noise="diagonal")
    p = p._replace(M=1e307 * (torch.eye(20) + 0.01 * torch.ones(20, 20)).double(), K=1e-307 * p.K)
    q = p._replace(M=1e-307 * p.M, K=1e307 * p.K)
    assert not p.M.sum().isfinite()
    torch.testing.assert_close(native(p)[0], dense(q))
    assert native(p)[-1] == FINE


@each_noise
def test_overflow_is_not_taken_for_an_indefinite_matrix(noise: str, dtype: torch.dtype) -> None:
    p = make_problem(4, 3, noise=noise, dtype=dtype)
    big = torch.finfo(dtype).max ** 0.6
    for q in (p._replace(M=big * p.M, K=big * p.K), p._replace(Y=big * p.Y)):
        assert native(q)[-1] == NOT_FINITE
        with pytest.raises(OverflowError, match="exceeds the range"):
            nll(q)


@pytest.mark.parametrize("s", [-600.0, 600.0, 720.0, 1400.0])
def test_gradient_where_the_noise_variance_itself_overflows(s: float) -> None:
    """An output that is all noise adds ½ (T s + Σ y² exp(−s) + T log 2π); ∂/∂s = ½ (T − …)."""
    p = make_problem(4, 2, noise="diagonal")
    log_noise = torch.tensor([s, 0.0], dtype=torch.float64)
    Y = p.Y * torch.tensor([math.exp(min(s / 2, 300.0)), 1.0], dtype=torch.float64)
    K = torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    value, *found, status = native(Problem(Y, p.M, K, {"log_noise": log_noise}))
    q = Problem(Y[:, 1:], p.M, K[1:, 1:], {"log_noise": log_noise[1:]})
    square = (Y[:, 0] * math.exp(-s / 2)).square().sum()
    expected = native(q)[0] + (4 * s + square + 4 * math.log(2 * math.pi)) / 2
    assert status == FINE
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(found[3][0], (4 - square) / 2)
    torch.testing.assert_close(found[3][1:], native(q)[4])


@pytest.mark.parametrize("s", [-1e4, 1e4])
def test_noise_outside_the_range_is_refused(s: float, dtype: torch.dtype) -> None:
    p = make_problem(4, 3, noise="diagonal", dtype=dtype)
    q = p._replace(noise={"log_noise": torch.full((3,), s, dtype=dtype)})
    assert native(q)[-1] == NOT_FINITE
    with pytest.raises(OverflowError, match="exceeds the range"):
        nll(q)


HARD = [
    "generic", "rank_one_M", "rank_one_K", "zero_M", "zero_K", "repeated_blocks", "rank_deficient",
    "replicates", "rbf", "huge_factors", "tiny_noise", "spread_noise",
]  # fmt: skip


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach() - expected).abs().max() / (expected.abs().max() or 1))


@pytest.mark.parametrize("kind", HARD)
def test_digits_as_good_as_the_dense_computation(kind: str) -> None:
    """Against 50 digits, beside the dense float64 twin: what both lose is the problem's own."""
    for noise in NOISES:
        p = make_problem(5, 3, kind=kind, noise=noise)
        exact = evaluate(p)
        quad, logdet = exact.grad_inv_quad, exact.grad_logdet
        wanted = [exact.nll, *((quad[key] + logdet[key]) / 2 for key in leaves(p))]
        found, twin = native(p)[:-1], [dense(p), *ones_backward(dense, p)]
        # the dense computation's largest error: one alone may be right by luck
        mine, theirs = (max(map(relative_error, xs, wanted)) for xs in (found, twin))
        assert mine <= max(10 * theirs, 1e-14), (noise, mine, theirs)
