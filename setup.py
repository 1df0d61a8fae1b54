"""Builds the native libraries torch_kronlik/_C (always) and torch_kronlik/_C_cuda (with CUDA).

The CUDA library is built when torch is a CUDA build and a toolkit is found. FORCE_CUDA=1 builds
it beside any torch, FORCE_CPU=1 never builds it. TORCH_CUDA_ARCH_LIST chooses the architectures.
"""

import os
import shutil
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
# The libraries use the LibTorch stable ABI of torch 2.10: one binary loads in every later torch.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
COMMON = ["-O3", "-std=c++17", STABLE_ABI]
HOST = [
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    "-fno-math-errno",  # square roots in vectors
    # Error messages name the source file: relative to the project, not to the build machine.
    f"-ffile-prefix-map={ROOT.resolve()}/=",
]
# torch's headers as system headers, so that warnings are about this project's code.
CXX = ["-g0", *COMMON, *HOST, *(f"-isystem{path}" for path in cpp_extension.include_paths())]
NVCC = [*COMMON, "-lineinfo", *(f"-Xcompiler={flag}" for flag in (*HOST, "-Wno-unused-parameter"))]
DEFAULT_ARCHS = "8.0;9.0+PTX"


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for q in patterns for p in (ROOT / "csrc").glob(q))


def headers() -> list[str]:
    return sources("*.h", "kernels/*.h", "cpu/*.h", "cuda/*.h")


def find_cuda() -> str | None:
    """The first toolkit that has headers; an nvcc wrapper on PATH would mislead torch."""
    for home in (os.environ.get("CUDA_HOME"), cpp_extension.CUDA_HOME, "/usr/local/cuda"):
        if home and (Path(home) / "include" / "cuda_runtime.h").exists():
            return home
    return None


def cuda_wanted() -> bool:
    if os.environ.get("FORCE_CPU") == "1":
        return False
    forced = os.environ.get("FORCE_CUDA") == "1"
    home = find_cuda()
    if forced and home is None:
        raise RuntimeError("FORCE_CUDA=1, but no CUDA toolkit: set CUDA_HOME to one with include/")
    if home is None or not (forced or torch.version.cuda):
        return False
    cpp_extension.CUDA_HOME = home
    return True


def cpu_extension() -> Extension:
    return cpp_extension.CppExtension(
        "torch_kronlik._C",
        sources("*.cpp", "cpu/*.cpp"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": CXX},
        depends=headers(),
        py_limited_api=True,
    )


def cuda_extension() -> Extension:
    # Without a visible GPU torch cannot guess the architectures and fails.
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS)
    extension = cpp_extension.CUDAExtension(
        "torch_kronlik._C_cuda",
        sources("cuda/*.cu"),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("USE_CUDA", None)],
        extra_compile_args={"cxx": CXX, "nvcc": NVCC},
        depends=headers(),
        py_limited_api=True,
    )
    if not torch.version.cuda:  # a compile check beside CPU torch: these are not there to link
        extension.libraries = [
            name for name in extension.libraries if name not in ("torch_cuda", "c10_cuda")
        ]
    return extension


extensions = [cpu_extension()]
if cuda_wanted():
    extensions.append(cuda_extension())

setup(
    ext_modules=extensions,
    cmdclass={
        "build_ext": cpp_extension.BuildExtension.with_options(
            use_ninja=shutil.which("ninja") is not None
        )
    },
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
