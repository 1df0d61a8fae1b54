"""Time, memory and error of the sum of diagonal blocks, against torch and against a plain copy.

    python benchmarks/block_diag_sum.py [--threads N] [--repeats N]

Contestants take turns in one process. "copy" is a contiguous copy of as many bytes as are on the
diagonal blocks: what reading them costs at the least. "torch" is
``A.view(p, m, p, n).diagonal(dim1=0, dim2=2).sum(-1)``. Ratios are medians over turns. Error is
the largest one relative to the largest entry, expected values in float64 from long sums.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import torch_kronlik as tk

SHAPES = [  # p, m, n
    (1000, 4, 4),
    (1000, 16, 16),
    (256, 64, 64),
    (64, 256, 256),
    (16, 1000, 1000),
]


def torch_sum(A: Tensor, p: int) -> Tensor:
    rows, cols = A.shape
    return A.view(p, rows // p, p, cols // p).diagonal(dim1=0, dim2=2).sum(-1)


def seconds(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def measure(contestants: list[Callable[[], object]], repeats: int) -> list[list[float]]:
    for f in contestants:
        f()
    return [[seconds(f) for f in contestants] for _ in range(repeats)]


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).abs().max() / expected.abs().max())


def exact(A: Tensor, p: int) -> Tensor:
    rows, cols = A.shape
    blocks = A.double().view(p, rows // p, p, cols // p).diagonal(dim1=0, dim2=2)
    flat = blocks.reshape(-1, p).tolist()
    return torch.tensor([math.fsum(x) for x in flat], dtype=torch.float64).view(blocks.shape[:2])


def report(p: int, m: int, n: int, dtype: torch.dtype, transposed: bool, repeats: int) -> None:
    A = torch.randn(p * m, p * n, dtype=dtype)
    if transposed:
        A = torch.randn(p * n, p * m, dtype=dtype).mT
    source = torch.randn(p * m * n, dtype=dtype)
    target = torch.empty_like(source)
    turns = measure(
        [
            lambda: tk.block_diag_sum(A, p),
            lambda: torch_sum(A, p),
            lambda: target.copy_(source),
        ],
        repeats,
    )
    ours, theirs, copy = (statistics.median(column) for column in zip(*turns, strict=True))
    to_torch = statistics.median(turn[1] / turn[0] for turn in turns)
    to_copy = statistics.median(turn[0] / turn[2] for turn in turns)
    megabytes = source.numel() * source.element_size() / 1e6
    errors = "" if m * n > 5000 else _errors(A, p)
    print(
        f"{p:5d} {m:5d} {n:5d} {str(dtype)[6:]:8s} {'T' if transposed else ' '} {megabytes:7.2f} MB"
        f" | ours {ours * 1e3:8.3f} ms  torch {theirs * 1e3:8.3f}  copy {copy * 1e3:8.3f}"
        f" | torch/ours {to_torch:6.2f}  ours/copy {to_copy:5.2f} {errors}"
    )


def _errors(A: Tensor, p: int) -> str:
    expected = exact(A, p)
    ours, theirs = error(tk.block_diag_sum(A, p), expected), error(torch_sum(A, p), expected)
    return f"| error ours {ours:.1e}  torch {theirs:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {options.threads} thread(s)")
    for p, m, n in SHAPES:
        for dtype in (torch.float32, torch.float64):
            for transposed in (False, True):
                if p * m * p * n * dtype.itemsize < 3e9:
                    report(p, m, n, dtype, transposed, options.repeats)


if __name__ == "__main__":
    main()
