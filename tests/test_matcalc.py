"""The rules of matrix calculus: each identity on random matrices, batches included."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg  # type: ignore[import-untyped]
import torch
from devices import to_numpy
from torch import Tensor

from torch_kronlik import matcalc as mc

f64 = torch.float64


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=f64)


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- vec


def test_vec_stacks_columns_as_numpy_does_in_fortran_order() -> None:
    A = normal(3, 4)
    same(mc.vec(A), torch.tensor(to_numpy(A).flatten(order="F")))
    same(mc.unvec(mc.vec(A), 3), A)


def test_vec_takes_batches_and_empty_matrices() -> None:
    A = normal(2, 5, 3, 4)
    same(mc.vec(A)[1, 2], mc.vec(A[1, 2]))
    same(mc.unvec(mc.vec(A), 3), A)
    assert mc.vec(normal(2, 0, 4)).shape == (2, 0)


def test_vec_of_a_product() -> None:
    A, X, B = normal(2, 3), normal(3, 4), normal(4, 5)
    same(mc.vec(A @ X @ B), mc.kron(B.T, A) @ mc.vec(X))


def test_vech_and_duplication_matrix() -> None:
    for n in (0, 1, 2, 5):
        S = normal(2, n, n)
        S = S + S.mT
        D = mc.duplication_matrix(n, dtype=f64)
        same(torch.einsum("ij,bj->bi", D, mc.vech(S)), mc.vec(S))
        same(mc.unvech(mc.vech(S)), S)
        rows, columns = np.triu_indices(n)
        assert mc.vech(S).tolist() == to_numpy(S)[:, columns, rows].tolist()


@pytest.mark.parametrize(("m", "n"), [(2, 3), (3, 3), (1, 4), (4, 1), (0, 2)])
def test_commutation_matrix(m: int, n: int) -> None:
    A, C = normal(m, n), mc.commutation_matrix(m, n, dtype=f64)
    same(C @ mc.vec(A), mc.vec(A.T))
    same(C.T @ C, torch.eye(m * n, dtype=f64))
    same(C.T, mc.commutation_matrix(n, m, dtype=f64))


def test_commutation_matrix_is_the_textbook_sum_and_swaps_kronecker_factors() -> None:
    m, n, p, q = 2, 3, 4, 5
    textbook = torch.zeros(m * n, m * n, dtype=f64)
    for i in range(m):
        for j in range(n):
            E = torch.zeros(m, n, dtype=f64)
            E[i, j] = 1
            textbook += torch.kron(E, E.T.contiguous())
    same(mc.commutation_matrix(m, n, dtype=f64), textbook)
    A, B = normal(m, n), normal(p, q)
    left, right = (mc.commutation_matrix(*x, dtype=f64) for x in ((p, m), (n, q)))
    same(left @ mc.kron(A, B) @ right, mc.kron(B, A))


def test_kron_identity_matrix() -> None:
    for p, n in ((3, 2), (1, 3), (4, 1), (0, 2)):
        S, N = normal(n, n), mc.kron_identity_matrix(p, n, dtype=f64)
        same(N @ mc.vec(S), mc.vec(mc.kron(torch.eye(p, dtype=f64), S)))
        A = normal(p * n, p * n)
        if p:
            same(N.T @ mc.vec(A), mc.vec(mc.partial_trace(A, p)))


def test_the_tempting_formula_has_the_same_rows_in_another_order() -> None:
    p, n = 3, 2
    N = mc.kron_identity_matrix(p, n, dtype=f64)
    tempting = torch.kron(mc.vec(torch.eye(p, dtype=f64))[:, None], torch.eye(n * n, dtype=f64))
    assert tempting.shape == N.shape
    assert not torch.equal(tempting, N)
    assert sorted(tempting.tolist()) == sorted(N.tolist())


# ---------------------------------------------------------------- products and blocks


def test_kron_against_torch_and_its_identities() -> None:
    A, B, C, D = normal(2, 3), normal(4, 5), normal(3, 2), normal(5, 3)
    same(mc.kron(A, B), torch.kron(A, B))
    same(mc.kron(A, B) @ mc.kron(C, D), mc.kron(A @ C, B @ D))
    same(mc.kron(A.T, B.T), mc.kron(A, B).T)
    X, Y = normal(3, 3), normal(2, 2)
    same(torch.det(mc.kron(X, Y)), torch.det(X) ** 2 * torch.det(Y) ** 3)
    batch = mc.kron(normal(2, 1, 2, 2), normal(3, 2, 2))
    assert batch.shape == (2, 3, 4, 4)


def test_khatri_rao_against_scipy_and_its_identities() -> None:
    A, B, x = normal(3, 4), normal(2, 4), normal(4)
    expected = torch.tensor(scipy.linalg.khatri_rao(to_numpy(A), to_numpy(B)))
    same(mc.khatri_rao(A, B), expected)
    K = mc.khatri_rao(A, B)
    same(K.T @ K, (A.T @ A) * (B.T @ B))
    same(mc.vec(B @ torch.diag(x) @ A.T), K @ x)
    same(mc.khatri_rao(A.expand(2, 3, 4), B)[1], K)


def test_blocks_are_views() -> None:
    A = normal(2, 6, 9)
    blocks = mc.block_view(A, 3)
    assert blocks.shape == (2, 3, 3, 2, 3)
    same(blocks[1, 2, 0], A[1, 4:6, 0:3])
    same(mc.diagonal_blocks(A, 3)[1, 2], A[1, 4:6, 6:9])
    for view in (blocks, mc.diagonal_blocks(A, 3)):
        assert view.untyped_storage().data_ptr() == A.untyped_storage().data_ptr()
    mc.diagonal_blocks(A, 3)[0, 1].fill_(7)
    assert (A[0, 2:4, 3:6] == 7).all()


def test_partial_traces() -> None:
    p, m = 3, 4
    B, C, S, R = normal(p, p), normal(m, m), normal(m, m), normal(p, p)
    same(mc.partial_trace(mc.kron(B, C), p), B.trace() * C)
    same(mc.partial_trace(mc.kron(B, C), p, factor=1), C.trace() * B)
    A = normal(2, p * m, p * m)
    for X in A:
        inner = (mc.partial_trace(X, p) * S).sum()
        same(inner, (X * mc.kron(torch.eye(p, dtype=f64), S)).sum())
        inner = (mc.partial_trace(X, p, factor=1) * R).sum()
        same(inner, (X * mc.kron(R, torch.eye(m, dtype=f64))).sum())
        same(mc.partial_trace(X, p).trace(), X.trace())
    same(mc.partial_trace(A, p, factor=1)[1], mc.partial_trace(A[1], p, factor=1))


# ---------------------------------------------------------------- differentials


def by_jvp(f: Callable[..., Tensor], values: list[Tensor], changes: list[Tensor]) -> Tensor:
    change: Tensor = torch.func.jvp(f, tuple(values), tuple(changes))[1]
    return change


def test_differentials_are_derivatives() -> None:
    X, dX, Y, dY = (normal(2, 3, 3) for _ in range(4))
    same(mc.inverse_differential(X, dX), by_jvp(torch.linalg.inv, [X], [dX]))
    logdet = by_jvp(lambda X: torch.linalg.slogdet(X)[1], [X], [dX])
    same(mc.logdet_differential(X, dX), logdet)
    pair, changes = [X, Y], [dX, dY]
    same(mc.kron_differential(X, dX, Y, dY), by_jvp(mc.kron, pair, changes))
    same(mc.hadamard_differential(X, dX, Y, dY), by_jvp(torch.mul, pair, changes))


def test_logdet_differential_holds_for_negative_determinants() -> None:
    X = torch.diag(torch.tensor([-2.0, 3.0], dtype=f64))
    same(
        mc.logdet_differential(X, torch.eye(2, dtype=f64)), torch.tensor(-1 / 2 + 1 / 3, dtype=f64)
    )


def test_kron_plus_noise_differential() -> None:
    M, dM = normal(3, 3), normal(3, 3)
    K, dK, Sigma, dSigma = (normal(2, 2) for _ in range(4))
    eye = torch.eye(3, dtype=f64)

    def U(M: Tensor, K: Tensor, Sigma: Tensor) -> Tensor:
        return torch.kron(M, K) + torch.kron(eye, Sigma)

    same(
        mc.kron_plus_noise_differential(M, K, dM=dM, dK=dK, dSigma=dSigma),
        by_jvp(U, [M, K, Sigma], [dM, dK, dSigma]),
    )


# ---------------------------------------------------------------- errors


def test_errors_name_the_argument() -> None:
    A = normal(4, 6)
    with pytest.raises(TypeError, match="A must be a tensor, got float"):
        mc.vec(1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"A must have shape \(\*batch, m, n\), got \(3,\)"):
        mc.vec(normal(3))
    with pytest.raises(ValueError, match=r"x must have shape \(\*batch, 2\*n\), got \(3,\)"):
        mc.unvec(normal(3), 2)
    with pytest.raises(TypeError, match="num_rows must be an integer, got float"):
        mc.unvec(normal(4), 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"A must have shape \(\*batch, n, n\), got \(4, 6\)"):
        mc.vech(A)
    with pytest.raises(ValueError, match=r"x must have shape \(\*batch, n\*\(n\+1\)/2\), got"):
        mc.unvech(normal(4))
    with pytest.raises(ValueError, match="m must not be negative, got -1"):
        mc.commutation_matrix(-1, 2)
    with pytest.raises(TypeError, match="n must be an integer, got bool"):
        mc.duplication_matrix(True)
    with pytest.raises(ValueError, match="the same number of columns, got 6 and 4"):
        mc.khatri_rao(A, A.T)
    with pytest.raises(ValueError, match=r"divisible into num_blocks = 4 blocks .* got 4 x 6"):
        mc.block_view(A, 4)
    with pytest.raises(ValueError, match="factor must be 0 or 1, got 2"):
        mc.partial_trace(A, 2, factor=2)
    with pytest.raises(ValueError, match="blocks of A must be square for factor=1"):
        mc.partial_trace(A, 2, factor=1)


def test_matrices_are_made_on_a_device() -> None:
    made = (
        mc.commutation_matrix(2, 3, device="meta"),
        mc.duplication_matrix(3, device="meta"),
        mc.kron_identity_matrix(2, 3, device="meta"),
    )
    assert [X.device.type for X in made] == ["meta"] * 3
    assert [X.shape for X in made] == [(6, 6), (9, 6), (36, 9)]
