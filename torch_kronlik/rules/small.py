"""The negative log likelihood of small problems: value and gradients in one native call.

The gradients are outputs of the operator, so reverse mode only scales them. Differentiated again,
their rule is the Hessian product of the general operators, on a factorisation made then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..capture import is_captured
from ..derivatives import define, register
from ..factor.batch import sum_to
from ..factor.diagnose import (
    OVERFLOW,
    not_positive_definite,
    raise_if_not_finite,
)
from ..factor.eigen import U
from .common import Maybe, noise_batch, plus
from .factorise import factorise
from .quad_logdet import hessian_product, quad_logdet

__all__ = ["small_nll"]

_CORES = (2, 2, 2, 2, 1)  # of Y, M, K, Sigma, log_noise


def _small_nll(Y: Tensor, M: Tensor, K: Tensor, Sigma: Maybe, log_noise: Maybe,
               gradients: bool) -> tuple[Tensor, ...]:  # fmt: skip
    noise = log_noise if Sigma is None else Sigma
    *out, status = ops.small_nll(Y, M, K, noise, Sigma is not None, gradients)
    if not is_captured(status) and bool(status.any()):
        _raise(status, Y=Y, M=M, K=K, Sigma=Sigma, log_noise=log_noise)
    return tuple(out)


def _raise(status: Tensor, **arguments: Maybe) -> None:
    raise_if_not_finite(**arguments)
    for code, what in ((1, "Sigma"), (2, U)):
        if bool((status == code).any()):
            not_positive_definite(what, status == code)
    raise OverflowError(OVERFLOW)


def _fake(Y: Tensor, M: Tensor, K: Tensor, Sigma: Maybe, log_noise: Maybe,
          gradients: bool) -> tuple[Tensor, ...]:  # fmt: skip
    batch = torch.broadcast_shapes(
        Y.shape[:-2], M.shape[:-2], K.shape[:-2], noise_batch(Sigma, log_noise)
    )
    T, D = Y.shape[-2:]
    cores = [(T, D), (T, T), (D, D), (D,) if Sigma is None else (D, D)]
    shapes = [(*batch, *core) if gradients else (0,) for core in cores]
    return Y.new_empty(batch), *(Y.new_empty(shape) for shape in shapes)


def _vjp(inputs: Any, outputs: Any, grads: Any, needs: Any) -> list[Maybe]:
    found = _by_argument(inputs, outputs[1:])
    to = [
        x.shape[: x.dim() - core] if need and x is not None else None
        for x, core, need in zip(inputs, _CORES, needs, strict=False)
    ]
    out: list[Maybe] = [None] * 5
    if grads[0] is not None:
        out = [
            None if b is None or g is None else sum_to(_widened(grads[0], core) * g, b, core)
            for g, b, core in zip(found, to, _CORES, strict=True)
        ]
    if any(g is not None for g in grads[1:]):
        V = _by_argument(inputs, grads[1:])
        out = [plus(a, b) for a, b in zip(out, _hessian_product(inputs, to, V), strict=True)]
    return [*out, None]


def _widened(g: Tensor, core: int) -> Tensor:
    return g.reshape(g.shape + (1,) * core) if g.dim() else g


def _by_argument(inputs: Any, four: Any) -> list[Maybe]:
    """(Y, M, K, noise) as (Y, M, K, Sigma, log_noise)."""
    full = inputs[3] is not None
    return [*four[:3], four[3] if full else None, None if full else four[3]]


def _hessian_product(inputs: Any, to: Any, V: Any) -> list[Maybe]:
    Y, M, K, Sigma, log_noise, _ = inputs
    c, _ = factorise(M, K, Sigma, log_noise, "auto")
    inv_quad, logdet, *saved = quad_logdet(Y, *c)
    half_q, half_l = (torch.full_like(x, 0.5) for x in (inv_quad, logdet))
    return hessian_product((half_q, half_l, Y, *c, *saved), to, V)


small_nll = define(
    "gaussian_nll_small(Tensor Y, Tensor M, Tensor K, Tensor? Sigma, Tensor? log_noise,"
    " bool gradients) -> (Tensor nll, Tensor gY, Tensor gM, Tensor gK, Tensor gnoise)",
    _small_nll,
    _fake,
)
register(
    small_nll,
    vjp=_vjp,
    core_dims=lambda *args: ([*_CORES, None], [0, 2, 2, 2, 1 if args[3] is None else 2]),
)
