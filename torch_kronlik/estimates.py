"""What follows from an information matrix: standard errors, of functions too (delta method)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import LinAlgError

__all__ = ["Estimates", "Information", "leaves_of", "rebuild"]


class Estimates(NamedTuple):
    """Values with their standard errors; ``str`` gives a line ``name  value ± s.e.`` each.

    Attributes:
        values: tensors in the structure that was asked for.
        standard_errors: the same structure, in the units of the values.
        covariance: (q, q), of all q values in order.
    """

    values: Any
    standard_errors: Any
    covariance: Tensor

    def __str__(self) -> str:
        names = _aligned(_names(self.values))
        pairs = zip(names, _flat(self.values), _flat(self.standard_errors), strict=True)
        return "\n".join(f"{name}  {value:.4f} ± {error:.4f}" for name, value, error in pairs)


@dataclass(frozen=True)
class Information:
    """An information matrix at a point, and the precision of estimates that it implies.

    Made by :func:`fisher_information` and :func:`observed_information`.

    ``covariance`` is its inverse. Everything is computed from its eigenvalues in the scaling in
    which its diagonal is one. Directions in which these vanish, to rounding, are not identified:
    what depends on them raises ``torch.linalg.LinAlgError`` with their names, and what does not
    is as good as ever (K = root·rootᵀ, say, has standard errors where root has none).
    """

    matrix: Tensor  # (p, p)
    params: Any  # where it was evaluated
    rounding: float = field(repr=False)  # relative error of an entry

    @property
    def names(self) -> list[str]:
        """A name for each row of ``matrix``: ``"log_noise[0]"``."""
        return _names(self.params)

    @property
    def covariance(self) -> Tensor:
        """(p, p), the inverse of ``matrix``.

        Raises:
            torch.linalg.LinAlgError: ``matrix`` is not positive definite.
        """
        return self.delta_method(lambda params: params).covariance

    @property
    def standard_errors(self) -> Any:
        """The square roots of the covariance's diagonal, in the structure of ``params``.

        Raises:
            torch.linalg.LinAlgError: ``matrix`` is not positive definite.
        """
        return self.delta_method(lambda params: params).standard_errors

    def delta_method(self, function: Callable[[Any], Any]) -> Estimates:
        """Values and standard errors of a function of the parameters.

        ``√diag(J F⁻¹ Jᵀ)`` with J the derivative of ``function`` at ``params``.

        Args:
            function: from the structure of ``params`` to a tensor, or a dict, tuple or list of
                tensors.

        Returns:
            :class:`Estimates`, in the structure that ``function`` returns.

        Raises:
            torch.linalg.LinAlgError: ``matrix`` is not positive semidefinite, or a value depends
                on a direction in which it vanishes.

        >>> information = Information(torch.tensor([[4.0]]), torch.tensor([2.0]), rounding=1e-6)
        >>> print(information.delta_method(lambda p: {"square": p**2}))
        square[0]  4.0000 ± 2.0000
        """
        values, J = _jacobian(function, self.params, self.matrix)
        scale, eigenvalues, V = self._spectrum()
        null = eigenvalues <= self.rounding
        along = (J * scale) @ V
        self._require_identified(along, V[:, null], null, values)
        root = torch.where(null, 0.0, along / eigenvalues.clamp_min(self.rounding).sqrt())
        covariance = root @ root.mT
        errors = rebuild(values, _split(covariance.diagonal().sqrt(), values))
        return Estimates(values, errors, covariance)

    def _spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        """(scale, eigenvalues, V) of the matrix scaled to a diagonal of 1."""
        scale = self._scale()
        eigenvalues, V = torch.linalg.eigh(scale[:, None] * self.matrix * scale)
        if bool(eigenvalues[0] < -self.rounding):
            raise LinAlgError(
                "the information is not positive semidefinite: it is negative along "
                f"{self._direction(V[:, 0], scale)}; the parameters are not at a minimum"
            )
        return scale, eigenvalues, V

    def _scale(self) -> Tensor:
        diagonal = self.matrix.diagonal().abs()
        return torch.where(diagonal == 0, 1.0, diagonal).rsqrt()

    def _require_identified(self, along: Tensor, N: Tensor, null: Tensor, values: Any) -> None:
        """No value may move along a null vector; its error is a root of that of ``matrix``."""
        moves = along[:, null].norm(dim=1) > self.rounding**0.5 * along.norm(dim=1)
        if not bool(moves.any()):
            return
        which = ", ".join(n for n, m in zip(_names(values), moves.tolist(), strict=True) if m)
        directions = "; ".join(self._direction(v, self._scale()) for v in N.mT)
        raise LinAlgError(
            f"{which}: not identified, since the information is singular along {directions}"
        )

    def _direction(self, v: Tensor, scale: Tensor) -> str:
        """The larger terms of a scaled direction, in words and in the parameters' own units."""
        entries = scale * v / (scale * v).abs().max()
        kept = (v.abs() > 1e-3 * v.abs().max()).nonzero().flatten().tolist()
        sign = 1 if float(entries[kept[0]]) > 0 else -1
        terms = [(sign * float(entries[i]), self.names[i]) for i in kept]
        words = " ".join(f"{'-' if x < 0 else '+'} {abs(x):.3g}·{name}" for x, name in terms)
        return words.removeprefix("+ ")


