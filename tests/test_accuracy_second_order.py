"""Second derivatives along a line, against central differences at 50 digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from battery import ROUTES, Tensors, from_leaves, leaves, symmetrised
from highprec import _exact, _float64, _inverse_and_logdet
from problems import Problem, make_problem
from test_accuracy import error, scaled_noise
from torch import Tensor
from torch.func import jacfwd, jacrev

import torch_kronlik as tk
from torch_kronlik import reference

EPS = torch.finfo(torch.float64).eps
NAMES = ("inv_quad", "logdet", "solve", "inverse_diagonal", "inverse_block_diag_sum")
KINDS = ["generic", "identity", "zero_M", "zero_K", "rank_one_M", "rank_one_K"]
KINDS += ["rank_deficient", "repeated_blocks", "replicates"]


def direction(noise: str) -> Problem:
    """Moves every argument, splits every repeated eigenvalue."""
    return symmetrised(make_problem(4, 2, noise=noise, seed=7))


def line(p: Problem, d: Problem, t: Any) -> Problem:
    step = zip(leaves(p).items(), leaves(d).values(), strict=True)
    return from_leaves({key: x + t * v for (key, x), v in step})


def all_results(functions: Any, **method: str) -> Callable[[Problem], Tensors]:
    def of_problem(q: Problem) -> Tensors:
        return (
            *functions.kron_inv_quad_logdet(q.M, q.K, q.Y, **q.noise, **method),
            functions.kron_solve(q.M, q.K, q.Y, **q.noise, **method),
            functions.inverse_diagonal(q.M, q.K, **q.noise, **method),
            functions.inverse_block_diag_sum(q.M, q.K, **q.noise, **method),
        )

    return of_problem


def at_high_precision(p: Problem, d: Problem, t: Any) -> list[Any]:
    """The same results at 50 digits, t steps along the line."""
    values, moves = ({key: _exact(x) for key, x in leaves(q).items()} for q in (p, d))
    x = {key: value + t * moves[key] for key, value in values.items()}
    T, D = x["Y"].shape
    Sigma = x["Sigma"] if "Sigma" in x else np.diag([mpmath.exp(s) for s in x["log_noise"]])
    U = np.kron(x["M"], x["K"]) + np.kron(np.diag([mpmath.mpf(1)] * T), Sigma)
    V, logdet = _inverse_and_logdet(U)
    A = (V @ x["Y"].reshape(-1)).reshape(T, D)
    blocks = [V.reshape(T, D, T, D)[t, :, t, :] for t in range(T)]
    diagonal = np.array([np.diagonal(b) for b in blocks])
    return [(x["Y"] * A).sum(), logdet, A, diagonal, sum(blocks)]


def exact_second_derivatives(p: Problem, d: Problem) -> list[Tensor]:
    with mpmath.workdps(60):
        h = mpmath.mpf(10) ** -15  # the difference is off by h² times a fourth derivative
        ahead, here, behind = (at_high_precision(p, d, t) for t in (h, mpmath.mpf(0), -h))
        triples = zip(ahead, here, behind, strict=True)
        return [_float64((a - 2 * b + c) / h**2) for a, b, c in triples]


@pytest.mark.parametrize("method", ROUTES)
@pytest.mark.parametrize(
    ("noise", "scale"), [("full", 1.0), ("full", 1e-3), ("diagonal", 1.0), ("diagonal", 1e5)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind: str, noise: str, scale: float, method: str) -> None:
    p, d = scaled_noise(make_problem(4, 2, kind=kind, noise=noise), scale), direction(noise)
    expected = exact_second_derivatives(p, d)
    zero = torch.zeros((), dtype=torch.float64)

    def second(f: Callable[[Problem], Tensors], outer: Any, inner: Any) -> Tensors:
        found: Tensors = outer(inner(lambda t: f(line(p, d, t))))(zero)
        return found

    dense = second(all_results(reference), jacrev, jacrev)
    lost = max(error(a, b) for a, b in zip(dense, expected, strict=True))
    # In log det the parts T of the curvature in log_noise cancel down to T / scale.
    least = 500 * EPS if scale <= 1 else 10_000 * EPS
    for outer, inner in ((jacfwd, jacrev), (jacrev, jacfwd)):
        actual = second(all_results(tk, method=method), outer, inner)
        for name, a, b in zip(NAMES, actual, expected, strict=True):
            assert error(a, b) <= max(10 * lost, least), name
