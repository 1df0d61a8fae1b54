"""GPyTorch's multitask likelihood on this library's exact path."""

from __future__ import annotations

from typing import Any

import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from gpytorch.likelihoods import MultitaskGaussianLikelihood as _Likelihood
from linear_operator.operators import LinearOperator

from .base import Noise
from .operator import KroneckerPlusNoiseLinearOperator
from .posterior import KroneckerPosteriorLinearOperator
from .prediction import KroneckerPredictionStrategy, evaluate, kronecker_factors

__all__ = ["MultitaskGaussianLikelihood"]


class MultitaskGaussianLikelihood(_Likelihood):  # type: ignore[misc]
    """Drop-in for GPyTorch's ``MultitaskGaussianLikelihood``, exact and structured at every size.

    ``p(y) = N(mean, M ⊗ K + I_T ⊗ Σ)`` for the prior covariance M ⊗ K that a ``MultitaskKernel``
    gives, with Σ the noise covariance of the D tasks: the task noises (``rank=0``) or F Fᵀ
    (``rank>0``), plus the global noise. The same arguments, parameters, constraints, priors and
    ``state_dict`` as the parent. Model, kernels, ``ExactMarginalLogLikelihood``, optimiser and
    prediction code stay as they are; training, ``model.eval()`` predictions, ``log_prob`` and
    samples then run on one factorisation of the T×T and D×D factors, whatever GPyTorch's settings
    of sizes and of fast predictions. (``settings.fast_computations(log_prob=False)`` asks for
    torch's dense density, and gets it.)

    A prior covariance that is no Kronecker product with the tasks last (a sum, as ``LCMKernel``
    gives; independent tasks; ``interleaved=False``) is left to the parent, and so to GPyTorch's own
    methods.

    Args:
        num_tasks: D.
        rank: of F; 0 for diagonal noise.
        batch_shape: of the noise parameters.
        task_prior: over Σ, for ``rank>0``.
        noise_prior, noise_constraint: of the task noises and the global noise, variances.
        has_global_noise: whether Σ has a multiple of the identity.
        has_task_noise: whether Σ has task noises.

    Raises:
        ValueError: neither noise; when it is used, noise of a rank below D and no global noise,
            for then Σ is singular.

    Cost: O(T³ + D³) a training step; see :class:`KroneckerPlusNoiseLinearOperator`.

    >>> from linear_operator.operators import KroneckerProductLinearOperator
    >>> covariance = KroneckerProductLinearOperator(torch.eye(3), torch.eye(2))
    >>> likelihood = MultitaskGaussianLikelihood(num_tasks=2)
    >>> y = likelihood(MultitaskMultivariateNormal(torch.zeros(3, 2), covariance))
    >>> y.event_shape, y.variance[0]
    (torch.Size([3, 2]), tensor([2.3865, 2.3865], grad_fn=<SelectBackward0>))
    """

    def __init__(
        self,
        num_tasks: int,
        rank: int = 0,
        batch_shape: torch.Size = torch.Size(),  # noqa: B008 the parent's default
        task_prior: Any = None,
        noise_prior: Any = None,
        noise_constraint: Any = None,
        has_global_noise: bool = True,
        has_task_noise: bool = True,
    ) -> None:
        super().__init__(
            num_tasks,
            rank,
            batch_shape,
            task_prior,
            noise_prior,
            noise_constraint,
            has_global_noise,
            has_task_noise,
        )
        if task_prior is not None and has_task_noise:
            # The parent's hands the prior a method where it needs that method's value.
            name = "MultitaskErrorCovariancePrior"
            self.register_prior(name, task_prior, lambda m: m.noise_covariance["Sigma"])

    @property
    def noise_covariance(self) -> Noise:
        """Σ as the noise argument of this library: {"log_noise": (*batch, D)} or {"Sigma": …}."""
        if not self.has_task_noise:
            return {"log_noise": self.noise.log().expand(*self.noise.shape[:-1], self.num_tasks)}
        if self.rank == 0:
            noise = self.task_noises + self.noise if self.has_global_noise else self.task_noises
            return {"log_noise": noise.log()}
        Sigma = self.task_noise_covar
        if self.has_global_noise:
            eye = torch.eye(self.num_tasks, dtype=Sigma.dtype, device=Sigma.device)
            return {"Sigma": Sigma + self.noise[..., None] * eye}
        if self.rank < self.num_tasks:
            raise ValueError(
                f"noise of rank {self.rank} for num_tasks={self.num_tasks} is singular: pass "
                f"has_global_noise=True, or rank={self.num_tasks}"
            )
        return {"Sigma": Sigma}

    def marginal(
        self, function_dist: MultitaskMultivariateNormal, *args: Any, **kwargs: Any
    ) -> MultitaskMultivariateNormal:
        """The distribution of observations, given that of the latent function: noise added."""
        covar = self._with_noise(function_dist)
        if covar is None:
            return super().marginal(function_dist, *args, **kwargs)
        return type(function_dist)(function_dist.mean, covar)

    def _with_noise(self, function_dist: MultitaskMultivariateNormal) -> LinearOperator | None:
        """None where there is no structure to use."""
        covar = evaluate(function_dist.lazy_covariance_matrix)
        if not getattr(function_dist, "_interleaved", False):
            return None
        if isinstance(covar, KroneckerPosteriorLinearOperator) and not covar.noise:
            return covar.with_noise(**self.noise_covariance)
        factors = kronecker_factors(covar, self.num_tasks)
        return factors and KroneckerPlusNoiseLinearOperator(*factors, **self.noise_covariance)

    def prediction_strategy(
        self, train_prior_dist: MultitaskMultivariateNormal
    ) -> type[KroneckerPredictionStrategy] | None:
        """How an ExactGP with this prior over its training rows predicts; None: GPyTorch's way."""
        return None if self._with_noise(train_prior_dist) is None else KroneckerPredictionStrategy
