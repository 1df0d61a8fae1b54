"""Argument checks shared by the functions of this package."""

from __future__ import annotations

from torch import Tensor

from ..checks import check_integer

__all__ = ["require_blocks", "require_matrix", "require_size", "require_square"]


def require_matrix(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dim() < 2:
        raise ValueError(f"{name} must have shape (*batch, m, n), got {tuple(value.shape)}")


def require_square(name: str, value: Tensor) -> None:
    require_matrix(name, value)
    if value.shape[-1] != value.shape[-2]:
        raise ValueError(f"{name} must have shape (*batch, n, n), got {tuple(value.shape)}")


def require_size(name: str, value: object) -> None:
    check_integer(name, value)
    if value < 0:  # type: ignore[operator]
        raise ValueError(f"{name} must not be negative, got {value}")


def require_blocks(A: Tensor, num_blocks: int) -> None:
    require_matrix("A", A)
    require_size("num_blocks", num_blocks)
    if num_blocks == 0 or any(size % num_blocks for size in A.shape[-2:]):
        raise ValueError(
            f"A must be divisible into num_blocks = {num_blocks} blocks in both directions, "
            f"got {A.shape[-2]} x {A.shape[-1]}"
        )
