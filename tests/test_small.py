"""Small problems: the native kernel, the operator over it, and when the likelihood takes it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from battery import NOISES, cotangents, double, from_leaves, gradients, laid_out, leaves
from conftest import check_close
from devices import DEVICE, opcheck
from highprec import evaluate
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    BATCHES,
    LAYOUTS,
    Problem,
    condition_number,
    from_roots,
    kinds_for,
    make_problem,
    make_roots,
    relayout,
)
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

import torch_kronlik as tk
from torch_kronlik import likelihood, ops, reference
from torch_kronlik.factor import plan
from torch_kronlik.rules import small as small_rule
from torch_kronlik.rules.small import small_nll

FINE, NOISE, COVARIANCE, NOT_FINITE = range(4)  # what a problem's status says
LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
each_noise = pytest.mark.parametrize("noise", NOISES)


def native(p: Problem, gradients: bool = True) -> tuple[Tensor, ...]:
    """nll, its gradients in (Y, M, K, noise) at the joint batch, and the status."""
    (noise,) = p.noise.values()
    outputs: tuple[Tensor, ...] = ops.small_nll(p.Y, p.M, p.K, noise, "Sigma" in p.noise, gradients)
    return outputs


def joint(p: Problem) -> Problem:
    """Every argument expanded to the joint batch: each problem then has gradients of its own."""
    cores = {key: 1 if key == "log_noise" else 2 for key in leaves(p)}
    shapes = [x.shape[: x.dim() - cores[key]] for key, x in leaves(p).items()]
    batch = torch.broadcast_shapes(*shapes)
    return from_leaves(
        {k: x.expand(*batch, *x.shape[x.dim() - cores[k] :]) for k, x in leaves(p).items()}
    )


def ones_backward(f: Callable[[Problem], Tensor], p: Problem) -> list[Tensor]:
    values = {key: x.detach().clone().requires_grad_() for key, x in leaves(p).items()}
    total = f(from_leaves(values)).sum()
    return list(grad(total, list(values.values()), materialize_grads=True))


def nll(p: Problem, **options: Any) -> Tensor:
    return tk.kron_gaussian_nll(p.Y, p.M, p.K, **p.noise, **options)


def dense(p: Problem) -> Tensor:
    return reference.kron_gaussian_nll(p.Y, p.M, p.K, **p.noise)


def check(p: Problem) -> None:
    """The kernel's value and gradients; no problem is found at fault."""
    wide, kappa = joint(double(p)), condition_number(p)
    value, *found, status = native(p)
    assert status.shape == value.shape
    assert (status == FINE).all()
    floor = float(p.Y.shape[-2] * p.Y.shape[-1])  # a log-determinant's terms may cancel
    check_close(value, dense(wide), condition=kappa, dims=0, floor=floor)
    for key, actual, expected in zip(leaves(p), found, ones_backward(dense, wide), strict=True):
        assert actual.dtype == p.Y.dtype
        assert actual.is_contiguous()
        dims = 1 if key == "log_noise" else 2
        check_close(actual, expected, condition=kappa, quantity="gradient", dims=dims)


# ---------------------------------------------------------------- against the dense twin


@each_noise
@pytest.mark.parametrize("kind", kinds_for(torch.float64))
def test_every_kind(kind: str, noise: str, dtype: torch.dtype) -> None:
    if kind in kinds_for(dtype):
        check(make_problem(6, 3, kind=kind, noise=noise, dtype=dtype))


# float64 has 8 lanes and float32 has 16: D = 9 and 16 take several passes, or one exactly; tiles
# are 4×4
SIZES = [(0, 1), (0, 3), (1, 1), (1, 16), (2, 3), (33, 3), (64, 2), (5, 8), (7, 9), (4, 16)]
SIZES += [(3, 2), (8, 1), (9, 4), (15, 2), (16, 5), (17, 3), (63, 2), (65, 2), (127, 1), (128, 2)]


# on a GPU a problem's matrices are in a block's shared memory
FITTING = [size for size in SIZES if plan.costs(DEVICE.type).fits_small(*size)]


