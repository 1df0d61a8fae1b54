"""How an opaque operator gets its derivatives: one mechanism for every operator of this library.

An operator here is opaque to PyTorch: a native kernel, or a Python kernel around ``torch.linalg``.
:func:`register` gives it its analytic rules at the dispatcher's Autograd key:

* ``vjp`` (reverse mode) and ``jvp`` (forward mode) see the operator's inputs and outputs as
  differentiable tensors and are themselves written in differentiable operations, so a rule that is
  right once is right at every order;
* ``vmap`` batches by broadcasting: every operator accepts leading batch dimensions, so a mapped
  argument gets its mapped dimension in front and an argument that is not mapped stays as it is.

The rule is written for one level: :mod:`.levels` says what a level is.

:func:`define` makes an operator whose arguments and results are typed records; :func:`register` is
the layer below it, for operators with a flat list of arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .autocast import full_precision
from .levels import (
    AUTOGRAD_AND_BELOW,
    BelowAutograd,
    SingleLevelFunction,
    TransformLevels,
    any_requires_grad,
    is_plain_eager,
    single_level,
)
from .records import Layout, layouts, open_fields

__all__ = [
    "NAMESPACE",
    "Operator",
    "define",
    "define_flat",
    "is_plain_eager",
    "may_be_differentiated",
    "register",
]

NAMESPACE = "torch_kronlik"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")

Vjp = Callable[..., Sequence[Tensor | None]]
Jvp = Callable[..., Sequence[Tensor | None]]
CoreDims = Callable[..., tuple[Sequence[Any], Sequence[Any]]]


def define_flat(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator implemented in Python, with its shape rule; returns the overload."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    base, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.torch_kronlik, base), overload or "default")


Vjps = Callable[..., Any]
Flatten = Callable[[Any], Sequence[Any]]
Unflatten = Callable[[Sequence[Any]], Any]


class Operator:
    """An operator whose arguments and results are records, with an overload for each combination
    of the records that may stand in its open fields. Made by :func:`define`.

    It is called with the fields of its arguments, and returns the record of its results, or the
    tensor where there is one result.
    """

    def __init__(
        self,
        name: str,
        arguments: Any,
        results: Any,
        kernel: Callable[..., Any],
        fake: Callable[..., Any],
        vjp: Vjps | None,
        jvp: Vjps | None,
    ) -> None:
        self.name, self.arguments, self.results = name, arguments, results
        self._kernel, self._fake, self._vjp, self._jvp = kernel, fake, vjp, jvp
        self._open = list(open_fields(arguments).values())
        # what flattens the arguments and makes the record of the results, beside the overload
        self._overloads: dict[tuple[type, ...], tuple[Any, Flatten, Unflatten]] = {}
        self._define_overloads()

    def __call__(self, *fields: Any) -> Any:
        which = tuple([type(_at(fields, path)) for path in self._open])
        if which not in self._overloads:  # a record that was registered later
            self._define_overloads()
        op, flatten, unflatten = self._overloads[which]
        out = op(*flatten(fields))
        return out if isinstance(out, Tensor) else unflatten(out)

    def overload(self, *records: type) -> Any:
        """PyTorch's overload for these records in the open fields."""
        return self._overloads[records][0]

    def _define_overloads(self) -> None:
        for which, given, made in layouts(self.arguments, self.results):
            if which not in self._overloads:
                self._overloads[which] = self._define(which, given, made)

    def _define(
        self, which: tuple[type, ...], given: Layout, made: Layout
    ) -> tuple[Any, Flatten, Unflatten]:
        overload = "_".join(record.__name__.lower() for record in which)
        name = f"{self.name}.{overload}" if overload else self.name
        results = made.schema()
        returns = results[0] if len(results) == 1 else f"({', '.join(results)})"
        flat = _Flat(given, made)
        op = define_flat(
            f"{name}({', '.join(given.schema())}) -> {returns.replace('?', '')}",
            flat.kernel(self._kernel),
            flat.kernel(self._fake),
        )
        cores = [x.core for x in given.leaves], [x.core for x in made.leaves]
        register(
            op,
            vjp=None if self._vjp is None else flat.vjp(self._vjp),
            jvp=None if self._jvp is None else flat.jvp(self._jvp),
            core_dims=lambda *_: cores,
            batch_shapes=[i for i, x in enumerate(given.leaves) if x.is_batch],
        )
        return op, flat.flatten_given, flat.make


