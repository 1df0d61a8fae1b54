"""Prediction at new rows, and validation by leaving data out."""

from .condition import condition
from .leave_out import (
    leave_one_out,
    leave_one_out_log_prob,
    leave_one_row_out,
    leave_one_row_out_log_prob,
)
from .posterior import KroneckerPosterior

__all__ = [
    "KroneckerPosterior",
    "condition",
    "leave_one_out",
    "leave_one_out_log_prob",
    "leave_one_row_out",
    "leave_one_row_out_log_prob",
]