def _jacobian(function: Callable[[Any], Any], params: Any, like: Tensor) -> tuple[Any, Tensor]:
    """(function(params), its derivative (q, p))."""
    leaves = [x.detach().clone().requires_grad_() for _, x in leaves_of(params)]
    with torch.enable_grad():
        values = function(rebuild(params, leaves))
        flat = torch.cat([x.flatten() for _, x in leaves_of(values)])
        rows = (
            [
                torch.cat(
                    [
                        g.flatten()
                        for g in torch.autograd.grad(
                            x, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
                        )
                    ]
                )
                for x in flat
            ]
            if flat.requires_grad
            else []
        )
    J = torch.stack(rows) if rows else like.new_zeros(len(flat), len(like))
    return rebuild(values, [x.detach() for _, x in leaves_of(values)]), J.to(like)


# --- nested tensors -----------------------------------------------------------------------------


def leaves_of(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for every tensor of a nest of dicts, tuples and lists."""
    if isinstance(tree, Tensor):
        if not tree.is_floating_point():
            raise TypeError(f"{name or 'params'} must be a floating-point tensor, got {tree.dtype}")
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves_of(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, (tuple, list)):
        for i, value in enumerate(tree):
            yield from leaves_of(value, f"{name}[{i}]")
    else:
        raise TypeError(
            f"{name or 'params'} must be a tensor, or a dict, tuple or list of tensors, "
            f"got {type(tree).__name__}"
        )


def rebuild(tree: Any, leaves: Sequence[Tensor] | Iterator[Tensor]) -> Any:
    """The nest with other tensors in it."""
    leaves = iter(leaves)
    if isinstance(tree, Tensor):
        return next(leaves)
    if isinstance(tree, Mapping):
        return {key: rebuild(value, leaves) for key, value in tree.items()}
    values = [rebuild(value, leaves) for value in tree]
    return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)


def _names(tree: Any) -> list[str]:
    nested = isinstance(tree, Mapping)
    return [
        ("" if nested else "params") + name + (f"[{', '.join(map(str, index))}]" if index else "")
        for name, x in leaves_of(tree)
        for index in _indices(x)
    ]


def _aligned(names: list[str]) -> list[str]:
    return [name.ljust(max(map(len, names))) for name in names]


def _indices(x: Tensor) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, x.shape)))


def _flat(tree: Any) -> list[float]:
    return [v for _, x in leaves_of(tree) for v in x.flatten().tolist()]


def _split(flat: Tensor, tree: Any) -> list[Tensor]:
    shapes = [x.shape for _, x in leaves_of(tree)]
    parts = flat.split([s.numel() for s in shapes])
    return [part.reshape(s) for part, s in zip(parts, shapes, strict=True)]
