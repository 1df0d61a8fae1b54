"""Which route factorises U."""

from __future__ import annotations

__all__ = ["METHODS", "choose"]

METHODS = ("auto", "spectral")


def choose(method: str) -> str:
    """The route for a ``method=`` argument."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return "spectral"
