"""GPyTorch's prediction with the structured posterior."""

from __future__ import annotations

from typing import Any

import torch
from gpytorch import settings
from gpytorch.lazy import LazyEvaluatedKernelTensor
from gpytorch.models import exact_gp
from gpytorch.models.exact_prediction_strategies import DefaultPredictionStrategy
from gpytorch.utils.memoize import cached
from linear_operator.operators import (
    ConstantMulLinearOperator,
    KroneckerProductLinearOperator,
    LinearOperator,
    ZeroLinearOperator,
)
from torch import Tensor

from .observed import at_observed
from .operator import KroneckerPlusNoiseLinearOperator
from .posterior import KroneckerPosteriorLinearOperator

__all__ = ["KroneckerPredictionStrategy", "evaluate", "kronecker_factors"]


def evaluate(covar: LinearOperator) -> LinearOperator:
    """What a kernel gave, where it has not been asked yet."""
    return covar.evaluate_kernel() if isinstance(covar, LazyEvaluatedKernelTensor) else covar


def kronecker_factors(covar: LinearOperator, num_outputs: int) -> tuple[Tensor, Tensor] | None:
    """(M, K) dense with covar = M ⊗ K and K of size D = num_outputs; None if it is no such product.

    Recognised: Kronecker products whose last factor has D columns, and multiples of them.
    """
    if isinstance(covar, ConstantMulLinearOperator):
        factors = kronecker_factors(covar.base_linear_op, num_outputs)
        return factors and (factors[0] * covar.expanded_constant, factors[1])
    if not isinstance(covar, KroneckerProductLinearOperator):
        return None
    *rows, outputs = covar.linear_ops
    if not rows or outputs.shape[-1] != num_outputs:
        return None
    M = rows[0] if len(rows) == 1 else KroneckerProductLinearOperator(*rows)
    return M.to_dense(), outputs.to_dense()


class KroneckerPredictionStrategy(DefaultPredictionStrategy):  # type: ignore[misc]
    """Exact predictions from one factorisation of the training covariance U = M ⊗ K + I_T ⊗ Σ.

    GPyTorch makes it for every ExactGP whose likelihood is
    :class:`~torch_kronlik.gpytorch.MultitaskGaussianLikelihood` and whose prior covariance is a
    Kronecker product. ``settings.fast_pred_var`` changes nothing: the exact variances are the fast
    ones. ``settings.detach_test_caches`` means what it means in GPyTorch: on (its default), what
    depends on the training data alone is constant, and predictions are differentiated in the test
    inputs; off, in the hyperparameters too.
    """

    @cached(name="constant_covariance")  # type: ignore[untyped-decorator]
    def _constant_covariance(self) -> KroneckerPlusNoiseLinearOperator:
        detached: KroneckerPlusNoiseLinearOperator = self.lik_train_train_covar.detach()
        return detached

    @property
    def _covariance(self) -> KroneckerPlusNoiseLinearOperator:
        covariance: KroneckerPlusNoiseLinearOperator = (
            self._constant_covariance()
            if settings.detach_test_caches.on()
            else self.lik_train_train_covar
        )
        if settings.observation_nan_policy.value() != "mask":
            return covariance
        observed: KroneckerPlusNoiseLinearOperator = self._observed_covariance(
            settings.detach_test_caches.on(), covariance
        )
        return observed

    @cached(name="observed_covariance")  # type: ignore[untyped-decorator]
    def _observed_covariance(
        self, detached: bool, covariance: KroneckerPlusNoiseLinearOperator
    ) -> KroneckerPlusNoiseLinearOperator:
        """At the entries that are observed in the whole batch, as GPyTorch has it."""
        return at_observed(covariance, self._observed.reshape(-1, covariance.num_outputs))

    @property
    def _observed(self) -> Tensor:
        """(T·D)"""
        missing: Tensor = self.train_labels.isnan()
        return ~missing.reshape(-1, missing.shape[-1]).any(0)

    @property
    def mean_cache(self) -> Tensor:
        """U⁻¹ (y − mean), (*batch, T·D), NaN where nothing is observed."""
        policy = settings.observation_nan_policy.value()
        if policy == "fill":
            raise NotImplementedError(
                "observation_nan_policy must be 'ignore' or 'mask' for predictions with this "
                "likelihood, got 'fill', which is an approximation"
            )
        solved: Tensor = self._solved_labels(settings.detach_test_caches.on(), policy)
        return solved

    @cached(name="mean_cache")  # type: ignore[untyped-decorator]
    def _solved_labels(self, detached: bool, policy: str) -> Tensor:
        residuals = self.train_labels - self.train_prior_dist.loc
        solved = self._covariance.solve(residuals[..., None]).squeeze(-1)
        if policy == "mask":
            solved = torch.where(self._observed, solved, torch.nan)
        return solved.detach() if detached else solved

    def exact_prediction(self, *args: Any, **kwargs: Any) -> tuple[Tensor, LinearOperator]:
        """Mean and covariance; the covariances of the test rows stay Kronecker products."""
        with settings.max_eager_kernel_size(0):
            prediction: tuple[Tensor, LinearOperator] = super().exact_prediction(*args, **kwargs)
        return prediction

    def exact_predictive_covar(
        self, test_test_covar: LinearOperator, test_train_covar: LinearOperator
    ) -> LinearOperator:
        """The covariance of the latent function at the test rows, as a structured operator.

        GPyTorch's formula stays where it hands over no Kronecker products, which is where
        ``settings.lazily_evaluate_kernels`` is off: with this factorisation, but S·D × T·D memory.
        """
        if settings.skip_posterior_variances.on():
            return ZeroLinearOperator(*test_test_covar.shape)
        U = self._covariance
        test = kronecker_factors(evaluate(test_test_covar), U.num_outputs)
        cross = kronecker_factors(evaluate(test_train_covar), U.num_outputs)
        if test is None or cross is None:
            return super().exact_predictive_covar(test_test_covar, test_train_covar)
        return KroneckerPosteriorLinearOperator(U, cross[0], test[0])

    def get_fantasy_strategy(
        self,
        inputs: Any,
        targets: Tensor,
        full_inputs: Any,
        full_targets: Tensor,
        full_output: Any,
        **kwargs: Any,
    ) -> DefaultPredictionStrategy:
        """With new rows: factorised anew, O((T + m)³), since they keep the structure."""
        likelihood = self.likelihood.get_fantasy_likelihood(**kwargs)
        return exact_gp.prediction_strategy(full_inputs, full_output, full_targets, likelihood)


_default_strategy = exact_gp.prediction_strategy


def _prediction_strategy(
    train_inputs: Any, train_prior_dist: Any, train_labels: Tensor, likelihood: Any
) -> DefaultPredictionStrategy:
    """GPyTorch's choice, except for this library's likelihood over a Kronecker product.

    GPyTorch lets kernels choose how an ExactGP predicts, not likelihoods, and its default forms the
    S·D × T·D cross-covariance. Every other model gets GPyTorch's own choice, unchanged.
    """
    choose = getattr(likelihood, "prediction_strategy", lambda prior: None)(train_prior_dist)
    return (choose or _default_strategy)(train_inputs, train_prior_dist, train_labels, likelihood)


exact_gp.prediction_strategy = _prediction_strategy
