"""Validation without refitting: every entry, or every row, predicted from all the others.

Functions of a covariance that may be factorised already; ``validation.py`` has the public ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..autocast import full_precision
from ..batch import symmetric
from ..waist import Waist

__all__ = ["entries", "entries_log_prob", "rows", "rows_log_prob"]

LOG_2PI = math.log(2 * math.pi)


@full_precision
def entries(U: Waist, Y: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, variance) of every entry given all others, each (*batch, T, D).

    ``y − [U⁻¹y] / diag(U⁻¹)`` and ``1 / diag(U⁻¹)``
    """
    A, precision = _entries(U, Y)
    return U.seen(Y - A / precision), U.seen((1 / precision).expand_as(A))


@full_precision
def entries_log_prob(U: Waist, Y: Tensor) -> Tensor:
    """The log density of every entry under :func:`entries`, summed: (*batch)."""
    A, precision = _entries(U, Y)
    terms = A.square() / precision - precision.log()
    return -0.5 * (terms.sum((-2, -1)) + U.num_observed * LOG_2PI)


@full_precision
def rows(U: Waist, Y: Tensor) -> tuple[Tensor, Tensor]:
    """(mean (*batch, T, D), covariance (*batch, T, D, D)) of every row given all others.

    ``y_t − (U⁻¹_tt)⁻¹ [U⁻¹y]_t`` and ``(U⁻¹_tt)⁻¹``
    """
    A, G = _rows(U, Y)
    eye = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device).expand_as(G)
    covariance = symmetric(torch.cholesky_solve(eye, G))
    mean = U.seen(Y - torch.cholesky_solve(A[..., None], G).squeeze(-1))
    covariance = covariance.expand(*mean.shape, mean.shape[-1])
    if U.observed is not None:
        both = U.observed[..., :, None] & U.observed[..., None, :]
        covariance = torch.where(both, covariance, 0)
    return mean, covariance


@full_precision
def rows_log_prob(U: Waist, Y: Tensor) -> Tensor:
    """The log density of every row under :func:`rows`, summed: (*batch)."""
    A, G = _rows(U, Y)
    white = torch.linalg.solve_triangular(G, A[..., None], upper=False)
    logdet = 2 * G.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1))
    density: Tensor = white.square().sum((-3, -2, -1)) - logdet + U.num_observed * LOG_2PI
    return -0.5 * density


def _entries(U: Waist, Y: Tensor) -> tuple[Tensor, Tensor]:
    """U⁻¹·Y and diag(U⁻¹), 1 where nothing is observed."""
    U.check_data("Y", Y)
    precision = U.finite(U.inverse_blocks_diagonal())
    if U.observed is not None:
        precision = torch.where(U.observed, precision, 1)
    return U.inverse_matmul(Y), precision


def _rows(U: Waist, Y: Tensor) -> tuple[Tensor, Tensor]:
    """U⁻¹·Y and the Cholesky factors of the diagonal blocks of U⁻¹, with 1 on the diagonal where
    nothing is observed."""
    U.check_data("Y", Y)
    A, blocks = U.inverse_matmul(Y), symmetric(U.inverse_own_blocks())
    if U.observed is not None:
        blocks = blocks + torch.diag_embed((~U.observed).to(U.dtype))
    return A, torch.linalg.cholesky(blocks)