@each_noise
@pytest.mark.parametrize("size", FITTING)
def test_every_size(size: tuple[int, int], noise: str, dtype: torch.dtype) -> None:
    check(make_problem(*size, noise=noise, dtype=dtype))
    check(make_problem(*size, batch=(2,), noise=noise, dtype=dtype))


@each_noise
@pytest.mark.parametrize("batch", BATCHES)
def test_every_batch_pattern(batch: str, noise: str, dtype: torch.dtype) -> None:
    check(make_problem(4, 3, batch=BATCHES[batch], noise=noise, dtype=dtype))


@each_noise
@pytest.mark.parametrize("how", LAYOUTS)
def test_every_memory_layout(how: str, noise: str, dtype: torch.dtype) -> None:
    check(laid_out(make_problem(5, 3, batch=(3,), noise=noise, dtype=dtype), how))


@st.composite
def _problems(draw: st.DrawFn) -> Problem:
    full = draw(st.lists(st.integers(0, 3), max_size=3))
    n = len(full)

    def own() -> tuple[int, ...]:
        """Some dimensions made 1, leading ones dropped."""
        return tuple(draw(st.sampled_from((1, k))) for k in full)[draw(st.integers(0, n)) :]

    batch = {key: own() for key in ("Y", "M", "K", "noise")}
    kinds = ("generic", "rank_one_M", "rank_deficient", "zero_K", "rbf")
    p = make_problem(
        draw(st.integers(0, 7)),
        draw(st.integers(1, 10)),
        batch=batch,
        noise=draw(st.sampled_from(NOISES)),
        kind=draw(st.sampled_from(kinds)),
        dtype=draw(st.sampled_from((torch.float32, torch.float64))),
        seed=draw(st.integers(0, 99)),
    )
    hows = st.sampled_from(("contiguous", "transposed", "strided", "offset"))
    return from_leaves({key: relayout(x, draw(hows)) for key, x in leaves(p).items()})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(p=_problems())
def test_any_shape_batch_and_layout(p: Problem) -> None:
    check(p)


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
            small_nll(q.Y, q.M, q.K, q.noise.get("Sigma"), q.noise.get("log_noise"), True)


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


