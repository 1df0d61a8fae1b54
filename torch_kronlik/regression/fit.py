"""Generalised least squares of data on covariates."""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..autocast import full_precision
from ..batch import symmetric
from ..checks import check_broadcast, check_uniform
from ..guards import finite
from ..waist import Waist
from .chi2 import log_chi2_tail
from .columns import as_matrix, orthonormaliser
from .posterior import RegressionPosterior

__all__ = ["Regression", "WaldTest"]


class WaldTest(NamedTuple):
    """Of q linear hypotheses about the coefficients, each entry (*batch) but the second."""

    statistic: Tensor
    degrees_of_freedom: int
    p_value: Tensor
    log_p_value: Tensor  # natural logarithm, which does not underflow


class Regression:
    """Generalised least squares of Y on X: vec(Y) ~ N((X ⊗ I_D) b, U).

    With x the columns x_c ⊗ e_j of the design (p of them), y = vec(Y), and N entries observed:

        S = xᵀU⁻¹x,  b̂ = S⁻¹ xᵀU⁻¹y,  cov b̂ = S⁻¹,  r = y − x b̂
        ML     ½ (N log 2π + log det U + rᵀU⁻¹r)
        REML   ½ ((N − p) log 2π + log det U + rᵀU⁻¹r + log det S − log det xᵀx)

    Made by ``U.regress(Y, X)``, from the one factorisation that U keeps.

    Args:
        U: the covariance of the data.
        Y: (*batch, T, D), the data, their mean not subtracted. Outside of ``observed`` they are not
            looked at.
        X: (*batch, T, c), the covariates of the rows; an intercept is a column of ones. X is not
            looked at where X enters no observed entry. c = 0 is the model of mean zero.
        reml: whether ``nll`` is the restricted likelihood, which counts the degrees of freedom that
            the coefficients take; otherwise it is the full one at b̂.
        effects: (c, D) of bool, which covariate enters which output; all enter all by default.

    Attributes:
        coefficients: b̂, (*batch, c, D), in units of Y per unit of X; zero where a covariate does
            not enter.
        residuals: r, (*batch, T, D); zero where nothing is observed.
        num_coefficients: p.

    Raises:
        TypeError, ValueError: an argument does not fit, or is not finite; columns of X depend on
            others, at the observed entries and to rounding: they are named.
        torch.linalg.LinAlgError: U is not positive definite, or Sigma is indefinite.

    Derivatives: first and second, of every result in Y, X, M, K and the noise.
    Cost: after the factorisation p solves, O(p·(T²·D + T·D²)), and O(T·D·p² + p³); memory O(T·D·p).
    Source: Aitken 1936; Patterson & Thompson 1971; Harville 1974.

    >>> import torch_kronlik as tk
    >>> U = tk.KroneckerPlusNoise(torch.zeros(3, 3), torch.eye(1), log_noise=torch.zeros(1))
    >>> fit = U.regress(torch.tensor([[1.0], [2.0], [6.0]]), torch.ones(3, 1))
    >>> fit.coefficients, fit.standard_errors
    (tensor([[3.]]), tensor([[0.5774]]))
    """

    @full_precision
    def __init__(
        self, U: Waist, Y: Tensor, X: Tensor, *, reml: bool = True, effects: Tensor | None = None
    ) -> None:
        batch = U.check_data("Y", Y)
        check_uniform(K=U.K, X=X)
        T, D = U.event_shape
        if X.dim() < 2 or X.shape[-2] != T:
            raise ValueError(
                f"X must have shape (*batch, T, c) with T = {T} (from M), got {tuple(X.shape)}"
            )
        self.num_covariates = X.shape[-1]
        _check_effects(effects, self.num_covariates, D)
        self.U, self.Y, self.X, self.reml, self.effects = U, Y, X, reml, effects
        self.batch_shape = check_broadcast(**{"Y and U": batch, "X": X.shape[:-2]})
        self._enters = _entering(effects, self.num_covariates, D)
        self.num_coefficients = len(self._enters)
        self._fit()

    def _fit(self) -> None:
        """The one pass that everything else is made of."""
        X, observed = self.X, self.U.observed
        if observed is not None:
            X = torch.where(self._looked_at(observed), X, 0)
        x = self._design(X)
        if observed is not None:
            x = torch.where(observed[..., None], x, 0)
        x = as_matrix(finite(x, X=X))
        self._V = orthonormaliser(x, *self._words())
        self._x = x @ self._V
        self._z = as_matrix(self._inverse_matmul(self._x))
        self._C = torch.linalg.cholesky(symmetric(self._x.mT @ self._z))  # S = C Cᵀ
        seen = self.U.seen(self.Y)
        y = finite(seen, Y=seen).flatten(-2)[..., None]
        b = self._x.mT @ y  # ordinary least squares
        for _ in range(2):  # b = b₀ + S⁻¹ zᵀ(y − x b₀) for any constant b₀: best for b₀ near b
            b = b.detach()
            b = b + _cholesky_solve(self._C, self._z.mT @ (y - self._x @ b))
        self._b = b
        residuals = (y - self._x @ b).squeeze(-1).unflatten(-1, self.U.event_shape)
        self.residuals = residuals.expand(*self.batch_shape, *self.U.event_shape)
        self.coefficients = self._all((self._V @ b).squeeze(-1)).unflatten(-1, self._shape)
        self.coefficients = self.coefficients.expand(*self.batch_shape, *self._shape)

    @cached_property
    @full_precision
    def nll(self) -> Tensor:
        """The negative log likelihood, REML or ML, in nats, constants included: (*batch)."""
        inv_quad, logdet = self.U.quad_logdet(self.residuals)
        count = self.U.num_observed - self.num_coefficients * self.reml
        value = inv_quad + logdet + count * math.log(2 * math.pi)
        if self.reml:
            G = torch.linalg.cholesky(symmetric(self._x.mT @ self._x))
            value = value + 2 * (_log_diagonal(self._C) - _log_diagonal(G))
        return (0.5 * value).expand(self.batch_shape)

    @cached_property
    @full_precision
    def covariance(self) -> Tensor:
        """cov b̂ = S⁻¹, (*batch, c·D, c·D): coefficients[c, d] is entry c·D + d. Rows and columns of
        what does not enter are zero."""
        root = self._root
        whole = self._all(self._all(root.mT @ root).mT)
        return whole.expand(*self.batch_shape, *whole.shape[-2:])

    @cached_property
    @full_precision
    def standard_errors(self) -> Tensor:
        """The roots of the variances of the coefficients: (*batch, c, D)."""
        errors = self._all(torch.linalg.vector_norm(self._root, dim=-2)).unflatten(-1, self._shape)
        out: Tensor = errors.expand(*self.batch_shape, *self._shape)
        return out

    @full_precision
    def wald(self, L: Tensor, rhs: Tensor | None = None) -> WaldTest:
        """The test of L b = rhs, with the covariance U taken as known.

        ``(L b̂ − rhs)ᵀ (L cov(b̂) Lᵀ)⁻¹ (L b̂ − rhs)`` is χ² with q degrees of freedom under it.

        Args:
            L: (*batch, q, c·D), q linear combinations of the coefficients, in the order of
                ``covariance``.
            rhs: (*batch, q), zero by default.

        Returns:
            The statistic, q, the p-value and its logarithm, right to rounding far in the tail.

        Raises:
            ValueError: rows of L depend on others, on the coefficients that enter: they are named.

        Cost: O(q·p²).

        >>> import torch_kronlik as tk
        >>> U = tk.KroneckerPlusNoise(torch.zeros(3, 3), torch.eye(1), log_noise=torch.zeros(1))
        >>> fit = U.regress(torch.tensor([[1.0], [2.0], [6.0]]), torch.ones(3, 1))
        >>> fit.wald(torch.eye(1)).p_value
        tensor(2.0346e-07)
        """
        check_uniform(K=self.U.K, L=L)
        n = math.prod(self._shape)
        if L.dim() < 2 or L.shape[-1] != n:
            raise ValueError(
                f"L must have shape (*batch, q, c·D) with c·D = {n} (from X and K), "
                f"got {tuple(L.shape)}"
            )
        q = L.shape[-2]
        batches = {"coefficients": self.batch_shape, "L": L.shape[:-2]}
        difference = (L @ self.coefficients.flatten(-2)[..., None]).squeeze(-1)
        if rhs is not None:
            check_uniform(K=self.U.K, rhs=rhs)
            if rhs.dim() < 1 or rhs.shape[-1] != q:
                raise ValueError(
                    f"rhs must have shape (*batch, q) with q = {q} (from L), got {tuple(rhs.shape)}"
                )
            batches["rhs"] = rhs.shape[:-1]
            difference = difference - rhs
        check_broadcast(**batches)
        difference = finite(difference, L=L, rhs=rhs)
        H = self._root @ L[..., self._places()].mT  # L cov(b̂) Lᵀ = HᵀH
        what = "L must have linearly independent rows on the coefficients that enter"
        W = orthonormaliser(H, what, "|".join(f"L[..., {i}, :]" for i in range(q)))
        G = torch.linalg.cholesky(symmetric((H @ W).mT @ (H @ W)))
        white = torch.linalg.solve_triangular(G, W.mT @ difference[..., None], upper=False)
        statistic = white.square().sum((-2, -1))
        log_p = log_chi2_tail(statistic, q)
        return WaldTest(statistic, q, log_p.exp(), log_p)

    @full_precision
    def predict(self, X_new: Tensor, M_cross: Tensor, M_test: Tensor) -> RegressionPosterior:
        """The posterior at S new rows with covariates X_new (*batch, S, c), the uncertainty of the
        coefficients included: see :class:`RegressionPosterior`."""
        return RegressionPosterior(self, X_new, M_cross, M_test)

    def __repr__(self) -> str:
        c, D = self._shape
        return (
            f"{type(self).__name__}(batch_shape={tuple(self.batch_shape)}, c={c}, D={D}, "
            f"num_coefficients={self.num_coefficients}, reml={self.reml})"
        )

    # --- the parts -------------------------------------------------------------------------------

    @property
    def _shape(self) -> tuple[int, int]:
        return self.num_covariates, self.U.event_shape[1]

    @property
    def _root(self) -> Tensor:
        """H with HᵀH the covariance of the coefficients that enter: (*batch, p, p)."""
        H: Tensor = torch.linalg.solve_triangular(self._C, self._V.mT, upper=False)
        return H

    def _places(self) -> Tensor:
        """Where each coefficient that enters stands among all c·D."""
        D = self.U.event_shape[1]
        places = [c * D + d for c, d in self._enters]
        return torch.tensor(places, dtype=torch.long, device=self.U.device)

    def _all(self, v: Tensor) -> Tensor:
        """The last dimension, of the coefficients that enter, as that of all c·D."""
        if self.effects is None:
            return v
        eye = torch.eye(math.prod(self._shape), dtype=v.dtype, device=v.device)
        return v @ eye[self._places()]

    def _looked_at(self, observed: Tensor) -> Tensor:
        """Where X enters an observed entry: (*batch, T, c)."""
        if self.effects is None:
            return observed.any(-1, keepdim=True)
        return (observed[..., None, :] & self.effects).any(-1)

    def _design(self, X: Tensor) -> Tensor:
        """The columns x_c ⊗ e_j that enter, for rows X (*batch, S, c): (*batch, S, D, p)."""
        c, d = ([pair[i] for pair in self._enters] for i in (0, 1))
        outputs = torch.tensor(d, dtype=torch.long, device=X.device)
        each = torch.arange(self.U.event_shape[1], device=X.device)
        covariates = X[..., torch.tensor(c, dtype=torch.long, device=X.device)]
        return torch.where(each[:, None] == outputs, covariates[..., None, :], 0)

    def _inverse_matmul(self, x: Tensor) -> Tensor:
        """U⁻¹ x of columns (*batch, T·D, p), as (*batch, T, D, p)."""
        x = x.movedim(-1, 0).unflatten(-1, self.U.event_shape)
        missing = len(self.U.batch_shape) - (x.dim() - 3)  # p stands before every batch dimension
        x = x.reshape(x.shape[0], *[1] * missing, *x.shape[1:])
        return self.U.inverse_matmul(x).movedim(0, -1)

    def _words(self) -> tuple[str, str]:
        """For the error that columns depend on others."""
        where = "" if self.U.observed is None else " at the observed entries"
        names = [f"X[..., {c}] (output {d})" for c, d in self._enters]
        return f"X must have linearly independent columns{where}", "|".join(names)


# --- helpers -------------------------------------------------------------------------------------


def _entering(effects: Tensor | None, c: int, D: int) -> list[tuple[int, int]]:
    """(covariate, output) of every coefficient."""
    enters = [[True] * D] * c if effects is None else effects.tolist()
    return [(i, j) for i in range(c) for j in range(D) if enters[i][j]]


def _check_effects(effects: object, c: int, D: int) -> None:
    if effects is None:
        return
    if not isinstance(effects, Tensor) or effects.dtype != torch.bool:
        got = effects.dtype if isinstance(effects, Tensor) else type(effects).__name__
        raise TypeError(f"effects must be a tensor of bool, got {got}")
    if tuple(effects.shape) != (c, D):
        raise ValueError(
            f"effects must have shape (c, D) with c = {c} (from X) and D = {D} (from K), "
            f"got {tuple(effects.shape)}"
        )


def _log_diagonal(C: Tensor) -> Tensor:
    return C.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _cholesky_solve(C: Tensor, b: Tensor) -> Tensor:
    """Whose derivatives are right in every mode."""
    half = torch.linalg.solve_triangular(C, b, upper=False)
    out: Tensor = torch.linalg.solve_triangular(C.mT, half, upper=True)
    return out
