"""Value and gradients of the likelihood: time, memory and error, against peers and floors.

    python benchmarks/likelihood.py --quick | --full | --targets
        [--threads N] [--repeats N] [--seconds S] [--output FOLDER]

We and the peers (see peers.py) take turns in one process with pinned threads. A ratio is the
median over turns of a peer's time to ours, with its quartiles; a turn is the value and the
gradients in M, K and the noise. Error is the largest over value and gradients, each relative to
its largest entry, against one Cholesky factor per output in float64, which uses no eigenvector of
M. Memory is how far a call raises the resident memory of the process, in T×T matrices, the
gradient in M included. Floors: ``eigh`` of M, Cholesky of M, and a copy of M.

--quick and --full print a table for the grid and write it, with a plot of time against T, to the
output folder; --targets prints the ratios that this project set itself.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import TARGETS, Case, Target, curves, grid, problem
from common import Spread, error, markdown, peak_bytes, ratio, take_turns, warm_up
from peers import PEERS, one_cholesky_per_output
from torch import Tensor

import torch_kronlik as tk
from torch_kronlik.factor.plan import costs

LARGEST_DENSE = 3000  # rows of U, beyond which dense peers are left out
LARGEST_STRUCTURED = 2000  # and of M, for GPyTorch's structured path
ROUTES = ("spectral", "cholesky", "low_rank")


class Settings(NamedTuple):
    threads: int
    repeats: int
    seconds: float  # a case starts no new turn after this
    output: Path


class Measured(NamedTuple):
    case: Case
    method: str
    milliseconds: dict[str, float]
    ratios: dict[str, Spread]  # to "ours"
    errors: dict[str, float]
    memory: float | None  # ours, in T×T matrices


# --- contestants --------------------------------------------------------------------------------


def step(nll: Callable[..., Tensor], case: Case) -> Callable[[], list[Tensor]]:
    """A call of value and gradients, or of the value alone."""
    Y, M, K, noise = problem(case)
    rows: Any = tk.symmetric_eigen(M) if case.constant and nll is tk.kron_gaussian_nll else M
    if not case.gradients:

        def value() -> list[Tensor]:
            with torch.no_grad():
                return [nll(Y, rows, K, **noise)]

        return value
    leaves = [*([] if case.constant else [M]), K, *noise.values()]
    for leaf in leaves:
        leaf.requires_grad_()

    def value_and_gradients() -> list[Tensor]:
        out = nll(Y, rows, K, **noise)
        return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]

    return value_and_gradients


def floors(case: Case) -> dict[str, Callable[[], object]]:
    M = problem(case)[1]
    target = torch.empty_like(M)
    C = M.clone()
    C.diagonal(dim1=-2, dim2=-1).add_(1)
    return {
        "eigh": lambda: torch.linalg.eigh(M),
        "Cholesky": lambda: torch.linalg.cholesky_ex(C),
        "copy": lambda: target.copy_(M),
    }


def contestants(case: Case, peers: list[str]) -> dict[str, Callable[[], Any]]:
    rows = case.T * case.D
    too_large = {
        "dense": rows > LARGEST_DENSE,
        "gpytorch_dense": rows > LARGEST_DENSE,
        "gpytorch": case.T > LARGEST_STRUCTURED,
    }
    found: dict[str, Callable[[], Any]] = {"ours": step(tk.kron_gaussian_nll, case)}
    found |= {p: step(PEERS[p], case) for p in peers if not too_large.get(p, False)}
    return found | floors(case)


def routes(case: Case) -> dict[str, Callable[[], Any]]:
    return {
        name: step(functools.partial(tk.kron_gaussian_nll, method=name), case) for name in ROUTES
    }


# --- measurements -------------------------------------------------------------------------------


def expected(case: Case) -> list[Tensor]:
    Y, M, K, noise = problem(case)
    arguments = (x.double() for x in (Y, M, K))
    value, _, gM, gK, g_noise = one_cholesky_per_output(
        *arguments, **{name: x.double() for name, x in noise.items()}
    )
    if not case.gradients:
        return [value]
    return [value, *([] if case.constant else [gM]), gK, g_noise]


def method_used(case: Case) -> str:
    """The route of "auto", "small" for the one native call."""
    if costs("cpu").fits_small(case.T, case.D) and not case.constant:
        return "small"
    _, M, K, noise = problem(case)
    rows = tk.symmetric_eigen(M) if case.constant else M
    return tk.KroneckerPlusNoise(rows, K, **noise).method_used


def measure(case: Case, peers: list[str], settings: Settings, by_route: bool) -> Measured:
    steps = contestants(case, peers) | (routes(case) if by_route else {})
    names = list(steps)
    turns = take_turns(list(steps.values()), settings.repeats, settings.seconds)
    truth = expected(case)
    errors = {
        name: max(map(error, steps[name](), truth)) for name in names if name in ("ours", *peers)
    }
    memory = peak_bytes(steps["ours"])
    matrix = case.T**2 * case.dtype.itemsize * max(case.batch, 1)
    return Measured(
        case,
        method_used(case),
        {n: 1e3 * statistics.median(turn[i] for turn in turns) for i, n in enumerate(names)},
        {n: ratio(turns, i) for i, n in enumerate(names)},
        errors,
        None if memory is None else memory / matrix,
    )


# --- reports ------------------------------------------------------------------------------------


def number(x: float) -> str:
    return f"{x:.2g}" if x < 10 else f"{x:.0f}"


def ratio_words(x: Spread) -> str:
    return f"**{number(x.median)}** ({number(x.low)} to {number(x.high)})"


def memory_words(m: Measured) -> str:
    return "-" if m.memory is None or m.case.T < 256 else f"{m.memory:.1f}"


def grid_row(m: Measured, peers: list[str]) -> list[str]:
    times = [number(m.milliseconds["ours"])]
    times += [ratio_words(m.ratios[p]) if p in m.ratios else "-" for p in peers]
    found = [f"{m.errors[p]:.0e}" if p in m.errors else "-" for p in ("ours", *peers)]
    below = [number(m.milliseconds[f]) for f in ("eigh", "Cholesky", "copy")]
    return [str(m.case), m.method, *times, " / ".join(found), memory_words(m), *below]


def grid_table(measured: list[Measured], peers: list[str]) -> str:
    header = ["problem", "route", "ours, ms", *(f"{p} / ours" for p in peers)]
    header += ["error: ours / " + " / ".join(peers), "memory, T×T"]
    return markdown([*header, "eigh, ms", "Cholesky, ms", "copy, ms"],
                    (grid_row(m, peers) for m in measured))  # fmt: skip


def target_row(target: Target, m: Measured) -> list[str]:
    found = m.ratios[target.peer]
    floor = {"cholesky": "Cholesky", "spectral": "eigh"}.get(m.method, "copy")
    floor = "copy" if m.case.constant else floor
    return [
        str(m.case),
        target.peer,
        f"{target.ratio:g}×",
        ratio_words(found),
        "yes" if found.median >= target.ratio else "no",
        number(m.milliseconds["ours"]),
        number(m.milliseconds[target.peer]),
        f"{floor} {number(m.milliseconds[floor])}",
        f"{m.errors['ours']:.0e} / {m.errors[target.peer]:.0e}",
        memory_words(m),
    ]


TARGET_HEADER = ["problem", "peer", "target", "measured", "met", "ours, ms", "peer, ms",
                 "floor, ms", "error: ours / peer", "memory, T×T"]  # fmt: skip


def report_targets(settings: Settings) -> None:
    rows = []
    for target in TARGETS:
        m = measure(target.case, [target.peer], settings, by_route=False)
        rows.append(target_row(target, m))
        print(" | ".join(rows[-1]), flush=True)
    print("\n" + markdown(TARGET_HEADER, rows))


def report_grid(largest: int, settings: Settings) -> None:
    peers, measured = list(PEERS), []
    for case in [*curves(largest), *grid(largest)]:
        m = measure(case, peers, settings, by_route=case in curves(largest))
        measured.append(m)
        print(" | ".join(grid_row(m, peers)), flush=True)
    settings.output.mkdir(parents=True, exist_ok=True)
    report = [_machine(settings), grid_table(measured, peers), _choices(measured)]
    (settings.output / "likelihood.md").write_text("\n\n".join(report) + "\n")
    plot([m for m in measured if m.case in curves(largest)], settings.output / "likelihood.png")


def _choices(measured: list[Measured]) -> str:
    """How much longer the route that "auto" took runs than the best one."""
    rows = []
    for m in measured:
        known = {r: m.ratios[r] for r in ROUTES if r in m.ratios}
        if known:
            best = min(known, key=lambda r: known[r].median)
            rows.append([str(m.case), m.method, best, number(1 / known[best].median)])
    return markdown(["problem", "auto", "fastest", "auto / fastest"], rows)


def plot(measured: list[Measured], path: Path) -> None:
    from matplotlib import pyplot as plt

    kernels = sorted({m.case.kernel for m in measured}, reverse=True)
    figure, axes = plt.subplots(1, len(kernels), figsize=(13, 5.5), sharey=True, squeeze=False)
    for ax, kernel in zip(axes[0], kernels, strict=True):
        own = [m for m in measured if m.case.kernel == kernel]
        for name in dict.fromkeys(name for m in own for name in m.milliseconds):
            xy = [(m.case.T, m.milliseconds[name]) for m in own if name in m.milliseconds]
            ax.loglog(*zip(*xy, strict=True), **_style(name))
        ax.set(title=f"{kernel}, D = 4, float64, value and gradients", xlabel="T")
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("milliseconds")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _style(name: str) -> dict[str, Any]:
    if name == "ours":
        return {"label": "torch_kronlik", "color": "black", "linewidth": 2.5, "marker": "o"}
    if name in ROUTES:
        return {"label": f"torch_kronlik, method={name!r}", "linewidth": 1, "marker": "."}
    if name in PEERS:
        return {"label": name, "linestyle": "--", "marker": "x", "markersize": 5}
    return {"label": f"floor: {name}", "linestyle": ":", "color": "gray", "alpha": 0.8}


def _machine(settings: Settings) -> str:
    import gpytorch
    import linear_operator

    return (
        f"torch {torch.__version__}, gpytorch {gpytorch.__version__}, linear_operator "
        f"{linear_operator.__version__}, torch_kronlik {tk.__version__}, "
        f"{torch.backends.cpu.get_cpu_capability()}, {settings.threads} thread(s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="T up to 512, under three minutes")
    what.add_argument("--full", action="store_true", help="T up to 4000")
    what.add_argument("--targets", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    options = parser.parse_args()
    settings = Settings(options.threads, options.repeats, options.seconds, options.output)
    torch.set_num_threads(settings.threads)
    warm_up()
    print(_machine(settings))
    if options.targets:
        report_targets(settings)
    else:
        report_grid(4000 if options.full else 512, settings)


if __name__ == "__main__":
    main()
