"""Errors in the caller's terms: argument, what was expected, what came."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["check_arguments", "require_finite_input", "require_finite_result"]

METHODS = ("auto", "action", "dense")


def require_finite_input(norm: float, **arguments: Tensor) -> None:
    """Raise if the norm of Diag(d) A is not finite."""
    if not math.isfinite(norm):
        _raise_not_finite("Diag(d) A", arguments)


def require_finite_result(w: Tensor, **arguments: Tensor) -> None:
    if not bool(torch.isfinite(w).all()):
        _raise_not_finite("exp(Diag(d) A) v", arguments)


def _raise_not_finite(what: str, arguments: dict[str, Tensor]) -> None:
    for name, value in arguments.items():
        bad = ~torch.isfinite(value)
        if bool(bad.any()):
            index = tuple(int(i) for i in bad.nonzero()[0])
            raise ValueError(f"{name} must be finite, but {name}{list(index)} is {value[index]}")
    dtype = next(iter(arguments.values())).dtype
    raise OverflowError(f"{what} exceeds the range of {dtype}, although its arguments are finite")


def check_arguments(d: Tensor, A: Tensor, v: Tensor) -> None:
    for name, argument in {"d": d, "A": A, "v": v}.items():
        _check_tensor(name, argument)
    _check_matrix(A)
    n = A.shape[-1]
    for name, value in {"d": d, "v": v}.items():
        if value.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
        if value.dim() < 1 or value.shape[-1] != n:
            raise ValueError(
                f"{name} must have shape (*batch, {n}) to go with A of shape {tuple(A.shape)}, "
                f"got {tuple(value.shape)}"
            )
        if value.dtype != A.dtype:
            raise TypeError(f"{name} must have the dtype of A, {A.dtype}, got {value.dtype}")
        if value.device != A.device:
            raise ValueError(f"{name} must be on the device of A, {A.device}, got {value.device}")
    _check_batch(d, A, v)


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {value.dtype}")


def _check_matrix(A: Tensor) -> None:
    if A.layout not in (torch.strided, torch.sparse_csr):
        raise TypeError(f"A must be a dense or a sparse CSR tensor, got layout {A.layout}")
    if A.dim() < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"A must have shape (*batch, n, n), got {tuple(A.shape)}")
    if A.layout == torch.sparse_csr and A.dim() != 2:
        raise ValueError(f"a sparse A must have shape (n, n), got {tuple(A.shape)}")


def _check_batch(d: Tensor, A: Tensor, v: Tensor) -> None:
    shapes = {"d": d.shape[:-1], "A": A.shape[:-2], "v": v.shape[:-1]}
    try:
        torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        shown = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"the batch shapes do not broadcast: {shown}") from None
