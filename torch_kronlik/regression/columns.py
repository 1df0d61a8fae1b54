"""Columns that are linearly independent, and an orthonormal form of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..capture import is_captured
from ..derivatives import define
from ..errors import batch_element
from ..records import Matrix

__all__ = ["as_matrix", "orthonormaliser"]


def as_matrix(x: Tensor) -> Tensor:
    """(*batch, T, D, p) as (*batch, T·D, p)"""
    return x.flatten(-3, -2)


class Columns(NamedTuple):
    x: Matrix
    what: str  # they must be, for the error
    names: str  # of the columns, with | between them


class Transformed(NamedTuple):
    V: Matrix


def _makeorthonormaliser(given: Columns) -> Tensor:
    x, what, names = given
    V, is_dependent = _triangular(x)
    if not is_captured(x) and bool(is_dependent.any()):
        _raise_dependent(x, is_dependent, what, names.split("|"))
    return V


def _triangular(x: Tensor) -> tuple[Tensor, Tensor]:
    """V, (*batch, p, p), and whether the columns depend on each other to rounding, (*batch).

    Column k less its projection on those before it has 1/|V_kk| times its length. Rounding of
    the columns moves that by eps times their lengths times their coefficients in the projection:
    in proportion to what Σ_l |V_lk| |x_l| sums.
    """
    n, p = x.shape[-2:]
    eye = torch.eye(p, dtype=x.dtype, device=x.device)
    if n < p:
        batch = x.shape[:-2]
        return eye.expand(*batch, p, p).contiguous(), x.new_ones(batch, dtype=torch.bool)
    length = torch.linalg.vector_norm(x, dim=-2)
    length = torch.where(length > 0, length, 1)
    R = torch.linalg.qr(x / length[..., None, :], mode="r")[1]
    V = torch.linalg.solve_triangular(R, eye.expand_as(R), upper=True)
    amplified = V.abs().sum(-2)
    is_dependent = ~(amplified * (_ROUNDINGS * torch.finfo(x.dtype).eps) < 1)
    return (V / length[..., :, None]).contiguous(), is_dependent.any(-1)


_ROUNDINGS = 20


def _raise_dependent(x: Tensor, bad: Tensor, what: str, names: list[str]) -> None:
    """One column after the other joins those that it does not depend on."""
    first = x.flatten(0, -3)[int(bad.flatten().nonzero()[0, 0])] if bad.dim() else x
    kept: list[int] = []
    dependent = []
    for k in range(len(names)):
        if bool(_triangular(first[:, [*kept, k]])[1]):
            dependent.append(names[k])
        else:
            kept.append(k)
    of = {name: name.partition(" (")[0] for name in names}
    whole = [of[x] for x in names if all(n in dependent for n in names if of[n] == of[x])]
    words = dict.fromkeys(of[name] if of[name] in whole else name for name in dependent)
    depend = "depends" if len(words) == 1 else "depend"
    raise ValueError(f"{what}, but {', '.join(words)} {depend} on those before{batch_element(bad)}")


orthonormaliser = define(
    "orthonormaliser",
    Columns,
    Transformed,
    _makeorthonormaliser,
    lambda given: given.x.new_empty((*given.x.shape[:-2], *[given.x.shape[-1]] * 2)),
)
"""V upper triangular with (x V)ᵀ x V = I, a constant for differentiation, after a check that the
columns of x are linearly independent."""
