"""``observation_nan_policy("mask")``: U at the observed entries, exact.

GPyTorch wraps the training covariance in a ``MaskedLinearOperator``, whose solves and
log-determinants are those of a matrix without structure: a dense Cholesky factor up to 800 entries
and stochastic beyond. Importing this module lets that operator ask the operator inside first: a
mask of this library's covariance keeps its structure, and masks of other operators are as before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from linear_operator.operators import LinearOperator, MaskedLinearOperator
from torch import Tensor

from ..covariance import KroneckerPlusNoise
from .base import map_noise
from .operator import KroneckerPlusNoiseLinearOperator
from .row_noise import RowNoiseLinearOperator

__all__ = ["ObservedLinearOperator"]


class ObservedLinearOperator(KroneckerPlusNoiseLinearOperator):
    """U at the observed entries, its solves padded with zeros: (*batch, T·D, T·D).

    Args:
        M, K, Sigma, log_noise: as for :class:`KroneckerPlusNoiseLinearOperator`.
        observed: (T, D) of bool, the same in the whole batch.
    """

    def __init__(
        self,
        M: Tensor | LinearOperator,
        K: Tensor | LinearOperator,
        *,
        observed: Tensor,
        Sigma: Tensor | LinearOperator | None = None,
        log_noise: Tensor | None = None,
    ) -> None:
        super().__init__(M, K, Sigma=Sigma, log_noise=log_noise)
        self._kwargs["observed"] = observed
        self.observed = observed

    @cached_property
    def covariance(self) -> KroneckerPlusNoise:
        """The covariance object, which keeps the factorisation."""
        noise: Any = self.noise
        return KroneckerPlusNoise(self.M, self.K, **noise, observed=self.observed)

    def _map(self, f: Callable[[Tensor, int], Tensor]) -> ObservedLinearOperator:
        noise: Any = map_noise(f, self.noise)
        return ObservedLinearOperator(f(self.M, 2), f(self.K, 2), observed=self.observed, **noise)


Structured = KroneckerPlusNoiseLinearOperator | RowNoiseLinearOperator


def at_observed(U: Structured, observed: Tensor) -> Structured:
    """The same with solves and log-determinants of the observed entries, (T, D)."""
    if isinstance(U, RowNoiseLinearOperator):
        return RowNoiseLinearOperator(U.M, U.K, U.row_log_noise, observed)
    return ObservedLinearOperator(U.M, U.K, observed=observed, **U.noise)


def _structured(masked: MaskedLinearOperator) -> Structured | None:
    """None where the mask is not the same for rows and columns, or of another operator."""
    U = masked.base
    is_ours = type(U) in (KroneckerPlusNoiseLinearOperator, RowNoiseLinearOperator)
    if not is_ours or not masked.row_eq_col_mask:
        return None
    return at_observed(U, masked.row_mask.reshape(-1, U.num_outputs))


_inv_quad_logdet = MaskedLinearOperator.inv_quad_logdet
_solve = MaskedLinearOperator.solve


def _masked_inv_quad_logdet(
    self: Any,
    inv_quad_rhs: Tensor | None = None,
    logdet: bool = False,
    reduce_inv_quad: bool = True,
) -> tuple[Tensor, Tensor]:
    U = _structured(self)
    if U is None:
        pair: tuple[Tensor, Tensor] = _inv_quad_logdet(self, inv_quad_rhs, logdet, reduce_inv_quad)
        return pair
    whole = None if inv_quad_rhs is None else _padded(inv_quad_rhs, self.row_mask)
    return U.inv_quad_logdet(whole, logdet, reduce_inv_quad)


def _masked_solve(self: Any, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
    U = _structured(self)
    if U is None:
        out: Tensor = _solve(self, right_tensor, left_tensor)
        return out
    solved = U.solve(_padded(right_tensor, self.row_mask))
    solved = solved[..., self.row_mask, :] if right_tensor.dim() > 1 else solved[self.row_mask]
    return solved if left_tensor is None else left_tensor @ solved


def _padded(x: Tensor, mask: Tensor) -> Tensor:
    """The rows of x, (n) or (*batch, n, C), at the True of the mask, zeros elsewhere."""
    if x.dim() == 1:
        return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x)
    out = torch.zeros(*x.shape[:-2], len(mask), x.shape[-1], dtype=x.dtype, device=x.device)
    return out.index_copy(-2, mask.nonzero()[:, 0], x)


MaskedLinearOperator.inv_quad_logdet = _masked_inv_quad_logdet
MaskedLinearOperator.solve = _masked_solve
