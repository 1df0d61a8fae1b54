"""Batch dimensions: expanded, and summed where an argument was broadcast over them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Shape = Sequence[int]

__all__ = [
    "Shape",
    "add_outer_",
    "broadcast",
    "expand_to",
    "mean_with_transpose",
    "outer_to",
    "places_of",
    "submatrix",
    "sum_to",
    "symmetric",
    "unflatten",
]


def broadcast(*shapes: Shape) -> torch.Size:
    """``torch.broadcast_shapes``, which takes ten microseconds even for shapes that are equal."""
    batches = [shape for shape in shapes if len(shape)]
    if all(shape == batches[0] for shape in batches):
        return torch.Size(batches[0] if batches else ())
    return torch.Size(torch.broadcast_shapes(*shapes))


def expand_to(tensor: Tensor, batch: Sequence[int], core: int) -> Tensor:
    """Expand the batch dimensions of ``tensor`` to ``batch``; the last ``core`` stay."""
    return tensor.expand(*batch, *tensor.shape[tensor.dim() - core :])


def sum_to(tensor: Tensor, batch: Sequence[int], core: int) -> Tensor:
    """Sum the batch dimensions of ``tensor`` down to ``batch``; the last ``core`` stay."""
    shape = (*batch, *tensor.shape[tensor.dim() - core :])
    return tensor if tensor.shape == shape else tensor.sum_to_size(shape)


def outer_to(X: Tensor, Y: Tensor, batch: Sequence[int]) -> Tensor:
    """``sum_to(X @ Y.mT, batch)`` as one product: a summed dimension joins the contracted one.

    Args:
        X: (*b, m, k).
        Y: (*b, n, k), its batch shape broadcast with that of X.
        batch: the batch shape of the result, broadcastable to ``b``.

    Returns:
        (*batch, m, n)
    """
    joint = broadcast(X.shape[:-2], Y.shape[:-2])
    X, Y = (Z.expand(*joint, *Z.shape[-2:]) for Z in (X, Y))
    lead = X.dim() - 2 - len(batch)
    summed = [
        i for i, size in enumerate(X.shape[:-2]) if i < lead or (size != 1 and batch[i - lead] == 1)
    ]
    if not summed:
        return X @ Y.mT
    kept = [i for i in range(X.dim() - 2) if i not in summed]
    order = [*kept, X.dim() - 2, *summed, X.dim() - 1]
    shape = [X.shape[i] for i in kept]
    inner = X.shape[-1] * math.prod(X.shape[i] for i in summed)
    X, Y = (Z.permute(order).reshape(*shape, Z.shape[-2], inner) for Z in (X, Y))
    product = X @ Y.mT
    return product.reshape(*batch, *product.shape[-2:])


def add_outer_(out: Tensor, X: Tensor, Y: Tensor) -> Tensor:
    """``out + outer_to(X, Y, batch of out)`` in place; without a batch it needs no memory."""
    if out.dim() == X.dim() == Y.dim() == 2:
        return out.addmm_(X, Y.mT)
    return out.add_(outer_to(X, Y, out.shape[:-2]))


def mean_with_transpose(X: Tensor) -> Tensor:
    """(X + Xᵀ)/2 in one pass, without derivatives; symmetric up to the last bit."""
    return torch.lerp(X.mT, X, 0.5)


def symmetric(X: Tensor) -> Tensor:
    """The symmetric part (X + Xᵀ)/2."""
    return torch.add(X, X.mT).mul(0.5)


def unflatten(X: Tensor, dim: int, sizes: Shape) -> Tensor:
    """``X.unflatten(dim, sizes)``, which has no annotation."""
    out: Tensor = X.unflatten(dim, sizes)
    return out


def places_of(flags: Tensor, count: int | None = None) -> Tensor:
    """Where the last dimension of ``flags`` (*batch, N) is true, in order: (*batch, n), n the most
    in the batch unless ``count`` says how many. Where there are fewer, other places follow."""
    order = torch.argsort(flags.byte(), dim=-1, descending=True, stable=True)
    if count is None:
        count = int(flags.sum(-1).max()) if flags.numel() else 0
    return order[..., :count].contiguous()


def submatrix(X: Tensor, places: Tensor) -> Tensor:
    """The rows and columns of X (*batch, N, N) at the places (*batch, n)."""
    rows = X.take_along_dim(places[..., :, None], -2)
    return rows.take_along_dim(places[..., None, :], -1)
