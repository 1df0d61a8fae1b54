"""The exact routes to U⁻¹ and log det U, each behind the members of :mod:`.spectral`, or, for
observed entries and noise that differs between rows, of :mod:`.capacitance`."""

from .base import Factor
from .border import Border
from .capacitance import Capacitance
from .direct import Direct
from .rotated import Rotated
from .shifted import Shifted
from .spectral import Spectral

__all__ = ["Border", "Capacitance", "Direct", "Factor", "Rotated", "Shifted", "Spectral"]
