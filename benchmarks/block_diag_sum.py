"""Time, memory and error of the sum of diagonal blocks, against torch and against a plain copy.

    python benchmarks/block_diag_sum.py [--threads N] [--repeats N]

Contestants take turns in one process. "copy" copies the diagonal blocks out of A: what reading
these bytes where they are costs at the least; "stream" copies as many bytes from one contiguous
piece of memory. "torch" is ``A.view(p, m, p, n).diagonal(dim1=0, dim2=2).sum(-1)``. Ratios are
medians over turns. Memory is what the result and the partial sums take, beside A. Error is the
largest one relative to the largest entry, expected values from exact sums. T: A is transposed.
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch
from common import error, take_turns
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


def exact(A: Tensor, p: int) -> Tensor:
    rows, cols = A.shape
    blocks = A.double().view(p, rows // p, p, cols // p).diagonal(dim1=0, dim2=2)
    flat = blocks.reshape(-1, p).tolist()
    return torch.tensor([math.fsum(x) for x in flat], dtype=torch.float64).view(blocks.shape[:2])


def blocks_of(A: Tensor, p: int) -> Tensor:
    """The diagonal blocks as a view (p, m, n), transposed to run along memory."""
    rows, cols = A.shape
    blocks = A.view(p, rows // p, p, cols // p).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    return blocks if A.is_contiguous() else blocks.mT


def partial_sums(p: int, m: int, n: int) -> float:
    """Megabytes of float64 partial sums, one for every 64 blocks."""
    return math.ceil(p / 64) * m * n * 8 / 1e6


def report(p: int, m: int, n: int, dtype: torch.dtype, transposed: bool, repeats: int) -> None:
    A = torch.randn(p * m, p * n, dtype=dtype)
    if transposed:
        A = torch.randn(p * n, p * m, dtype=dtype).mT
    blocks = blocks_of(A, p)
    packed, source = torch.empty_like(blocks), torch.randn(blocks.numel(), dtype=dtype)
    target = torch.empty_like(source)
    turns = take_turns(
        [
            lambda: tk.block_diag_sum(A, p),
            lambda: torch_sum(A, p),
            lambda: packed.copy_(blocks),
            lambda: target.copy_(source),
        ],
        repeats,
    )
    ours, theirs, copy, stream = (
        statistics.median(column) * 1e3 for column in zip(*turns, strict=True)
    )
    to_torch = statistics.median(turn[1] / turn[0] for turn in turns)
    to_copy = statistics.median(turn[0] / turn[2] for turn in turns)
    megabytes = source.numel() * dtype.itemsize / 1e6
    print(
        f"{p:5d} {m:5d} {n:5d} {str(dtype)[6:]:8s} {'T' if transposed else ' '} {megabytes:7.2f} MB"
        f" | ours {ours:8.3f} ms  torch {theirs:8.3f}  copy {copy:8.3f}  stream {stream:8.3f}"
        f" | torch/ours {to_torch:6.2f}  ours/copy {to_copy:5.2f}"
        f" | memory {partial_sums(p, m, n):6.2f} MB {'' if m * n > 5000 else _errors(A, p)}"
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
