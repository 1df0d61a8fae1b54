"""What is made of a covariance and data: posteriors, imputed entries, predictions of what is left
out."""

from . import leave_out
from .impute import impute
from .posterior import KroneckerPosterior

__all__ = ["KroneckerPosterior", "impute", "leave_out"]
