"""Why a computation failed, in the user's terms: called only after it did."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from .capture import is_captured

COVARIANCE = "U = M ⊗ K + I ⊗ Sigma"
LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

__all__ = [
    "COVARIANCE",
    "OVERFLOW",
    "LinAlgError",
    "batch_element",
    "not_positive_definite",
    "raise_if_not_finite",
    "require_finite",
]


def batch_element(bad: Tensor) -> str:
    """Words for the first True of ``bad`` (*batch): nothing without a batch, else its index."""
    if bad.dim() == 0:
        return ""
    index = tuple(int(i) for i in bad.nonzero()[0])
    return f" (batch element {index[0] if len(index) == 1 else index})"


def raise_if_not_finite(**arguments: Tensor | None) -> None:
    """Raise ValueError for the first argument that holds a NaN or an infinity."""
    for name, value in arguments.items():
        if value is None or bool(torch.isfinite(value).all()):
            continue
        index = tuple(int(i) for i in (~torch.isfinite(value)).nonzero()[0])
        raise ValueError(
            f"{name} must be finite, but {name}{list(index)} is {value.detach()[index].item()}"
        )


def not_positive_definite(what: str, bad: Tensor) -> NoReturn:
    raise LinAlgError(f"{what} is not positive definite{batch_element(bad)}")


OVERFLOW = (
    "the result exceeds the range of its dtype, although every argument is finite; rescale them"
)


def require_finite(*results: Tensor, **arguments: Tensor | None) -> None:
    """Raise if the results are not finite: a non-finite argument first, else an overflow."""
    if is_captured(results[0]):
        return
    # One pass without temporaries decides, and the host waits once for a GPU, but for finite
    # entries with an infinite sum.
    if math.isfinite(sum(x.sum() for x in results)):
        return
    if all(bool(torch.isfinite(x).all()) for x in results):
        return
    raise_if_not_finite(**arguments)
    raise OverflowError(OVERFLOW)
