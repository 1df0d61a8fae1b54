"""M from a kernel, by columns on demand."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..checks import check_floating, versions
from ..derivatives import is_plain_eager
from ..errors import LinAlgError, not_positive_definite
from ..machine import shortage
from .dense import Dense
from .kernel_columns import KernelColumns

__all__ = ["KernelMatrix"]

Kernel = Callable[[Any, Any], Any]

_BLOCK = 256  # rows of a block of the diagonal
_STRIDE = 32  # columns of the factor in one block
_CHUNK = 1 << 22  # entries of C that one call of the kernel is to give


class KernelMatrix:
    """The row covariance M = kernel(x, x), which is not formed where the kernel is smooth.

    Accepted wherever M is. A pivoted Cholesky factorisation takes the diagonal of M and r of its
    columns, and stops where what is left is rounding: the largest entry of the rest is below 4.5
    machine epsilons times the largest variance. Values, first and second derivatives are exact to
    rounding. Gradients flow to everything that the kernel depends on, and to x, through the r
    columns alone. The kernel is evaluated when something first needs M, and once: make a new
    KernelMatrix for each step of a training loop, as one would compute M anew.

    Args:
        kernel: ``kernel(a, b)`` is the covariance between points a (*batch, n, d) and b
            (*batch, m, d), a tensor (*batch, n, m) or an object with ``to_dense()``. A function, a
            ``torch.nn.Module`` or a kernel of GPyTorch. The kernel has to be positive semidefinite.
        x: the points, (*batch, T, d); or (T,), which kernel then gets as (n,) and (m,).
        max_rank: the rank above which M is formed as a matrix. T/3 if None.
        chunk_rows: how many rows of C = kernel(x, x_p) are evaluated at once; backward evaluates
            them again rather than storing what lies between. If None, as many as give four million
            entries.

    Raises:
        TypeError, ValueError: x is no floating-point tensor of these shapes; the kernel returns
            something else than announced, or what is not finite; M is of full rank and does not
            fit into memory as a matrix.
        torch.linalg.LinAlgError: the kernel is not positive semidefinite.

    Third derivatives are refused with NotImplementedError. A parameter that makes a kernel of full
    rank out of one of low rank, such as a jitter inside the kernel with the value zero, has no
    derivative through r columns: put it into the noise.

    Cost: T·(256 + 2r) evaluations of the kernel and O(T·r²); of a likelihood with its gradients
    O(T·r² + T·r·D); memory O(T·(r + D)).
    Source: Harbrecht, Peters, Schneider 2012 for the pivots; docs/maths.md, "M from a kernel".

    >>> import torch, torch_kronlik as tk
    >>> def kernel(a, b):
    ...     return torch.exp(-0.5 * (a[:, None] - b).square())
    >>> M = tk.KernelMatrix(kernel, torch.linspace(0, 1, 1000, dtype=torch.float64))
    >>> M.rank < 15
    True
    >>> K, s = torch.eye(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    >>> tk.kron_logdet(M, K, log_noise=s)
    tensor(12.4145, dtype=torch.float64)
    """

    def __init__(
        self,
        kernel: Kernel,
        x: Tensor,
        *,
        max_rank: int | None = None,
        chunk_rows: int | None = None,
    ) -> None:
        if not callable(kernel):
            raise TypeError(f"kernel must be callable, got {type(kernel).__name__}")
        check_floating(x=x)
        if x.dim() == 0:
            raise ValueError("x must have shape (*batch, T, d) or (T,), got ()")
        for name, value in (("max_rank", max_rank), ("chunk_rows", chunk_rows)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer or None, got {value!r}")
        self.kernel, self.x, self.max_rank, self.chunk_rows = kernel, x, max_rank, chunk_rows
        self._rows: Any = None
        self._versions: list[int] = []

    @property
    def size(self) -> int:
        """T."""
        return self.x.shape[-1 if self.x.dim() == 1 else -2]

    @property
    def rank(self) -> int:
        """r, or T where M is formed as a matrix; asking evaluates the kernel."""
        rows = self.rows()
        return rows.root.shape[-1] if isinstance(rows, KernelColumns) else self.size

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.kernel).__name__}, T={self.size})"

    def rows(self) -> Any:
        """M as the row covariance that the library computes with."""
        if self._rows is None:
            current = versions(self._watched)
            # Also where the first use asks for no gradients: a later one may.
            with torch.inference_mode(False), torch.set_grad_enabled(not self.x.is_inference()):
                self._rows = self._evaluate()
            self._versions = current
        elif self._versions != versions(self._watched):
            raise RuntimeError(
                f"x or a parameter of the kernel of this {type(self).__name__} was changed in "
                "place after it was evaluated: make a new one"
            )
        return self._rows

    @property
    def _watched(self) -> list[Tensor]:
        """x, and what a module holds; what a function closes over, nobody knows."""
        kernel = self.kernel
        if not isinstance(kernel, torch.nn.Module):
            return [self.x]
        return [self.x, *kernel.parameters(), *kernel.buffers()]

    def cross(self, x_new: Tensor) -> Tensor:
        """kernel(x_new, x), (*batch, S, T)."""
        return self._covariance(x_new, self.x)

    def variance(self, x_new: Tensor) -> Tensor:
        """The diagonal of kernel(x_new, x_new), (*batch, S)."""
        return self._diagonal(x_new)

    def covariance(self, x_new: Tensor) -> Tensor:
        """kernel(x_new, x_new), (*batch, S, S)."""
        return self._covariance(x_new, x_new)

    # --- the kernel ------------------------------------------------------------------------------

    def _covariance(self, a: Tensor, b: Tensor) -> Tensor:
        """kernel(a, b), checked."""
        out = self.kernel(a, b)
        out = out.to_dense() if hasattr(out, "to_dense") and not isinstance(out, Tensor) else out
        want = _count(a), _count(b)
        if not isinstance(out, Tensor):
            raise TypeError(f"kernel(a, b) must return a tensor, got {type(out).__name__}")
        if out.shape[-2:] != torch.Size(want):
            raise ValueError(
                f"kernel(a, b) must have shape (*batch, {want[0]}, {want[1]}) for a "
                f"{tuple(a.shape)} and b {tuple(b.shape)}, got {tuple(out.shape)}"
            )
        if out.dtype != a.dtype or out.device != a.device:
            raise TypeError(
                f"kernel(a, b) must be of a's dtype and device, {a.dtype} on {a.device}, got "
                f"{out.dtype} on {out.device}"
            )
        return out

    def _diagonal(self, x: Tensor) -> Tensor:
        """(*batch, n)"""
        if hasattr(self.kernel, "covar_dist"):  # of GPyTorch
            out: Tensor = self.kernel(x, diag=True)  # type: ignore[call-arg]
            return out
        blocks = [_points(x, slice(i, i + _BLOCK)) for i in range(0, max(_count(x), 1), _BLOCK)]
        # copies, since a view would keep its block
        parts = [self._covariance(b, b).diagonal(dim1=-2, dim2=-1).clone() for b in blocks]
        return torch.cat(parts, -1)

    # --- pivots ----------------------------------------------------------------------------------

    def _evaluate(self) -> Any:
        T = self.size
        limit = T // 3 if self.max_rank is None else min(self.max_rank, T)
        with torch.no_grad():
            found = self._pivots(limit)
        if found is None:
            return Dense(self._whole(limit))
        x = self._points_for(found.places.shape[:-1])
        pivots = _at(x, found.places)
        columns = self._columns(x, pivots)
        corner = self._covariance(pivots, pivots)
        if not bool(found.real.all()):
            columns = torch.where(found.real[..., None, :], columns, 0)
            both = found.real[..., :, None] & found.real[..., None, :]
            corner = torch.where(both, corner, 0)
        return KernelColumns(columns, corner, found.root)

    def _pivots(self, limit: int) -> _Pivots | None:
        """None where the rank is above ``limit``, or is going to be."""
        d = self._diagonal(self.x)
        _require_variances(d)
        T, batch = self.size, d.shape[:-1]
        x = self._points_for(batch)
        scale = d.amax(-1, keepdim=True) if T else d.new_zeros((*batch, 1))
        stop = 4.5 * torch.finfo(d.dtype).eps * scale
        F: list[Tensor] = []  # the columns of the factor as rows, in blocks that grow in number
        places: list[Tensor] = []
        seen: list[Tensor] = []  # the largest residual before each pivot
        lowest = torch.zeros_like(scale)  # of what is left of the variances
        while T:
            largest, p = d.max(-1, keepdim=True)
            is_left = largest > stop
            seen.append(largest)
            if not bool(is_left.any()):
                break
            k = len(places)
            if k == limit or (k == limit // 4 and _looks_rough(seen, stop, limit)):
                _require_semidefinite(lowest, scale, k)
                return None
            if k % _STRIDE == 0:
                F.append(d.new_zeros((*batch, _STRIDE, T)))
            column = self._covariance(x, _at(x, p)).squeeze(-1)
            for block in F:
                at_pivot = block.take_along_dim(p[..., None, :], -1)
                column = column - (at_pivot.mT @ block).squeeze(-2)
            column = torch.where(is_left, column * largest.rsqrt(), 0)
            F[-1][..., k % _STRIDE, :] = column
            d = (d - column.square()).scatter_(-1, p, 0)
            lowest = torch.minimum(lowest, d.amin(-1, keepdim=True))
            d = d.clamp_(min=0)
            places.append(torch.where(is_left, p, -1))
        _require_semidefinite(lowest, scale, len(places))
        if not places:
            none = d.new_empty((*batch, 0), dtype=torch.int64)
            return _Pivots(none, none >= 0, d.new_empty((*batch, 0, 0)))
        return _Pivots.of(F, torch.cat(places, -1))

    def _points_for(self, batch: torch.Size) -> Tensor:
        """x at the batch shape of what the kernel returns."""
        return self.x if self.x.dim() == 1 else self.x.expand(*batch, *self.x.shape[-2:])

    def _columns(self, x: Tensor, pivots: Tensor) -> Tensor:
        """C = kernel(x, pivots), in chunks of rows that backward evaluates again."""
        T, r = self.size, _count(pivots)
        rows = self.chunk_rows or max(_CHUNK // max(r, 1), 1)
        if rows >= T or not is_plain_eager():
            return self._covariance(x, pivots)
        parts = [_points(x, slice(i, i + rows)) for i in range(0, T, rows)]
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(self._covariance, a, pivots) for a in parts], -2)

    def _whole(self, limit: int) -> Tensor:
        """M as a matrix."""
        T = self.size
        short = shortage(4 * T * T * self.x.element_size(), self.x.device)
        if short:
            raise ValueError(
                f"kernel(x, x) has a rank above {limit} with T = {T}, and as a matrix takes, with "
                f"its factor, {short}: a smoother kernel, a larger max_rank or fewer rows would fit"
            )
        return self._covariance(self.x, self.x)


class _Pivots(NamedTuple):
    places: Tensor  # (*batch, r), of the pivots among the T rows
    real: Tensor  # (*batch, r) of bool, False for what fills up the batch
    root: Tensor  # L, (*batch, r, r)

    @classmethod
    def of(cls, F: list[Tensor], index: Tensor) -> _Pivots:
        """From the factor, transposed and in blocks, and the places, −1 for what fills up."""
        real, places = index >= 0, index.clamp(min=0)
        r = index.shape[-1]
        rows = [block.take_along_dim(places[..., None, :], -1) for block in F]
        root = torch.cat(rows, -2)[..., :r, :].mT.tril()
        root = torch.where(real[..., :, None], root, 0)
        return cls(places, real, (root + torch.diag_embed((~real).to(root.dtype))).contiguous())


def _count(points: Tensor) -> int:
    return points.shape[-1 if points.dim() == 1 else -2]


def _points(x: Tensor, which: slice) -> Tensor:
    return x[which] if x.dim() == 1 else x[..., which, :]


def _at(x: Tensor, places: Tensor) -> Tensor:
    """The points at these places, (*batch, r)."""
    return x[places] if x.dim() == 1 else x.take_along_dim(places[..., None], -2)


def _looks_rough(largest: list[Tensor], stop: Tensor, limit: int) -> bool:
    """Whether more than ``limit`` pivots are needed if the largest residual, seen at k pivots, goes
    on falling as a power of k, as it does where the kernel is rough; else it falls faster."""
    k = len(largest) - 1
    if k < 16:
        return False
    before, now = largest[k // 2].clamp(min=stop), largest[k].clamp(min=stop)
    power = (before / now).log() / math.log(k / (k // 2))
    return bool(((now / stop).log() > power * math.log(limit / k)).any())


def _require_variances(d: Tensor) -> None:
    if not bool(d.isfinite().all()):
        raise ValueError("kernel(x, x) must be finite, but its diagonal has NaN or infinity")
    if bool((d < 0).any()):
        raise LinAlgError("kernel(x, x) must be positive semidefinite, but has negative variances")


def _require_semidefinite(lowest: Tensor, scale: Tensor, k: int) -> None:
    """What is left of the variances may be negative by rounding, no more."""
    bad = ~(lowest >= -(k + 8) * 8 * torch.finfo(scale.dtype).eps * scale).all(-1)
    if bool(bad.any()):
        if not bool(lowest.isfinite().all()):
            raise ValueError("kernel(x, x) must be finite, but a column has NaN or infinity")
        not_positive_definite("kernel(x, x)", bad)
