"""Every native kernel on a device against float64 references computed on the CPU.

    python benchmarks/gpu_checks.py [--device cuda] [--small]

``--small`` keeps to sizes, and to the kernels themselves, that compute-sanitizer gets through.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from cases import Case, problem
from common import error
from torch import Tensor

import torch_kronlik as tk
from torch_kronlik import ops, reference

__all__ = ["gradients", "moved", "run_checks"]

# Relative to the largest entry; the problems have condition numbers up to some hundreds.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-4}
Named = Iterable[tuple[str, Tensor, Tensor]]  # (what, found, expected)


def moved(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    Y, M, K, noise = problem(case)
    return Y.to(device), M.to(device), K.to(device), {k: x.to(device) for k, x in noise.items()}


def gradients(nll: Callable[..., Tensor], Y: Tensor, M: Tensor, K: Tensor,
              noise: dict[str, Tensor]) -> list[Tensor]:  # fmt: skip
    """The value and its gradients in Y, M, K and the noise."""
    leaves = [x.detach().requires_grad_() for x in (Y, M, K, *noise.values())]
    value = nll(*leaves[:3], **dict(zip(noise, leaves[3:], strict=True)))
    return [value, *torch.autograd.grad(value.sum(), leaves)]


# --- each kernel: what it gives on the device, and what it should --------------------------------


def blocks(device: str, dtype: torch.dtype, small: bool) -> Named:
    for p, m, n in [(7, 5, 3), (65, 4, 4), (3, 64, 48)] + ([] if small else [(8, 512, 512)]):
        A = torch.randn(2, p * m, p * n, dtype=dtype)
        there = A.to(device)
        for X in (there, there.mT.contiguous().mT):
            yield (
                f"block_diag_sum {p} of {m}×{n}",
                ops.block_diag_sum(X, p),
                (reference.block_diag_sum(A.double(), p)),
            )
        S = A[..., :m, :n]
        eye = torch.eye(p, dtype=torch.float64)
        dense = torch.stack([torch.kron(eye, x.double().contiguous()) for x in S])
        yield f"block_diag_expand {p} of {m}×{n}", ops.block_diag_expand(S.to(device), p), dense


def middle(device: str, dtype: torch.dtype, small: bool) -> Named:
    for T, D in [(5, 3), (70, 4), (33, 19)] + ([] if small else [(5000, 16)]):
        s, lam, Y = torch.rand(2, T), torch.rand(1, D), torch.randn(2, T, D)
        s, lam, Y = (x.to(dtype) for x in (10 * s, lam, Y))
        X = s.double()[..., :, None] * lam.double()[..., None, :]
        W = 1 / (1 + X)
        sums = ops.kron_diag_sums(s.to(device), lam.to(device))
        wanted = (X.log1p().sum((-2, -1)), (W * lam.double()[..., None, :]).sum(-1),
                  (W * s.double()[..., :, None]).sum(-2), W.sum(-2))  # fmt: skip
        for found, expected in zip(sums, wanted, strict=True):
            yield f"kron_diag_sums {T}, {D}", found, expected
        Z, quad = ops.kron_diag_scale(s.to(device), lam.to(device), Y.to(device))
        yield f"kron_diag_scale {T}, {D}", Z, W * Y.double()
        yield f"kron_diag_scale {T}, {D}", quad, (W * Y.double().square()).sum((-2, -1))


def low_rank(device: str, dtype: torch.dtype, small: bool) -> Named:
    for T, r in [(33, 4), (150, 40)] + ([] if small else [(2000, 60)]):
        X = torch.randn(2, T, r, dtype=torch.float64)
        M = (X @ X.mT).to(dtype)
        F, rank = ops.pivoted_cholesky(M.to(device), r + 3)
        yield f"pivoted_cholesky {T}, {r}", F @ F.mT, M.double()
        # a few more, where M is of that rank but for its rounding; -1 where it is refused
        yield f"rank of {T}, {r}", rank.clamp_max(r), torch.full((2,), float(r))


def whitening(device: str, dtype: torch.dtype, small: bool) -> Named:
    for D in (1, 3, 8, 16):
        for noise in ("full", "diagonal"):
            _, _, K, given = moved(Case(4, D, noise=noise, batch=5, dtype=dtype), "cpu")
            (N,) = given.values()
            found = ops.whiten_small(K.to(device), N.to(device), noise == "full")
            lam, R, logdet = (x.double().cpu() for x in found[:3])
            Sigma = N.double() if noise == "full" else torch.diag_embed(N.double().exp())
            yield f"whiten_small {D}", R.mT @ Sigma @ R, torch.eye(D).double().expand(5, D, D)
            yield f"whiten_small {D}", R.mT @ K.double() @ R, torch.diag_embed(lam)
            yield f"whiten_small {D}", logdet, Sigma.logdet()


def small_problems(device: str, dtype: torch.dtype, small: bool) -> Named:
    sizes = [(1, 1), (9, 2), (16, 16), (32, 4), (33, 5), (64, 16)]
    for T, D in sizes[:4] if small else sizes:
        for noise in ("full", "diagonal"):
            case = Case(T, D, "matern12", noise=noise, batch=3, dtype=dtype)
            Y, M, K, given = moved(case, device)
            out = ops.small_nll(Y, M, K, *given.values(), noise == "full", True)
            wide = [x.double().cpu() for x in (Y, M, K)]
            expected = gradients(
                reference.kron_gaussian_nll, *wide, {k: x.double().cpu() for k, x in given.items()}
            )
            for found, x in zip(out[:5], expected, strict=True):
                yield f"small_nll {T}, {D}, {noise}", found, x


def likelihood(device: str, dtype: torch.dtype, small: bool) -> Named:
    if small:
        return
    cases = [Case(24, 3), Case(60, 5, "matern12", "full"), Case(9, 2, batch=7), Case(130, 2)]
    for case in [*cases, Case(130, 9, "matern12", noise="full"), Case(40, 17, "matern12")]:
        Y, M, K, noise = moved(case._replace(dtype=dtype), device)
        wide = [x.double().cpu() for x in (Y, M, K)]
        expected = gradients(
            reference.kron_gaussian_nll, *wide, {k: x.double().cpu() for k, x in noise.items()}
        )
        for method in ("auto", "spectral", "cholesky", "low_rank"):
            nll = partial(tk.kron_gaussian_nll, method=method)
            for found, x in zip(gradients(nll, Y, M, K, noise), expected, strict=True):
                yield f"likelihood, {case}, {method}", found, x


CHECKS: list[Callable[..., Any]] = [blocks, middle, low_rank, whitening, small_problems, likelihood]


def run_checks(device: str, small: bool = False) -> Iterator[tuple[str, torch.dtype, float, bool]]:
    """(what, dtype, largest relative error, whether it is within the tolerance)."""
    torch.manual_seed(0)
    for check in CHECKS:
        for dtype, tolerance in TOLERANCE.items():
            worst: dict[str, float] = {}
            for what, found, expected in check(device, dtype, small):
                off = error(found.detach().cpu(), expected.detach())
                worst[what] = max(worst.get(what, 0.0), off if off == off else float("inf"))
            for what, off in worst.items():
                yield what, dtype, off, off <= tolerance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    failed = 0
    for what, dtype, off, good in run_checks(options.device, options.small):
        failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {what}, {dtype}: {off:.1e}", flush=True)
    if failed:
        raise SystemExit(f"{failed} checks failed")


if __name__ == "__main__":
    main()
