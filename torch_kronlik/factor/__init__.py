"""The exact routes to U⁻¹ and log det U, each behind the protocol of :mod:`.spectral`."""

from .spectral import Spectral

__all__ = ["CORE_DIMS", "ROUTES", "Spectral"]

ROUTES = {"spectral": Spectral}

# The trailing dimensions of a factorisation's tensors that are not batch.
CORE_DIMS = {"spectral": (1, 2, 1, 2, 0)}
