"""What a posterior needs of U⁻¹ and of M beyond the blocks of :mod:`.expansion`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..derivatives import define_flat, may_be_differentiated, register
from ..errors import LinAlgError, batch_element
from .common import Factored
from .expansion import Expansion, expand, moved, vanishing_sum
from .factorise import eigen

__all__ = ["MatrixRoot", "inverse_pairs"]


# --- the whole of (F ⊗ I) U⁻¹ (F ⊗ I)ᵀ -----------------------------------------------------------


def inverse_pairs(U: Factored, F: Tensor) -> Tensor:
    """(f_s ⊗ I)ᵀ U⁻¹ (f_u ⊗ I) for all pairs of rows of F (*batch, S, T): (*batch, S, D, S, D).

    Σ_j (F̂ Diag(W_·j) F̂ᵀ)_su R_dj R_ej with F̂ = F P; with derivatives, the expansion of
    :mod:`.expansion`, which then needs memory for S·T·D² numbers.
    """
    e, f = expand(U), U.factor
    Fh = F @ f.P
    scaled = Fh[..., None, :, :] * e.W.mT[..., :, None, :]  # (*batch, D, S, T)
    G = torch.diag_embed((scaled @ Fh[..., None, :, :].mT).movedim(-3, -1)).movedim(
        (-2, -1), (-4, -3)
    )
    if e.moves():
        G = G + _moved_pairs(e, scaled)
    out: Tensor = torch.einsum("...dj,...jlsu,...el->...sdue", f.R, G, f.R)
    return out


def _moved_pairs(e: Expansion, scaled: Tensor) -> Tensor:
    """a (−E + E W E) aᵀ, zero in value: (*batch, D, D, S, S)."""
    Ea = _apply(e, scaled)  # (*batch, D, D, T, S)
    first = scaled[..., :, None, :, :] @ Ea
    second = torch.einsum("...mjis,...im,...mliu->...jlsu", Ea, e.W, Ea)
    end = vanishing_sum(e[3:], 2, "a posterior covariance matrix")
    return end[..., None, None, None, None] + second - first


def _apply(e: Expansion, scaled: Tensor) -> Tensor:
    """E_ml a_lᵀ for the outputs m, l: (*batch, D, D, T, S)."""
    columns = scaled.mT[..., None, :, :, :]  # of each l: (T, S)
    K_moved = 0 if e.VK is None else e.VK[..., :, :, None, None]
    out = torch.zeros_like(e.lam)[..., :, None, None, None] * columns
    if e.VK is not None:
        out = out + e.VK[..., :, :, None, None] * (e.s[..., None, None, :, None] * columns)
    if e.VSigma is not None:
        out = out + e.VSigma[..., :, :, None, None] * columns
    if e.X is not None:
        K = torch.diag_embed(e.lam)[..., :, :, None, None] + K_moved
        out = out + K * (e.X[..., None, None, :, :] @ columns)
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
