"""Exact multi-output Gaussian likelihoods with Kronecker-plus-noise covariance."""

from torch_kronlik._version import __version__
from torch_kronlik.blocks import block_diag, block_diag_sum
from torch_kronlik.covariance import KroneckerPlusNoise
from torch_kronlik.likelihood import kron_gaussian_nll
from torch_kronlik.linalg import (
    inverse_block_diag_sum,
    inverse_diagonal,
    kron_inv_quad_logdet,
    kron_logdet,
    kron_matmul,
    kron_solve,
)
from torch_kronlik.symmetric_eigen import SymmetricEigen, symmetric_eigen

__all__ = [
    "KroneckerPlusNoise",
    "SymmetricEigen",
    "__version__",
    "block_diag",
    "block_diag_sum",
    "inverse_block_diag_sum",
    "inverse_diagonal",
    "kron_gaussian_nll",
    "kron_inv_quad_logdet",
    "kron_logdet",
    "kron_matmul",
    "kron_solve",
    "symmetric_eigen",
]
