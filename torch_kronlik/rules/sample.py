"""Products with a root of U, for reparameterised sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from ..derivatives import may_be_differentiated
from .common import Factored
from .expansion import moved, vanishing_sum

__all__ = ["root_matmul"]


def root_matmul(U: Factored, E: Tensor) -> Tensor:
    """F·E with U = F Fᵀ, F = (I ⊗ L) (M ⊗ K̃ + I)^½, Σ = L Lᵀ, K̃ = L⁻¹ K L⁻ᵀ: (*batch, T, D).

    The symmetric square root is a smooth function of its positive definite argument, whatever the
    eigenvectors that it is computed with. Its derivative divides by sums of roots, never by
    differences: dV_ab = dA_ab / (v_a + v_b). First order; the second is refused.
    """
    f, whitened = U.factor, U.noise.whitened(U.K)
    Q = U.noise.coordinates(f.R).detach()
    v = (1 + f.s[..., :, None] * f.lam[..., None, :]).sqrt()
    EQ = E @ Q
    Eh = f.P.mT @ EQ
    Z = v * Eh
    parts = []
    if may_be_differentiated(*U.rows):
        X = moved(f.P.mT @ U.rows.matmul(f.P))
        Z = Z + _rows_term(X, f.lam, v, Eh)
        parts.append(X)
    if may_be_differentiated(whitened):
        V = moved(Q.mT @ whitened @ Q)
        Z = Z + _columns_term(V, f.s, v, Eh)
        parts.append(V)
    if parts:
        Z = Z + vanishing_sum(parts, 1, "a sample")[..., None, None]
    white = f.P @ Z
    if f.complement:  # there v = 1; with derivatives the basis is complete
        white = white + f.outside(EQ)
    out: Tensor = U.noise.root_matmul(white @ Q.mT)
    return out


def _rows_term(X: Tensor, lam: Tensor, v: Tensor, Eh: Tensor) -> Tensor:
    """Σ_k λ_j X_ik ε_kj / (v_ij + v_kj), a column at a time: memory O(T²)."""
    columns = []
    for j in range(v.shape[-1]):
        w = v[..., j]
        weights = X / (w[..., :, None] + w[..., None, :])
        columns.append(lam[..., j, None] * (weights @ Eh[..., j, None]).squeeze(-1))
    return torch.stack(columns, -1)


def _columns_term(V: Tensor, s: Tensor, v: Tensor, Eh: Tensor) -> Tensor:
    """Σ_l s_i V_jl ε_il / (v_ij + v_il)."""
    weights = V[..., None, :, :] / (v[..., :, None] + v[..., None, :])
    return s[..., :, None] * (weights @ Eh[..., None]).squeeze(-1)
