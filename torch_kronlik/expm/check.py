"""Errors in the caller's terms: argument, what was expected, what came."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_dtype, check_floating
from ..errors import raise_if_not_finite

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
    raise_if_not_finite(**arguments)
    dtype = next(iter(arguments.values())).dtype
    raise OverflowError(f"{what} exceeds the range of {dtype}, although its arguments are finite")


def check_arguments(d: Tensor, A: Tensor, v: Tensor) -> None:
    for name, argument in {"d": d, "A": A, "v": v}.items():
        check_dtype(name, argument)
    _check_matrix(A)
    n = A.shape[-1]
    for name, value in {"d": d, "v": v}.items():
        check_floating(**{name: value})
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
