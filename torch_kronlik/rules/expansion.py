"""D×D functionals of U⁻¹, differentiable by the series about the point of factorisation.

    U⁻¹ ≈ C⁻¹ − C⁻¹ E C⁻¹ + C⁻¹ E C⁻¹ E C⁻¹,   C the value of U,

with E zero in value, carrying the derivatives. The series is exact in value, first and second
derivatives, and needs no divided difference. :func:`vanishing` refuses a third. What depends on the
route is in ``factor/spectral_series.py`` and ``factor/shifted_series.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..batch import symmetric
from ..derivatives import define_flat, may_be_differentiated, register
from ..factor.spectral_series import Moved
from .common import Factored, Maybe

__all__ = [
    "ends",
    "expand",
    "inverse_block_sum",
    "inverse_blocks",
    "inverse_blocks_diagonal",
    "inverse_trace",
    "moved",
    "vanishing_sum",
]


# --- the end of the series -----------------------------------------------------------------------


def _vanishing_rule(inputs: Any, outputs: Any, along: Any, needs: Any = None) -> list[Maybe]:
    x, order, what = inputs
    if order == 0:
        raise NotImplementedError(f"derivatives of {what} of this order are not implemented")
    g = along[0]
    return [None if g is None else g * vanishing(x, order - 1, what), None, None]


vanishing = define_flat(
    "vanishing(Tensor x, int order, str what) -> Tensor",
    lambda x, order, what: torch.zeros_like(x, memory_format=torch.contiguous_format),
    lambda x, order, what: x.new_empty(x.shape),
)
"""Zero with zero derivatives up to ``order``; the next one raises NotImplementedError."""

register(
    vanishing,
    vjp=_vanishing_rule,
    jvp=lambda *rule: _vanishing_rule(*rule)[:1],
    core_dims=lambda x, order, what: ([0, None, None], [0]),
)


def vanishing_sum(parts: Iterable[Maybe], order: int, what: str) -> Tensor:
    """:func:`vanishing` of the matrices of ``parts``: (*batch)."""
    sums = [x.sum((-2, -1)) for x in parts if x is not None]
    out: Tensor = vanishing(sum(sums[1:], sums[0]), order, what)
    return out


# --- E -------------------------------------------------------------------------------------------


def moved(Z: Tensor) -> Tensor:
    """Zero in value, with the derivatives of the symmetric part of Z."""
    Z = symmetric(Z)
    return Z - Z.detach()


def expand(U: Factored) -> Moved:
    """The parts of E about the factorisation."""
    R = U.factor.R
    return Moved(
        moved(U.rows.dense()) if may_be_differentiated(*U.rows) else None,
        moved(R.mT @ U.K @ R) if may_be_differentiated(U.K) else None,
        moved(U.noise.congruence(R)) if may_be_differentiated(*U.noise) else None,
    )


def ends(e: Moved, what: str) -> Tensor:
    """The end of the series after its second order: (*batch)."""
    return vanishing_sum(e, 2, what)


# --- the functionals -----------------------------------------------------------------------------


def _in_outputs(U: Factored, C: Tensor) -> Tensor:
    R = U.factor.R[..., None, :, :]
    out: Tensor = R @ C @ R.mT
    return out


def _blocks(U: Factored, diagonal: Tensor, e: Moved, terms: Callable[[], Tensor], what: str) -> Any:
    """R C Rᵀ for each weight, from the diagonals of C and the terms with E."""
    C = torch.diag_embed(diagonal)
    if e.moves():
        C = C + terms() + ends(e, what)[..., None, None, None]
    return _in_outputs(U, C)


def inverse_block_sum(U: Factored) -> Tensor:
    """B = Σ_t (U⁻¹)_tt, (*batch, D, D)."""
    e, series, what = expand(U), U.factor.series(U.rows), "the inverse's block sum"
    B = _blocks(U, series.identity(), e, lambda: series.moved_identity(e), what)
    out: Tensor = B.squeeze(-3)
    return out


def inverse_blocks(U: Factored, F: Tensor) -> Tensor:
    """(f_s ⊗ I)ᵀ U⁻¹ (f_s ⊗ I) for each row f_s of F (*batch, S, T): (*batch, S, D, D)."""
    e, series, what = expand(U), U.factor.series(U.rows), "blocks of the inverse"
    out: Tensor = _blocks(U, series.outer(F), e, lambda: series.moved_outer(F, e), what)
    return out


def inverse_blocks_diagonal(U: Factored, F: Maybe = None) -> Tensor:
    """The diagonals of :func:`inverse_blocks`, (*batch, S, D): no D×D block without derivatives.

    F = None stands for the identity.
    """
    e, series, what = expand(U), U.factor.series(U.rows), "a diagonal of the inverse"
    diagonal: Tensor = series.outer(F) @ U.factor.R.square().mT
    if not e.moves():
        return diagonal
    terms = series.moved_outer(F, e) + ends(e, what)[..., None, None, None]
    return diagonal + _in_outputs(U, terms).diagonal(dim1=-2, dim2=-1)


def inverse_trace(U: Factored, M2: Tensor, K2: Tensor) -> Tensor:
    """tr(U⁻¹ (M2 ⊗ K2)), (*batch)."""
    e, series, x = expand(U), U.factor.series(U.rows), symmetric(M2)
    what = "a trace with the inverse"
    C = _blocks(U, series.trace(x), e, lambda: series.moved_trace(x, e), what).squeeze(-3)
    out: Tensor = (C * symmetric(K2)).sum((-2, -1))
    return out
