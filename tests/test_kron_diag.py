"""The fused Kronecker-plus-diagonal middle, against the formulas in float64 torch and mpmath."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from conftest import check_close
from devices import opcheck
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from torch_kronlik import ops
from torch_kronlik.ops import KronDiag, kron_diag


def expected(s: Tensor, lam: Tensor, Y: Tensor) -> KronDiag:
    """The definitions, in float64."""
    s, lam, Y = s.double()[..., :, None], lam.double()[..., None, :], Y.double()
    X = s * lam
    W = 1 / (1 + X)
    return KronDiag(
        Z=W * Y,
        logdet=X.log1p().sum((-2, -1)),
        inv_quad=(W * Y * Y).sum((-2, -1)),
        row_sum=(W * lam).sum(-1),
        col_sum_s=(W * s).sum(-2),
        col_sum_1=W.sum(-2),
    )


def check(actual: KronDiag, wanted: KronDiag) -> None:
    for name, dims in zip(KronDiag._fields, (2, 0, 0, 1, 1, 1), strict=True):
        check_close(getattr(actual, name), getattr(wanted, name), dims=dims)


def problem(T, D, *, batch=((), (), ()), dtype=torch.float64, device="cpu", scale=1.0):
    s = scale * torch.rand(*batch[0], T, dtype=dtype, device=device)
    lam = torch.rand(*batch[1], D, dtype=dtype, device=device)
    return s, lam, torch.randn(*batch[2], T, D, dtype=dtype, device=device)


@pytest.mark.parametrize("T", [0, 1, 5, 64, 65, 200])
@pytest.mark.parametrize("D", [1, 4, 8, 19])
def test_value(T, D, dtype, device):
    s, lam, Y = problem(T, D, dtype=dtype, device=device, scale=100.0)
    actual = kron_diag(s, lam, Y)
    check(actual, expected(s, lam, Y))
    assert all(t.dtype == dtype and t.is_contiguous() for t in actual)


BATCHES = [
    ((2,), (2,), (2,)),
    ((3, 1), (2,), ()),
    ((), (), (4,)),
    ((1,), (3,), (2, 1)),
    ((2, 1, 3), (1, 5, 1), (3,)),
    ((0,), (1,), ()),
    ((), (), (0,)),
]


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_batches_broadcast(batch, dtype, device):
    s, lam, Y = problem(7, 5, batch=batch, dtype=dtype, device=device)
    actual = kron_diag(s, lam, Y)
    check(actual, expected(s, lam, Y))
    joint = torch.broadcast_shapes(*batch[:2])
    assert actual.logdet.shape == joint, "the sums have the batch of s and lam, not of Y"


def test_strided_inputs_are_read_in_place(dtype, device):
    s = torch.rand(3, 80, dtype=dtype, device=device)[:, ::2].expand(2, 3, 40)
    lam = torch.rand(9, 3, dtype=dtype, device=device).mT
    for Y in (
        torch.randn(2, 3, 9, 40, dtype=dtype, device=device).mT,
        torch.randn(3, 2, 50, 12, dtype=dtype, device=device).transpose(0, 1)[..., 5:45, 1:10],
        torch.randn(3, 1, 9, dtype=dtype, device=device).expand(2, 3, 40, 9),
        torch.randn(40, 9, 2, 3, dtype=dtype, device=device).permute(2, 3, 0, 1),
    ):
        check(kron_diag(s, lam, Y), expected(s, lam, Y))


def test_without_data_only_the_sums(dtype, device):
    s, lam, Y = problem(6, 3, dtype=dtype, device=device)
    actual = kron_diag(s, lam)
    assert actual.Z.shape == actual.inv_quad.shape == (0,)
    assert actual.Z.dtype == dtype
    for name in ("logdet", "row_sum", "col_sum_s", "col_sum_1"):
        assert torch.equal(getattr(actual, name), getattr(kron_diag(s, lam, Y), name))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1.0, 1e6, 1e15])
def test_logdet_has_full_relative_accuracy(scale, dtype, device):
    """Against 50 digits. Products of 1 + s λ are grouped before the logarithm."""
    s, lam, _ = problem(150, 3, dtype=dtype, device=device, scale=scale)
    with mpmath.workdps(50):
        terms = (mpmath.log1p(mpmath.mpf(a) * b) for a in s.tolist() for b in lam.tolist())
        exact = mpmath.fsum(terms)
        found = mpmath.mpf(kron_diag(s, lam).logdet.item())
        error = abs(found - exact) / exact if exact else abs(found)
    # float32: one rounding at the end. float64: a product of up to 64 factors.
    assert error <= {torch.float32: 2.0**-24, torch.float64: 64 * 2.0**-53}[dtype]


def test_huge_eigenvalues_do_not_overflow(device):
    s = torch.tensor([1e300, 1e-300, 1e160, 0.0], dtype=torch.float64, device=device).repeat(50)
    lam = torch.tensor([1.0, 1e8, 0.0], dtype=torch.float64, device=device)
    check(
        kron_diag(s, lam, torch.ones(200, 3, dtype=s.dtype, device=device)),
        expected(s, lam, torch.ones(200, 3, dtype=s.dtype, device=device)),
    )


def test_large_float32_sums_are_rounded_once(device):
    """Ten thousand equal terms: a float32 sum would be off by hundreds of units."""
    T = 10_000
    s = torch.full((T,), 0.1, dtype=torch.float32, device=device)
    lam = torch.ones(1, dtype=torch.float32, device=device)
    Y = torch.ones(T, 1, dtype=torch.float32, device=device)
    x = s[0].double().item()
    actual = kron_diag(s, lam, Y)
    for found, exact in [
        (actual.logdet, T * math.log1p(x)),
        (actual.inv_quad, T / (1 + x)),
        (actual.col_sum_1, T / (1 + x)),
        (actual.col_sum_s, T * x / (1 + x)),
    ]:
        assert abs(found.item() - exact) <= 2.0**-24 * exact


@pytest.mark.parametrize("bad", [-1.0, -3.0, math.nan, math.inf])
def test_a_bad_eigenvalue_makes_logdet_not_finite(bad, dtype, device):
    s = torch.ones(100, dtype=dtype, device=device)
    # Twice, so that two negative factors cannot hide each other in a product.
    s[[70, 71]] = bad
    lam = torch.tensor([0.5, 1.0], dtype=dtype, device=device)
    assert not kron_diag(s, lam).logdet.isfinite()


def test_slightly_negative_eigenvalues_are_used_as_they_are(dtype, device):
    s, lam, Y = problem(90, 4, dtype=dtype, device=device)
    s[::7] *= -1e-3
    check(kron_diag(s, lam, Y), expected(s, lam, Y))


def test_result_does_not_depend_on_threads(dtype):
    s, lam, Y = problem(5000, 17, batch=((), (3, 1), (2,)), dtype=dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(kron_diag(s, lam, Y))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(0, 70),
    D=st.integers(1, 20),
    batch=st.lists(st.integers(0, 3), max_size=3),
    unit=st.lists(st.booleans(), min_size=9, max_size=9),
    exponent=st.integers(-20, 20),
)
def test_any_shape(T, D, batch, unit, exponent):
    """Each argument has some of the batch dimensions, and some of those of size one."""
    n = len(batch)
    own = [
        tuple(1 if unit[3 * i + d] else batch[d] for d in range(i % (n + 1), n)) for i in range(3)
    ]
    s, lam, Y = problem(T, D, batch=own, scale=10.0**exponent)
    check(kron_diag(s, lam, Y), expected(s, lam, Y))


OPS = {"sums": (ops.kron_diag_sums, 2), "scale": (ops.kron_diag_scale, 3)}


def inputs(name: str, device, *, grad: bool = True) -> tuple[Tensor, ...]:
    batch = ((2, 1), (3,), (1,))
    tensors = problem(3, 4, batch=batch, device=device)[: OPS[name][1]]
    return tuple(t.requires_grad_(grad) for t in tensors)


@pytest.mark.parametrize("name", OPS)
def test_derivatives_of_every_mode_and_order(name, device):
    op, _ = OPS[name]
    args = inputs(name, device)
    assert gradcheck(
        op, args, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert gradgradcheck(op, args, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("name", OPS)
def test_derivative_of_each_output_alone(name, device):
    """Outputs that get no cotangent are zeros, not errors, in the rules."""
    op, _ = OPS[name]
    args = inputs(name, device)
    for k in range(len(op(*args))):
        assert gradcheck(lambda *a, k=k: op(*a)[k], args, fast_mode=True, check_forward_ad=True)


@pytest.mark.parametrize("name", OPS)
def test_derivative_in_each_input_alone(name, device):
    op, count = OPS[name]
    for k in range(count):
        args = [a.requires_grad_(i == k) for i, a in enumerate(inputs(name, device, grad=False))]
        assert gradcheck(op, args, fast_mode=True, check_forward_ad=True)


def total(s: Tensor, lam: Tensor, Y: Tensor) -> Tensor:
    return torch.stack([out.square().sum() for out in kron_diag(s, lam, Y)]).sum()


def total_expected(s: Tensor, lam: Tensor, Y: Tensor) -> Tensor:
    return torch.stack([out.square().sum() for out in expected(s, lam, Y)]).sum()


def test_torch_func_transforms_compose(device):
    args = problem(3, 2, batch=((2,), (), (2,)), device=device)
    every = (0, 1, 2)
    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        actual = transform(total, argnums=every)(*args)
        wanted = transform(total_expected, argnums=every)(*args)
        for a, w in zip(_leaves(actual), _leaves(wanted), strict=True):
            check_close(a, w, quantity="gradient", dims=a.dim())


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 1, None), (None, None, 1), (0, 1, 2)])
def test_vmap_maps_some_arguments(in_dims, device):
    """Unmapped arguments have batch dimensions of their own; outputs keep theirs."""
    B = 3
    args = list(problem(5, 4, batch=((2,), (), (6, 1)), device=device))
    for i, dim in enumerate(in_dims):
        if dim is not None:
            args[i] = torch.rand(B, *args[i].shape, dtype=torch.float64, device=device)
            args[i] = args[i].movedim(0, dim)
    actual = torch.func.vmap(lambda *a: tuple(kron_diag(*a)), in_dims=in_dims)(*args)
    for b in range(B):
        one = [a if d is None else a.select(d, b) for a, d in zip(args, in_dims, strict=True)]
        check(KronDiag(*(out[b] for out in actual)), expected(*one))


def test_vmap_of_grad(device):
    s, lam, Y = problem(4, 3, batch=((5,), (), (5,)), device=device)
    every = (0, 1, 2)
    actual = torch.func.vmap(torch.func.grad(total, argnums=every), in_dims=(0, None, 0))(s, lam, Y)
    for b in range(5):
        wanted = torch.func.grad(total_expected, argnums=every)(s[b], lam, Y[b])
        for a, w in zip(actual, wanted, strict=True):
            check_close(a[b], w, quantity="gradient")


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, dtype, device):
    op, _ = OPS[name]
    args = [a.detach().to(dtype).requires_grad_() for a in inputs(name, device)]
    opcheck(op, tuple(args))


def test_compile_is_one_graph(device):
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    args = [a.requires_grad_() for a in problem(4, 3, device=device)]
    actual = torch.autograd.grad(compiled(*args), args)
    wanted = torch.autograd.grad(total_expected(*args), args)
    for a, w in zip(actual, wanted, strict=True):
        check_close(a, w, quantity="gradient")


def _leaves(tree: object) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for branch in tree for leaf in _leaves(branch)]  # type: ignore[attr-defined]
