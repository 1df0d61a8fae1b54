"""Devices, dtypes, seeds and tolerances of the test run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# A failed compile can leave a wrong artefact on disk, which a later run would load.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import pytest
import torch
from cuda_emulation import device as emulated_device
from cuda_emulation.build import compiler
from torch import Tensor
from torch.distributions import Distribution

DTYPES = {"float32": torch.float32, "float64": torch.float64}

# Two threads split the parallel loops even on a small machine, and a fixed number makes runs
# comparable from one machine to the next.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


# The first threaded call of a vectorised function in a process can be wrong by 3e-9
# (pytorch#188792), and a kernel matrix then is not symmetric: each is called here once.
for _function in (torch.exp, torch.log, torch.sqrt, torch.sin, torch.cos, torch.tanh, torch.erf):
    for _dtype in DTYPES.values():
        _function(torch.ones(1, dtype=_dtype, device="cpu"))


class Tolerance(NamedTuple):
    """Error allowed relative to the largest entry of the expected tensor: factor · eps · condition.

    A backward stable method loses a factor of the condition number; `factor` covers the constants
    and the growth with size (the problems have T·D up to a few hundred).
    """

    value: float  # log det, inv_quad, nll, solves: one factorisation, one pass of products
    gradient: float  # two such results multiplied: the errors of both, and a longer sum
    eps: float


TOLERANCES = {
    # Expected values are float64 too, and carry an error of the same size as the result.
    torch.float64: Tolerance(value=100, gradient=400, eps=2.0**-52),
    # Expected values are exact here, but LAPACK's blocked float32 sums have larger constants than
    # the few units in the last place of an ideal one.
    torch.float32: Tolerance(value=100, gradient=400, eps=2.0**-23),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    about = "device of the tensors: cpu, cuda, or emulated (tests/cuda_emulation/device.cpp)"
    parser.addoption("--device", default="cpu", help=about)
    parser.addoption("--dtype", default="both", choices=[*DTYPES, "both"])


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "emulated":
        if sys.platform != "linux" or compiler() is None:
            raise pytest.UsageError("--device=emulated needs Linux and a C++ compiler: c++ or $CXX")
        emulated_device.start()
    device = torch.device(config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device=cuda: torch sees no CUDA device")
    if device.type != "cpu":
        config.option.doctestmodules = False  # what they print is the CPU's
        # where tests make tensors; the library says for each of its own: test_layering.py
        torch.set_default_device(device)
    # torch's own modules (forward mode, vmap) call it on import: nothing a user of them can change.
    for category in ("DeprecationWarning", "FutureWarning"):
        ignored = f"ignore:`?torch.jit.*` is deprecated:{category}"
        config.addinivalue_line("filterwarnings", ignored)
    if device.type == "cuda":
        # what torch says there depends on the card; such a warning is shown and is no failure
        config.addinivalue_line("filterwarnings", "default")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What belongs to one kind of device is no skipped test elsewhere."""
    kind, name = torch.device(config.getoption("--device")).type, collection_path.name
    if name == "test_cuda.py":
        return True if kind != "cuda" else None
    if name == "test_device.py":
        return True if kind == "cpu" else None
    of_cpu = name.startswith(("test_examples", "test_cuda_emulated"))
    return True if of_cpu and kind != "cpu" else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "dtype" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--dtype")
        names = list(DTYPES) if chosen == "both" else [chosen]
        metafunc.parametrize("dtype", [DTYPES[name] for name in names], ids=names)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield


@pytest.fixture
def validation_on() -> Iterator[None]:
    """torch.compile switches the validation of distributions off for the whole process."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(True)
    yield
    Distribution.set_default_validate_args(before)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def float64() -> Iterator[None]:
    """As torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """`assert_close(actual, expected, condition=…, quantity=…)`, see `check_close`."""
    return check_close


def check_close(
    actual: Tensor,
    expected: Tensor,
    *,
    condition: float = 1.0,
    quantity: str = "value",
    dims: int = 2,
    floor: float = 0.0,
) -> None:
    """Compare shapes, and the largest error of each matrix with the tolerance table.

    `expected`: float64 from the reference, at the same (already rounded) inputs.  `condition`: of
    the problem, from `problems.condition_number`.  `quantity`: a column of the table.  `dims`: how
    many trailing dimensions form one object, whose largest entry is the scale; 0 for a (*batch)
    of numbers.  `floor`: least scale, for a result that is a cancelling sum of terms of that size.
    """
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    tolerance = TOLERANCES[actual.dtype]
    bound = getattr(tolerance, quantity) * tolerance.eps * condition
    assert bound < 0.1, f"nothing would be checked: condition number {condition:.1e}"
    if expected.numel() == 0:
        return
    expected = expected.detach().to(actual.device)
    scale = expected.abs()
    if dims:
        scale = scale.amax(tuple(range(-min(dims, expected.dim()), 0)), keepdim=True)
    error = (actual.detach().double() - expected).abs()
    # Written so that a NaN is an error too.
    assert (error <= bound * scale.clamp_min(floor)).all(), (
        f"largest error {error.max():.2e}, allowed {bound:.2e} of {scale.max():.2e}"
    )
