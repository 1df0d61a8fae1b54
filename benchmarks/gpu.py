"""Everything on a GPU in one command, under ten minutes: build, checks, sanitizer, floors, times.

    python benchmarks/gpu.py [--device cuda] [--quick] [--check-only | --times-only]
        [--output table.md]

Builds the native libraries, checks every kernel against float64 references, runs the small ones
once more under compute-sanitizer where that is installed, then times against the peers and the
floors measured in the same run. Contestants take turns; numbers are medians.
``--device cpu --quick`` tries the script itself.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SANITIZERS = ("memcheck", "racecheck", "synccheck")
MISSING = ["T", "D", "kernel", "missing", "capacitance", "border", "dense"]
ROUTES = ["T", "D", "spectral", "cholesky", "T/8 sought", "rank found"]


def build(device: str) -> None:
    """Compiles what has changed; on a CPU, where nothing is there."""
    if device == "cpu" and list((ROOT / "torch_kronlik").glob("_C.*")):
        return
    print("building the native libraries", flush=True)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, check=True)


def sanitize(device: str, seconds: float) -> list[str]:
    """Runs the small checks under compute-sanitizer; what was found, in words."""
    tool = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if tool is None or device == "cpu":
        return ["compute-sanitizer: not run"]
    # without the caching allocator, so that memory next to a tensor is nobody's
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = []
    for kind in SANITIZERS:
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable]
        command += [str(HERE / "gpu_checks.py"), "--device", device, "--small"]
        found.append(f"compute-sanitizer {kind}: {outcome(command, env, seconds)}")
    return found


def outcome(command: list[str], env: dict[str, str], seconds: float) -> str:
    """Of a command that is stopped after so many seconds, with all that it has started."""
    child = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    try:
        told, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return f"no fault in {seconds:.0f} s, not finished"
    if child.returncode == 0:
        return "clean"
    if "Device not supported" in told:
        return "refused by this machine"
    lines = told.strip().splitlines()
    first = [line for line in lines if line.startswith("=========")][:40]
    return "\n".join(["FAULT", *first, *lines[-6:]])


def describe(device: str) -> str:
    if device == "cpu":
        name = platform.processor() or platform.machine()
    else:
        name = torch.cuda.get_device_name(device)
        if tool := shutil.which("nvidia-smi"):
            query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout
            name += f", driver {driver.strip().splitlines()[0] if driver.strip() else 'unknown'}"
    return f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def checked(device: str) -> str:
    from gpu_checks import run_checks

    results = list(run_checks(device))
    for what, dtype, off, good in results:
        print(f"{'ok  ' if good else 'FAIL'} {what}, {dtype}: {off:.1e}", flush=True)
    failed = [
        f"FAULT: {what}, {dtype}: {off:.1e}" for what, dtype, off, good in results if not good
    ]
    return "\n".join([f"{len(results)} checks against float64 references", *failed])


class Report:
    """Lines that are printed and written as they come, so that a run cut short leaves a table."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.lines = path, list[str]()

    def add(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)
        if self.path:
            self.path.write_text("\n".join(self.lines) + "\n")

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        for line in ("", *("| " + " | ".join(x) + " |" for x in (header, ["---"] * len(header)))):
            self.add(line)
        for row in rows:
            self.add("| " + " | ".join(row) + " |")


def times(report: Report, device: str, quick: bool) -> None:
    from gpu_times import HEADER, Bench

    bench = Bench(device, quick, budget=0.3 if quick else 8)
    for part in (
        bench.measure_floors,
        bench.block_sums,
        bench.small_kernels,
        bench.pivots,
        bench.comparisons,
    ):
        report.table(HEADER, part())
    bench.budget = 0.1 if quick else 1
    report.add("\nValue and gradients by each route, float64, ms:")
    report.table(ROUTES, bench.routes())
    report.add("\nMissing entries, value and gradients by each route, float64, ms:")
    report.table(MISSING, bench.missing())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--check-only", action="store_true")
    part.add_argument("--times-only", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    start = time.perf_counter()
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    build(options.device)
    report = Report(options.output)
    report.add(describe(options.device))
    if not options.times_only:
        report.add(checked(options.device))
        for line in sanitize(options.device, seconds=90):
            report.add(line)
    if not options.check_only:
        times(report, options.device, options.quick)
    report.add(f"\n{time.perf_counter() - start:.0f} s in all")
    if any("FAULT" in line for line in report.lines):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
