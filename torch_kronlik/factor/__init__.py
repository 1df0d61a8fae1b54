"""The exact routes to U⁻¹ and log det U, each behind the protocol of :mod:`.spectral`."""

from .spectral import Spectral

__all__ = ["ROUTES"]

ROUTES = {"spectral": Spectral}
