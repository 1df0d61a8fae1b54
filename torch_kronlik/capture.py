"""CUDA graphs: while one is captured, the host can wait for no result and so raise no error."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_captured"]


def is_captured(x: Tensor) -> bool:
    """Whether what is done to ``x`` goes into a CUDA graph.

    Checks of values are then left out: what they would have raised for makes the result of the
    replay not finite.
    """
    if not x.is_cuda:
        return False
    with torch.cuda.device(x.device):  # the stream that is asked about is this device's
        return torch.cuda.is_current_stream_capturing()
