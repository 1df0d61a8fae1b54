"""New rows with covariates: universal kriging."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autocast import full_precision
from ..batch import expand_to, symmetric, unflatten
from ..checks import check_broadcast, check_uniform
from ..guards import finite
from ..predict import KroneckerPosterior
from .columns import as_matrix

__all__ = ["RegressionPosterior"]


class RegressionPosterior:
    """The Gaussian posterior of S new rows with covariates, known as universal kriging.

    With h the part of the new rows' design that the residuals do not carry over,
    h = x_new − (M_* ⊗ K) U⁻¹ x:

        mean                  X_new b̂ + M_* (U⁻¹·R) K,  R the residuals
        latent covariance     that of :class:`KroneckerPosterior` + h S⁻¹ hᵀ
        observations add      I_S ⊗ Σ

    The latent value is X_new b plus the random part of the row. Attributes are computed when they
    are asked for, differentiably in every argument.

    Args:
        fit: the regression.
        X_new: (*batch, S, c), the covariates of the new rows.
        M_cross, M_test: as of :class:`KroneckerPosterior`.

    Raises:
        TypeError, ValueError: an argument does not fit, or is not finite.

    Cost: beside that of :class:`KroneckerPosterior`, O(S·T·D·p + S·D·p²).
    Source: Matheron 1969; Henderson 1975.

    >>> import torch_kronlik as tk
    >>> U = tk.KroneckerPlusNoise(torch.zeros(3, 3), torch.eye(1), log_noise=torch.zeros(1))
    >>> fit = U.regress(torch.tensor([[1.0], [2.0], [6.0]]), torch.ones(3, 1))
    >>> new = fit.predict(torch.ones(1, 1), torch.zeros(1, 3), torch.zeros(1))
    >>> new.mean, new.variance, new.observation_variance
    (tensor([[3.]]), tensor([[0.3333]]), tensor([[1.3333]]))
    """

    @full_precision
    def __init__(self, fit: Any, X_new: Tensor, M_cross: Tensor, M_test: Tensor) -> None:
        self.fit, self.X_new, self.M_cross = fit, X_new, M_cross
        self._kriging = KroneckerPosterior(fit.U, fit.residuals, M_cross, M_test)
        check_uniform(K=fit.U.K, X_new=X_new)
        self.event_shape = self._kriging.event_shape
        shape = self.event_shape[0], fit.num_covariates
        if X_new.dim() < 2 or tuple(X_new.shape[-2:]) != shape:
            raise ValueError(
                f"X_new must have shape (*batch, S, c) with S = {shape[0]} (from M_cross) and "
                f"c = {shape[1]} (from X), got {tuple(X_new.shape)}"
            )
        self.batch_shape = check_broadcast(
            **{"data, M_cross and M_test": self._kriging.batch_shape, "X_new": X_new.shape[:-2]}
        )

    @property
    @full_precision
    def mean(self) -> Tensor:
        """Of the latent values and of the observations: (*batch, S, D)."""
        fixed = self.X_new @ self.fit.coefficients
        return self._expand(finite(fixed, X_new=self.X_new) + self._kriging.mean, 2)

    @property
    @full_precision
    def variance(self) -> Tensor:
        """The variances of the latent values: (*batch, S, D)."""
        return self._expand(self._kriging.variance + self._root.square().sum(-3), 2)

    @property
    @full_precision
    def observation_variance(self) -> Tensor:
        """The variances of new observations, noise included: (*batch, S, D)."""
        return self._expand(self._kriging.observation_variance + self._root.square().sum(-3), 2)

    @property
    @full_precision
    def row_covariance(self) -> Tensor:
        """The covariance of the latent values of each row: (*batch, S, D, D)."""
        root = self._root.movedim(-3, -1)
        return self._expand(self._kriging.row_covariance + root @ root.mT, 3)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch_shape={tuple(self.batch_shape)}, "
            f"event_shape={tuple(self.event_shape)})"
        )

    @property
    def _root(self) -> Tensor:
        """C⁻¹ h̃ᵀ with h̃ = h V, the square of which is h S⁻¹ hᵀ: (*batch, p, S, D)."""
        fit, D = self.fit, self.event_shape[1]
        z = fit._z.unflatten(-2, fit.U.event_shape).flatten(-2)  # (*batch, T, D·p)
        carried = (self.M_cross @ z).unflatten(-1, (D, fit.num_coefficients))
        h = as_matrix(fit._design(self.X_new)) @ fit._V - as_matrix(
            symmetric(fit.U.K)[..., None, :, :] @ carried
        )
        h = finite(h, X_new=self.X_new, M_cross=self.M_cross)
        root = torch.linalg.solve_triangular(fit._C, h.mT, upper=False)
        return unflatten(root, -1, self.event_shape)

    def _expand(self, x: Tensor, core: int) -> Tensor:
        return expand_to(x, self.batch_shape, core)
