"""The exact routes to U⁻¹ and log det U, each behind the protocol of :mod:`.spectral`."""

from .cholesky import Cholesky
from .spectral import Spectral

__all__ = ["CORE_DIMS", "ROUTES", "Cholesky", "Spectral"]

ROUTES: dict[str, type[Spectral] | type[Cholesky]] = {"spectral": Spectral, "cholesky": Cholesky}

# The trailing dimensions of a factorisation's tensors that are not batch.
CORE_DIMS = {"spectral": (1, 2, 1, 2, 0), "cholesky": (3, 1, 1, 2, 0)}
