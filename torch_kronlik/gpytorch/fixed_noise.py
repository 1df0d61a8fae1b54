"""Noise variances that are known for every entry, as a multitask likelihood for GPyTorch."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from gpytorch.likelihoods.multitask_gaussian_likelihood import _MultitaskGaussianLikelihoodBase
from gpytorch.likelihoods.noise_models import HomoskedasticNoise
from gpytorch.utils.warnings import GPInputWarning
from linear_operator.operators import DiagLinearOperator, LinearOperator
from torch import Tensor, nn

from .prediction import KroneckerPredictionStrategy, evaluate, kronecker_factors
from .row_noise import RowNoiseLinearOperator

__all__ = ["FixedNoiseMultitaskGaussianLikelihood"]


class FixedNoiseMultitaskGaussianLikelihood(_MultitaskGaussianLikelihoodBase):  # type: ignore[misc]
    """Multitask likelihood with a known noise variance for every entry, exact and structured.

    What ``FixedNoiseGaussianLikelihood`` is for one output. Use it like
    :class:`MultitaskGaussianLikelihood`; for observations at new rows, pass their variances,
    ``likelihood(model(x_new), noise=...)``.

    Args:
        noise: (n, t), the noise variances of the training data, positive.
        learn_additional_noise: whether a variance that is learnt is added to all of them.
        batch_shape, noise_prior, noise_constraint: of the additional noise.

    Raises:
        ValueError: noise has no two dimensions, or is not positive and finite.

    Cost: see :class:`torch_kronlik.KroneckerPlusNoise` with ``row_log_noise``.

    >>> likelihood = FixedNoiseMultitaskGaussianLikelihood(torch.full((3, 2), 0.1))
    >>> likelihood.noise.shape
    torch.Size([3, 2])
    """

    has_global_noise = has_task_noise = False  # of the parent's kinds

    def __init__(
        self,
        noise: Tensor,
        learn_additional_noise: bool = False,
        batch_shape: torch.Size = torch.Size(),  # noqa: B008 as the parent's
        noise_prior: Any = None,
        noise_constraint: Any = None,
    ) -> None:
        if noise.dim() < 2 or not bool(((noise > 0) & noise.isfinite()).all()):
            got = f"shape {tuple(noise.shape)}, least entry {noise.min():g}"
            raise ValueError(
                f"noise must be the positive, finite variances (n, t) of the entries, got {got}"
            )
        super().__init__(num_tasks=noise.shape[-1], noise_covar=nn.Module())
        self.register_buffer("fixed_noise", noise)
        self.second_noise_covar = None
        if learn_additional_noise:
            self.second_noise_covar = HomoskedasticNoise(noise_prior, noise_constraint, batch_shape)

    @property
    def second_noise(self) -> Tensor:
        """The variance that is learnt, (*batch, 1), or zero."""
        if self.second_noise_covar is None:
            zero: Tensor = self.fixed_noise.new_zeros(1)
            return zero
        learnt: Tensor = self.second_noise_covar.noise
        return learnt

    @property
    def noise(self) -> Tensor:
        """The variances of the training data, all told: (*batch, n, t)."""
        total: Tensor = self.fixed_noise + self.second_noise[..., None]
        return total

    def _variances(self, shape: torch.Size, noise: Tensor | None) -> Tensor:
        """(*batch, rows, t)"""
        if noise is not None:
            return noise.expand(*noise.shape[:-2], *shape[-2:]) + self.second_noise[..., None]
        if shape[-2:] == self.fixed_noise.shape[-2:]:
            return self.noise
        warnings.warn(
            f"noise is of {self.fixed_noise.shape[-2]} rows and the distribution of {shape[-2]}: "
            "no fixed noise is added; pass noise=... for these rows",
            GPInputWarning,
            stacklevel=3,
        )
        return self.second_noise[..., None].expand(*self.second_noise.shape[:-1], *shape[-2:])

    def marginal(
        self, function_dist: MultitaskMultivariateNormal, *params: Any, **kwargs: Any
    ) -> MultitaskMultivariateNormal:
        """The distribution of observations, given that of the latent function: noise added."""
        noise = self._variances(function_dist.event_shape, kwargs.get("noise"))
        covar = evaluate(function_dist.lazy_covariance_matrix)
        factors = self._factors(function_dist)
        if factors is not None:
            covar = RowNoiseLinearOperator(*factors, noise.log())
        elif getattr(function_dist, "_interleaved", True):
            covar = covar.add_diagonal(noise.flatten(-2))
        else:
            covar = covar.add_diagonal(noise.mT.flatten(-2))
        same = {"interleaved": getattr(function_dist, "_interleaved", True)}
        return type(function_dist)(function_dist.mean, covar, **same)

    def _factors(self, function_dist: Any) -> tuple[Tensor, Tensor] | None:
        if not getattr(function_dist, "_interleaved", False):
            return None
        return kronecker_factors(evaluate(function_dist.lazy_covariance_matrix), self.num_tasks)

    def _shaped_noise_covar(
        self, shape: torch.Size, *params: Any, noise: Tensor | None = None, **kwargs: Any
    ) -> LinearOperator:
        return DiagLinearOperator(self._variances(shape, noise).flatten(-2))

    def prediction_strategy(
        self, train_prior_dist: MultitaskMultivariateNormal
    ) -> type[KroneckerPredictionStrategy] | None:
        """How an ExactGP with this prior over its training rows predicts; None: GPyTorch's way."""
        return None if self._factors(train_prior_dist) is None else KroneckerPredictionStrategy
