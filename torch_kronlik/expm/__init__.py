"""exp(Diag(d) A) v with analytic derivatives."""

from .multiply import expm_diag_jacobian, expm_diag_multiply

__all__ = ["expm_diag_jacobian", "expm_diag_multiply"]
