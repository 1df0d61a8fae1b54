"""What the benchmarks share: taking turns in one process, medians, errors, memory, tables."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Spread",
    "error",
    "markdown",
    "peak_bytes",
    "ratio",
    "seconds",
    "spread",
    "take_turns",
    "warm_up",
]


class Spread(NamedTuple):
    """The median and the quartiles."""

    median: float
    low: float
    high: float


def warm_up() -> None:
    """The first threaded call of a vectorised function in a process can be wrong by 3e-9
    (pytorch#188792), and a kernel matrix then is not symmetric: each is called here once."""
    one = torch.ones(1)
    for f in (torch.exp, torch.log, torch.sqrt, torch.sin, torch.cos, torch.tanh, torch.erf):
        f(one), f(one.double())


def spread(values: Iterable[float]) -> Spread:
    x = sorted(values)
    if len(x) < 3:
        return Spread(statistics.median(x), x[0], x[-1])
    low, median, high = statistics.quantiles(x, n=4, method="inclusive")
    return Spread(median, low, high)


def seconds(f: Callable[[], object]) -> float:
    """Of the second of two calls: what a loop sees, without the page faults and cache misses that
    whoever ran before has left."""
    f()
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def take_turns(
    contestants: Sequence[Callable[[], object]], repeats: int, limit: float = float("inf")
) -> list[list[float]]:
    """Seconds of each contestant in each turn; no new turn starts after ``limit`` seconds.

    They come one after the other in one process, so that a ratio compares neighbours in time; every
    second turn goes backward.
    """
    turns: list[list[float]] = []
    start = time.perf_counter()
    while len(turns) < repeats and (not turns or time.perf_counter() - start < limit):
        order = range(len(contestants))
        measured = {
            i: seconds(contestants[i]) for i in (reversed(order) if len(turns) % 2 else order)
        }
        turns.append([measured[i] for i in order])
    return turns


def ratio(turns: Sequence[Sequence[float]], of: int, to: int = 0) -> Spread:
    """How many times as long contestant ``of`` takes as contestant ``to``."""
    return spread(turn[of] / turn[to] for turn in turns)


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest error relative to the largest entry."""
    scale = expected.double().abs().max()
    return float((actual.double() - expected.double()).abs().max() / scale)


def peak_bytes(f: Callable[[], object]) -> int | None:
    """How far f() raises the resident memory of the process at most, its results included.

    It counts everything: tensors, and the scratch memory of kernels and of LAPACK. Linux only, for
    there the peak can be reset; None elsewhere.
    """
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    f()
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    before = _kilobytes("VmRSS")
    results = f()
    peak = _kilobytes("VmHWM")
    del results
    return 1024 * (peak - before)


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
