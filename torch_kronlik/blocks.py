"""Diagonal blocks of a matrix and their sum."""

from __future__ import annotations

from torch import Tensor

from . import ops
from .autocast import full_precision
from .checks import check_floating, check_integer

__all__ = ["block_diag", "block_diag_sum"]


@full_precision
def block_diag_sum(A: Tensor, num_blocks: int) -> Tensor:
    """Sum of the diagonal blocks of a matrix.

    ``out[i, j] = Σ_k A[k·m + i, k·n + j]`` for the p = ``num_blocks`` blocks of size m×n. Only
    the entries on the diagonal blocks are read, at any strides; float32 entries are added in
    float64. The adjoint is S ↦ I_p ⊗ S.

    Args:
        A: (*batch, p·m, p·n), float32 or float64.
        num_blocks: p ≥ 1.

    Returns:
        (*batch, m, n).

    Raises:
        TypeError: A is not a float32 or float64 tensor, or num_blocks not an integer.
        ValueError: A is not made of p×p blocks.

    Cost: p·m·n reads and additions.

    >>> import torch
    >>> A = torch.arange(16.0).reshape(4, 4)
    >>> block_diag_sum(A, 2)
    tensor([[10., 12.],
            [18., 20.]])
    """
    _check_blocks(A, num_blocks)
    out: Tensor = ops.block_diag_sum(A, num_blocks)
    return out


@full_precision
def block_diag(A: Tensor, k: int, num_blocks: int) -> Tensor:
    """The k-th diagonal block of a matrix, as a view.

    ``A[k·m : (k+1)·m, k·n : (k+1)·n]`` for the p = ``num_blocks`` blocks of size m×n.

    Args:
        A: (*batch, p·m, p·n).
        k: which block, 0 ≤ k < p.
        num_blocks: p ≥ 1.

    Returns:
        (*batch, m, n), sharing A's memory.

    Raises:
        TypeError: A is not a float32 or float64 tensor, or k or num_blocks not an integer.
        ValueError: A is not made of p×p blocks, or k is not in 0 ≤ k < p.

    Cost: none, no entry is read.

    >>> import torch
    >>> block_diag(torch.arange(16.0).reshape(4, 4), 1, 2)
    tensor([[10., 11.],
            [14., 15.]])
    """
    _check_blocks(A, num_blocks)
    check_integer("k", k)
    if not 0 <= k < num_blocks:
        raise ValueError(f"k must satisfy 0 <= k < num_blocks = {num_blocks}, got {k}")
    m, n = A.shape[-2] // num_blocks, A.shape[-1] // num_blocks
    return A[..., k * m : (k + 1) * m, k * n : (k + 1) * n]


def _check_blocks(A: Tensor, num_blocks: int) -> None:
    check_floating(A=A)
    check_integer("num_blocks", num_blocks)
    if num_blocks < 1:
        raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
    if A.dim() < 2:
        raise ValueError(f"A must have shape (*batch, p*m, p*n), got {tuple(A.shape)}")
    rows, cols = A.shape[-2:]
    if rows % num_blocks or cols % num_blocks:
        raise ValueError(
            f"A must be divisible into num_blocks = {num_blocks} blocks in both directions, "
            f"got {rows} x {cols}"
        )
