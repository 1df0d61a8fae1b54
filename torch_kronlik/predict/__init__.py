"""Prediction at new rows, and validation by leaving data out, on the waist alone."""

from . import leave_out
from .posterior import KroneckerPosterior

__all__ = ["KroneckerPosterior", "leave_out"]
