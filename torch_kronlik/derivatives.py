"""How an opaque operator gets its derivatives: one mechanism for every operator of this library.

An operator here is opaque to PyTorch: a native kernel, or a Python kernel around ``torch.linalg``.
:func:`register` gives it its analytic rules at the dispatcher's Autograd key:

* ``vjp`` (reverse mode) and ``jvp`` (forward mode) see the operator's inputs and outputs as
  differentiable tensors and are themselves written in differentiable operations, so a rule that is
  right once is right at every order;
* ``vmap`` batches by broadcasting: every operator accepts leading batch dimensions, so a mapped
  argument gets its mapped dimension in front and an argument that is not mapped stays as it is.

The dispatcher sends a call through the Autograd key once per transform level (``torch.func``, dual
numbers, plain backward), so the rule is written for one level. ``torch.autograd.Function`` cannot
be used at that key, because it refuses to run under a transform. Its single-level base class can:
it is what functorch itself uses for one level, and it is the one private mechanism here. The
private names are all imported below, from ``torch.autograd.function``, ``torch._functorch.utils``
and ``torch._C``; where one disappears, importing this module fails with its name, so that no
derivative can be silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _after_autograd_keyset,
    _any_requires_grad,
    _are_functorch_transforms_active,
    _AutoDispatchBelowAutograd,
    _len_torch_dispatch_stack,
)
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from .autocast import full_precision

__all__ = [
    "NAMESPACE",
    "define",
    "is_plain_eager",
    "may_be_differentiated",
    "register",
]

NAMESPACE = "torch_kronlik"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")

Vjp = Callable[..., Sequence[Tensor | None]]
Jvp = Callable[..., Sequence[Tensor | None]]
CoreDims = Callable[..., tuple[Sequence[Any], Sequence[int]]]


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator implemented in Python, with its shape rule; returns the overload."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(torch.ops.torch_kronlik, name).default


def register(
    op: Any,
    *,
    vjp: Vjp | None = None,
    jvp: Jvp | None = None,
    core_dims: CoreDims,
    batch_shapes: Sequence[int] = (),
) -> None:
    """Give ``op`` its derivative and batching rules.

    Args:
        op: an operator overload, ``torch.ops.torch_kronlik.<name>.default``.
        vjp: ``vjp(inputs, outputs, grads, needs) -> gradients``, one gradient (or None) for each
            input; ``grads`` holds None for outputs without cotangent, ``needs`` a bool per input.
        jvp: ``jvp(inputs, outputs, tangents) -> output tangents``; ``tangents`` holds None for
            inputs without tangent. An output tangent of None means zero.
            With neither rule, the operator is a constant for differentiation.
        core_dims: ``core_dims(*inputs) -> (inputs', outputs')``, the number of trailing dimensions
            that are not batch, for each input (None where it is no tensor) and each output.
        batch_shapes: positions of the inputs that are batch shapes of outputs (SymInt[]?).
    """
    name = op._schema.name.split("::")[1]
    constant = vjp is None and jvp is None
    kernel = _below_autograd(op) if constant else _autograd_kernel(op, vjp, jvp)
    _library.impl(name, kernel, "Autograd", with_keyset=True)
    torch.library.register_vmap(op, _vmap_rule(op, core_dims, batch_shapes), lib=_library)


# --- one level of differentiation ---------------------------------------------------------------


def _below_autograd(op: Any) -> Callable[..., Any]:
    def redispatch(keyset: Any, *args: Any) -> Any:
        with _AutoDispatchBelowAutograd():
            return op.redispatch(keyset & _after_autograd_keyset, *args)

    return redispatch


def may_be_differentiated(*args: Any) -> bool:
    """Whether a derivative may be asked for at this or, under a transform, at another level."""
    return not is_plain_eager() or (torch.is_grad_enabled() and _any_requires_grad(*args))


class _transform_levels_enabled:
    """Grad and forward mode on: the levels below, which belong to outer transforms, need both."""

    def __enter__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._forward = torch._C._is_fwd_grad_enabled()
        torch._C._set_grad_enabled(True)
        torch._C._set_fwd_grad_enabled(True)

    def __exit__(self, *_: object) -> None:
        torch._C._set_grad_enabled(self._grad)
        torch._C._set_fwd_grad_enabled(self._forward)


def is_plain_eager() -> bool:
    """Whether only reverse mode can come: no transform, no forward mode, nothing traced."""
    return not (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or _are_functorch_transforms_active()
        or _len_torch_dispatch_stack() > 0
    )


def _autograd_kernel(op: Any, vjp: Vjp | None, jvp: Jvp | None) -> Callable[..., Any]:
    below = _below_autograd(op)
    single = len(op._schema.returns) == 1

    class Rule(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            with _transform_levels_enabled():
                out = below(keyset, *args)
            outs = (out,) if single else tuple(out)
            ctx.static = [None if isinstance(a, Tensor) else a for a in args]
            saved = [a if isinstance(a, Tensor) else None for a in args] + list(outs)
            ctx.save_for_backward(*saved)
            ctx.save_for_forward(*saved)
            ctx.set_materialize_grads(False)
            return out if single else outs

        @staticmethod
        def saved(ctx: Any, tensors: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            n = len(ctx.static)
            inputs = [s if t is None else t for t, s in zip(tensors[:n], ctx.static, strict=True)]
            return inputs, list(tensors[n:])

        @staticmethod
        @full_precision
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            if vjp is None:
                raise NotImplementedError(f"{op}: reverse-mode differentiation is not supported")
            if all(g is None for g in grads):
                return (None,) * (1 + len(ctx.static))
            inputs, outputs = Rule.saved(ctx, ctx.saved_tensors)
            return (None, *vjp(inputs, outputs, grads, ctx.needs_input_grad[1:]))

        @staticmethod
        @full_precision
        def jvp(ctx: Any, _keyset: Any, *tangents: Any) -> Any:
            if jvp is None:
                raise NotImplementedError(f"{op}: forward-mode differentiation is not supported")
            primals = [
                None if t is None else forward_ad.unpack_dual(t, level=0).primal
                for t in ctx.saved_tensors
            ]
            with _transform_levels_enabled():
                inputs, outputs = Rule.saved(ctx, primals)
                pairs = zip(jvp(inputs, outputs, tangents), outputs, strict=True)
                full = tuple(torch.zeros_like(o) if t is None else t for t, o in pairs)
            return full[0] if single else full

    def kernel(keyset: Any, *args: Any) -> Any:
        if not may_be_differentiated(*args):
            return below(keyset, *args)
        with enable_single_level_autograd_function():
            return Rule.apply(keyset, *args)  # type: ignore[attr-defined]

    return kernel


# --- batching -----------------------------------------------------------------------------------


def _vmap_rule(op: Any, core_dims: CoreDims, batch_shapes: Sequence[int]) -> Callable[..., Any]:
    """Mapped dimensions in front, ones after them where an argument's batch shape is shorter.

    Every mapped argument then has more batch dimensions than any argument that is not mapped, so
    the outputs that depend on a mapped argument are told by their number of dimensions.
    """

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        cores_in, cores_out = core_dims(*args)
        moved = list(args)
        tensors = [
            (i, in_dims[i], c) for i, c in enumerate(cores_in) if isinstance(args[i], Tensor)
        ]
        rank = max(args[i].dim() - (d is not None) - c for i, d, c in tensors)
        for i, d, c in tensors:
            if d is not None:
                moved[i] = _to_front(args[i], d, rank + 1 + c)
        for i in batch_shapes:
            if args[i] is not None:
                moved[i] = [info.batch_size, *[1] * (rank - len(args[i])), *args[i]]
        out = op(*moved)
        outs = (out,) if isinstance(out, Tensor) else out
        mapped = [0 if o.dim() - c > rank else None for o, c in zip(outs, cores_out, strict=True)]
        return out, mapped[0] if isinstance(out, Tensor) else tuple(mapped)

    return rule


def _to_front(tensor: Tensor, dim: int, num_dims: int) -> Tensor:
    moved = tensor.movedim(dim, 0)
    return moved[(slice(None),) + (None,) * (num_dims - moved.dim())]
