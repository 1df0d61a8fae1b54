"""Inputs of exp(Diag(d) A) v: sizes, strides and batches, the same bits again, and errors."""

from __future__ import annotations

import pytest
import torch
from devices import DEVICE, no_sparse
from expm_problems import METHODS, ROUTES, apply, assert_near, jordan, n, normal, small_inputs

from torch_kronlik.expm import expm_diag_jacobian, expm_diag_multiply

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")


# ---------------------------------------------------------------- sizes, strides, repeatability


def test_a_large_matrix_is_never_exponentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch_kronlik.expm.dense.exponential")
    size = 2000
    d, v = torch.rand(size).double().requires_grad_(), normal(size)
    A = normal(size, size) / size**0.5
    (gd,) = torch.autograd.grad(expm_diag_multiply(d, A, v).sum(), d)
    step = 1e-6 * torch.randn(size).double()
    with torch.no_grad():
        ahead, behind = (expm_diag_multiply(d + s * step, A, v).sum() for s in (1, -1))
    torch.testing.assert_close(2 * (gd @ step), ahead - behind, rtol=1e-5, atol=0)


@no_sparse
def test_a_sparse_matrix_too_large_to_be_dense() -> None:
    size = 100_000  # 80 GB as a dense matrix
    i = torch.arange(size)
    crow = torch.arange(size + 1)
    A = torch.sparse_csr_tensor(
        crow, (i + 1) % size, torch.ones(size).double(), (size, size), check_invariants=True
    )
    d = torch.full((size,), 2.0, dtype=torch.float64, requires_grad=True)
    w = expm_diag_multiply(d, A, torch.ones(size).double())
    assert_near(w, torch.full((size,), torch.e**2, dtype=torch.float64), 1e-14)
    (gd,) = torch.autograd.grad(w.sum(), d)
    assert_near(gd, torch.full((size,), torch.e**2, dtype=torch.float64), 1e-13)


@no_sparse
def test_gradient_of_a_sparse_matrix_is_sparse() -> None:
    A = jordan(1.0).to_sparse_csr().requires_grad_()
    d, v = torch.rand(n).double(), normal(n)
    (gA,) = torch.autograd.grad(expm_diag_multiply(d, A, v).sum(), A)
    assert gA.layout == torch.sparse_csr
    dense = A.detach().to_dense().requires_grad_()
    (expected,) = torch.autograd.grad(expm_diag_multiply(d, dense, v).sum(), dense)
    assert_near(gA.to_dense(), expected * (dense != 0), 1e-13)


def test_strides_do_not_matter() -> None:
    d, A, v = torch.rand(2 * n).double()[::2], normal(n, n).T, normal(1).expand(n)
    for method in METHODS:
        plain = expm_diag_multiply(d.clone(), A.contiguous(), v.contiguous(), method=method)
        assert_near(expm_diag_multiply(d, A, v, method=method), plain, 1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_batch_elements_of_different_norms(method: str) -> None:
    d, A, v = torch.rand(n).double(), normal(3, n, n), normal(n)
    A = A * torch.tensor([1e-6, 1.0, 30.0])[:, None, None]
    each = torch.stack([expm_diag_multiply(d, B, v) for B in A])
    for actual, expected in zip(expm_diag_multiply(d, A, v, method=method), each, strict=True):
        assert_near(actual, expected, 1e-12)


def test_empty_inputs() -> None:
    for d, A, v, out in (
        ((0,), (0, 0), (0,), (0,)),
        ((2, 0), (0, 0), (0,), (2, 0)),
        ((0, 3), (3, 3), (3,), (0, 3)),
        ((3,), (3, 3), (0, 3), (0, 3)),
    ):
        inputs = [normal(*s).requires_grad_() for s in (d, A, v)]
        for method in METHODS:
            w = expm_diag_multiply(*inputs, method=method)
            assert w.shape == out
            for x, g in zip(inputs, torch.autograd.grad(w.sum(), inputs), strict=True):
                assert g.shape == x.shape
                assert not g.any()
        assert expm_diag_jacobian(*inputs).shape == (*out, out[-1])


@pytest.mark.parametrize("route", ROUTES)
def test_two_runs_agree_bit_for_bit(route: str) -> None:
    if route == "sparse" and DEVICE.type == "cuda":
        pytest.skip("cuSPARSE promises no order of summation")
    inputs = small_inputs(20)
    first, second = (torch.autograd.grad(apply(route, *inputs).sum(), inputs) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- errors


@no_sparse
def test_arguments_are_checked() -> None:
    d, A, v = (x.detach() for x in small_inputs())
    for f in (expm_diag_multiply, expm_diag_jacobian):
        with pytest.raises(TypeError, match="d must be a tensor, got list"):
            f([1.0], A, v)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"v must be float32 or float64, got torch\.int64"):
            f(d, A, v.long())
        with pytest.raises(TypeError, match=r"d must have the dtype of A, torch\.float64, got"):
            f(d.float(), A, v)
        with pytest.raises(ValueError, match=r"A must have shape \(\*batch, n, n\), got \(3, 2\)"):
            f(d, A[:, :2], v)
        with pytest.raises(ValueError, match=r"v must have shape \(\*batch, 3\) .* got \(2,\)"):
            f(d, A, v[:2])
        with pytest.raises(ValueError, match=r"do not broadcast: d \(2,\), A \(3,\), v \(\)"):
            f(d.expand(2, 3), A.expand(3, 3, 3), v)
        with pytest.raises(TypeError, match="A must be a dense or a sparse CSR tensor"):
            f(d, A.to_sparse_coo(), v)
        with pytest.raises(ValueError, match=f"d must be on the device of A, {A.device}, got meta"):
            f(d.to("meta"), A, v)
    with pytest.raises(ValueError, match="method must be one of"):
        expm_diag_multiply(d, A, v, method="fast")
    with pytest.raises(ValueError, match="needs a dense A"):
        expm_diag_multiply(d, A.to_sparse_csr(), v, method="dense")
    with pytest.raises(ValueError, match=r"a sparse A must have shape \(n, n\)"):
        expm_diag_multiply(d, A.expand(2, 3, 3).to_sparse_csr(), v)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_numbers_that_are_not_finite_are_named(bad: float, method: str) -> None:
    for i, (name, index) in enumerate((("d", r"\[1\]"), ("A", r"\[1, 2\]"), ("v", r"\[1\]"))):
        inputs = [x.detach().clone() for x in small_inputs()]
        inputs[i][(1, 2)[: inputs[i].dim()]] = bad
        with pytest.raises(ValueError, match=f"^{name} must be finite, but {name}{index} is"):
            expm_diag_multiply(*inputs, method=method)
        with pytest.raises(ValueError, match=f"^{name} must be finite"):
            expm_diag_jacobian(*inputs)


@no_sparse
def test_numbers_that_are_not_finite_are_named_in_a_sparse_matrix() -> None:
    A = jordan(1.0)
    A[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^A.values\(\) must be finite, but A.values\(\)\[0\]"):
        expm_diag_multiply(torch.ones(n).double(), A.to_sparse_csr(), torch.ones(n).double())


def test_a_result_beyond_the_range_is_an_error(dtype: torch.dtype) -> None:
    d = torch.full((2,), 800.0, dtype=dtype)
    A, v = torch.eye(2, dtype=dtype), torch.ones(2, dtype=dtype)
    for method in METHODS:
        with pytest.raises(OverflowError, match="exceeds the range of"):
            expm_diag_multiply(d, A, v, method=method)
