"""The device of the test run, and what tests need to know of it.

It is torch's default device, set by conftest.py: tests say nothing of devices, except where numbers
leave PyTorch or come into it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cuda_emulation import device as emulated_device
from torch import Tensor

DEVICE = torch.get_default_device()

# The dispatch key of the device's kernels.
KERNELS = torch._C.DispatchKeySet(
    torch._C._parse_dispatch_key(torch._C._dispatch_key_for_device(DEVICE.type))
)


def to_numpy(x: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    return x.detach().cpu().numpy()


def generator(seed: int) -> torch.Generator:
    """For the library's own draws, which are made on the device."""
    return torch.Generator(DEVICE).manual_seed(seed)


def not_emulated(reason: str) -> pytest.MarkDecorator:
    """Where PyTorch lacks for the emulated device what it has for CUDA."""
    return pytest.mark.skipif(DEVICE.type == "emulated", reason=reason)


no_compiler = not_emulated("no compiler for it")
no_sparse = not_emulated("no sparse tensors there")
only_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="the CPU has operators of its own")


def waits(f: Callable[[], object]) -> int:
    """How often f makes the host wait for the device."""
    f()
    if DEVICE.type == "emulated":
        before = emulated_device.waits()
        f()
        return emulated_device.waits() - before
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # which warns itself, once
            f()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


def opcheck(op: Any, args: tuple[Any, ...]) -> None:
    """torch.library's, with all of its tests that know the device."""
    tests = list(torch.library.opcheck.__kwdefaults__["test_utils"])
    if DEVICE.type == "emulated":
        tests.remove("test_autograd_registration")
    results = torch.library.opcheck(op, args, test_utils=tests)
    assert set(results.values()) == {"SUCCESS"}
