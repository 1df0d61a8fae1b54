"""Exact multi-output Gaussian likelihoods with Kronecker-plus-noise covariance."""

from torch_kronlik._version import __version__
from torch_kronlik.blocks import block_diag, block_diag_sum

__all__ = ["__version__", "block_diag", "block_diag_sum"]
