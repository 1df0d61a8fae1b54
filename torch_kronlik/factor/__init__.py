"""The exact routes to U⁻¹ and log det U, each behind the members of :mod:`.spectral`."""

from .base import Factor
from .shifted import Shifted
from .spectral import Spectral

__all__ = ["Factor", "Shifted", "Spectral"]