# ---------------------------------------------------------------- derivatives of the operator


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each time the likelihood takes the kernel, whether with gradients."""
    made: list[bool] = []

    def counted(*args: Any) -> Any:
        made.append(args[-1])
        return small_nll(*args)

    monkeypatch.setattr(likelihood, "small_nll", counted)
    return made


SHARED = {"Y": (3,), "M": (3,), "K": (), "noise": ()}


@each_noise
@pytest.mark.parametrize("batch", [(), (3,), (1, 2), (0,), SHARED], ids=str)
def test_gradients_through_the_likelihood(
    batch: Any, noise: str, dtype: torch.dtype, calls: list[bool]
) -> None:
    """Weighted, and summed where K and the noise are shared."""
    p = make_problem(5, 3, batch=batch, noise=noise, dtype=dtype)
    found = gradients(lambda q: (nll(q),), p)
    kappa, wanted = condition_number(p), gradients(lambda q: (dense(q),), double(p))
    for key, expected in wanted.items():
        dims = 1 if key == "log_noise" else 2
        check_close(found[key], expected, condition=kappa, quantity="gradient", dims=dims)
    assert calls == [True]


@each_noise
@pytest.mark.parametrize("rank", [None, 1])
def test_first_and_second_derivatives(noise: str, rank: int | None, calls: list[bool]) -> None:
    roots = make_roots(3, 2, rank=rank, noise=noise)
    f = lambda *r: nll(from_roots(*r, noise=noise))  # noqa: E731
    assert gradcheck(f, roots, check_forward_ad=True)
    assert gradgradcheck(f, roots, check_fwd_over_rev=True)
    assert calls


@each_noise
def test_hessian_products_where_arguments_are_shared(noise: str, calls: list[bool]) -> None:
    """With cotangents of the gradients in matrices that are not symmetric."""
    p = make_problem(4, 3, batch=SHARED, noise=noise)

    def product(f: Callable[[Problem], Tensor]) -> dict[str, Tensor]:
        values = {key: x.clone().requires_grad_() for key, x in leaves(p).items()}
        value = f(from_leaves(values))
        first = grad(value, list(values.values()), cotangents((value,))[0], create_graph=True)
        second = grad(first, list(values.values()), cotangents(first, 2))
        return dict(zip(values, second, strict=True))

    found, wanted = product(nll), product(dense)
    for key, expected in wanted.items():
        torch.testing.assert_close(found[key], expected, rtol=1e-10, atol=1e-10)
    assert calls == [True]


@pytest.mark.parametrize("key", ["Y", "M", "K", "Sigma"])
def test_second_derivative_in_one_argument(key: str, calls: list[bool]) -> None:
    p = make_problem(4, 3)

    def curvature(f: Callable[[Problem], Tensor]) -> Tensor:
        x = leaves(p)[key].clone().requires_grad_()
        (first,) = grad(f(from_leaves({**leaves(p), key: x})), x, create_graph=True)
        (second,) = grad(first.square().sum(), x)
        return second

    torch.testing.assert_close(curvature(nll), curvature(dense), rtol=1e-10, atol=1e-10)
    assert calls == [True]


@pytest.mark.parametrize("key", ["M", "K", "Sigma"])
def test_third_derivatives_are_refused(key: str) -> None:
    p = make_problem(3, 2)
    x = leaves(p)[key].clone().requires_grad_()
    (first,) = grad(nll(from_leaves({**leaves(p), key: x})), x, create_graph=True)
    (second,) = grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives"):
        grad(second.square().sum(), x)


def test_kernel_alone_refuses_derivatives() -> None:
    p = make_problem(3, 2)
    value = native(p._replace(Y=p.Y.requires_grad_()))[0]
    with pytest.raises(NotImplementedError, match=r"rules\.small\.small_nll"):
        value.backward()


# ---------------------------------------------------------------- when it is taken


@each_noise
def test_without_gradients_none_are_computed(noise: str, calls: list[bool]) -> None:
    p = make_problem(4, 3, batch=(2,), noise=noise)
    value, *found, status = native(p, gradients=False)
    assert all(g.shape == (0,) for g in found)
    assert torch.equal(value, native(p)[0])
    assert torch.equal(status, torch.zeros(2, dtype=torch.int64))
    nll(p)
    p.M.requires_grad_()
    with torch.no_grad():
        assert not nll(p).requires_grad
    with torch.inference_mode():
        nll(p)
    assert calls == [False] * 3


LARGEST = plan.costs(DEVICE.type).small_T
TAKEN = [(0, 1, ()), (1, 1, ()), (LARGEST, 16, ()), (LARGEST, 1, (2,)), (5, 3, (2, 3))]


@pytest.mark.parametrize(("T", "D", "batch"), TAKEN)
def test_taken(T: int, D: int, batch: tuple[int, ...], calls: list[bool]) -> None:
    p = make_problem(T, D, batch=batch)
    torch.testing.assert_close(nll(p), nll(p, method="spectral"))
    assert calls == [False]


def test_not_taken(calls: list[bool]) -> None:
    """Larger problems, M that several share, a constant or factorised M, a method asked for."""
    shared_M = make_problem(4, 3, batch={"Y": (2,), "M": (), "K": (), "noise": ()})
    many_K = make_problem(4, 3, batch={"Y": (), "M": (), "K": (2,), "noise": ()})
    for p in (make_problem(LARGEST + 1, 2), make_problem(5, 17), shared_M, many_K):
        torch.testing.assert_close(nll(p), dense(p))
    p = make_problem(4, 3)
    nll(p._replace(M=tk.symmetric_eigen(p.M)))  # type: ignore[arg-type]
    nll(p, method="cholesky")
    U = tk.KroneckerPlusNoise(p.M, p.K, **p.noise)
    U.logdet()
    likelihood.gaussian_nll(U, p.Y)
    assert calls == []


@each_noise
def test_transforms_take_the_general_operators(noise: str, calls: list[bool]) -> None:
    p = make_problem(4, 3, batch=(2,), noise=noise)
    values, keys = tuple(leaves(p).values()), list(leaves(p))

    def f(*x: Tensor) -> Tensor:
        return nll(from_leaves(dict(zip(keys, x, strict=True))))

    every, expected = (0, 1, 2, 3), nll(p, method="spectral")
    wanted = gradients(lambda q: (nll(q, method="spectral").sum(),), p)
    scale = cotangents((torch.zeros(()),))[0]
    wanted_list = [g / scale for g in wanted.values()]
    torch.testing.assert_close(torch.func.vmap(f)(*values), expected)
    found = torch.func.grad(lambda *x: f(*x).sum(), argnums=every)(*values)
    torch.testing.assert_close(list(found), wanted_list)
    mapped = torch.func.vmap(torch.func.grad(f, argnums=every))(*values)
    torch.testing.assert_close(list(mapped), wanted_list)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    leaves_ = [x.clone().requires_grad_() for x in values]
    torch.testing.assert_close(list(grad(compiled(*leaves_).sum(), leaves_)), wanted_list)
    with torch.autograd.forward_ad.dual_level():
        Y = torch.autograd.forward_ad.make_dual(p.Y, torch.ones_like(p.Y))
        tangent = torch.autograd.forward_ad.unpack_dual(nll(p._replace(Y=Y))).tangent
    torch.testing.assert_close(tangent, wanted_list[0].sum((-2, -1)))
    assert calls == []


# ---------------------------------------------------------------- the operators


@pytest.mark.parametrize(("batch", "noise"), [((), "diagonal"), (SHARED, "full")], ids=str)
@pytest.mark.parametrize("with_gradients", [True, False])
def test_opcheck(batch: Any, noise: str, with_gradients: bool) -> None:
    p = make_problem(3, 2, batch=batch, noise=noise)
    (form,) = p.noise.values()
    opcheck(ops.small_nll, (p.Y, p.M, p.K, form, noise == "full", with_gradients))
    for x in leaves(p).values():
        x.requires_grad_(with_gradients)
    pair = p.noise.get("Sigma"), p.noise.get("log_noise")
    opcheck(small_nll, (p.Y, p.M, p.K, *pair, with_gradients))


@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (1, None, None, 0), (None, 0, 2, None)])
def test_vmap_of_the_operator(in_dims: tuple[int | None, ...]) -> None:
    p = make_problem(4, 3, batch=(2,))
    args = [
        x if d is None else torch.stack([x, 2 * x, 3 * x], d)
        for x, d in zip(leaves(p).values(), in_dims, strict=True)
    ]
    mapped = torch.func.vmap(lambda *x: native(Problem(*x[:3], {"Sigma": x[3]})), in_dims)(*args)
    for b in range(3):
        one = [x if d is None else x.select(d, b) for x, d in zip(args, in_dims, strict=True)]
        alone = native(Problem(*one[:3], {"Sigma": one[3]}))
        assert all(torch.equal(x[b], y) for x, y in zip(mapped, alone, strict=True))


MISFITS: list[tuple[dict[str, tuple[int, ...]], bool]] = [
    ({"M": (4, 5)}, True),
    ({"K": (2, 2)}, True),
    ({"noise": (3, 2)}, True),
    ({"noise": (2,)}, False),
    ({"Y": (3,)}, True),
    ({"Y": (129, 3), "M": (129, 129)}, True),
    ({"Y": (4, 17), "K": (17, 17), "noise": (17,)}, False),
    ({"Y": (2, 4, 3), "M": (3, 4, 4)}, True),
]


@pytest.mark.parametrize(("shapes", "full"), MISFITS)
def test_direct_call_refuses_what_does_not_fit(
    shapes: dict[str, tuple[int, ...]], full: bool
) -> None:
    fitting = {"Y": (4, 3), "M": (4, 4), "K": (3, 3), "noise": (3, 3) if full else (3,)}
    with pytest.raises(RuntimeError, match="small_nll"):
        ops.small_nll(*(torch.ones(s) for s in {**fitting, **shapes}.values()), full, True)
    mixed = [torch.ones(s) for s in fitting.values()]
    with pytest.raises(RuntimeError, match="dtype"):
        ops.small_nll(mixed[0].double(), *mixed[1:], full, True)
