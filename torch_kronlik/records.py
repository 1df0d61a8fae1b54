"""Typed records as the arguments and results of operators.

An operator of PyTorch takes a flat list of tensors. A record is a NamedTuple whose fields say what
each tensor is: ``Matrix`` is a tensor with two trailing dimensions behind its batch, ``Vector`` one
with one, and so on; ``Batch`` is the batch shape of a result; a field may be a record itself. The
schema of an operator, the shapes that vmap needs, and the flat list follow from the annotations.

A field annotated with a subclass of :class:`Kind` is open: any record registered for that kind may
stand there. An operator has one overload for each combination of registered records.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple, Union, get_args, get_origin, get_type_hints

from torch import Tensor

__all__ = [
    "Batch",
    "Kind",
    "Layout",
    "Matrix",
    "Scalar",
    "Stack",
    "Vector",
    "expand_record",
    "layouts",
    "open_fields",
    "own_layout",
    "share_members",
]

Scalar = Annotated[Tensor, 0]  # (*batch)
Vector = Annotated[Tensor, 1]  # (*batch, n)
Matrix = Annotated[Tensor, 2]  # (*batch, m, n)
Stack = Annotated[Tensor, 3]  # (*batch, k, m, n)
Batch = Annotated[Sequence[int], "batch"]  # the batch shape of a result


class Kind:
    """A kind of record, such as the row covariances. Subclasses list the records of that kind."""

    records: list[type]

    def __init_subclass__(cls) -> None:
        cls.records = []

    beside: ClassVar[dict[type, dict[str, tuple[str, ...]]]] = {}

    @classmethod
    def register(cls, record: type) -> type:
        """Let ``record``, a NamedTuple, stand where this kind is asked for."""
        cls.records.append(record)
        return record

    @classmethod
    def register_beside(cls, **names: tuple[str, ...]) -> Callable[[type], type]:
        """The same, for a record beside which only records of these names stand; by their kind."""

        def register(record: type) -> type:
            cls.beside[record] = names
            return cls.register(record)

        return register


def share_members(record: type, members: type) -> None:
    """Give ``record``, which as a NamedTuple cannot inherit, the members that it lacks."""
    for name, member in vars(members).items():
        if not name.startswith("__") and not hasattr(record, name):
            setattr(record, name, member)


class Leaf(NamedTuple):
    """A field that is no record."""

    name: str
    core: int | None  # trailing dimensions that are not batch; None for what is no tensor
    type: str  # in a schema
    optional: bool

    @property
    def is_batch(self) -> bool:
        return self.type == "SymInt[]"


class Layout:
    """How a record with known kinds is laid out in a flat list.

    Args:
        record: a NamedTuple class.
        kinds: the record that stands for each kind.
        name: of the field that the record stands in.
    """

    def __init__(self, record: Any, kinds: dict[type, type], name: str = "") -> None:
        self.record, self.name = record, name
        hints = _hints(record)
        self.fields = [_field(f, hints[f], kinds) for f in record._fields]
        self.leaves: list[Leaf] = [leaf for field in self.fields for leaf in _leaves(field)]

    def functions(self) -> tuple[Callable[[Any], Any], Callable[[Sequence[Any]], Any]]:
        """(flatten, unflatten): the fields of a record in order, where a record that is None is as
        many Nones; and back, where nested records without any value are records of Nones.

        Written out as expressions, for every call of an operator evaluates them:
        ``lambda v: (v[0], *(n1 if v[1] is None else (v[1][0], v[1][1],)), v[2],)``.
        """
        names: dict[str, Any] = {}
        flatten = f"lambda v: {self._flat('v')}"
        unflatten = f"lambda v: {self._expression(0, names)}"
        return _function(flatten, {}), _function(unflatten, names)

    def _flat(self, v: str) -> str:
        parts = []
        for i, field in enumerate(self.fields):
            own = f"{v}[{i}]"
            if isinstance(field, Layout):
                nothing = "None," * len(field.leaves)
                own = f"*(({nothing}) if {own} is None else {field._flat(own)})"
            parts.append(own)
        return f"({', '.join(parts)},)"

    def _expression(self, start: int, names: dict[str, Any]) -> str:
        """``R(v[0], S(v[1], v[2]), v[3])``, with the records under ``names``."""
        own, parts = f"R{len(names)}", []
        names[own] = self.record
        for field in self.fields:
            if isinstance(field, Layout):
                parts.append(field._expression(start, names))
                start += len(field.leaves)
            else:
                parts.append(f"v[{start}]")
                start += 1
        return f"{own}({', '.join(parts)})"

    def schema(self) -> list[str]:
        """``"Tensor? M"`` for each leaf. A name that occurs twice gets that of its record."""
        names = [leaf.name for leaf in self.leaves]
        owners = [f.name for f in self.fields for _ in _leaves(f)]
        full = [
            f"{owner}_{name}" if name in names[:i] and owner != name else name
            for i, (owner, name) in enumerate(zip(owners, names, strict=True))
        ]
        pairs = zip(self.leaves, full, strict=True)
        return [f"{x.type}{'?' if x.optional else ''} {name}" for x, name in pairs]


def _function(expression: str, names: dict[str, Any]) -> Callable[[Any], Any]:
    found: Callable[[Any], Any] = eval(compile(expression, __file__, "eval"), names)
    return found


@functools.cache
def _hints(record: Any) -> dict[str, Any]:
    return get_type_hints(record, include_extras=True)


def _leaves(field: Leaf | Layout) -> list[Leaf]:
    return [field] if isinstance(field, Leaf) else field.leaves


_TYPES = {int: "int", bool: "bool", str: "str"}


def _field(name: str, hint: Any, kinds: dict[type, type], optional: bool = False) -> Leaf | Layout:
    if get_origin(hint) is Annotated:
        core = get_args(hint)[1]
        if core == "batch":
            return Leaf(name, None, "SymInt[]", optional)
        return Leaf(name, core, "Tensor", optional)
    if get_origin(hint) is Union or type(hint).__name__ == "UnionType":
        (inner,) = (x for x in get_args(hint) if x is not type(None))
        return _optional(_field(name, inner, kinds, True))
    if hint in _TYPES:
        return Leaf(name, None, _TYPES[hint], optional)
    return Layout(kinds.get(hint, hint), kinds, name)


def _optional(field: Leaf | Layout) -> Leaf | Layout:
    if isinstance(field, Layout):
        field.fields = [_optional(f) for f in field.fields]
        field.leaves = [leaf for f in field.fields for leaf in _leaves(f)]
        return field
    return field._replace(optional=True)


@functools.cache
def own_layout(record: Any) -> Layout:
    """The layout of a record without open fields."""
    return Layout(record, {})


def open_fields(record: Any) -> dict[type, tuple[int, ...]]:
    """Where a record of each kind stands: the positions that lead there, outside optional ones."""
    found: dict[type, tuple[int, ...]] = {}
    hints = _hints(record)
    for i, name in enumerate(record._fields):
        hint = hints[name]
        if isinstance(hint, type) and issubclass(hint, Kind):
            found.setdefault(hint, (i,))
        elif isinstance(hint, type) and hasattr(hint, "_fields"):
            for kind, path in open_fields(hint).items():
                found.setdefault(kind, (i, *path))
    return found


def layouts(arguments: Any, results: Any) -> Iterator[tuple[tuple[type, ...], Layout, Layout]]:
    """(the records of the open fields, the layouts with them) for every combination that fits.

    The leaves of two combinations differ in some name: PyTorch takes overloads with the same names
    for one when it clears up.
    """
    kinds: list[Any] = list(open_fields(arguments))
    for chosen in itertools.product(*(kind.records for kind in kinds)):
        if not all(_fit(x, y) for x in chosen for y in chosen):
            continue
        which = dict(zip(kinds, chosen, strict=True))
        yield chosen, Layout(arguments, which), Layout(results, which)


def _fit(record: Any, other: Any) -> bool:
    wanted = Kind.beside.get(record, {}).get(_kind_of(other))
    return wanted is None or other.__name__ in wanted


def _kind_of(record: type) -> str:
    return next(k.__name__ for k in Kind.__subclasses__() if record in k.records)


def expand_record(record: Any, batch: Sequence[int]) -> Any:
    """A record of tensors with every batch shape expanded to ``batch``."""
    leaves = zip(record, own_layout(type(record)).leaves, strict=True)  # type: ignore[arg-type]
    return type(record)(*(x.expand(*batch, *x.shape[x.dim() - f.core :]) for x, f in leaves))
