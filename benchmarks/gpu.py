"""Everything on a GPU in one command, under ten minutes: checks, sanitizer, times, floors.

    python benchmarks/gpu.py [--device cuda] [--quick] [--check-only] [--output table.md]

Checks every native kernel against float64 references, runs itself once more under compute-sanitizer
on small sizes where that is installed, then times against the peers and the floors measured in the
same run: bandwidth of a device copy, rate of a matrix product, Cholesky, eigendecomposition.
Contestants take turns; ratios are medians. ``--device cpu --quick`` tries the script itself.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import Case, problem
from common import markdown, ratio, take_turns
from peers import composed, dense, gpytorch
from torch import Tensor

import torch_kronlik as tk
from torch_kronlik import reference

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
METHODS = ("auto", "spectral", "cholesky", "low_rank")


def synchronised(f: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        result = f()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result

    return run


def milliseconds(f: Callable[[], object], repeats: int) -> float:
    turns = take_turns([synchronised(f)], repeats)
    return 1e3 * statistics.median(turn[0] for turn in turns)


# --- checks --------------------------------------------------------------------------------------


def moved(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    Y, M, K, noise = problem(case)
    return Y.to(device), M.to(device), K.to(device), {k: x.to(device) for k, x in noise.items()}


def gradients(nll: Callable[..., Tensor], Y: Tensor, M: Tensor, K: Tensor,
              noise: dict[str, Tensor]) -> list[Tensor]:  # fmt: skip
    """The value and its gradients in M, K and the noise."""
    leaves = [x.detach().requires_grad_() for x in (M, K, *noise.values())]
    value = nll(Y, *leaves[:2], **dict(zip(noise, leaves[2:], strict=True)))
    return [value, *torch.autograd.grad(value.sum(), leaves)]


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    errors = [
        (x.double().cpu() - y.double().cpu()).abs().max() / y.double().abs().max().cpu()
        for x, y in zip(found, expected, strict=True)
    ]
    return float(torch.stack(errors).max())


def check_likelihood(device: str) -> None:
    cases = [Case(24, 3), Case(24, 3, noise="full"), Case(60, 5, "matern12"), Case(9, 2, batch=7)]
    cases += [Case(130, 2), Case(130, 9, "matern12", noise="full")]
    for base in cases:
        for dtype in (torch.float64, torch.float32):
            case = base._replace(dtype=dtype)
            Y, M, K, noise = moved(case, device)
            wide = {k: x.double() for k, x in noise.items()}
            expected = gradients(
                reference.kron_gaussian_nll, Y.double(), M.double(), K.double(), wide
            )
            for method in METHODS:
                nll = partial(tk.kron_gaussian_nll, method=method)
                report(f"{case} {method}", worst(gradients(nll, Y, M, K, noise), expected), dtype)


def check_blocks(device: str) -> None:
    for dtype in (torch.float64, torch.float32):
        A = torch.randn(2, 35, 14, dtype=dtype, device=device)
        for X in (A, A.mT.contiguous().mT):
            found, expected = tk.block_diag_sum(X, 7), reference.block_diag_sum(X.double(), 7)
            report("block_diag_sum", worst([found], [expected]), dtype)


def report(what: str, error: float, dtype: torch.dtype) -> None:
    good = error <= TOLERANCE[dtype]
    print(f"{'ok  ' if good else 'FAIL'} {what}, {dtype}: {error:.1e}", flush=True)
    if not good:
        raise SystemExit(1)


def sanitize(device: str) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not installed: not run")
        return
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "1", sys.executable, __file__]
        subprocess.run([*command, "--device", device, "--check-only"], check=True)


# --- times ---------------------------------------------------------------------------------------


def floors(device: str, quick: bool) -> list[list[str]]:
    n, T = (1 << 20, 256) if quick else (1 << 28, 4096)
    source = torch.randn(n, device=device)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), 5)
    X = torch.randn(T, T, device=device, dtype=torch.float64)
    S = X @ X.mT + T * torch.eye(T, device=device, dtype=torch.float64)
    product = milliseconds(lambda: X @ X, 3)
    return [
        ["device copy", f"{copy:.2f}", f"{8 * n / copy / 1e6:.0f} GB/s read and written"],
        [f"product {T}", f"{product:.2f}", f"{2 * T**3 / product / 1e9:.1f} TFLOP/s float64"],
        [f"cholesky {T}", f"{milliseconds(lambda: torch.linalg.cholesky(S), 3):.1f}", ""],
        [f"eigh {T}", f"{milliseconds(lambda: torch.linalg.eigh(S), 1):.1f}", ""],
    ]


def block_sums(device: str, quick: bool) -> list[list[str]]:
    """To compare with half the rate of the copy, which writes as much as it reads."""
    rows = []
    for p, m in ((64, 64),) if quick else ((16, 4096), (64, 1024)):
        A = torch.randn(p * m, p * m, device=device)
        mine = milliseconds(partial(tk.block_diag_sum, A, p), 5)
        rate = f"{4 * p * m * m / mine / 1e6:.0f} GB/s read"
        rows.append([f"block_diag_sum of {p} blocks {m}×{m}", f"{mine:.3f}", rate])
        del A
    return rows


def against(name: str, case: Case, peer: Callable[..., Tensor], device: str) -> list[str]:
    inputs = moved(case, device)
    steps: list[Callable[[], Any]] = [
        synchronised(partial(gradients, f, *inputs)) for f in (tk.kron_gaussian_nll, peer)
    ]
    turns = take_turns(steps, 5, limit=60)
    ours, theirs = (1e3 * statistics.median(x) for x in zip(*turns, strict=True))
    return [f"{case}", f"{ours:.2f}", f"{name}: {theirs:.1f} ms, {ratio(turns, of=1).median:.1f}×"]


def comparisons(device: str, quick: bool) -> list[list[str]]:
    single = torch.float32
    batch, T = (64, 256) if quick else (4096, 4096)
    return [
        against("composed eigh", Case(32, 4, batch=batch, dtype=single), composed, device),
        against("dense", Case(16, 3, batch=batch), dense, device),
        against("GPyTorch", Case(T, 8), gpytorch, device),
        against("GPyTorch", Case(T // 2, 4, "matern12"), gpytorch, device),
        against("composed eigh", Case(T // 4, 16, "matern12"), composed, device),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    check_blocks(options.device)
    check_likelihood(options.device)
    if options.check_only:
        return
    if options.device != "cpu":
        sanitize(options.device)
    name = torch.cuda.get_device_name() if options.device != "cpu" else "CPU"
    rows = floors(options.device, options.quick) + block_sums(options.device, options.quick)
    rows += comparisons(options.device, options.quick)
    table = f"{name}, torch {torch.__version__}\n\n" + markdown(["what", "ms", ""], rows)
    print(table)
    if options.output:
        options.output.write_text(table + "\n")


if __name__ == "__main__":
    main()
