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
FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
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
CHECKS = ["-fsanitize=alignment,bounds", "-fsanitize=thread"]
EMULATOR = [HERE / "emulator.cpp", HERE / "races.cpp"]
NOT_A_KERNEL = {"build_info.cu"}


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def sources() -> list[Path]:
    kernels = sorted(p for p in CSRC.glob("cuda/*.cu") if p.name not in NOT_A_KERNEL)
    return [CSRC / "ops.cpp", *kernels, HERE / "self_test.cu", *EMULATOR]


def compile_one(source: Path, target: Path) -> Path:
    include = [f"-I{HERE}", *(f"-isystem{path}" for path in cpp_extension.include_paths())]
    flags = FLAGS if source in EMULATOR else [*FLAGS, *CHECKS, "-include", "registration.h"]
    subprocess.run(
        [compiler() or "c++", "-x", "c++", *flags, *include, "-c", str(source), "-o", str(target)],
        check=True,
    )
    return target


def build(folder: Path) -> Path:
    """The shared object, which registers its operators in torch.ops.torch_kronlik_emulated."""
    folder.mkdir(parents=True, exist_ok=True)
    objects = [compile_one(source, folder / f"{source.name}.o") for source in sources()]
    library = folder / "cuda_emulation.so"
    torch_lib = Path(torch.__file__).parent / "lib"
    link = ["-shared", "-Wl,-Bsymbolic", f"-L{torch_lib}", "-ltorch_cpu", f"-Wl,-rpath,{torch_lib}"]
    subprocess.run([compiler() or "c++", *map(str, objects), *link, "-o", str(library)], check=True)
    return library


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
