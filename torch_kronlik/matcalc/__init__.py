"""Matrix calculus: vec and its companions, differentials, and a judge for gradient formulas.

Everywhere here vec stacks the columns, as the textbooks do, while ``Y.reshape(-1)`` stacks rows.
"""

from .differentials import (
    hadamard_differential,
    inverse_differential,
    kron_differential,
    kron_plus_noise_differential,
    logdet_differential,
)
from .gradient_check import GradientReport, Random, check_gradient
from .products import block_view, diagonal_blocks, khatri_rao, kron, partial_trace
from .vectors import (
    commutation_matrix,
    duplication_matrix,
    kron_identity_matrix,
    unvec,
    unvech,
    vec,
    vech,
)

__all__ = [
    "GradientReport",
    "Random",
    "block_view",
    "check_gradient",
    "commutation_matrix",
    "diagonal_blocks",
    "duplication_matrix",
    "hadamard_differential",
    "inverse_differential",
    "khatri_rao",
    "kron",
    "kron_differential",
    "kron_identity_matrix",
    "kron_plus_noise_differential",
    "logdet_differential",
    "partial_trace",
    "unvec",
    "unvech",
    "vec",
    "vech",
]
