"""block_diag_sum, block_diag and the adjoint I_p ⊗ S, against explicit loops over blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import check_close
from devices import opcheck
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import torch_kronlik as tk
from torch_kronlik import ops, reference


def loop(A: Tensor, p: int) -> Tensor:
    """The definition, in float64."""
    m, n = A.shape[-2] // p, A.shape[-1] // p
    total = torch.zeros(*A.shape[:-2], m, n, dtype=torch.float64, device=A.device)
    for k in range(p):
        total = total + A[..., k * m : (k + 1) * m, k * n : (k + 1) * n].double()
    return total


def expand_dense(S: Tensor, p: int) -> Tensor:
    """I_p ⊗ S."""
    m, n = S.shape[-2:]
    eye = torch.eye(p, dtype=S.dtype, device=S.device)
    return torch.einsum("kl,...ij->...kilj", eye, S).reshape(*S.shape[:-2], p * m, p * n)


SHAPES = [  # batch, p, m, n
    ((), 1, 1, 1),
    ((), 5, 3, 4),
    ((), 3, 1, 33),
    ((), 2, 40, 1),
    ((), 64, 2, 2),  # exactly one chunk of blocks
    ((), 131, 3, 2),  # two whole chunks and a rest
    ((), 3, 50, 41),  # more than one tile of rows
    ((2, 3), 4, 5, 7),
    ((2, 1, 3), 67, 2, 3),
]


@pytest.mark.parametrize(("batch", "p", "m", "n"), SHAPES)
def test_value(batch, p, m, n, dtype, device):
    A = torch.randn(*batch, p * m, p * n, dtype=dtype, device=device)
    out = tk.block_diag_sum(A, p)
    assert out.dtype == dtype
    assert out.is_contiguous()
    check_close(out, loop(A, p), floor=math.sqrt(p))
    check_close(out, reference.block_diag_sum(A.double(), p), floor=math.sqrt(p))


@pytest.mark.parametrize(("batch", "p", "m", "n"), SHAPES)
def test_transposed_input_gives_transposed_sum(batch, p, m, n, dtype, device):
    A = torch.randn(*batch, p * n, p * m, dtype=dtype, device=device).mT
    out = tk.block_diag_sum(A, p)
    assert out.is_contiguous()
    check_close(out, loop(A, p), floor=math.sqrt(p))


VIEWS = {
    "slice": lambda X: X[..., 1:13, 2:22],
    "step": lambda X: X[..., ::2, ::3][..., :12, :10],
    "batch permuted": lambda X: X.transpose(0, 1)[..., :12, :10],
    "batch last": lambda X: X.movedim(0, -1)[..., :12, :2],
    "expanded rows": lambda X: X[..., :1, :10].expand(2, 3, 12, 10),
    "expanded columns": lambda X: X[..., :12, :1].expand(2, 3, 12, 10),
    "expanded batch": lambda X: X[:1, :, :12, :10].expand(4, 3, 12, 10),
    "conjugate of real": lambda X: X[..., :12, :10].conj(),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strided_input_is_read_in_place(view, dtype, device):
    X = VIEWS[view](torch.randn(2, 3, 40, 36, dtype=dtype, device=device))
    A = X if X.shape[-2] % 2 == 0 and X.shape[-1] % 2 == 0 else X[..., :-1]
    check_close(tk.block_diag_sum(A, 2), loop(A, 2), floor=1.0)


@settings(max_examples=60, deadline=None)
@given(
    p=st.integers(1, 70),
    m=st.integers(0, 5),
    n=st.integers(0, 5),
    batch=st.lists(st.integers(0, 3), max_size=3),
    order=st.permutations(range(5)),
    offset=st.integers(0, 3),
)
def test_any_shape_and_any_strides(p, m, n, batch, order, offset):
    """Integer entries: every order of summation is exact, so the results are equal."""
    shape = (*batch, p * m + offset, p * n)
    axes = [a for a in order if a < len(shape)]
    storage = np.random.default_rng(0).integers(-9, 9, [shape[a] for a in axes]).astype(np.float64)
    A = torch.tensor(storage).permute(*np.argsort(axes).tolist())[..., offset:, :]
    assert torch.equal(tk.block_diag_sum(A, p), loop(A, p))


def test_only_the_diagonal_blocks_are_read(device):
    A = torch.full((12, 8), math.nan, dtype=torch.float64, device=device)
    for k in range(4):
        A[3 * k : 3 * k + 3, 2 * k : 2 * k + 2] = k
    assert torch.equal(tk.block_diag_sum(A, 4), torch.full_like(A[:3, :2], 6))


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 4), (3, 4, 0), (0, 0), (2, 0, 0)])
def test_empty_input(shape, dtype, device):
    A = torch.zeros(shape, dtype=dtype, device=device)
    out = tk.block_diag_sum(A, 2)
    assert out.shape == (*shape[:-2], shape[-2] // 2, shape[-1] // 2)
    assert ops.block_diag_expand(out, 2).shape == shape


def test_float32_is_rounded_once(device):
    """2¹⁴ times 1 + 2⁻²³ is exact in float64; a float32 sum loses the small part."""
    p = 2**14
    A = torch.tensor(1 + 2.0**-23, dtype=torch.float32, device=device).expand(p, p)
    assert tk.block_diag_sum(A, p).item() == p * (1 + 2.0**-23)


def test_float64_sum_of_many_blocks_is_accurate(device):
    A = torch.full((), 0.1, dtype=torch.float64, device=device).expand(20000, 20000)
    exact = math.fsum([0.1] * 20000)
    # Sums of 64, then of 313 chunks: the error of plain summation would grow with 20000.
    assert abs(tk.block_diag_sum(A, 20000).item() - exact) <= 64 * 2.0**-53 * exact


@pytest.mark.parametrize("transpose", [False, True])
def test_result_does_not_depend_on_threads(transpose, dtype):
    A = torch.randn(3, 200 * 16, 200 * 16, dtype=dtype)
    A = A.mT if transpose else A
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(tk.block_diag_sum(A, 200))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(("batch", "p", "m", "n"), SHAPES)
def test_expand_value(batch, p, m, n, dtype, device):
    S = torch.randn(*batch, n, m, dtype=dtype, device=device).mT
    out = ops.block_diag_expand(S, p)
    assert out.is_contiguous()
    assert torch.equal(out, expand_dense(S, p))


def test_sum_and_expand_are_adjoint(device):
    A = torch.randn(2, 15, 20, dtype=torch.float64, device=device)
    S = torch.randn(2, 3, 4, dtype=torch.float64, device=device)
    left = (tk.block_diag_sum(A, 5) * S).sum()
    check_close(left, (A * ops.block_diag_expand(S, 5)).sum(), dims=0, floor=10.0)


OPS = {
    "sum": (ops.block_diag_sum, (2, 6, 9)),
    "expand": (ops.block_diag_expand, (2, 3, 2)),
}


@pytest.mark.parametrize("name", OPS)
def test_derivatives_of_every_mode_and_order(name, device):
    op, shape = OPS[name]
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return op(x, 3)

    def cube(x: Tensor) -> Tensor:
        return op(x**3, 3)

    everything = {"check_batched_grad": True, "fast_mode": False}
    assert gradcheck(f, x, check_forward_ad=True, check_batched_forward_grad=True, **everything)
    assert gradgradcheck(cube, x, check_fwd_over_rev=True, check_rev_over_rev=True, **everything)


@pytest.mark.parametrize("name", OPS)
def test_torch_func_transforms_compose(name, device):
    op, shape = OPS[name]
    x = torch.randn(shape, dtype=torch.float64, device=device)

    def f(x: Tensor) -> Tensor:
        return op(x.square(), 3).pow(2).sum()

    def plain(x: Tensor) -> Tensor:
        out = loop(x.square(), 3) if name == "sum" else expand_dense(x.square(), 3)
        return out.pow(2).sum()

    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        check_close(transform(f)(x), transform(plain)(x))
    per_matrix = torch.func.vmap(torch.func.grad(f))
    check_close(per_matrix(x), torch.func.vmap(torch.func.grad(plain))(x))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_vmap_over_any_dimension(dim, device):
    A = torch.randn(4, 6, 8, dtype=torch.float64, device=device).movedim(0, dim)
    out = torch.func.vmap(lambda a: tk.block_diag_sum(a, 2), in_dims=dim)(A)
    check_close(out, loop(A.movedim(dim, 0), 2))


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, dtype, device):
    op, shape = OPS[name]
    x = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    opcheck(op, (x, 3))
    opcheck(op, (x.detach().mT, 1))


def test_compile_is_one_graph(device):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(A: Tensor) -> Tensor:
        return tk.block_diag_sum(A.square(), 3).sin()

    A = torch.randn(6, 9, dtype=torch.float64, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(f(A).sum(), A)
    (expected,) = torch.autograd.grad(loop(A.square(), 3).sin().sum(), A)
    check_close(grad, expected)


def test_block_diag_is_a_view_of_each_block(dtype, device):
    A = torch.randn(2, 6, 8, dtype=dtype, device=device)
    blocks = [tk.block_diag(A, k, 2) for k in range(2)]
    assert torch.equal(blocks[1], A[:, 3:, 4:])
    assert torch.equal(blocks[0], A[:, :3, :4])
    assert blocks[1].untyped_storage().data_ptr() == A.untyped_storage().data_ptr()
    for k in range(2):
        assert torch.equal(blocks[k], reference.block_diag(A, k, 2))


def test_numpy_integers_are_integers(device):
    A = torch.eye(4, device=device)
    assert torch.equal(tk.block_diag_sum(A, np.int64(2)), 2 * torch.eye(2, device=device))
    assert torch.equal(tk.block_diag(A, np.int64(1), 2), torch.eye(2, device=device))


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((np.eye(4), 2), TypeError, "A must be a tensor, got ndarray"),
        ((torch.eye(4, dtype=torch.int64), 2), TypeError, "A must be float32 or float64, got .*64"),
        ((torch.eye(4, dtype=torch.float16), 2), TypeError, "A must be .*, got torch.float16"),
        ((torch.eye(4), 2.0), TypeError, "num_blocks must be an integer, got float"),
        ((torch.eye(4), True), TypeError, "num_blocks must be an integer, got bool"),
        ((torch.eye(4), 0), ValueError, "num_blocks must be at least 1, got 0"),
        ((torch.eye(4), -2), ValueError, "num_blocks must be at least 1, got -2"),
        ((torch.ones(4), 2), ValueError, r"A must have shape \(\*batch, .*\), got \(4,\)"),
        ((torch.eye(4), 3), ValueError, "A must be divisible into num_blocks = 3 .* got 4 x 4"),
        ((torch.ones(4, 6), 4), ValueError, "A must be divisible .* got 4 x 6"),
    ],
)
def test_errors_name_the_argument(args, error, message):
    with pytest.raises(error, match=message):
        tk.block_diag_sum(*args)
    with pytest.raises(error, match=message):
        tk.block_diag(args[0], 0, args[1])


def test_block_diag_index_errors():
    with pytest.raises(ValueError, match="k must satisfy 0 <= k < num_blocks = 2, got 2"):
        tk.block_diag(torch.eye(4), 2, 2)
    with pytest.raises(ValueError, match="k must satisfy 0 <= k < num_blocks = 2, got -1"):
        tk.block_diag(torch.eye(4), -1, 2)
    with pytest.raises(TypeError, match="k must be an integer, got float"):
        tk.block_diag(torch.eye(4), 1.0, 2)
