"""The dense twin for observed entries and noise by row: U at the observed entries as a matrix.

Tests import it as `from dense_observed import Observed, make_observed`, with what they share. It is
of single problems: a batch is compared element by element.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from problems import make_problem, normal
from torch import Tensor
from torch.autograd import grad
from torch.distributions import MultivariateNormal

import torch_kronlik as tk
from torch_kronlik.factor.plan import OBSERVED_METHODS

PATTERNS = [
    "all",
    "one_missing",
    "row",
    "output",
    "all_but_one",
    "random_10",
    "random_60",
    "stairs",
]
ROW_NOISES = ["full", "diagonal", "scaled", "row_full", "row_diagonal"]


class Observed(NamedTuple):
    """Data, factors, a noise, and which entries are observed."""

    Y: Tensor
    M: Tensor
    K: Tensor
    noise: dict[str, Tensor]  # keywords of KroneckerPlusNoise
    observed: Tensor

    def covariance(self, M: Any = None, **options: Any) -> tk.KroneckerPlusNoise:
        rows = self.M if M is None else M
        return tk.KroneckerPlusNoise(rows, self.K, **self.noise, observed=self.observed, **options)

    def leaves(self) -> dict[str, Tensor]:
        return {"Y": self.Y, "M": self.M, "K": self.K, **self.noise}

    def at(self, leaves: dict[str, Tensor]) -> Observed:
        noise = {key: x for key, x in leaves.items() if key not in ("Y", "M", "K")}
        return self._replace(Y=leaves["Y"], M=leaves["M"], K=leaves["K"], noise=noise)

    def double(self) -> Observed:
        return self.at({key: x.double() for key, x in self.leaves().items()})

    # --- dense -----------------------------------------------------------------------------------

    def row_noise(self) -> Tensor:
        """(T, D, D)"""
        n = self.noise
        if "row_Sigma" in n:
            return n["row_Sigma"]
        if "row_log_noise" in n:
            return torch.diag_embed(n["row_log_noise"].exp())
        Sigma = n["Sigma"] if "Sigma" in n else torch.diag_embed(n["log_noise"].exp())
        scale = n.get("row_scale", torch.ones(self.M.shape[-1], dtype=self.M.dtype))
        return scale[..., None, None] * Sigma[..., None, :, :]

    def whole(self) -> Tensor:
        """U of all entries, (T·D, T·D), as a function of the symmetric parts."""
        M, K, noise = ((x + x.mT) / 2 for x in (self.M, self.K, self.row_noise()))
        return torch.kron(M.contiguous(), K.contiguous()) + torch.block_diag(*noise)

    def places(self) -> Tensor:
        return self.observed.flatten().nonzero()[:, 0]

    def U(self) -> Tensor:
        return self.whole()[self.places()][:, self.places()]

    def y(self) -> Tensor:
        return self.Y.flatten()[self.places()]

    def nll(self) -> Tensor:
        L = torch.linalg.cholesky(self.U())
        white = torch.linalg.solve_triangular(L, self.y()[:, None], upper=False)
        logdet = 2 * L.diagonal().log().sum()
        constant = len(L) * math.log(2 * math.pi)
        return 0.5 * (white.square().sum() + logdet + constant)

    def padded_inverse(self) -> Tensor:
        """Q, (T·D, T·D)."""
        n, o = self.Y.numel(), self.places()
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.U()))
        return inverse.new_zeros(n, n).index_put((o[:, None], o), inverse)

    def given_the_rest(self, rows: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of what has this covariance with all T·D entries, given the data."""
        cross = rows[:, self.places()]
        L = torch.linalg.cholesky(self.U())
        mean = cross @ torch.cholesky_solve(self.y()[:, None], L)
        half = torch.linalg.solve_triangular(L, cross.mT, upper=False)
        return mean[:, 0], prior - half.mT @ half

    def density(self) -> MultivariateNormal:
        return MultivariateNormal(torch.zeros_like(self.y()), self.U())


def pattern(name: str, T: int, D: int) -> Tensor:
    observed = torch.ones(T, D, dtype=torch.bool)
    if name == "one_missing":
        observed[T // 2, 0] = False
    elif name == "row":
        observed[1] = False
    elif name == "output":
        observed[:, -1] = False
    elif name == "all_but_one":
        observed[:] = False
        observed[T // 2, 0] = True
    elif name.startswith("random"):
        share = int(name.partition("_")[2]) / 100
        ranks = normal(T * D, seed=5).argsort().argsort().reshape(T, D)
        observed = ranks >= share * T * D
    elif name == "stairs":
        observed = torch.arange(T)[:, None] * D < (1 + torch.arange(D)) * T
    return observed


def make_observed(
    T: int, D: int, *, mask: str = "random_10", noise: str = "full", **options: Any
) -> Observed:
    """A problem of ``problems.KINDS`` with a mask of PATTERNS and a noise of ROW_NOISES."""
    base = "diagonal" if noise.endswith("diagonal") else "full"
    p = make_problem(T, D, noise=base, **options)
    given = dict(p.noise)
    factor = normal(T, seed=3).exp().to(p.Y)
    if noise == "scaled":
        given["row_scale"] = factor
    elif noise == "row_full":
        given = {"row_Sigma": factor[:, None, None] * p.noise["Sigma"][..., None, :, :]}
    elif noise == "row_diagonal":
        given = {"row_log_noise": factor.log()[:, None] + p.noise["log_noise"][..., None, :]}
    return Observed(p.Y, p.M, p.K, given, pattern(mask, T, D))


# ---------------------------------------------------------------- what the tests share

ROUTES = list(OBSERVED_METHODS)
each_route = pytest.mark.parametrize("method", ROUTES)
each_noise = pytest.mark.parametrize("noise", ROW_NOISES)
EPS = torch.finfo(torch.float64).eps


def condition(p: Observed) -> float:
    """Of U, or of U beside the noise, which the capacitance form divides by."""
    values, noise = (torch.linalg.eigvalsh(x) for x in (p.double().U(), p.double().row_noise()))
    return float(values[-1] / min(values[0], noise.min()))


def close(actual: Tensor, expected: Tensor, bound: float = 1e-11) -> None:
    assert actual.shape == expected.shape
    scale = expected.abs().max().clamp_min(1e-300) if expected.numel() else 1.0
    error = (actual.double() - expected.double()).abs().max() if expected.numel() else 0.0
    assert error <= bound * scale, f"{float(error):.1e} of {float(scale):.1e}"


def value_and_gradients(f: Callable[[Observed], Tensor], p: Observed) -> list[Tensor]:
    leaves = {key: x.clone().requires_grad_() for key, x in p.leaves().items()}
    value = f(p.at(leaves))
    return [value.detach(), *grad(value, list(leaves.values()))]


def skip_border(noise: str, method: str) -> None:
    if method == "border" and noise.startswith("row"):
        pytest.skip("needs one noise for all rows, up to a factor")


def by_route(method: str) -> Callable[[Observed], Tensor]:
    return lambda p: p.covariance(method=method).nll(p.Y)


def new_rows(p: Observed, S: int) -> tuple[Observed, Tensor, Tensor]:
    """A problem whose M, M_cross and M_test are parts of one covariance."""
    T = len(p.M)
    X = normal(T + S, T + 2, seed=8)
    joint = X @ X.mT / T
    return p._replace(M=joint[:T, :T]), joint[T:, :T], joint[T:, T:]
