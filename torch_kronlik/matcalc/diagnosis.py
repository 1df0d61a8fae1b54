"""In which way a wrong gradient is wrong: the usual slips, each undone and compared with the truth.

A slip is accepted only if undoing it gives the true gradient at every random input, with the same
constant factor everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Trial", "diagnose", "largest_error"]


class Trial(NamedTuple):
    """A claim and the truth at one random input X; both matrices or vectors of X's shape.

    For a function with matrix values both are the Jacobian ∂vec(f)/∂vec(X) instead, and ``rows``
    is the shape of f's value.
    """

    claimed: Tensor
    true: Tensor
    X: Tensor
    rows: torch.Size | None = None


Undo = Callable[[Trial], Tensor | None]


def diagnose(trials: Sequence[Trial], *, symmetric: bool, tolerance: float) -> str | None:
    """What to change in the claim, as a sentence; None if no usual slip explains the error."""
    if any(trial.rows is not None for trial in trials):
        slips = _JACOBIAN
    else:
        slips = _GENERAL[:1] + (_SYMMETRIC if symmetric else []) + _GENERAL[1:]
    for text, undo in slips:
        factor = _common_factor(trials, undo, tolerance)
        if factor is not None:
            return _sentence(text, factor)
    if _other_order(trials, tolerance):
        return "the same factors multiplied in the other order: W Wᵀ for Wᵀ W, or the reverse"
    return None


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """Relative to the largest expected entry."""
    if expected.numel() == 0:
        return 0.0
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float((actual - expected).abs().max() / scale)


def _common_factor(trials: Sequence[Trial], undo: Undo, tolerance: float) -> float | None:
    """c with c·undo(claim) = truth in every trial."""
    undone = [undo(trial) for trial in trials]
    pairs = [(x, t.true) for x, t in zip(undone, trials, strict=True) if x is not None]
    if len(pairs) < len(trials) or any(x.shape != true.shape for x, true in pairs):
        return None
    square = sum(float((x * x).sum()) for x, _ in pairs)
    if square == 0 or not square < float("inf"):
        return None
    factor = sum(float((x * true).sum()) for x, true in pairs) / square
    close = all(largest_error(factor * x, true) <= tolerance for x, true in pairs)
    return factor if close and factor != 0 else None


def _sentence(text: str, factor: float) -> str:
    if abs(factor - 1) < 1e-6:
        return text
    times = f"multiply by {_readable(factor)}"
    return f"{text}; then {times}" if text else f"a constant factor: {times}"


def _readable(factor: float) -> str:
    fraction = Fraction(factor).limit_denominator(64)
    if abs(float(fraction) - factor) > 1e-6 * abs(factor):
        return f"{factor:.6g}"
    return str(fraction)


# ---------------------------------------------------------------- slips in a gradient


def _transposed(trial: Trial) -> Tensor | None:
    return trial.claimed.mT if trial.claimed.dim() == 2 else None


def _other_vec(trial: Trial) -> Tensor | None:
    """The entries of vec(C), stacked by columns, read as if they had been stacked by rows."""
    if trial.claimed.dim() != 2 or trial.claimed.shape != trial.X.shape:
        return None
    return trial.claimed.mT.reshape(trial.X.shape)


def _same_shape(f: Callable[[Tensor, Tensor], Tensor]) -> Undo:
    return lambda t: f(t.claimed, t.X) if t.claimed.shape == t.X.shape else None


_GENERAL: list[tuple[str, Undo]] = [
    ("", lambda trial: trial.claimed),
    ("transpose the claim", _transposed),
    ("a permuted vec: the entries are stacked by rows, not by columns", _other_vec),
    (
        "the chain rule of exp(X): multiply the claim by exp(X), entry by entry",
        _same_shape(lambda C, X: C * torch.exp(X)),
    ),
    (
        "a factor X, entry by entry, is missing (the derivative in log X is X times that in X)",
        _same_shape(lambda C, X: C * X),
    ),
    (
        "a factor X, entry by entry, is too much (the derivative in log X is X times that in X)",
        _same_shape(lambda C, X: C / X),
    ),
]
_SYMMETRIC: list[tuple[str, Undo]] = [
    (
        "missing symmetrisation: the gradient in a symmetric matrix is (C + Cᵀ)/2",
        _same_shape(lambda C, X: (C + C.mT) / 2),
    ),
    (
        "off-diagonal entries counted twice: the claim is the derivative in the n(n+1)/2 free "
        "entries; halve it off the diagonal",
        _same_shape(lambda C, X: (C + torch.diag(C.diagonal())) / 2),
    ),
]


def _other_order(trials: Sequence[Trial], tolerance: float) -> bool:
    """Whether both are symmetric with the same non-zero eigenvalues, up to a common factor."""
    factors = []
    for claimed, true, _, rows in trials:
        spectra = [_spectrum(x) for x in (claimed, true)]
        if rows is not None or any(s is None for s in spectra):
            return False
        ours, theirs = (s for s in spectra if s is not None)
        size = max(len(ours), len(theirs))
        if size < 2 or ours.abs().max() == 0:
            return False
        factor = theirs.sum() / ours.sum()
        ours, theirs = (_padded(s, size) for s in (factor * ours, theirs))
        if largest_error(ours, theirs) > tolerance:
            return False
        factors.append(float(factor))
    return max(factors) - min(factors) <= tolerance * max(map(abs, factors))


def _spectrum(X: Tensor) -> Tensor | None:
    if X.dim() != 2 or X.shape[0] != X.shape[1] or not torch.allclose(X, X.mT):
        return None
    eigenvalues: Tensor = torch.linalg.eigvalsh(X)
    return eigenvalues


def _padded(eigenvalues: Tensor, size: int) -> Tensor:
    zeros = eigenvalues.new_zeros(size - len(eigenvalues))
    return torch.cat([eigenvalues, zeros]).sort().values


# ---------------------------------------------------------------- slips in a Jacobian


def _other_order_of(J: Tensor, shape: torch.Size) -> Tensor:
    """The rows of J, which belong to vec of a matrix of this shape, stacked by rows instead."""
    if len(shape) != 2 or J.shape[0] != shape.numel():
        return J
    return J.reshape(*shape, -1).transpose(0, 1).reshape(J.shape)


def _rows_permuted(trial: Trial) -> Tensor:
    assert trial.rows is not None
    return _other_order_of(trial.claimed, trial.rows)


def _columns_permuted(trial: Trial) -> Tensor:
    return _other_order_of(trial.claimed.mT, trial.X.shape).mT


def _both_permuted(trial: Trial) -> Tensor:
    return _other_order_of(_rows_permuted(trial).mT, trial.X.shape).mT


def _sorted_rows(trial: Trial) -> Tensor | None:
    """The rows of the claim, permuted to match the truth if they are the same rows."""
    claimed, true = trial.claimed, trial.true
    if claimed.shape != true.shape:
        return None
    out = torch.empty_like(claimed)
    out[_lexical(true)] = claimed[_lexical(claimed)]
    return out


def _lexical(J: Tensor) -> Tensor:
    rounded = J / J.abs().max().clamp_min(torch.finfo(J.dtype).tiny)
    keys = [tuple(round(x, 9) + 0.0 for x in row) for row in rounded.tolist()]
    return torch.tensor(sorted(range(len(keys)), key=keys.__getitem__), device="cpu")


_JACOBIAN: list[tuple[str, Undo]] = [
    ("", lambda trial: trial.claimed),
    ("transpose the claim: rows belong to the value, columns to X", _transposed),
    ("a permuted vec: the rows are in the order of the value stacked by rows", _rows_permuted),
    ("a permuted vec: the columns are in the order of X stacked by rows", _columns_permuted),
    ("a permuted vec: rows and columns are in the order of stacking by rows", _both_permuted),
    ("a permuted vec: these are the right rows in another order", _sorted_rows),
]
