"""exp(Diag(d) A) v: value, gradients and Jacobian against 50 digits, scipy and closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import scipy.linalg  # type: ignore[import-untyped]
import torch
from devices import DEVICE, no_compiler, no_sparse, opcheck, to_numpy
from torch import Tensor
from torch.autograd import forward_ad

from torch_kronlik.expm import expm_diag_jacobian, expm_diag_multiply
from torch_kronlik.expm.degrees import THETA, THETA_PADE

METHODS = ("action", "dense")
ROUTES = METHODS if DEVICE.type == "emulated" else (*METHODS, "sparse")  # no sparse tensors there
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")

# Error relative to the largest entry. Data that are rounded to eps move exp(X) by about ‖X‖ eps,
# and both routes stay within a small multiple of that up to ‖X‖ = 100 for float64; the gradient is
# the product of two such vectors. float32 the same with its own eps.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-4}


def apply(route: str, d: Tensor, A: Tensor, v: Tensor) -> Tensor:
    if route == "sparse":
        return expm_diag_multiply(d, A.to_sparse_csr(), v)
    return expm_diag_multiply(d, A, v, method=route)


# ---------------------------------------------------------------- matrices

n = 7


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _jordan(value: float) -> Tensor:
    return value * torch.eye(n, dtype=torch.float64) + torch.diag(torch.ones(n - 1).double(), 1)


def _path() -> Tensor:
    off = torch.diag(torch.ones(n - 1).double(), 1)
    A = off + off.T
    return A - torch.diag(A.sum(0))


def _scaled(X: Tensor, norm: float) -> Tensor:
    return X * (norm / X.abs().sum(0).max())


MATRICES: dict[str, Callable[[], Tensor]] = {
    "random": lambda: _normal(n, n),
    "norm_100": lambda: _scaled(_normal(n, n), 100),
    "tiny": lambda: 1e-9 * _normal(n, n),
    "zero": lambda: torch.zeros(n, n).double(),
    "nilpotent": lambda: torch.triu(_normal(n, n), 1),
    "nilpotent_norm_100": lambda: _scaled(torch.triu(_normal(n, n), 1), 100),
    "defective": lambda: _jordan(-2.0),
    "defective_norm_100": lambda: _scaled(_jordan(1.0), 100),
    "skew_norm_100": lambda: _scaled((X := _normal(n, n)) - X.T, 100),
    "diffusion": _path,
    "stiff_diffusion": lambda: 25 * _path(),
    "positive_norm_100": lambda: _scaled(torch.rand(n, n).double(), 100),
    "nonnormal": lambda: -_jordan(1.0) + 20 * torch.triu(torch.rand(n, n).double(), 2),
    "one_large_row": lambda: torch.cat([80 * _normal(1, n) / n, 0.1 * _normal(n - 1, n)]),
    "rank_one": lambda: _normal(n, 1) @ _normal(1, n),
}


class Exact:
    """w, the gradients of ⟨g, w⟩ and the Jacobian at 50 digits, rounded once."""

    def __init__(self, d: Tensor, A: Tensor, v: Tensor, g: Tensor) -> None:
        with mpmath.workdps(50):
            dm, Am, vm, gm = (_exact(x) for x in (d, A, v, g))
            size = len(dm)
            X = dm[:, None] * Am
            E = np.outer(gm, vm)
            block = np.block([[X.T, E], [np.zeros_like(X), X.T]])
            power = mpmath.expm(mpmath.matrix(block.tolist()))
            both = np.array(power.tolist(), dtype=object).reshape(2 * size, 2 * size)
            F, G = both[:size, :size].T, both[:size, size:]
            self.w = _float64(F @ vm)
            self.grad_d = _float64((G * Am).sum(1))
            self.grad_A = _float64(dm[:, None] * G)
            self.grad_v = _float64(F.T @ gm)
            self.F = _float64(F)


def _exact(x: Tensor) -> Any:
    return np.vectorize(mpmath.mpf, otypes=[object])(to_numpy(x.double()))


def _float64(x: Any) -> Tensor:
    return torch.tensor(x.astype(np.float64))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, floor: float = 0.0) -> None:
    assert actual.shape == expected.shape
    error = (actual.detach().double() - expected).abs().max()
    scale = max(float(expected.abs().max()), floor)
    assert error <= tolerance * scale, f"error {error:.2e}, largest entry {scale:.2e}"


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", MATRICES)
def test_value_and_gradients_match_50_digits(name: str, route: str, dtype: torch.dtype) -> None:
    A = MATRICES[name]().to(dtype)
    d = (0.2 + 0.8 * torch.rand(n)).to(dtype)
    v, g = (_normal(n).to(dtype) for _ in range(2))
    exact = Exact(d, A, v, g)
    leaves = [x.clone().requires_grad_() for x in (d, A, v)]
    w = apply(route, *leaves)
    gd, gA, gv = torch.autograd.grad(w @ g, leaves)
    tolerance = TOLERANCE[dtype]
    # An entry of w may be a cancelling sum of terms of the size of exp(X) and v.
    floor = float(exact.F.abs().max())
    assert_near(w, exact.w, tolerance, floor)
    assert_near(gv, exact.grad_v, tolerance, floor)
    assert_near(gd, exact.grad_d, tolerance)
    assert_near(gA, exact.grad_A if route != "sparse" else exact.grad_A * (A != 0), tolerance)


@pytest.mark.parametrize("norm", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("size", [1, 2, 25, 60])
def test_matches_scipy_over_random_problems(size: int, norm: float) -> None:
    for _ in range(3):
        d, v, g = torch.randn(size).double(), _normal(size), _normal(size)
        A = _normal(size, size)
        A *= norm / (d[:, None] * A).abs().sum(0).max()
        X = to_numpy(d[:, None] * A)
        F, G = scipy.linalg.expm_frechet(X.T, np.outer(to_numpy(g), to_numpy(v)))
        expected = torch.tensor((G * to_numpy(A)).sum(1))
        for route in ROUTES:
            leaf = d.clone().requires_grad_()
            w = apply(route, leaf, A, v)
            (gd,) = torch.autograd.grad(w @ g, leaf)
            assert_near(w, torch.tensor(F.T) @ v, 1e-11, floor=float(abs(F).max()))
            assert_near(gd, expected, 1e-11)


def test_nilpotent_matrix_is_its_finite_series() -> None:
    d = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    A = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    v = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    expected = torch.tensor([1 + 2 * 10 + 0.5 * 6 * 100, 10 + 3 * 100, 100]).double()
    for method in METHODS:
        assert_near(expm_diag_multiply(d, A, v, method=method), expected, 1e-15)


@pytest.mark.parametrize("route", ROUTES)
def test_semigroup(route: str) -> None:
    d, A, v = torch.rand(n).double(), _normal(n, n), _normal(n)
    twice = apply(route, d, A, apply(route, d, A, v))
    assert_near(apply(route, 2 * d, A, v), twice, 1e-12)


def test_negative_spectrum_keeps_small_components() -> None:
    # Long Taylor steps would lose all digits here to cancellation.
    d = torch.arange(1.0, 41.0, 3.0, dtype=torch.float64)
    A = -torch.eye(len(d), dtype=torch.float64)
    for route in ROUTES:
        for k in range(len(d)):
            v = torch.eye(len(d), dtype=torch.float64)[k]
            assert_near(apply(route, d, A, v), torch.exp(-d) * v, 1e-11)


# ---------------------------------------------------------------- derivatives


def _small(size: int = 3) -> list[Tensor]:
    inputs = (torch.rand(size).double(), _normal(size, size), _normal(size))
    return [x.requires_grad_() for x in inputs]


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck_in_all_modes(method: str) -> None:
    def f(*x: Tensor) -> Tensor:
        return expm_diag_multiply(*x, method=method)

    modes = {
        "check_forward_ad": True,
        "check_batched_grad": True,
        "check_batched_forward_grad": True,
    }
    assert torch.autograd.gradcheck(f, _small(), **modes)
    assert torch.autograd.gradgradcheck(f, _small(), check_fwd_over_rev=True)


@no_sparse
def test_gradcheck_of_a_sparse_matrix_in_its_values() -> None:
    crow, col = torch.tensor([0, 2, 3, 5]), torch.tensor([0, 2, 1, 0, 2])

    def f(d: Tensor, values: Tensor, v: Tensor) -> Tensor:
        from torch_kronlik.expm.operators import expm_action

        w: Tensor = expm_action(d[None], values[None], v[None], crow, col, "auto")
        return w[0]

    inputs = [x.requires_grad_() for x in (torch.rand(3).double(), _normal(5), _normal(3))]
    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=True)


def test_gradcheck_with_broadcast_batches() -> None:
    shapes = [((2, 1, 2), (2, 2), (3, 2)), ((2,), (2, 2, 2), (2,)), ((2,), (2, 2), (2, 2))]
    for method in METHODS:
        for d, A, v in shapes:
            inputs = [_normal(*s).requires_grad_() for s in (d, A, v)]

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
    d, A, v = (x.detach() for x in _small())
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
    d, A, v = (x.detach() for x in _small())
    for transform in (torch.func.hessian, lambda f: torch.func.jacfwd(torch.func.jacfwd(f))):
        actual = transform(lambda d: expm_diag_multiply(d, A, v).square().sum())(d)
        expected = transform(lambda d: _series(d, A, v).square().sum())(d)
        torch.testing.assert_close(actual, expected)


def test_nested_dual_numbers() -> None:
    d, A, v = (x.detach() for x in _small())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(d, torch.ones_like(d))
        tangent = forward_ad.unpack_dual(expm_diag_multiply(dual, A, v)).tangent
    assert tangent is not None
    assert_near(tangent, expm_diag_jacobian(d, A, v).sum(1), 1e-13)


# ---------------------------------------------------------------- transforms and compilation


@pytest.mark.parametrize("route", ROUTES)
def test_vmap_is_a_loop(route: str) -> None:
    d, A, v, g = torch.rand(4, n).double(), _normal(n, n), _normal(n), _normal(n)
    if route == "sparse":
        A = A.to_sparse_csr()
    method = "auto" if route == "sparse" else route

    def gradient(d: Tensor) -> Tensor:
        return torch.func.grad(lambda d: expm_diag_multiply(d, A, v, method=method) @ g)(d)

    for f in (lambda d: expm_diag_multiply(d, A, v, method=method), gradient):
        assert_near(torch.func.vmap(f)(d), torch.stack([f(x) for x in d]), 1e-13)


def test_vmap_over_each_argument() -> None:
    d, A, v = torch.rand(3, n).double(), _normal(3, n, n), _normal(3, n)
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

    inputs = _small()
    expected = torch.autograd.grad(f(*inputs), inputs)
    actual = torch.autograd.grad(torch.compile(f, fullgraph=True)(*inputs), inputs)
    torch.testing.assert_close(actual, expected)


def test_opcheck() -> None:
    ops = torch.ops.torch_kronlik
    d, v, g = (_normal(2, 1, 3).requires_grad_() for _ in range(3))
    A = _normal(1, 3, 3).requires_grad_()
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
    d, A, v = torch.rand(n).double() + 0.2, MATRICES[name](), _normal(n)
    assert_near(expm_diag_jacobian(d, A, v), _khatri_rao_jacobian(d, A, v), 1e-11)


@no_sparse
def test_jacobian_of_a_sparse_matrix_and_of_batches() -> None:
    d, A, v = torch.rand(2, 1, n).double(), _normal(n, n), _normal(3, n)
    J = expm_diag_jacobian(d, A, v)
    assert J.shape == (2, 3, n, n)
    assert_near(J[1, 2], _khatri_rao_jacobian(d[1, 0], A, v[2]), 1e-11)
    assert_near(expm_diag_jacobian(d, A.to_sparse_csr(), v), J, 1e-13)


def test_jacobian_gradcheck() -> None:
    modes = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(expm_diag_jacobian, _small(), **modes)
    assert torch.autograd.gradgradcheck(expm_diag_jacobian, _small(2), check_fwd_over_rev=True)
    batched = [_normal(*s).requires_grad_() for s in ((2, 2), (2, 2), (3, 1, 2))]
    assert torch.autograd.gradcheck(expm_diag_jacobian, batched, check_forward_ad=True)


# ---------------------------------------------------------------- truncation


def _log_ratio_series(numerator: list[Any], denominator: list[Any], terms: int) -> list[Any]:
    """The series of log(p/q) − x, by p'/p and q'/q."""

    def log_derivative(p: list[Any]) -> list[Any]:
        p = p + [mpmath.mpf(0)] * (terms + 2 - len(p))
        out: list[Any] = []
        for k in range(terms):
            rest = mpmath.fsum(p[i] * out[k - i] for i in range(1, k + 1))
            out.append(((k + 1) * p[k + 1] - rest) / p[0])
        return out

    pairs = zip(log_derivative(numerator), log_derivative(denominator), strict=True)
    series = [mpmath.mpf(0)] + [(a - b) / (k + 1) for k, (a, b) in enumerate(pairs)]
    series[1] -= 1
    return series


def _backward_error(series: list[Any], first: int, theta: float) -> Any:
    """The largest of h̃/θ, h̃', θ h̃''/2 at θ."""
    t, terms = mpmath.mpf(theta), list(enumerate(series))[first:]
    return max(
        mpmath.fsum(mpmath.binomial(i, k) * abs(h) * t ** (i - 1) for i, h in terms)
        for k in range(3)
    )