def _at(fields: Any, path: Sequence[int]) -> Any:
    for i in path:
        fields = fields[i]
    return fields


class _Flat:
    """Kernels and rules on records, as kernels and rules on flat lists."""

    def __init__(self, given: Layout, made: Layout) -> None:
        self.flatten_given, self.give = given.functions()
        self.flatten_made, self.make = made.functions()

    def kernel(self, f: Callable[..., Any]) -> Callable[..., Any]:
        def flat(*args: Any) -> Any:
            out = f(self.give(args))
            return out if isinstance(out, Tensor) else tuple(self.flatten_made(out))

        return flat

    def vjp(self, f: Vjps) -> Vjp:
        def flat(inputs: Any, outputs: Any, grads: Any, needs: Any) -> Sequence[Tensor | None]:
            give, make = self.give, self.make
            found = f(give(inputs), make(outputs), make(grads), give(needs))
            flattened: Sequence[Tensor | None] = self.flatten_given(found)
            return flattened

        return flat

    def jvp(self, f: Vjps) -> Jvp:
        def flat(inputs: Any, outputs: Any, tangents: Any) -> Sequence[Tensor | None]:
            tangents = [*tangents, *[None] * (len(inputs) - len(tangents))]
            out = f(self.give(inputs), self.make(outputs), self.give(tangents))
            flattened: Sequence[Tensor | None] = self.flatten_made(out)
            return flattened

        return flat


def define(
    name: str,
    arguments: Any,
    results: Any,
    kernel: Callable[[Any], Any],
    fake: Callable[[Any], Any],
    *,
    vjp: Vjps | None = None,
    jvp: Vjps | None = None,
) -> Operator:
    """Define an operator implemented in Python, on records.

    Args:
        name: of the operator.
        arguments, results: NamedTuple classes, see :mod:`.records`.
        kernel: ``kernel(arguments) -> results``, a tensor where there is one.
        fake: the same, for shapes alone.
        vjp: ``vjp(arguments, results, grads, needs) -> gradients``. ``grads`` is a record of the
            results with None for outputs without cotangent, ``needs`` one of the arguments with a
            bool for each; the gradients are a record of the arguments with None for what has none.
        jvp: ``jvp(arguments, results, tangents) -> tangents of the results``, None where zero.
            With neither rule, the operator is a constant for differentiation.
    """
    return Operator(name, arguments, results, kernel, fake, vjp, jvp)


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
    name = op._name.split("::")[1]
    constant = vjp is None and jvp is None
    kernel = _below_autograd(op) if constant else _autograd_kernel(op, vjp, jvp)
    _library.impl(name, kernel, "Autograd", with_keyset=True)
    torch.library.register_vmap(op, _vmap_rule(op, core_dims, batch_shapes), lib=_library)


# --- one level of differentiation ---------------------------------------------------------------


def _below_autograd(op: Any) -> Callable[..., Any]:
    def redispatch(keyset: Any, *args: Any) -> Any:
        with BelowAutograd():
            return op.redispatch(keyset & AUTOGRAD_AND_BELOW, *args)

    return redispatch


def may_be_differentiated(*args: Any) -> bool:
    """Whether a derivative may be asked for at this or, under a transform, at another level."""
    return not is_plain_eager() or (torch.is_grad_enabled() and any_requires_grad(*args))


def _autograd_kernel(op: Any, vjp: Vjp | None, jvp: Jvp | None) -> Callable[..., Any]:
    below = _below_autograd(op)
    single = len(op._schema.returns) == 1

    class Rule(SingleLevelFunction):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            with TransformLevels():
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
            with TransformLevels():
                inputs, outputs = Rule.saved(ctx, primals)
                pairs = zip(jvp(inputs, outputs, tangents), outputs, strict=True)
                full = tuple(torch.zeros_like(o) if t is None else t for t, o in pairs)
            return full[0] if single else full

    def kernel(keyset: Any, *args: Any) -> Any:
        if not may_be_differentiated(*args):
            return below(keyset, *args)
        with single_level():
            return Rule.apply(keyset, *args)

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
