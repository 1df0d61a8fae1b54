"""Autocast regions: everything of this library computes in float32 (or float64) inside them.

An eigendecomposition or a Cholesky factorisation of a half-precision matrix means nothing, so a
public function casts half-precision arguments up, as torch's own ``autocast`` does for ``linalg``
functions, and turns autocast off while it computes: the matrix products that it is composed of
would otherwise run in half precision. The derivative rules of the operators do the same, because
they may run inside a region that the function itself was not called in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["full_precision"]

DEVICE_TYPES = ("cpu", "cuda")
HALF = (torch.bfloat16, torch.float16)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def full_precision(function: _Function) -> _Function:
    """``function`` without autocast, and its half-precision arguments in float32 under autocast."""

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        for kind in DEVICE_TYPES:
            if torch.is_autocast_enabled(kind):
                widened = [_widened(x, kind) for x in args]
                named = {name: _widened(x, kind) for name, x in kwargs.items()}
                with torch.autocast(kind, enabled=False):
                    return outside(*widened, **named)
        return function(*args, **kwargs)

    return outside  # type: ignore[return-value]


def _widened(x: Any, kind: str) -> Any:
    if isinstance(x, Tensor) and x.device.type == kind and x.dtype in HALF:
        return x.float()
    return x
