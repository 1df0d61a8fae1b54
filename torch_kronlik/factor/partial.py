"""What the routes for observed entries share: Q, the zero-padded inverse of U at those entries.

    Q = E_o U_oo⁻¹ E_oᵀ,   E_o the columns of the identity at the observed entries

Every functional of U⁻¹ is the same one of Q. Here are those that a route makes of Q as a matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..batch import sum_to, symmetric
from ..rows import RowMatrix

__all__ = ["gradient_of", "gradients_of", "hvp_of", "no_sums"]


def no_sums(like: Tensor, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Nothing is left over from the pass over the data for the gradients."""
    empty = like.new_empty((*batch, 0))
    return empty, empty.clone(), empty.clone()


def gradient_of(f: Any, U: Any, g: Tensor, to: Any) -> tuple[RowMatrix | None, Tensor | None, Any]:
    """See :func:`.columns.logdet_gradient`, for a route that has the three gradients as methods of
    what they share."""
    G = K = noise = None
    shared = f.shared()
    if to.rows is not None:
        G = f.gradient_in_M(U, shared).scaled(g)
    if to.K is not None:
        K = sum_to(g[..., None, None] * f.gradient_in_K(U, shared), to.K, 2)
    if to.noise is not None:
        noise = U.noise.pull_back(g[..., None, None] * f.gradient_in_noise(shared), to.noise)
    return G, K, noise


def gradients_of(f: Any, U: Any) -> tuple[RowMatrix, Tensor, Tensor]:
    """∂ log det U in M, in K, and in every Σ_t."""
    shared = f.shared()
    return f.gradient_in_M(U, shared), f.gradient_in_K(U, shared), f.gradient_in_noise(shared)


def hvp_of(
    f: Any, U: Any, dM: RowMatrix | None, dK: Tensor | None, dSigma: Tensor | None
) -> tuple[RowMatrix, Tensor, Tensor]:
    """The derivatives of the three log-det gradients along a symmetric direction, from Q as a
    matrix: dQ = −Q dU Q. Cost: O((T·D)³)."""
    (T, D), batch = U.shape, U.batch
    M, K = symmetric(U.rows.dense().detach()), symmetric(U.K.detach())
    Q, eye = f.inverse(), torch.eye(T, dtype=M.dtype, device=M.device)
    zero = M.new_zeros(())
    V = zero if dM is None else dM.dense(dM.batch)
    L = zero if dK is None else symmetric(dK)
    dU: Any = _kron(V, K, T, D) + _kron(M, L, T, D)
    if dSigma is not None:
        blocks = dSigma.unflatten(-2, (T, D))
        dU = dU + eye[:, None, :, None] * blocks[..., :, :, None, :]
    dU = dU.expand(*dU.shape[:-4], T, D, T, D).flatten(-4, -3).flatten(-2)
    dQ = -(Q @ dU @ Q)
    dQ, Q = (x.unflatten(-1, (T, D)).unflatten(-3, (T, D)) for x in (dQ, Q))
    K, L = K.expand(*batch, D, D), L.expand(*L.shape[:-2], D, D)
    M, V = M.expand(*batch, T, T), V.expand(*V.shape[:-2], T, T)
    HM = _einsum("tdue,de->tu", dQ, K) + _einsum("tdue,de->tu", Q, L)
    HK = _einsum("tdue,tu->de", dQ, M) + _einsum("tdue,tu->de", Q, V)
    HS = dQ.diagonal(dim1=-4, dim2=-2).movedim(-1, -3).flatten(-3, -2)
    return RowMatrix(T, whole=symmetric(HM)), symmetric(HK), HS


def _kron(M: Tensor, K: Tensor, T: int, D: int) -> Tensor:
    """M ⊗ K as (*batch, T, D, T, D), from matrices or zeros."""
    M, K = M.expand(*M.shape[:-2], T, T), K.expand(*K.shape[:-2], D, D)
    return M[..., :, None, :, None] * K[..., None, :, None, :]


def _einsum(indices: str, X: Tensor, Y: Tensor) -> Tensor:
    (x, rest) = indices.split(",")
    y, out = rest.split("->")
    return torch.einsum(f"...{x},...{y}->...{out}", X, Y)
