"""Times on a device: floors measured in the same run, targets, peers, and the routes one by one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from cases import Case, mask
from common import seconds
from gpu_checks import gradients, moved
from torch import Tensor

import torch_kronlik as tk
from torch_kronlik import ops

__all__ = ["HEADER", "Bench"]

HEADER = ["what", "ms", "floor, ms", "of the floor", "against", "target"]
Row = list[str]


class Floors(NamedTuple):
    """What the device does at best."""

    bandwidth: float  # bytes a second, of a copy: read and written
    product: dict[torch.dtype, float]  # multiplications and additions a second


class Bench:
    """``budget``: seconds that a contestant may take in one comparison."""

    def __init__(self, device: str, quick: bool, budget: float) -> None:
        self.device, self.quick, self.budget = device, quick, budget
        self.floors: Floors

    # --- measuring -------------------------------------------------------------------------------

    def finished(self, f: Callable[[], object], calls: int = 1) -> None:
        for _ in range(calls):
            f()
        if self.device != "cpu":
            torch.cuda.synchronize()

    def race(self, *contestants: Callable[[], object], turns: int = 9) -> list[list[float]]:
        """Milliseconds of each call of each contestant, in turns; a turn has many short calls."""
        for f in contestants:
            self.finished(f)
        once = [seconds(partial(self.finished, f)) for f in contestants]
        calls = [max(1, int(0.02 / t)) for t in once]
        found: list[list[float]] = []
        end = time.perf_counter() + self.budget * len(contestants) - 2 * sum(once)
        while len(found) < turns and (not found or time.perf_counter() < end):
            pairs = zip(contestants, calls, strict=True)
            found.append([1e3 * seconds(partial(self.finished, f, n)) / n for f, n in pairs])
        return found

    def median(self, f: Callable[[], object]) -> float:
        return statistics.median(turn[0] for turn in self.race(f))

    def row(
        self, what: str, ms: float, floor: float = 0, against: str = "", target: str = ""
    ) -> Row:
        share = [f"{floor:.3g}", f"{floor / ms:.0%}"] if floor else ["", ""]
        return [what, f"{ms:.3g}", *share, against, target]

    # --- floors ----------------------------------------------------------------------------------

    def measure_floors(self) -> Iterator[Row]:
        n = 1 << 20 if self.quick else 1 << 29
        source = torch.zeros(n, device=self.device)
        target = torch.empty_like(source)
        copy = self.median(partial(target.copy_, source))
        bandwidth = 8 * n / copy * 1e3
        yield self.row(f"copy of {4 * n / 1e9:.1f} GB", copy, against=f"{bandwidth / 1e9:.0f} GB/s")
        del source, target
        rates = {}
        for dtype in (torch.float64, torch.float32):
            name, T = str(dtype).removeprefix("torch."), 256 if self.quick else 4096
            X = torch.randn(T, T, device=self.device, dtype=dtype)
            S = X @ X.mT / T + torch.eye(T, device=self.device, dtype=dtype)
            ms = self.median(lambda X=X: X @ X)
            rates[dtype] = 2 * T**3 / ms * 1e3
            yield self.row(f"product {T}, {name}", ms, against=f"{rates[dtype] / 1e12:.1f} TFLOP/s")
            for n_, f in self.factorisations(S):
                yield self.row(f"{n_} {T}, {name}", self.median(f))
        self.floors = Floors(bandwidth, rates)

    def factorisations(self, S: Tensor) -> list[tuple[str, Callable[[], object]]]:
        L = torch.linalg.cholesky(S)
        return [
            ("cholesky", lambda: torch.linalg.cholesky(S)),
            ("cholesky_inverse", lambda: torch.cholesky_inverse(L)),
            ("eigh", lambda: torch.linalg.eigh(S)),
        ]

    # --- kernels alone ---------------------------------------------------------------------------

    def block_sums(self) -> Iterator[Row]:
        """Bytes of the blocks at the rate at which a copy reads and writes."""
        shapes: list[tuple[int, int, int]] = [(1, 64, 64), (64, 8, 16)]
        if not self.quick:
            shapes = [(1, 4, 8192), (1, 16, 4096), (1, 64, 2048), (1 << 17, 8, 16)]
        for batch, p, m in shapes:
            if 4 * batch * (p * m) ** 2 > 0.85 * self.free():
                continue
            A = torch.ones(batch, p * m, p * m, device=self.device)
            ms = self.median(partial(ops.block_diag_sum, A, p))
            size = 4 * batch * p * m * m
            floor = size / self.floors.bandwidth * 1e3
            met = "met" if floor >= 0.85 * ms else "not met"
            target = f"85%: {met}" if size >= 1e9 else ""
            yield self.row(f"block_diag_sum, {batch} × {p} of {m}×{m}", ms, floor, "", target)
            del A

    def free(self) -> int:
        if self.device == "cpu":
            return 1 << 28
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def small_kernels(self) -> Iterator[Row]:
        """Reading M and writing its gradient, or multiplications and additions, n³ for each λ."""
        batch = 64 if self.quick else 4096
        for T, D, dtype in [(8, 2, 4), (16, 4, 4), (32, 4, 4), (32, 4, 8), (32, 16, 4), (64, 4, 4),
                            (64, 16, 8)]:  # fmt: skip
            kind = torch.float32 if dtype == 4 else torch.float64
            Y, M, K, noise = moved(Case(T, D, batch=batch, dtype=kind), self.device)
            (N,) = noise.values()
            ms = self.median(partial(ops.small_nll, Y, M, K, N, False, True))
            size = 2 * dtype * batch * (T * T + T * D + D * D)
            work = batch * D * T**3 / self.floors.product[kind]
            floor = 1e3 * max(size / self.floors.bandwidth, work)
            value = self.median(partial(ops.small_nll, Y, M, K, N, False, False))
            what = f"small_nll, {batch} × T = {T}, D = {D}, float{8 * dtype}"
            yield self.row(what, ms, floor, f"value alone {value:.3g} ms")

    def pivots(self) -> Iterator[Row]:
        """Reading M once and, for each of r columns, those before it; a launch for each column."""
        for T in (128, 256) if self.quick else (1024, 4096, 16384):
            M = moved(Case(T, 1), self.device)[1]
            sought = max(T // 32, 64)
            r = int(ops.pivoted_cholesky(M, sought)[1])
            ms = self.median(partial(ops.pivoted_cholesky, M, sought))
            floor = 8 * (T * T + T * r * r / 2) / self.floors.bandwidth * 1e3
            yield self.row(f"pivoted_cholesky, T = {T}, rank {r} of {sought}", ms, floor)

    # --- the likelihood against others -----------------------------------------------------------

    def against(self, case: Case, name: str, peer: Callable[..., Tensor], target: float = 0) -> Row:
        inputs = moved(case, self.device)
        steps = [partial(gradients, f, *inputs) for f in (tk.kron_gaussian_nll, peer)]
        try:
            turns = self.race(*steps)
        except RuntimeError as error:  # out of memory, or a matrix that a peer finds indefinite
            return [f"{case}", "", "", "", f"{name}: {type(error).__name__}", ""]
        ms, other = (statistics.median(x) for x in zip(*turns, strict=True))
        ratio = statistics.median(b / a for a, b in turns)
        met = f"{target:.0f}×: {'met' if ratio >= target else 'not met'}" if target else ""
        return self.row(f"{case}", ms, 0, f"{name} {other:.4g} ms, {ratio:.3g}×", met)

    def comparisons(self) -> Iterator[Row]:
        try:
            from peers import composed, dense, gpytorch
        except ImportError as missing:
            yield [f"no peers: {missing}", *[""] * 5]
            return
        batch, T = (64, 128) if self.quick else (4096, 4096)
        single = torch.float32
        yield self.against(Case(32, 4, batch=batch, dtype=single), "batched eigh", composed, 50)
        yield self.against(Case(32, 4, batch=batch), "batched eigh", composed)
        yield self.against(Case(64, 4, batch=batch // 4, dtype=single), "batched eigh", composed)
        yield self.against(Case(16, 3, batch=batch // 4), "dense", dense)
        yield self.against(Case(T // 16, 8), "dense", dense)
        yield self.against(Case(T, 8), "GPyTorch", gpytorch, 10)
        yield self.against(Case(T, 8, "matern12"), "GPyTorch", gpytorch, 10)
        yield self.against(Case(T // 4, 4, "matern12"), "GPyTorch", gpytorch)
        yield self.against(Case(T // 4, 4, "matern12"), "eigh", composed)

    # --- for the constants of factor/plan.py -----------------------------------------------------

    def routes(self) -> Iterator[list[str]]:
        """T, D, then ms of the value with gradients: full rank by each route, its rank sought in
        vain up to T/8, and rank 30 or so found."""
        sizes: Sequence[int] = (64, 128) if self.quick else (64, 128, 256, 512, 1024, 2048, 4096)
        for T in sizes:
            for D in (2, 8, 16):
                times = [self.route(Case(T, D, "matern12"), m) for m in ("spectral", "cholesky")]
                M = moved(Case(T, D, "matern12"), self.device)[1]
                sought = self.median(partial(ops.pivoted_cholesky, M, T // 8))
                # by name it is sought up to T
                found = self.route(Case(T, D), "auto" if T > 64 else "low_rank")
                yield [str(T), str(D), *(f"{x:.3g}" for x in (*times, sought, found))]

    def missing(self) -> Iterator[list[str]]:
        """T, D, kernel, share missing, then ms by each route; where U would not be too large."""
        sizes = [(100, 0.3)] if self.quick else [(300, 0.3), (1000, 0.1), (1000, 0.3), (4000, 0.1)]
        sizes += [] if self.quick else [(1000, 0.6), (2000, 0.3), (2000, 0.6)]
        for kernel in ("rbf", "matern12"):
            for T, share in sizes:
                case = Case(T, 4, kernel)
                Y, M, K, noise = moved(case, self.device)
                observed = mask(case, share).to(self.device)
                names = ["capacitance"] if kernel == "rbf" else []
                names += ["border"] + (["dense"] if T <= 2000 else [])
                times = {name: self.masked(name, observed, Y, M, K, noise) for name in names}
                cells = [times.get(name, "") for name in ("capacitance", "border", "dense")]
                yield [str(T), "4", kernel, f"{share:.0%}", *cells]

    def masked(self, method: str, observed: Tensor, *inputs: Any) -> str:
        f = partial(tk.kron_gaussian_nll, method=method, observed=observed)
        try:
            return f"{self.median(partial(gradients, f, *inputs)):.3g}"
        except RuntimeError as error:  # out of memory
            return type(error).__name__

    def route(self, case: Case, method: str) -> float:
        inputs: Any = moved(case, self.device)
        return self.median(
            partial(gradients, partial(tk.kron_gaussian_nll, method=method), *inputs)
        )
