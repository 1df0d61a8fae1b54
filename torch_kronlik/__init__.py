"""Exact multi-output Gaussian likelihoods with Kronecker-plus-noise covariance."""

from torch_kronlik import matcalc
from torch_kronlik._version import __version__
from torch_kronlik.blocks import block_diag, block_diag_sum
from torch_kronlik.covariance import KroneckerPlusNoise
from torch_kronlik.distribution import KroneckerNormal
from torch_kronlik.estimates import Estimates, Information
from torch_kronlik.expm import expm_diag_jacobian, expm_diag_multiply
from torch_kronlik.information import fisher_information, observed_information
from torch_kronlik.likelihood import kron_gaussian_nll
from torch_kronlik.linalg import (
    inverse_block_diag_sum,
    inverse_diagonal,
    kron_inv_quad_logdet,
    kron_logdet,
    kron_matmul,
    kron_solve,
)
from torch_kronlik.loss import KroneckerGaussianNLLLoss
from torch_kronlik.predict import KroneckerPosterior
from torch_kronlik.prediction import condition
from torch_kronlik.regression import Regression
from torch_kronlik.rows import KernelMatrix, LowRankRoot, SymmetricEigen, symmetric_eigen
from torch_kronlik.validation import (
    leave_one_out,
    leave_one_out_log_prob,
    leave_one_row_out,
    leave_one_row_out_log_prob,
)

__all__ = [
    "Estimates",
    "Information",
    "KernelMatrix",
    "KroneckerGaussianNLLLoss",
    "KroneckerNormal",
    "KroneckerPlusNoise",
    "KroneckerPosterior",
    "LowRankRoot",
    "Regression",
    "SymmetricEigen",
    "__version__",
    "block_diag",
    "block_diag_sum",
    "condition",
    "expm_diag_jacobian",
    "expm_diag_multiply",
    "fisher_information",
    "inverse_block_diag_sum",
    "inverse_diagonal",
    "kron_gaussian_nll",
    "kron_inv_quad_logdet",
    "kron_logdet",
    "kron_matmul",
    "kron_solve",
    "leave_one_out",
    "leave_one_out_log_prob",
    "leave_one_row_out",
    "leave_one_row_out_log_prob",
    "matcalc",
    "observed_information",
    "symmetric_eigen",
]
