"""Compiles the CUDA kernels for the CPU:  python tests/cuda_emulation/build.py FOLDER"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMMON = ["-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS = [
    *COMMON,
    "-std=c++17",
    # nvcc compares such integers, and knows such pragmas
    "-Wno-sign-compare",
    "-Wno-unknown-pragmas",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DUSE_CUDA",
    # longjmp changes stacks, which the fortified one takes for an error
    "-U_FORTIFY_SOURCE",
]
# Reported by the emulator: vector loads from addresses that are not aligned, indices of arrays out
# of bounds, and all accesses to memory, among which it looks for races.
PLACES = ["-fsanitize=alignment,bounds"]
CHECKS = [*PLACES, "-fsanitize=thread"]
EMULATOR = [HERE / "emulator.cpp", HERE / "races.cpp"]
NOT_A_KERNEL = {"build_info.cu"}


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def kernels() -> list[Path]:
    return sorted(p for p in CSRC.glob("cuda/*.cu") if p.name not in NOT_A_KERNEL)


def compile_one(source: Path, target: Path, flags: list[str]) -> Path:
    include = [f"-I{HERE}", *(f"-isystem{path}" for path in cpp_extension.include_paths())]
    subprocess.run(
        [compiler() or "c++", "-x", "c++", *flags, *include, "-c", str(source), "-o", str(target)],
        check=True,
    )
    return target


def link(objects: list[Path], library: Path) -> Path:
    torch_lib = Path(torch.__file__).parent / "lib"
    flags = ["-shared", "-Wl,-Bsymbolic", f"-L{torch_lib}", "-ltorch_cpu", "-lc10"]
    flags += [f"-Wl,-rpath,{torch_lib}", "-o", str(library)]
    subprocess.run([compiler() or "c++", *map(str, objects), *flags], check=True)
    return library


def build_kernels(folder: Path, sources: list[Path], checks: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, *checks, "-include", "registration.h"]
    objects = [compile_one(x, folder / f"{x.name}.o", flags) for x in sources]
    objects += [compile_one(x, folder / f"{x.name}.o", FLAGS) for x in EMULATOR]
    return link(objects, folder / "cuda_emulation.so")


def build(folder: Path) -> Path:
    """The shared object, which registers its operators in torch.ops.torch_kronlik_emulated."""
    return build_kernels(folder, [CSRC / "ops.cpp", *kernels(), HERE / "self_test.cu"], CHECKS)


def build_device(folder: Path) -> list[Path]:
    """The emulated device, and torch_kronlik's operators on it; no search for races."""
    library = build_kernels(folder, kernels(), [*PLACES, "-DEMULATED_DEVICE"])
    flags = [*COMMON, "-std=c++20", "-Wno-unused-parameter"]
    device = compile_one(HERE / "device.cpp", folder / "device.cpp.o", flags)
    return [link([device], folder / "device.so"), library]


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
