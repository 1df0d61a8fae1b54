"""Fixed effects: generalised least squares with covariance U, its likelihood, tests, predictions.

The letters are those of docs/maths.md, "Fixed effects and REML". The N×p design x has a column
x_c ⊗ e_j for each covariate c and output j that it enters. It is used as x̃ = x V with orthonormal
columns, V upper triangular: scales of the covariates and correlations between them cost no digits.
Every result is the same for any V, so that V is a constant for differentiation.
"""

from .fit import Regression, WaldTest
from .posterior import RegressionPosterior

__all__ = ["Regression", "RegressionPosterior", "WaldTest"]
