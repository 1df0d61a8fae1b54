"""The rows of the data and the new rows together, for samples and joint densities."""

from __future__ import annotations

import torch
from torch import Tensor

from ..covariance import KroneckerPlusNoise
from ..guards import finite
from ..rules.factorise import eigen
from ..rules.posterior import sqrt_matmul
from ..rules.sample import root_matmul

__all__ = ["JointPrior"]


class JointPrior:
    """The prior of all T + S rows, M = [M, M_*ᵀ; M_*, M_**], factorised once.

    Args:
        U: the covariance of the data.
        M_cross: (*batch, S, T).
        M_test: (*batch, S, S).
    """

    def __init__(self, U: KroneckerPlusNoise, M_cross: Tensor, M_test: Tensor) -> None:
        U._factorise()  # names what is not finite in M, K and the noise
        # It is kept, so it needs a graph whatever the grad mode, and one with nothing to be freed.
        with torch.enable_grad():
            self.M = _join(U.rows.dense(), M_cross, M_test)
        finite(self.M.detach(), M_cross=M_cross, M_test=M_test)
        self.covariance = KroneckerPlusNoise(self.M, U.K, **U.noise.named())
        self._eigen: tuple[Tensor, Tensor] | None = None

    def latent(self, white: Tensor) -> Tensor:
        """M^½ ε K^½ for standard normal ε (*batch, T + S, D): a draw of f."""
        if self._eigen is None:
            self._eigen = eigen(self.M)
        s, P = self._eigen
        rows = sqrt_matmul(self.M, s, P, white, "[M, M_cross^T; M_cross, M_test]")
        K = self.covariance.K
        s, P = eigen(K)
        return sqrt_matmul(K, s, P, rows.mT, "K").mT

    def observations(self, white: Tensor) -> Tensor:
        """The same with noise: a smooth function of M, K and Σ where these are singular too."""
        return root_matmul(self.covariance._spectral(), white)


def _join(M: Tensor, M_cross: Tensor, M_test: Tensor) -> Tensor:
    """[M, M_*ᵀ; M_*, M_**]."""
    batch = torch.broadcast_shapes(*(X.shape[:-2] for X in (M, M_cross, M_test)))
    M, M_cross, M_test = (X.expand(*batch, *X.shape[-2:]) for X in (M, M_cross, M_test))
    return torch.cat([torch.cat([M, M_cross.mT], -1), torch.cat([M_cross, M_test], -1)], -2)
