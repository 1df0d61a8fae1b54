"""This library's exact path for GPyTorch models: change the likelihood, keep everything else.

``import torch_kronlik.gpytorch as tkg``, then ``tkg.MultitaskGaussianLikelihood`` where
``gpytorch.likelihoods.MultitaskGaussianLikelihood`` stood. Needs gpytorch, imported only here.
"""

from . import observed  # noqa: F401  masks of this library's covariance keep its structure
from .fixed_noise import FixedNoiseMultitaskGaussianLikelihood
from .likelihood import MultitaskGaussianLikelihood
from .operator import KroneckerPlusNoiseLinearOperator
from .posterior import KroneckerPosteriorLinearOperator
from .prediction import KroneckerPredictionStrategy

__all__ = [
    "FixedNoiseMultitaskGaussianLikelihood",
    "KroneckerPlusNoiseLinearOperator",
    "KroneckerPosteriorLinearOperator",
    "KroneckerPredictionStrategy",
    "MultitaskGaussianLikelihood",
]
