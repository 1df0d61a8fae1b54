"""Derivatives of exp(Diag(d) A) v: all modes and orders, transforms, the compiler, the Jacobian."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg  # type: ignore[import-untyped]
import torch
from devices import no_compiler, no_sparse, opcheck, to_numpy
from expm_problems import MATRICES, METHODS, ROUTES, assert_near, n, normal, small_inputs
from torch import Tensor
from torch.autograd import forward_ad

from torch_kronlik.expm import expm_diag_jacobian, expm_diag_multiply

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")


# ---------------------------------------------------------------- derivatives


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck_in_all_modes(method: str) -> None:
    def f(*x: Tensor) -> Tensor:
        return expm_diag_multiply(*x, method=method)

    modes = {
        "check_forward_ad": True,
        "check_batched_grad": True,
        "check_batched_forward_grad": True,
    }
    assert torch.autograd.gradcheck(f, small_inputs(), **modes)
    assert torch.autograd.gradgradcheck(f, small_inputs(), check_fwd_over_rev=True)


@no_sparse
def test_gradcheck_of_a_sparse_matrix_in_its_values() -> None:
    crow, col = torch.tensor([0, 2, 3, 5]), torch.tensor([0, 2, 1, 0, 2])

    def f(d: Tensor, values: Tensor, v: Tensor) -> Tensor:
        from torch_kronlik.expm.operators import expm_action

        w: Tensor = expm_action(d[None], values[None], v[None], crow, col, "auto")
        return w[0]

    inputs = [x.requires_grad_() for x in (torch.rand(3).double(), normal(5), normal(3))]
    repeated = {"nondet_tol": 1e-14}  # cuSPARSE promises no order of summation
    assert torch.autograd.gradcheck(
        f, inputs, check_forward_ad=True, check_batched_grad=True, **repeated
    )
    assert torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=True, **repeated)


def test_gradcheck_with_broadcast_batches() -> None:
    shapes = [((2, 1, 2), (2, 2), (3, 2)), ((2,), (2, 2, 2), (2,)), ((2,), (2, 2), (2, 2))]
    for method in METHODS:
        for d, A, v in shapes:
            inputs = [normal(*s).requires_grad_() for s in (d, A, v)]

            def f(*x: Tensor, method: str = method) -> Tensor:
                return expm_diag_multiply(*x, method=method)

            assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True)
            assert torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=True)


def _series(d: Tensor, A: Tensor, v: Tensor) -> Tensor:
    """The plain Taylor series, which autograd differentiates to any order."""
    w = b = v
    for j in range(1, 40):
        b = d * (A @ b) / j
        w = w + b
    return w


@pytest.mark.parametrize("method", METHODS)
def test_third_derivatives(method: str) -> None:
    d, A, v = (x.detach() for x in small_inputs())
    jacrev, jacfwd = torch.func.jacrev, torch.func.jacfwd

    def f(d: Tensor, A: Tensor) -> Tensor:
        return expm_diag_multiply(d, A, v, method=method)

    def expected(d: Tensor, A: Tensor) -> Tensor:
        return _series(d, A, v)

    for first in (jacrev, jacfwd):
        for second in (jacrev, jacfwd):
            for third in (jacrev, jacfwd):
                actual = first(second(third(f), 1), 0)(d, A)
                torch.testing.assert_close(actual, first(second(third(expected), 1), 0)(d, A))


def test_torch_func_agrees_with_the_plain_series() -> None:
    d, A, v = (x.detach() for x in small_inputs())
    for transform in (torch.func.hessian, lambda f: torch.func.jacfwd(torch.func.jacfwd(f))):
        actual = transform(lambda d: expm_diag_multiply(d, A, v).square().sum())(d)
        expected = transform(lambda d: _series(d, A, v).square().sum())(d)
        torch.testing.assert_close(actual, expected)


def test_nested_dual_numbers() -> None:
    d, A, v = (x.detach() for x in small_inputs())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(d, torch.ones_like(d))
        tangent = forward_ad.unpack_dual(expm_diag_multiply(dual, A, v)).tangent
    assert tangent is not None
    assert_near(tangent, expm_diag_jacobian(d, A, v).sum(1), 1e-13)


# ---------------------------------------------------------------- transforms and compilation


@pytest.mark.parametrize("route", ROUTES)
def test_vmap_is_a_loop(route: str) -> None:
    d, A, v, g = torch.rand(4, n).double(), normal(n, n), normal(n), normal(n)
    if route == "sparse":
        A = A.to_sparse_csr()
    method = "auto" if route == "sparse" else route

    def gradient(d: Tensor) -> Tensor:
        return torch.func.grad(lambda d: expm_diag_multiply(d, A, v, method=method) @ g)(d)

    for f in (lambda d: expm_diag_multiply(d, A, v, method=method), gradient):
        assert_near(torch.func.vmap(f)(d), torch.stack([f(x) for x in d]), 1e-13)


def test_vmap_over_each_argument() -> None:
    d, A, v = torch.rand(3, n).double(), normal(3, n, n), normal(3, n)
    whole = expm_diag_multiply(d, A, v)
    assert_near(torch.func.vmap(expm_diag_multiply)(d, A, v), whole, 1e-13)
    shared = torch.func.vmap(expm_diag_multiply, in_dims=(None, 0, None))(d[0], A, v[0])
    assert_near(shared, expm_diag_multiply(d[0], A, v[0]), 1e-13)


# torch's own, on tracing
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch._prims_common.check.*:FutureWarning")
@no_compiler
def test_compiles_as_one_graph() -> None:
    def f(d: Tensor, A: Tensor, v: Tensor) -> Tensor:
        return expm_diag_multiply(d, A, v).square().sum() + expm_diag_jacobian(d, A, v).sum()

    inputs = small_inputs()
    expected = torch.autograd.grad(f(*inputs), inputs)
    actual = torch.autograd.grad(torch.compile(f, fullgraph=True)(*inputs), inputs)
    torch.testing.assert_close(actual, expected)


def test_opcheck() -> None:
    ops = torch.ops.torch_kronlik
    d, v, g = (normal(2, 1, 3).requires_grad_() for _ in range(3))
    A = normal(1, 3, 3).requires_grad_()
    one = [x.detach().requires_grad_() for x in (d[0, 0], A[0], v[0, 0])]
    opcheck(ops.expm_action, (d, A, v, None, None, "auto"))
    arguments = (g, d, A, v, None, None, "auto")
    opcheck(ops.expm_gradient, (*arguments, (2,), (), None))
    opcheck(ops.expm_jacobian, tuple(one))


# ---------------------------------------------------------------- Jacobian


def _khatri_rao_jacobian(d: Tensor, A: Tensor, v: Tensor) -> Tensor:
    """(vᵀ ⊗ I) (∂vec F/∂vec X) (Aᵀ ⊠ I), with matrices of size 2n²."""
    size = len(d)
    X, eye = to_numpy(d[:, None] * A), np.eye(size)
    zeros, one = np.zeros((size**2, size**2)), np.eye(size**2)
    block = np.block([[np.kron(X.T, eye), one], [zeros, np.kron(eye, X)]])
    dF = scipy.linalg.expm(block)[: size**2, size**2 :]
    khatri_rao = scipy.linalg.khatri_rao(to_numpy(A).T, eye)
    return torch.tensor(np.kron(to_numpy(v), eye) @ dF @ khatri_rao)


@pytest.mark.parametrize("name", MATRICES)
def test_jacobian_is_the_khatri_rao_formula(name: str) -> None:
    d, A, v = torch.rand(n).double() + 0.2, MATRICES[name](), normal(n)
    assert_near(expm_diag_jacobian(d, A, v), _khatri_rao_jacobian(d, A, v), 1e-11)


@no_sparse
def test_jacobian_of_a_sparse_matrix_and_of_batches() -> None:
    d, A, v = torch.rand(2, 1, n).double(), normal(n, n), normal(3, n)
    J = expm_diag_jacobian(d, A, v)
    assert J.shape == (2, 3, n, n)
    assert_near(J[1, 2], _khatri_rao_jacobian(d[1, 0], A, v[2]), 1e-11)
    assert_near(expm_diag_jacobian(d, A.to_sparse_csr(), v), J, 1e-13)


def test_jacobian_gradcheck() -> None:
    modes = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(expm_diag_jacobian, small_inputs(), **modes)
    assert torch.autograd.gradgradcheck(
        expm_diag_jacobian, small_inputs(2), check_fwd_over_rev=True
    )
    batched = [normal(*s).requires_grad_() for s in ((2, 2), (2, 2), (3, 1, 2))]
    assert torch.autograd.gradcheck(expm_diag_jacobian, batched, check_forward_ad=True)
