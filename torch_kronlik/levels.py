"""The levels of differentiation below a call, and every private name of torch that they need.

The dispatcher sends a call through the Autograd key once per level: plain backward, each dual
number, each transform of ``torch.func``. ``torch.autograd.Function`` refuses to run under a
transform. ``SingleLevelFunction``, the base class that functorch itself uses for one level, runs.

torch keeps these names private, so each is looked up here, once, and nowhere else in the package.
Where one is missing, importing this module fails with that name and the version of torch, and no
derivative can be silently wrong.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch.autograd import forward_ad

__all__ = [
    "AUTOGRAD_AND_BELOW",
    "BelowAutograd",
    "SingleLevelFunction",
    "TransformLevels",
    "WithoutTransforms",
    "any_requires_grad",
    "is_plain_eager",
    "single_level",
]


def _private(name: str) -> Any:
    """What torch keeps under ``name``, a dotted path below ``torch``."""
    try:
        return reduce(getattr, name.split("."), torch)
    except AttributeError:
        raise ImportError(
            f"torch_kronlik needs torch.{name}, which torch {torch.__version__} does not have: "
            "install a torch version that torch_kronlik is tested with"
        ) from None


AUTOGRAD_AND_BELOW = _private("_C._after_autograd_keyset")
BelowAutograd = _private("_C._AutoDispatchBelowAutograd")
SingleLevelFunction = _private("autograd.function._SingleLevelFunction")
WithoutTransforms = _private("_C._DisableFuncTorch")
any_requires_grad = _private("_C._any_requires_grad")
single_level = _private("_functorch.utils.enable_single_level_autograd_function")

_transforms_active = _private("_C._are_functorch_transforms_active")
_num_dispatch_modes = _private("_C._len_torch_dispatch_stack")
_is_forward_enabled = _private("_C._is_fwd_grad_enabled")
_set_forward_enabled = _private("_C._set_fwd_grad_enabled")
_set_grad_enabled = _private("_C._set_grad_enabled")
_private("autograd.forward_ad._current_level")  # a number that changes: read where it is used


class TransformLevels:
    """Grad and forward mode on: the levels below, which belong to outer transforms, need both."""

    def __enter__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._forward = _is_forward_enabled()
        _set_grad_enabled(True)
        _set_forward_enabled(True)

    def __exit__(self, *_: object) -> None:
        _set_grad_enabled(self._grad)
        _set_forward_enabled(self._forward)


def is_plain_eager() -> bool:
    """Whether only reverse mode can come: no transform, no forward mode, nothing traced."""
    return not (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or _transforms_active()
        or _num_dispatch_modes() > 0
    )
