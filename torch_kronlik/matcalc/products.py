"""Kronecker products and the blocks of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .check import require_blocks, require_matrix

__all__ = ["block_view", "diagonal_blocks", "khatri_rao", "kron", "partial_trace"]


def kron(A: Tensor, B: Tensor) -> Tensor:
    """The Kronecker product, blocks ``A[i, j]·B``, for batches and any strides.

    Identities: (A ⊗ B)(C ⊗ D) = AC ⊗ BD, (A ⊗ B)ᵀ = Aᵀ ⊗ Bᵀ, det(A ⊗ B) = det(A)^q det(B)^m for
    A m×m and B q×q.

    Args:
        A: (*batch, m, n).
        B: (*batch, p, q).

    Returns:
        (*batch, m·p, n·q).

    Raises:
        TypeError, ValueError: an argument is not a tensor with two or more dimensions.

    Cost: m·n·p·q multiplications.

    >>> kron(torch.tensor([[1, 2]]), torch.tensor([[1], [10]]))
    tensor([[ 1,  2],
            [10, 20]])
    """
    require_matrix("A", A)
    require_matrix("B", B)
    blocks = torch.mul(A[..., :, None, :, None], B[..., None, :, None, :])
    rows, columns = A.shape[-2] * B.shape[-2], A.shape[-1] * B.shape[-1]
    return blocks.reshape(*blocks.shape[:-4], rows, columns)


def khatri_rao(A: Tensor, B: Tensor) -> Tensor:
    """The column-wise Kronecker product: column k is ``A[:, k] ⊗ B[:, k]``.

    Identities: vec(A Diag(x) B) = (Bᵀ ⊠ A) x, (A ⊠ B)ᵀ(A ⊠ B) = AᵀA ⊙ BᵀB.

    Args:
        A: (*batch, m, n).
        B: (*batch, p, n).

    Returns:
        (*batch, m·p, n).

    Raises:
        TypeError, ValueError: an argument is not a matrix, or the numbers of columns differ.

    Cost: m·p·n multiplications.

    >>> khatri_rao(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 10]]))
    tensor([[ 1, 20],
            [ 3, 40]])
    """
    require_matrix("A", A)
    require_matrix("B", B)
    if A.shape[-1] != B.shape[-1]:
        raise ValueError(
            f"A and B must have the same number of columns, got {A.shape[-1]} and {B.shape[-1]}"
        )
    product = torch.mul(A[..., :, None, :], B[..., None, :, :])
    return product.reshape(*product.shape[:-3], A.shape[-2] * B.shape[-2], A.shape[-1])


def block_view(A: Tensor, num_blocks: int) -> Tensor:
    """All blocks of A as a view: entry [i, j] is the m×n block in block row i, block column j.

    Args:
        A: (*batch, p·m, p·n).
        num_blocks: p ≥ 1.

    Returns:
        (*batch, p, p, m, n), sharing A's memory.

    Raises:
        TypeError, ValueError: A is not made of p×p blocks.

    Cost: none, no entry is read.

    >>> block_view(torch.arange(16).reshape(4, 4), 2)[0, 1]
    tensor([[2, 3],
            [6, 7]])
    """
    require_blocks(A, num_blocks)
    m, n = (size // num_blocks for size in A.shape[-2:])
    blocks: Tensor = A.unflatten(-1, (num_blocks, n)).unflatten(-3, (num_blocks, m))
    return blocks.transpose(-3, -2)


def diagonal_blocks(A: Tensor, num_blocks: int) -> Tensor:
    """The diagonal blocks of A as a view.

    Args:
        A: (*batch, p·m, p·n).
        num_blocks: p ≥ 1.

    Returns:
        (*batch, p, m, n), sharing A's memory.

    Raises:
        TypeError, ValueError: A is not made of p×p blocks.

    Cost: none, no entry is read.

    >>> diagonal_blocks(torch.arange(16).reshape(4, 4), 2)[1]
    tensor([[10, 11],
            [14, 15]])
    """
    return block_view(A, num_blocks).diagonal(dim1=-4, dim2=-3).movedim(-1, -3)


def partial_trace(A: Tensor, num_blocks: int, *, factor: int = 0) -> Tensor:
    """The trace over one factor of a matrix on a product space.

    tr₀(B ⊗ C) = tr(B)·C is the sum of the diagonal blocks, tr₁(B ⊗ C) = tr(C)·B the matrix of the
    traces of all blocks. Adjoints: ⟨tr₀(A), S⟩ = ⟨A, I ⊗ S⟩ and ⟨tr₁(A), S⟩ = ⟨A, S ⊗ I⟩.

    Args:
        A: (*batch, p·m, p·n); m = n for factor 1.
        num_blocks: p ≥ 1.
        factor: 0 or 1, the factor that the trace removes.

    Returns:
        (*batch, m, n) for factor 0, (*batch, p, p) for factor 1.

    Raises:
        TypeError, ValueError: A is not made of p×p blocks, or factor is neither 0 nor 1.

    Cost: p·m·n additions for factor 0, p²·m for factor 1.

    >>> A = torch.arange(16).reshape(4, 4)
    >>> partial_trace(A, 2)
    tensor([[10, 12],
            [18, 20]])
    >>> partial_trace(A, 2, factor=1)
    tensor([[ 5,  9],
            [21, 25]])
    """
    if factor not in (0, 1):
        raise ValueError(f"factor must be 0 or 1, got {factor!r}")
    if factor == 0:
        return diagonal_blocks(A, num_blocks).sum(-3)
    blocks = block_view(A, num_blocks)
    if blocks.shape[-1] != blocks.shape[-2]:
        raise ValueError(f"the blocks of A must be square for factor=1, got {tuple(A.shape)}")
    return blocks.diagonal(dim1=-2, dim2=-1).sum(-1)