def test_degrees_keep_the_truncation_below_the_rounding(dtype: torch.dtype) -> None:
    unit = torch.finfo(dtype).eps / 2
    with mpmath.workdps(60):
        for m, theta in THETA[dtype].items():
            taylor = [1 / mpmath.factorial(k) for k in range(m + 1)]
            series = _log_ratio_series(taylor, [mpmath.mpf(1)], m + 60)
            # Tight too: a larger θ of three digits would break the bound.
            assert _backward_error(series, m + 1, theta) <= 1.01 * unit
            assert _backward_error(series, m + 1, 1.01 * theta) > unit


def test_pade_degree_keeps_the_truncation_below_the_rounding() -> None:
    with mpmath.workdps(60):
        f = mpmath.factorial
        p = [f(26 - j) * f(13) / (f(26) * f(13 - j) * f(j)) for j in range(14)]
        series = _log_ratio_series(p, [x * (-1) ** j for j, x in enumerate(p)], 90)
        assert _backward_error(series, 27, THETA_PADE) <= 2**-53


# ---------------------------------------------------------------- sizes, strides, repeatability


def test_a_large_matrix_is_never_exponentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch_kronlik.expm.dense.exponential")
    size = 2000
    d, v = torch.rand(size).double().requires_grad_(), _normal(size)
    A = _normal(size, size) / size**0.5
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
    A = _jordan(1.0).to_sparse_csr().requires_grad_()
    d, v = torch.rand(n).double(), _normal(n)
    (gA,) = torch.autograd.grad(expm_diag_multiply(d, A, v).sum(), A)
    assert gA.layout == torch.sparse_csr
    dense = A.detach().to_dense().requires_grad_()
    (expected,) = torch.autograd.grad(expm_diag_multiply(d, dense, v).sum(), dense)
    assert_near(gA.to_dense(), expected * (dense != 0), 1e-13)


