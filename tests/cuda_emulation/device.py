"""The device "emulated", which is to PyTorch what a GPU is: see device.cpp."""

from __future__ import annotations

import contextlib
import ctypes
import tempfile
import types
from pathlib import Path

import torch
from cuda_emulation.build import build_device

from torch_kronlik import autocast
from torch_kronlik.factor import plan

_device: ctypes.CDLL | None = None


def waits() -> int:
    """How often, so far, the host would have waited for a GPU."""
    assert _device is not None
    found: int = _device.emulated_device_waits()
    return found


def start() -> None:
    """Compile and load it, once in a process; torch_kronlik takes it for a GPU."""
    torch.utils.rename_privateuse1_backend("emulated")
    with tempfile.TemporaryDirectory() as folder:
        libraries = build_device(Path(folder))
        for library in libraries:
            torch.ops.load_library(str(library))
        global _device
        _device = ctypes.CDLL(str(libraries[0]))
    torch._register_device_module("emulated", _module())
    torch.utils.generate_methods_for_privateuse1_backend()
    plan.BY_DEVICE["emulated"] = plan.CUDA
    autocast.DEVICE_TYPES = (*autocast.DEVICE_TYPES, "emulated")


def _module() -> types.ModuleType:
    """What PyTorch looks for in ``torch.emulated``; random numbers are the CPU's by default."""
    module = types.ModuleType("torch.emulated")
    found = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": contextlib.nullcontext,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "manual_seed_all": lambda seed: None,
        "_is_in_bad_fork": lambda: False,
        "get_rng_state": lambda device=0: torch.get_rng_state(),
        "set_rng_state": lambda state, device=0: torch.set_rng_state(state),
    }
    vars(module).update(found)
    return module
