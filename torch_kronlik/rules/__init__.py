"""The differentiable functionals of a factorised U, and how each gets its derivatives.

    common       U as a record, with its factorisation; products with U
    factorise    the factorisation: a constant for differentiation, so no gradient passes through
                 an eigenvector

Three idioms:

1. A family closed under its own rules. The derivative of each member is made of members.
       multiply     U·Y: products
       solve        U⁻¹·Y: solves and products
       quad_logdet  (yᵀU⁻¹y, log det U), their gradient, and the Hessian product of that
       logdet       ∂ log det/∂(M, K, Σ), that is B for Σ, and their derivatives along a direction
       small        the likelihood of a small problem: value and gradients in one native call
2. The series about the factorisation: exact in value, first and second derivatives.
       expansion    B, blocks and diagonals of U⁻¹, traces with U⁻¹
       posterior    all pairs of blocks
       observed     the same for observed entries, where solves carry the derivatives
3. First order, with a clear refusal of the second: dV_ab = dA_ab / (v_a + v_b).
       sample       F·E with U = F Fᵀ
       posterior    M^½ E

∂ log det U/∂K of a route is a part of ``logdet_gradient`` of its factor: R Diag(·) Rᵀ in
``factor/columns.py`` for complete data, else ``gradient_in_K`` (``factor/capacitance.py`` and the
like). What M and Σ are, their records know (``rows/``, ``noise.py``): the rules give a gradient in
M, and ``pull_back`` takes that gradient to the tensors of the caller.
"""

from ..factor import Spectral
from ..factor.plan import WITH_BASIS, check_method, check_observed_method
from . import observed
from .common import Covariance, Factored
from .expansion import (
    inverse_block_sum,
    inverse_blocks,
    inverse_blocks_diagonal,
    inverse_trace,
)
from .factorise import completed, factorise
from .multiply import multiply
from .posterior import MatrixRoot, inverse_pairs
from .quad_logdet import quad_logdet
from .sample import root_matmul
from .small import is_small, small_likelihood
from .solve import solve

__all__ = [
    "WITH_BASIS",
    "Covariance",
    "Factored",
    "MatrixRoot",
    "Spectral",
    "check_method",
    "check_observed_method",
    "completed",
    "factorise",
    "inverse_block_sum",
    "inverse_blocks",
    "inverse_blocks_diagonal",
    "inverse_pairs",
    "inverse_trace",
    "is_small",
    "multiply",
    "observed",
    "quad_logdet",
    "root_matmul",
    "small_likelihood",
    "solve",
]
