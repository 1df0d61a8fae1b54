"""What a posterior needs of U⁻¹ and of M beyond the blocks of :mod:`.expansion`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..derivatives import define_flat, may_be_differentiated, register
from ..errors import LinAlgError, batch_element
from .common import Factored
from .expansion import ends, expand, moved, vanishing_sum
from .factorise import eigen

__all__ = ["MatrixRoot", "inverse_pairs"]


# --- the whole of (F ⊗ I) U⁻¹ (F ⊗ I)ᵀ -----------------------------------------------------------


def inverse_pairs(U: Factored, F: Tensor) -> Tensor:
    """(f_s ⊗ I)ᵀ U⁻¹ (f_u ⊗ I) for all pairs of rows of F (*batch, S, T): (*batch, S, D, S, D).

    Σ_j (f_sᵀ C_j⁻¹ f_u) R_dj R_ej; with derivatives, the series of :mod:`.expansion`, which then
    needs memory for S·T·D² numbers.
    """
    e, series, R = expand(U), U.factor.series(U.rows), U.factor.R
    G = torch.diag_embed(series.pairs(F).movedim(-3, -1)).movedim((-2, -1), (-4, -3))
    if e.moves():
        end = ends(e, "a posterior covariance matrix")
        G = G + series.moved_pairs(F, e) + end[..., None, None, None, None]
    out: Tensor = torch.einsum("...dj,...jlsu,...el->...sdue", R, G, R)
    return out


# --- M^½ -----------------------------------------------------------------------------------------


def _root_values(s: Tensor, what: str) -> Tensor:
    if bool((s < 0).any()):
        element = batch_element((s < 0).any(-1))
        raise LinAlgError(f"{what} is not positive semidefinite{element}")
    return s.sqrt()


root_values = define_flat(
    "root_values(Tensor s, str what) -> Tensor",
    _root_values,
    lambda s, what: s.new_empty(s.shape),
)
register(root_values, core_dims=lambda *_: ([1, None], [1]))


def sqrt_matmul(M: Tensor, s: Tensor, P: Tensor, E: Tensor, what: str) -> Tensor:
    """M^½ E, the symmetric root of M = P Diag(s) Pᵀ: (*batch, T, D).

    dV_ab = dA_ab / (√s_a + √s_b) in the basis of P. Between two zero eigenvalues it is taken to be
    zero: the derivative along the directions in which M keeps its rank, the only ones that have
    one. First order; the second is refused.
    """
    v = root_values(s, what)
    Eh = P.mT @ E
    Z = v[..., :, None] * Eh
    if may_be_differentiated(M):
        sums = v[..., :, None] + v[..., None, :]
        X = moved(P.mT @ M @ P)
        Z = Z + torch.where(sums > 0, X / torch.where(sums > 0, sums, 1.0), 0.0) @ Eh
        Z = Z + vanishing_sum([X], 1, "a posterior sample")[..., None, None]
    out: Tensor = P @ Z
    return out


class MatrixRoot:
    """The symmetric root of a positive semidefinite matrix X, diagonalised once.

    Args:
        X: (*batch, n, n).
        what: the name of X in an error.
    """

    def __init__(self, X: Tensor, what: str) -> None:
        self.X, self.what = X, what
        self.s, self.P = eigen(X)

    def matmul(self, E: Tensor) -> Tensor:
        """X^½ E."""
        return sqrt_matmul(self.X, self.s, self.P, E, self.what)
