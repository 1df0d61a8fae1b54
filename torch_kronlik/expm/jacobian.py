"""∂w/∂d of w = exp(Diag(d) A) v, all columns from one set of powers of X.

Column k is L(X, e_k A_k·) v = ∫₀¹ e^(X(1−τ)) e_k (A e^(Xτ) v)_k dτ, so the Jacobian is
∫₀¹ e^(X(1−τ)) Diag(A e^(Xτ) v) dτ. Over one step of length 1/s from w, with Y = (X − μ)/s,

    J(w) = e^(μ/s)/s Σ_k Y^k Diag(z_k),   z_k = Σ_l A Y^l w / (k + l + 1)!   (k + l < m)

which is the derivative of the m-term Taylor polynomial, and the next step maps J to P J + J(P w)
with P = e^(μ/s) T_m(Y). In all m + s products of n×n matrices.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..derivatives import define_flat, register
from .algebra import join, lift
from .check import require_finite_result
from .degrees import Steps
from .matrices import DenseMatrix
from .operators import choose, expm_action, expm_gradient

__all__ = ["expm_jacobian"]


def _jacobian(d: Tensor, A: Tensor, v: Tensor) -> Tensor:
    """(*batch, n, n), entry [i, k] = ∂w_i/∂d_k."""
    shape = _shape(d, A, v)
    if 0 in shape:
        return v.new_empty(shape)
    columns, matrix = d.unsqueeze(-2), A.unsqueeze(-3)
    steps = choose(DenseMatrix(matrix), columns, matrix, None, spread=True)
    J = _sum_steps(d, A, v, steps).expand(shape).contiguous()
    require_finite_result(J, v=v)
    return J


def _shape(d: Tensor, A: Tensor, v: Tensor) -> tuple[int, ...]:
    n = A.shape[-1]
    return (*torch.broadcast_shapes(d.shape[:-1], A.shape[:-2], v.shape[:-1]), n, n)


def _sum_steps(d: Tensor, A: Tensor, v: Tensor, steps: Steps) -> Tensor:
    growth = torch.exp(steps.shift / steps.number)
    powers = _powers(d, A, steps)
    P = growth.unsqueeze(-1) * _polynomial(powers)
    w, J = v, v.new_zeros(())
    for i in range(steps.number):
        local = growth.unsqueeze(-1) / steps.number * _local(powers, A, w)
        J = P @ J + local if i else local
        w = (P @ w.unsqueeze(-1)).squeeze(-1)
    return J


def _powers(d: Tensor, A: Tensor, steps: Steps) -> list[Tensor]:
    """I, Y, …, Y^m, each (*batch, n, n)."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    Y = (d.unsqueeze(-1) * A - steps.shift.unsqueeze(-1) * eye) / steps.number
    powers = [eye.expand_as(Y), Y]
    while len(powers) <= steps.degree:
        powers.append(powers[-1] @ Y)
    return powers


def _polynomial(powers: list[Tensor]) -> Tensor:
    """T_m(Y) = Σ_k Y^k/k!, small terms first."""
    out = torch.zeros_like(powers[0])
    for k in range(len(powers) - 1, -1, -1):
        out = out + powers[k] * (1 / math.factorial(k))
    return out


def _local(powers: list[Tensor], A: Tensor, w: Tensor) -> Tensor:
    """Σ_k Y^k Diag(z_k)"""
    m = len(powers) - 1
    b, columns = w, []
    for _ in range(m):
        columns.append((A @ b.unsqueeze(-1)).squeeze(-1))
        b = (powers[1] @ b.unsqueeze(-1)).squeeze(-1)
    out = torch.zeros_like(powers[0])
    for k in range(m - 1, -1, -1):
        z = torch.zeros_like(columns[0])
        for i in range(m - 1 - k, -1, -1):
            z = z + columns[i] * (1 / math.factorial(k + i + 1))
        out = out + powers[k] * z.unsqueeze(-2)
    return out


# --- its derivatives: those of w along d + ε e_k, all k in a batch dimension in front -------------


def _columns(d: Tensor, A: Tensor, v: Tensor) -> list[Any]:
    """The arguments of expm_action for w(d + ε e_k), in batch element k."""
    *batch, n, _ = _shape(d, A, v)
    eye = torch.eye(n, dtype=d.dtype, device=d.device).view(n, *[1] * len(batch), n)
    along = torch.stack(torch.broadcast_tensors(d, eye), -2)
    return [along, A.unsqueeze(-3), torch.stack([v, torch.zeros_like(v)], -2), None, None, "action"]


def _vjp(inputs: Any, outputs: Any, grads: Any, needs: Any) -> list[Tensor | None]:
    H = grads[0].movedim(-1, 0)
    g = torch.stack([H, torch.zeros_like(H)], -2)
    cores = zip(inputs, (1, 2, 1), needs, strict=True)
    to = [x.shape[: x.dim() - core] if need else None for x, core, need in cores]
    found = expm_gradient(g, *_columns(*inputs), *to)
    dims = zip(found, (-2, -3, -2), to, strict=True)
    return [None if b is None else x.select(dim, -1) for x, dim, b in dims]


def _jvp(inputs: Any, outputs: Any, tangents: Any) -> list[Tensor | None]:
    d, A, v, *rest = _columns(*inputs)
    dd, dA, dv = tangents
    dd = None if dd is None else dd.unsqueeze(-2)
    dA = None if dA is None else dA.unsqueeze(-3)
    dv = torch.zeros_like(v) if dv is None else dv.unsqueeze(-2)
    moved = [lift(d, dd, -2, 2), lift(A, dA, -3, 2), join(v, dv, -2)]
    out = expm_action(*moved, *rest).select(-2, -1).movedim(0, -1)
    return [out.expand_as(outputs[0]).clone(memory_format=torch.contiguous_format)]


expm_jacobian = define_flat(
    "expm_jacobian(Tensor d, Tensor A, Tensor v) -> Tensor",
    _jacobian,
    lambda d, A, v: v.new_empty(_shape(d, A, v)),
)
register(expm_jacobian, vjp=_vjp, jvp=_jvp, core_dims=lambda *_: ([1, 2, 1], [2]))
