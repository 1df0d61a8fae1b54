"""The rows of the data and the new rows together, for samples and joint densities."""

from __future__ import annotations

import torch
from torch import Tensor

from ..guards import finite
from ..rows import as_rows
from ..waist import MatrixRoot, Waist

__all__ = ["JointPrior"]


class JointPrior:
    """The prior of all T + S rows, M = [M, M_*ᵀ; M_*, M_**], factorised once.

    Args:
        U: the covariance of the data.
        M_cross: (*batch, S, T).
        M_test: (*batch, S, S).
    """

    def __init__(self, U: Waist, M_cross: Tensor, M_test: Tensor) -> None:
        U.method_used  # noqa: B018  factorises: names what is not finite in M, K and the noise
        # It is kept, so it needs a graph whatever the grad mode, and one with nothing to be freed.
        with torch.enable_grad():
            self.M = _join(U.rows.dense(), M_cross, M_test)
        finite(self.M.detach(), M_cross=M_cross, M_test=M_test)
        self.covariance = Waist(as_rows(self.M), U.K, U.noise, "auto")
        self._root: MatrixRoot | None = None

    def latent(self, white: Tensor) -> Tensor:
        """M^½ ε K^½ for standard normal ε (*batch, T + S, D): a draw of f."""
        if self._root is None:
            self._root = MatrixRoot(self.M, "[M, M_cross^T; M_cross, M_test]")
        rows = self._root.matmul(white)
        return MatrixRoot(self.covariance.K, "K").matmul(rows.mT).mT

    def observations(self, white: Tensor) -> Tensor:
        """The same with noise: a smooth function of M, K and Σ where these are singular too."""
        return self.covariance.root_matmul(white)


def _join(M: Tensor, M_cross: Tensor, M_test: Tensor) -> Tensor:
    """[M, M_*ᵀ; M_*, M_**]."""
    batch = torch.broadcast_shapes(*(X.shape[:-2] for X in (M, M_cross, M_test)))
    M, M_cross, M_test = (X.expand(*batch, *X.shape[-2:]) for X in (M, M_cross, M_test))
    return torch.cat([torch.cat([M, M_cross.mT], -1), torch.cat([M_cross, M_test], -1)], -2)
