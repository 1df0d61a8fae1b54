"""What the routes for observed entries share: Q, the zero-padded inverse of U at those entries.

    Q = E_o U_oo⁻¹ E_oᵀ,   E_o the columns of the identity at the observed entries

Every functional of U⁻¹ is the same one of Q. Here are those that a route makes of Q as a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch import Shape, sum_to, symmetric, unflatten
from ..records import share_members
from ..rows import RowMatrix
from .base import PARTIAL, Factor

__all__ = ["gather", "no_sums", "register_partial", "scatter"]


def no_sums(like: Tensor, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Nothing is left over from the pass over the data for the gradients."""
    empty = like.new_empty((*batch, 0))
    return empty, empty.clone(), empty.clone()


def gather(Y: Tensor, places: Tensor, real: Tensor) -> Tensor:
    """The entries of Y (*batch, T, D, k) at places among the T·D, (*batch, n): (*batch, n, k), zero
    where ``real`` is."""
    flat = Y.flatten(-3, -2)
    batch = torch.broadcast_shapes(flat.shape[:-2], places.shape[:-1])
    flat = flat.expand(*batch, *flat.shape[-2:])
    places = places.expand(*batch, places.shape[-1])[..., None]
    return flat.take_along_dim(places, -2) * real[..., None]


def scatter(x: Tensor, places: Tensor, real: Tensor, shape: torch.Size) -> Tensor:
    """The adjoint of :func:`gather`: (*batch, T, D, k), zero at all other places."""
    out = x.new_zeros((*x.shape[:-2], shape.numel(), x.shape[-1]))
    places = places[..., None].expand(x.shape)
    return unflatten(out.scatter(-2, places, x * real[..., None]), -2, shape)


# --- members of every such route -----------------------------------------------------------------


class _Members:
    """What a route gets beside its own ``quad_logdet``, ``solve``, ``blocks``, ``inverse``, and
    ``shared`` with the three gradients that are made of what it returns."""

    complement = 0  # nothing that the derivatives need is left out

    def solve_scaled(self, A: Tensor) -> Tensor:
        """A itself is what ``quad_logdet`` leaves."""
        return A.clone()

    def sizes_of_sums(self) -> tuple[int, int, int]:
        return 0, 0, 0

    def quadratic_in_K(self, g: Tensor, A: Tensor, to: Shape | None) -> None:
        """Nothing better than the product with M."""

    def explained(self: Any, weights: Tensor, K: Tensor) -> Tensor:
        """K (x_s ⊗ I)ᵀ Q (x_s ⊗ I) K."""
        K = K[..., None, :, :]
        out: Tensor = K @ self.blocks(weights) @ K
        return out

    def logdet_gradient(
        self: Any, U: Any, g: Tensor, to: Any, saved: Sequence[Tensor] | None
    ) -> tuple[RowMatrix | None, Tensor | None, Any]:
        """See :func:`.columns.logdet_gradient`."""
        G = K = noise = None
        shared = self.shared()
        if to.rows is not None:
            G = self.gradient_in_M(U, shared).scaled(g)
        if to.K is not None:
            K = sum_to(g[..., None, None] * self.gradient_in_K(U, shared), to.K, 2)
        if to.noise is not None:
            noise = U.noise.pull_back(g[..., None, None] * self.gradient_in_noise(shared), to.noise)
        return G, K, noise

    def logdet_gradients(self: Any, U: Any) -> tuple[RowMatrix, Tensor, Tensor]:
        """∂ log det U in M, in K, and in every Σ_t."""
        x = self.shared()
        return self.gradient_in_M(U, x), self.gradient_in_K(U, x), self.gradient_in_noise(x)

    def logdet_hvp(
        self, U: Any, dM: RowMatrix | None, dK: Tensor | None, dSigma: Tensor | None
    ) -> tuple[RowMatrix, Tensor, Tensor]:
        """The derivatives of the three along a symmetric direction."""
        return _hvp(self, U, dM, dK, dSigma)


def register_partial(record: type) -> type:
    """Make ``record``, a NamedTuple, a route for a noise of each row, with the members that all of
    them share where it has none of its own."""
    share_members(record, _Members)
    registered: type = Factor.register_beside(Noise=PARTIAL)(record)
    return registered


def _hvp(
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
