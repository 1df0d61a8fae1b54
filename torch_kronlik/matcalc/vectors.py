"""vec, vech and the matrices that relate them; vec stacks columns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .check import require_matrix, require_size, require_square

__all__ = [
    "commutation_matrix",
    "duplication_matrix",
    "kron_identity_matrix",
    "unvec",
    "unvech",
    "vec",
    "vech",
]


def vec(A: Tensor) -> Tensor:
    """The columns of A on top of each other: ``vec(A)[i + j·m] = A[i, j]``.

    Identities: vec(A X B) = (Bᵀ ⊗ A) vec(X), ⟨A, B⟩ = vec(A)ᵀ vec(B).

    Args:
        A: (*batch, m, n).

    Returns:
        (*batch, m·n).

    Raises:
        TypeError, ValueError: A is not a tensor with two or more dimensions.

    Cost: one copy.

    >>> vec(torch.tensor([[1, 2], [3, 4]]))
    tensor([1, 3, 2, 4])
    """
    require_matrix("A", A)
    return A.mT.reshape(*A.shape[:-2], A.shape[-2] * A.shape[-1])


def unvec(x: Tensor, num_rows: int) -> Tensor:
    """The matrix with ``num_rows`` rows of which x is the vec.

    Args:
        x: (*batch, m·n).
        num_rows: m.

    Returns:
        (*batch, m, n), sharing x's memory where its strides permit.

    Raises:
        TypeError: num_rows is not an integer.
        ValueError: the length of x is not a multiple of num_rows.

    Cost: none.

    >>> unvec(torch.tensor([1, 3, 2, 4]), 2)
    tensor([[1, 2],
            [3, 4]])
    """
    require_size("num_rows", num_rows)
    if x.dim() < 1 or num_rows == 0 or x.shape[-1] % num_rows:
        raise ValueError(f"x must have shape (*batch, {num_rows}*n), got {tuple(x.shape)}")
    return x.reshape(*x.shape[:-1], x.shape[-1] // num_rows, num_rows).mT


def vech(A: Tensor) -> Tensor:
    """The lower triangle of a symmetric A, column by column.

    Args:
        A: (*batch, n, n); only the lower triangle is read.

    Returns:
        (*batch, n (n + 1)/2).

    Raises:
        TypeError, ValueError: A is not a square matrix.

    Cost: one copy of the triangle.

    >>> vech(torch.tensor([[1, 2], [2, 3]]))
    tensor([1, 2, 3])
    """
    require_square("A", A)
    column, row = torch.triu_indices(A.shape[-1], A.shape[-1], device=A.device)
    return A[..., row, column]


def unvech(x: Tensor) -> Tensor:
    """The symmetric matrix of which x is the vech.

    Args:
        x: (*batch, n (n + 1)/2).

    Returns:
        (*batch, n, n).

    Raises:
        ValueError: the length of x is not a triangular number.

    Cost: one gather.

    >>> unvech(torch.tensor([1, 2, 3]))
    tensor([[1, 2],
            [2, 3]])
    """
    n = (math.isqrt(8 * x.shape[-1] + 1) - 1) // 2 if x.dim() else -1
    if n < 0 or n * (n + 1) // 2 != x.shape[-1]:
        raise ValueError(f"x must have shape (*batch, n*(n+1)/2), got {tuple(x.shape)}")
    return x[..., _place_in_vech(n, x.device)]


def _place_in_vech(n: int, device: torch.device | str | None = None) -> Tensor:
    """(n, n): at [i, j] the position of entry (i, j) of a symmetric matrix in its vech."""
    column, row = torch.triu_indices(n, n, device=device)
    place = torch.zeros(n, n, dtype=torch.long, device=device)
    place[row, column] = place[column, row] = torch.arange(len(row), device=device)
    return place


def commutation_matrix(
    m: int, n: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """C with vec(Aᵀ) = C vec(A) for every m×n matrix A.

    C = Σ_ij E_ij ⊗ E_ijᵀ with E_ij of size m×n. Identities: Cᵀ = C⁻¹ =
    commutation_matrix(n, m), and C_pm (A ⊗ B) C_nq = B ⊗ A for A m×n and B p×q.

    Args:
        m, n: the shape of A.
        dtype, device: of the result, torch's defaults where None.

    Returns:
        (m·n, m·n), a permutation matrix.

    Raises:
        TypeError, ValueError: m or n is not an integer ≥ 0.

    Cost: (m·n)² entries written.

    >>> A = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    >>> commutation_matrix(2, 3) @ vec(A) == vec(A.T)
    tensor([True, True, True, True, True, True])
    """
    require_size("m", m)
    require_size("n", n)
    order = torch.arange(m * n, device=device).reshape(n, m).mT.reshape(-1)
    return torch.eye(m * n, dtype=dtype, device=device)[order]


def duplication_matrix(
    n: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """The matrix that makes vec(S) of vech(S), for symmetric S of size n×n.

    Args:
        n: the size of S.
        dtype, device: of the result, torch's defaults where None.

    Returns:
        (n², n (n + 1)/2), of zeros and ones.

    Raises:
        TypeError, ValueError: n is not an integer ≥ 0.

    Cost: n³ (n + 1)/2 entries written.

    >>> S = torch.tensor([[1.0, 2.0], [2.0, 3.0]])
    >>> duplication_matrix(2) @ vech(S)
    tensor([1., 2., 2., 3.])
    """
    require_size("n", n)
    place = vec(_place_in_vech(n, device))
    return torch.eye(n * (n + 1) // 2, dtype=dtype, device=device)[place]


def kron_identity_matrix(
    p: int, n: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """N with vec(I_p ⊗ S) = N vec(S) for every n×n matrix S.

    N = [I_n ⊗ e_1; …; I_n ⊗ e_p] ⊗ I_n, e_k the columns of I_p. Its transpose takes the vec of a
    matrix to the vec of the sum of its diagonal blocks. (vec(I_p) ⊗ I_{n²}) is not N: it has the
    same rows in another order.

    Args:
        p: the number of blocks.
        n: the size of S.
        dtype, device: of the result, torch's defaults where None.

    Returns:
        ((p·n)², n²), of zeros and ones.

    Raises:
        TypeError, ValueError: p or n is not an integer ≥ 0.

    Cost: p²·n⁴ entries written.

    >>> S = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> bool((kron_identity_matrix(3, 2) @ vec(S) == vec(torch.kron(torch.eye(3), S))).all())
    True
    """
    require_size("p", p)
    require_size("n", n)
    eye, large = (torch.eye(size, dtype=dtype, device=device) for size in (n, p))
    tall = torch.cat([torch.kron(eye, e.reshape(p, 1)) for e in large]) if p else eye[:0]
    return torch.kron(tall, eye)
