"""Fixed effects: generalised least squares with covariance U, its likelihood, tests, predictions.

The letters are those of docs/maths.md, "Fixed effects and REML". The N×p design x has a column
x_c ⊗ e_j for each covariate c and output j that it enters. It is used as x̃ = x V with orthonormal
columns, V upper triangular: scales of the covariates and correlations between them cost no digits.
Every result is the same for any V, so that V is a constant for differentiation.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .autocast import full_precision
from .batch import symmetric, unflatten
from .capture import is_captured
from .checks import check_broadcast, check_uniform
from .derivatives import define
from .errors import batch_element
from .guards import finite
from .predict import KroneckerPosterior
from .records import Matrix
from .waist import Waist

__all__ = ["Regression", "RegressionPosterior", "WaldTest"]


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
        x = self._design(self.X)
        if self.U.observed is not None:
            x = torch.where(self.U.observed[..., None], x, 0)
        x = _matrix(finite(x, X=self.X if self.U.observed is None else x))
        self._V = _orthonormaliser(x, *self._words())
        self._x = x @ self._V
        self._z = _matrix(self._inverse_matmul(self._x))
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
        W = _orthonormaliser(H, what, "|".join(f"L[..., {i}, :]" for i in range(q)))
        G = torch.linalg.cholesky(symmetric((H @ W).mT @ (H @ W)))
        white = torch.linalg.solve_triangular(G, W.mT @ difference[..., None], upper=False)
        statistic = white.square().sum((-2, -1))
        log_p = _log_chi2_tail(statistic, q)
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


class RegressionPosterior:
    """The Gaussian posterior of S new rows with covariates, known as universal kriging.

    With h the part of the new rows' design that the residuals do not carry over,
    h = x_new − (M_* ⊗ K) U⁻¹ x:

        mean                  X_new b̂ + M_* (U⁻¹·R) K,  R the residuals
        latent covariance     that of :class:`KroneckerPosterior` + h S⁻¹ hᵀ
        observations add      I_S ⊗ Σ

    The latent value is X_new b plus the random part of the row. Attributes are computed when they
    are asked for, differentiably in every argument.

    Args:
        fit: the regression.
        X_new: (*batch, S, c), the covariates of the new rows.
        M_cross, M_test: as of :class:`KroneckerPosterior`.

    Raises:
        TypeError, ValueError: an argument does not fit, or is not finite.

    Cost: beside that of :class:`KroneckerPosterior`, O(S·T·D·p + S·D·p²).
    Source: Matheron 1969; Henderson 1975.

    >>> import torch_kronlik as tk
    >>> U = tk.KroneckerPlusNoise(torch.zeros(3, 3), torch.eye(1), log_noise=torch.zeros(1))
    >>> fit = U.regress(torch.tensor([[1.0], [2.0], [6.0]]), torch.ones(3, 1))
    >>> new = fit.predict(torch.ones(1, 1), torch.zeros(1, 3), torch.zeros(1))
    >>> new.mean, new.variance, new.observation_variance
    (tensor([[3.]]), tensor([[0.3333]]), tensor([[1.3333]]))
    """

    @full_precision
    def __init__(self, fit: Regression, X_new: Tensor, M_cross: Tensor, M_test: Tensor) -> None:
        self.fit, self.X_new, self.M_cross = fit, X_new, M_cross
        self._kriging = KroneckerPosterior(fit.U, fit.residuals, M_cross, M_test)
        check_uniform(K=fit.U.K, X_new=X_new)
        self.event_shape = self._kriging.event_shape
        shape = self.event_shape[0], fit.num_covariates
        if X_new.dim() < 2 or tuple(X_new.shape[-2:]) != shape:
            raise ValueError(
                f"X_new must have shape (*batch, S, c) with S = {shape[0]} (from M_cross) and "
                f"c = {shape[1]} (from X), got {tuple(X_new.shape)}"
            )
        self.batch_shape = check_broadcast(
            **{"data, M_cross and M_test": self._kriging.batch_shape, "X_new": X_new.shape[:-2]}
        )

    @property
    @full_precision
    def mean(self) -> Tensor:
        """Of the latent values and of the observations: (*batch, S, D)."""
        fixed = self.X_new @ self.fit.coefficients
        return self._expand(finite(fixed, X_new=self.X_new) + self._kriging.mean, 2)

    @property
    @full_precision
    def variance(self) -> Tensor:
        """The variances of the latent values: (*batch, S, D)."""
        return self._expand(self._kriging.variance + self._root.square().sum(-3), 2)

    @property
    @full_precision
    def observation_variance(self) -> Tensor:
        """The variances of new observations, noise included: (*batch, S, D)."""
        return self._expand(self._kriging.observation_variance + self._root.square().sum(-3), 2)

    @property
    @full_precision
    def row_covariance(self) -> Tensor:
        """The covariance of the latent values of each row: (*batch, S, D, D)."""
        root = self._root.movedim(-3, -1)
        return self._expand(self._kriging.row_covariance + root @ root.mT, 3)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch_shape={tuple(self.batch_shape)}, "
            f"event_shape={tuple(self.event_shape)})"
        )

    @property
    def _root(self) -> Tensor:
        """C⁻¹ h̃ᵀ with h̃ = h V, the square of which is h S⁻¹ hᵀ: (*batch, p, S, D)."""
        fit, D = self.fit, self.event_shape[1]
        z = fit._z.unflatten(-2, fit.U.event_shape).flatten(-2)  # (*batch, T, D·p)
        carried = (self.M_cross @ z).unflatten(-1, (D, fit.num_coefficients))
        h = _matrix(fit._design(self.X_new)) @ fit._V - _matrix(
            symmetric(fit.U.K)[..., None, :, :] @ carried
        )
        h = finite(h, X_new=self.X_new, M_cross=self.M_cross)
        root = torch.linalg.solve_triangular(fit._C, h.mT, upper=False)
        return unflatten(root, -1, self.event_shape)

    def _expand(self, x: Tensor, core: int) -> Tensor:
        return x.expand(*self.batch_shape, *x.shape[x.dim() - core :])


# --- columns that are linearly independent -------------------------------------------------------


class Columns(NamedTuple):
    x: Matrix
    what: str  # they must be, for the error
    names: str  # of the columns, with | between them


class Transformed(NamedTuple):
    V: Matrix


def _make_orthonormaliser(given: Columns) -> Tensor:
    x, what, names = given
    V, is_dependent = _triangular(x)
    if not is_captured(x) and bool(is_dependent.any()):
        _raise_dependent(x, is_dependent, what, names.split("|"))
    return V


def _triangular(x: Tensor) -> tuple[Tensor, Tensor]:
    """V, (*batch, p, p), and whether the columns depend on each other to rounding, (*batch).

    Column k less its projection on those before it has 1/|V_kk| times its length. Rounding of
    the columns moves that by eps times their lengths times their coefficients in the projection:
    in proportion to what Σ_l |V_lk| |x_l| sums.
    """
    n, p = x.shape[-2:]
    eye = torch.eye(p, dtype=x.dtype, device=x.device)
    if n < p:
        batch = x.shape[:-2]
        return eye.expand(*batch, p, p).contiguous(), x.new_ones(batch, dtype=torch.bool)
    length = torch.linalg.vector_norm(x, dim=-2)
    length = torch.where(length > 0, length, 1)
    R = torch.linalg.qr(x / length[..., None, :], mode="r")[1]
    V = torch.linalg.solve_triangular(R, eye.expand_as(R), upper=True)
    amplified = V.abs().sum(-2)
    is_dependent = ~(amplified * (_ROUNDINGS * torch.finfo(x.dtype).eps) < 1)
    return (V / length[..., :, None]).contiguous(), is_dependent.any(-1)


_ROUNDINGS = 20


def _raise_dependent(x: Tensor, bad: Tensor, what: str, names: list[str]) -> None:
    """One column after the other joins those that it does not depend on."""
    first = x.flatten(0, -3)[int(bad.flatten().nonzero()[0, 0])] if bad.dim() else x
    kept: list[int] = []
    dependent = []
    for k in range(len(names)):
        if bool(_triangular(first[:, [*kept, k]])[1]):
            dependent.append(names[k])
        else:
            kept.append(k)
    of = {name: name.partition(" (")[0] for name in names}
    whole = [of[x] for x in names if all(n in dependent for n in names if of[n] == of[x])]
    words = dict.fromkeys(of[name] if of[name] in whole else name for name in dependent)
    depend = "depends" if len(words) == 1 else "depend"
    raise ValueError(f"{what}, but {', '.join(words)} {depend} on those before{batch_element(bad)}")


_orthonormaliser = define(
    "orthonormaliser",
    Columns,
    Transformed,
    _make_orthonormaliser,
    lambda given: given.x.new_empty((*given.x.shape[:-2], *[given.x.shape[-1]] * 2)),
)
"""V upper triangular with (x V)ᵀ x V = I, a constant for differentiation, after a check that the
columns of x are linearly independent."""


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


def _matrix(x: Tensor) -> Tensor:
    """(*batch, T, D, p) as (*batch, T·D, p)"""
    return x.flatten(-3, -2)


def _log_diagonal(C: Tensor) -> Tensor:
    return C.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _cholesky_solve(C: Tensor, b: Tensor) -> Tensor:
    """Whose derivatives are right in every mode."""
    half = torch.linalg.solve_triangular(C, b, upper=False)
    out: Tensor = torch.linalg.solve_triangular(C.mT, half, upper=True)
    return out


def _log_chi2_tail(statistic: Tensor, q: int) -> Tensor:
    """log P(χ²_q > statistic), as a finite sum of positive terms.

    With h = statistic / 2: e⁻ʰ Σ_k h^k / Γ(k + 1), k < q/2 in whole steps from 0 where q is even,
    from ½ where it is odd; then erfc(√h) is added.
    """
    h = statistic / 2
    powers = [k + (q % 2) / 2 for k in range(q // 2)]
    terms = [torch.special.xlogy(k, h) - math.lgamma(k + 1) for k in powers]
    if q % 2:
        positive = torch.where(h > 0, h, 1)  # the root has no derivative at zero
        terms.append(torch.where(h > 0, torch.special.erfcx(positive.sqrt()).log(), 0))
    if not terms:
        return torch.where(h > 0, -math.inf, 0.0).to(h)
    return (torch.logsumexp(torch.stack(terms), 0) - h).clamp(max=0)
