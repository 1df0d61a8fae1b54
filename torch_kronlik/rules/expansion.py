"""D×D functionals of U⁻¹, differentiable by expansion about the point of factorisation.

In the basis of the factorisation U⁻¹ = (P ⊗ R) (Diag(1/w) + E)⁻¹ (P ⊗ R)ᵀ, 1/w_ij = 1 + s_i λ_j,

    E = X ⊗ (Λ + V_K) + (S ⊗ V_K + I ⊗ V_Σ),
    X = Pᵀ M P − S,   V_K = Rᵀ K R − Λ,   V_Σ = Rᵀ Σ R − I,

where P, R, S, Λ are constants, so that E is zero in value and carries the derivatives. The series
W − W E W + W E W E W − … cut after the second order is exact in value, first and second
derivatives, and needs no divided difference. :func:`vanishing` refuses a third.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import symmetric
from ..derivatives import define_flat, may_be_differentiated, register
from .common import Factored, Maybe

__all__ = [
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


class Expansion(NamedTuple):
    """The factorisation, and the parts of E; None for what does not move."""

    s: Tensor  # (*batch, T)
    lam: Tensor  # (*batch, D)
    W: Tensor  # (*batch, T, D)
    X: Maybe  # (*batch, T, T)
    VK: Maybe  # (*batch, D, D)
    VSigma: Maybe  # (*batch, D, D)

    def moves(self) -> bool:
        return any(x is not None for x in self[3:])


def moved(Z: Tensor) -> Tensor:
    """Zero in value, with the derivatives of the symmetric part of Z."""
    Z = symmetric(Z)
    return Z - Z.detach()


def expand(U: Factored) -> Expansion:
    f = U.factor
    X = VK = VSigma = None
    if may_be_differentiated(*U.rows):
        X = moved(f.P.mT @ U.rows.matmul(f.P))
    if may_be_differentiated(U.K):
        VK = moved(f.R.mT @ U.K @ f.R)
    if may_be_differentiated(*U.noise):
        VSigma = moved(U.noise.congruence(f.R))
    return Expansion(f.s, f.lam, f.weights(), X, VK, VSigma)


# --- the functionals -----------------------------------------------------------------------------


class Weights(NamedTuple):
    """A weight x = PᵀXP on the rows, as the sums that the terms of the series need of it.

    ``plain`` x_kk; ``once(w)`` Σ_i w_i X_ik x_ki; ``twice(w)`` Σ_il X_ki w_i x_il w_l X_lk; each
    for every k, with w a column of W: (*batch, S, T), where S counts weights.
    """

    plain: Tensor
    once: Callable[[Tensor], Tensor]
    twice: Callable[[Tensor], Tensor]


def _columns(e: Expansion, x: Weights, what: str) -> Tensor:
    """Σ_ik x_ik [(Diag(1/w) + E)⁻¹]_(ij,kl) for each weight: (*batch, S, D, D)."""
    C = torch.diag_embed(x.plain @ e.W)
    return C + _moved_columns(e, x, what) if e.moves() else C


def _moved_columns(e: Expansion, x: Weights, what: str) -> Tensor:
    """The terms with E: zero in value."""
    W, local = e.W, _local(e)
    C = vanishing_sum(e[3:], 2, what)[..., None, None, None]
    if local is not None:
        WNW = W[..., :, None] * local * W[..., None, :]
        second = WNW @ (local * W[..., None, :])
        C = C + _contract(x.plain, second - WNW)
    if e.X is not None:
        C = C + _row_terms(e, x, local)
    return C


def _local(e: Expansion) -> Maybe:
    """N_i = s_i V_K + V_Σ, (*batch, T, D, D): the part of E that is diagonal in the rows."""
    noise = None if e.VSigma is None else e.VSigma[..., None, :, :]
    if e.VK is None:
        return noise if noise is None else noise + 0 * e.s[..., :, None, None]
    N = e.s[..., :, None, None] * e.VK[..., None, :, :]
    return N if noise is None else N + noise


def _contract(weights: Tensor, blocks: Tensor) -> Tensor:
    """Σ_i weights_si blocks_i: (*batch, S, T) and (*batch, T, D, D) to (*batch, S, D, D)."""
    D = blocks.shape[-1]
    flat = weights @ blocks.flatten(-2)
    return flat.reshape(*flat.shape[:-1], D, D)


def _row_terms(e: Expansion, x: Weights, local: Maybe) -> Tensor:
    """The terms with X: one row of the D×D result for each j."""
    W, lam = e.W, e.lam
    rows, diagonal = [], []
    for j in range(W.shape[-1]):
        w, lam_j = W[..., j], lam[..., j, None, None]
        once = x.once(w)
        row = torch.zeros_like(once @ W)
        if e.VK is not None:
            row = row - (once @ W) * e.VK[..., None, j, :]
        if local is not None:
            row = row + 2 * lam_j * ((once * w[..., None, :]) @ (local[..., j, :] * W))
        rows.append(row)
        double = lam_j.square() * (x.twice(w) @ w[..., None])
        diagonal.append((double - lam_j * (once @ w[..., None]))[..., 0])
    return symmetric(torch.stack(rows, -2)) + torch.diag_embed(torch.stack(diagonal, -1))


def _in_outputs(U: Factored, C: Tensor) -> Tensor:
    R = U.factor.R[..., None, :, :]
    out: Tensor = R @ C @ R.mT
    return out


def inverse_block_sum(U: Factored) -> Tensor:
    """B = Σ_t (U⁻¹)_tt, (*batch, D, D)."""
    e = expand(U)
    one = torch.ones_like(e.s)[..., None, :]
    x = Weights(
        one,
        lambda w: (w * _diagonal(_not_none(e.X)))[..., None, :],
        lambda w: w.square()[..., None, :] @ _not_none(e.X).square(),
    )
    return _in_outputs(U, _columns(e, x, "the inverse's block sum")).squeeze(-3)


def inverse_blocks(U: Factored, F: Tensor) -> Tensor:
    """(f_s ⊗ I)ᵀ U⁻¹ (f_s ⊗ I) for each row f_s of F (*batch, S, T): (*batch, S, D, D)."""
    e = expand(U)
    return _in_outputs(U, _columns(e, _outer_weights(e, F @ U.factor.P), "blocks of the inverse"))


def inverse_blocks_diagonal(U: Factored, F: Maybe = None) -> Tensor:
    """The diagonals of :func:`inverse_blocks`, (*batch, S, D): no D×D block without derivatives.

    F = None stands for the identity.
    """
    e, P, R = expand(U), U.factor.P, U.factor.R
    x = _outer_weights(e, P if F is None else F @ P)
    diagonal = (x.plain @ e.W) @ R.square().mT
    if not e.moves():
        return diagonal
    moved_blocks = _in_outputs(U, _moved_columns(e, x, "a diagonal of the inverse"))
    return diagonal + _diagonal(moved_blocks)


def _outer_weights(e: Expansion, Fh: Tensor) -> Weights:
    """The weights f fᵀ, for each row f of Fh."""
    return Weights(
        Fh.square(),
        lambda w: ((Fh * w[..., None, :]) @ _not_none(e.X)) * Fh,
        lambda w: ((Fh * w[..., None, :]) @ _not_none(e.X)).square(),
    )


def inverse_trace(U: Factored, M2: Tensor, K2: Tensor) -> Tensor:
    """tr(U⁻¹ (M2 ⊗ K2)), (*batch)."""
    e, P = expand(U), U.factor.P
    xh = P.mT @ symmetric(M2) @ P
    x = Weights(
        _diagonal(xh)[..., None, :],
        lambda w: w[..., None, :] @ (_not_none(e.X) * xh),
        lambda w: _diagonal(
            _not_none(e.X) @ (w[..., :, None] * xh * w[..., None, :]) @ _not_none(e.X)
        )[..., None, :],
    )
    C = _in_outputs(U, _columns(e, x, "a trace with the inverse")).squeeze(-3)
    return (C * symmetric(K2)).sum((-2, -1))


def _not_none(X: Maybe) -> Tensor:
    assert X is not None
    return X


def _diagonal(X: Tensor) -> Tensor:
    return X.diagonal(dim1=-2, dim2=-1)
