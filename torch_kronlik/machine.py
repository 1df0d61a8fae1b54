"""What the machine has."""

from __future__ import annotations

import os

import torch

__all__ = ["memory", "shortage"]


def memory(device: torch.device) -> int | None:
    """Bytes of the machine, or of the GPU; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def shortage(needed: int, device: torch.device) -> str | None:
    """In words how many bytes are missing; None where they fit, or where that is not known."""
    there = memory(device)
    if there is None or needed <= there:
        return None
    return f"{needed / 1e9:.1f} GB where there are {there / 1e9:.1f}"
