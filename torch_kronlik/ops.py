"""Loads the native library."""

from pathlib import Path

import torch

_HERE = Path(__file__).parent


def _load(name: str) -> None:
    found = sorted(_HERE.glob(f"{name}.*"))
    if not found:
        raise ImportError(
            f"the native library torch_kronlik/{name} is not built; build it in the source folder "
            "with:  pip install -c constraints.txt -e ."
        )
    torch.ops.load_library(str(found[0]))


_load("_C")
if torch.version.cuda:
    _load("_C_cuda")

block_diag_sum = torch.ops.torch_kronlik.block_diag_sum.default
