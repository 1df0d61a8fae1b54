"""A claimed gradient formula against automatic and finite differences, with a diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .diagnosis import Trial, diagnose, largest_error
from .vectors import unvec, vec

__all__ = ["GradientReport", "InputReport", "Random", "check_gradient"]

STRUCTURES = ("general", "symmetric", "positive_definite", "positive")
# Automatic differences are good to rounding, a formula evaluated in float64 is good to rounding
# times the condition numbers of random inputs, and finite differences to some ten digits.
TOLERANCE = 1e-7


class Random(NamedTuple):
    """A random input: standard normal entries, with the structure asked for.

    "general"; "symmetric": (R + Rᵀ)/2; "positive_definite": R Rᵀ/n + I/2; "positive": exp(R).
    """

    shape: tuple[int, ...]
    structure: str = "general"

    def draw(self, generator: torch.Generator) -> Tensor:
        R = _normal(self.shape, generator, torch.float64, torch.get_default_device())
        if self.structure == "symmetric":
            return (R + R.mT) / 2
        if self.structure == "positive_definite":
            return R @ R.mT / len(R) + torch.eye(len(R), dtype=R.dtype, device=R.device) / 2
        return R.exp() if self.structure == "positive" else R

    @property
    def is_symmetric(self) -> bool:
        return self.structure in ("symmetric", "positive_definite")

    def __str__(self) -> str:
        size = " x ".join(map(str, self.shape)) or "scalar"
        return f"{size}, {self.structure.replace('_', ' ')}"


@dataclass(frozen=True)
class InputReport:
    """The verdict on the claimed gradient in one input.

    error: the largest error of the claim relative to the largest entry of the true gradient, over
    all random inputs; infinite if the shapes do not fit. finite_difference_error: how far automatic
    and finite differences of f are apart. diagnosis: what is wrong, None if it is not known.
    """

    name: str
    description: str
    ok: bool
    error: float
    finite_difference_error: float
    diagnosis: str | None

    def __str__(self) -> str:
        verdict = "right" if self.ok else "WRONG"
        lines = [f"gradient in {self.name} ({self.description}): {verdict}, error {self.error:.1e}"]
        if not self.ok:
            lines.append(f"  diagnosis: {self.diagnosis or 'none of the usual slips'}")
        agree = f"{self.finite_difference_error:.1e}"
        lines.append(f"  automatic and finite differences of f agree to {agree}")
        return "\n".join(lines)


@dataclass(frozen=True)
class GradientReport:
    """The verdicts by the name of the input; ``print`` it."""

    inputs: Mapping[str, InputReport]

    @property
    def ok(self) -> bool:
        return all(report.ok for report in self.inputs.values())

    def __str__(self) -> str:
        return "\n".join(map(str, self.inputs.values()))


Formula = Callable[..., Tensor]


def check_gradient(
    f: Formula,
    claimed: Formula | Mapping[str, Formula],
    inputs: Mapping[str, Random | tuple[int, ...] | Tensor],
    *,
    trials: int = 3,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> GradientReport:
    """Tell a right gradient formula from a wrong one, and say in which way the wrong one is wrong.

    For scalar f the gradient in X is the matrix G with ``df = ⟨G, dX⟩``, of X's shape; for a
    symmetric X it is the symmetric one. For f with vector or matrix values it is the Jacobian
    ``∂vec(f)/∂vec(X)``, vec stacking columns. At each of some random inputs the claim is compared
    with automatic differentiation of f, and that with finite differences along a random direction
    which keeps X's structure.

    Args:
        f: f(*inputs) → Tensor, in the order of ``inputs``, made of differentiable operations.
        claimed: claimed(*inputs) → the gradient in the first input, or a mapping from the names of
            inputs to such functions. Of scalar f it has X's shape or is its vec (any shape with as
            many entries); of f with values the shape (f's entries, X's entries).
        inputs: by name, a `Random`, a shape, or a tensor that stays as it is.
        trials: how many random inputs.
        seed: of the random inputs.
        tolerance: the error allowed, relative to the largest entry of the gradient.

    Returns:
        A `GradientReport` with the verdict on each claim: ``ok``, ``error``, ``diagnosis``.

    Raises:
        TypeError: f or a claim returns no tensor.
        ValueError: a claim is for an input that does not exist, or a structure is not known.
        RuntimeError: automatic and finite differences of f disagree.

    Cost: one gradient of f (a Jacobian: one for each entry of f) and four values, for each trial
    and claim.

    >>> report = check_gradient(
    ...     lambda X: torch.logdet(X),
    ...     lambda X: 2 * torch.linalg.inv(X),
    ...     {"X": Random((3, 3), "positive_definite")},
    ... )
    >>> report.ok
    False
    >>> report.inputs["X"].diagnosis
    'a constant factor: multiply by 1/2'
    """
    kinds = {name: _kind(name, value) for name, value in inputs.items()}
    claims = {next(iter(kinds)): claimed} if callable(claimed) else dict(claimed)
    unknown = [name for name in claims if name not in kinds]
    if unknown or trials < 1:
        raise ValueError(
            f"claimed names {unknown}, inputs are {list(kinds)}"
            if unknown
            else f"trials must be at least 1, got {trials}"
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    draws = [[_draw(kind, generator) for kind in kinds.values()] for _ in range(trials)]
    reports = {}
    for name, formula in claims.items():
        index = list(kinds).index(name)
        checks = [
            _check_once(f, formula, values, index, kinds[name], generator) for values in draws
        ]
        reports[name] = _report(name, kinds[name], checks, tolerance)
    return GradientReport(reports)


def _kind(name: str, value: Any) -> Random | Tensor:
    if isinstance(value, Tensor):
        return value
    kind = value if isinstance(value, Random) else Random(tuple(value))
    if kind.structure not in STRUCTURES:
        raise ValueError(f"{name}: structure must be one of {STRUCTURES}, got {kind.structure!r}")
    if kind.is_symmetric and (len(kind.shape) != 2 or kind.shape[0] != kind.shape[1]):
        raise ValueError(f"{name}: a {kind.structure} matrix must be square, got {kind.shape}")
    return kind


def _normal(
    shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(shape, generator=generator, dtype=dtype, device="cpu").to(device)


def _draw(kind: Random | Tensor, generator: torch.Generator) -> Tensor:
    return kind.draw(generator) if isinstance(kind, Random) else kind


# ---------------------------------------------------------------- one random input


def _check_once(
    f: Formula,
    formula: Formula,
    values: list[Tensor],
    index: int,
    kind: Random | Tensor,
    generator: torch.Generator,
) -> tuple[Trial, float]:
    """The claim beside the truth, and the disagreement of finite differences with the truth."""
    X = values[index]

    def along(x: Tensor) -> Tensor:
        return _tensor("f", f(*values[:index], x, *values[index + 1 :]))

    symmetric = isinstance(kind, Random) and kind.is_symmetric
    value = along(X)
    J = _jacobian(along, X, symmetric)
    E = _normal(X.shape, generator, X.dtype, X.device)
    E = (E + E.mT) / 2 if symmetric else E
    scale = J.abs().max() * E.norm() + value.detach().abs().max()
    difference = float((J @ _vec(E) - _finite_difference(along, X, E)).abs().max() / scale)
    claim = _tensor("the claimed gradient", formula(*values)).detach()
    if value.numel() == 1:
        true = _unvec(J[0], X.shape)
        return Trial(_as_gradient(claim, X), true, X), difference
    return Trial(claim, J, X, value.shape), difference


def _tensor(what: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must return a tensor, got {type(value).__name__}")
    return value


def _as_gradient(claim: Tensor, X: Tensor) -> Tensor:
    """A claim that is a vec, as a row, a column or a vector, becomes a matrix."""
    is_vec = claim.dim() < 2 or 1 in claim.shape
    if claim.shape == X.shape or claim.numel() != X.numel() or not is_vec:
        return claim
    return _unvec(claim.reshape(-1), X.shape)


def _vec(X: Tensor) -> Tensor:
    return vec(X) if X.dim() == 2 else X.reshape(-1)


def _unvec(x: Tensor, shape: torch.Size) -> Tensor:
    return unvec(x, shape[0]) if len(shape) == 2 else x.reshape(shape)


def _jacobian(f: Formula, X: Tensor, symmetric: bool) -> Tensor:
    """(entries of f, entries of X), both in the order of vec."""
    leaf = X.detach().clone().requires_grad_()
    rows = []
    for y in _vec(f(leaf)):
        (G,) = torch.autograd.grad(y, leaf, retain_graph=True)
        rows.append(_vec((G + G.mT) / 2 if symmetric else G))
    return torch.stack(rows)


def _finite_difference(f: Formula, X: Tensor, E: Tensor) -> Tensor:
    """The derivative of vec(f) along E by four values: error O(h⁴)."""
    h = 1e-4 * float(X.abs().max().clamp_min(1e-3) / E.abs().max())
    with torch.no_grad():
        near, far = (_vec(f(X + k * h * E) - f(X - k * h * E)) for k in (1, 2))
    return (8 * near - far) / (12 * h)


# ---------------------------------------------------------------- the verdict


def _report(
    name: str, kind: Random | Tensor, checks: list[tuple[Trial, float]], tolerance: float
) -> InputReport:
    trials = [trial for trial, _ in checks]
    difference = max(d for _, d in checks)
    if not difference <= 1e-5:
        raise RuntimeError(
            f"automatic and finite differences of f in {name} disagree by {difference:.1e}: f is "
            "not smooth there, or part of it is hidden from differentiation"
        )
    fits = all(t.claimed.shape == t.true.shape for t in trials)
    error = max(largest_error(t.claimed, t.true) for t in trials) if fits else float("inf")
    ok = error <= tolerance
    symmetric = isinstance(kind, Random) and kind.is_symmetric
    diagnosis = None if ok else diagnose(trials, symmetric=symmetric, tolerance=tolerance)
    if not fits:
        shapes = f"shape {tuple(trials[0].claimed.shape)}, not {tuple(trials[0].true.shape)}"
        diagnosis = f"{shapes}; {diagnosis}" if diagnosis else shapes
    description = str(kind) if isinstance(kind, Random) else "as given"
    return InputReport(name, description, ok, error, difference, diagnosis)