def test_strides_do_not_matter() -> None:
    d, A, v = torch.rand(2 * n).double()[::2], _normal(n, n).T, _normal(1).expand(n)
    for method in METHODS:
        plain = expm_diag_multiply(d.clone(), A.contiguous(), v.contiguous(), method=method)
        assert_near(expm_diag_multiply(d, A, v, method=method), plain, 1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_batch_elements_of_different_norms(method: str) -> None:
    d, A, v = torch.rand(n).double(), _normal(3, n, n), _normal(n)
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
        inputs = [_normal(*s).requires_grad_() for s in (d, A, v)]
        for method in METHODS:
            w = expm_diag_multiply(*inputs, method=method)
            assert w.shape == out
            for x, g in zip(inputs, torch.autograd.grad(w.sum(), inputs), strict=True):
                assert g.shape == x.shape
                assert not g.any()
        assert expm_diag_jacobian(*inputs).shape == (*out, out[-1])


@pytest.mark.parametrize("route", ROUTES)
def test_two_runs_agree_bit_for_bit(route: str) -> None:
    inputs = _small(20)
    first, second = (torch.autograd.grad(apply(route, *inputs).sum(), inputs) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- errors


@no_sparse
def test_arguments_are_checked() -> None:
    d, A, v = (x.detach() for x in _small())
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
        inputs = [x.detach().clone() for x in _small()]
        inputs[i][(1, 2)[: inputs[i].dim()]] = bad
        with pytest.raises(ValueError, match=f"^{name} must be finite, but {name}{index} is"):
            expm_diag_multiply(*inputs, method=method)
        with pytest.raises(ValueError, match=f"^{name} must be finite"):
            expm_diag_jacobian(*inputs)


@no_sparse
def test_numbers_that_are_not_finite_are_named_in_a_sparse_matrix() -> None:
    A = _jordan(1.0)
    A[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^A.values\(\) must be finite, but A.values\(\)\[0\]"):
        expm_diag_multiply(torch.ones(n).double(), A.to_sparse_csr(), torch.ones(n).double())


def test_a_result_beyond_the_range_is_an_error(dtype: torch.dtype) -> None:
    d = torch.full((2,), 800.0, dtype=dtype)
    A, v = torch.eye(2, dtype=dtype), torch.ones(2, dtype=dtype)
    for method in METHODS:
        with pytest.raises(OverflowError, match="exceeds the range of"):
            expm_diag_multiply(d, A, v, method=method)
