"""U at the observed entries, with a noise for each row: its factorisation, and functionals of Q.

Q is the zero-padded inverse of U at the observed entries (``factor/partial.py``). What is asked of
Q has its value from the factor, and its derivatives from solves, which have those of every order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..batch import broadcast, symmetric
from ..derivatives import define_flat, may_be_differentiated, register
from ..errors import LinAlgError, not_positive_definite, raise_if_not_finite
from ..factor import Border, Capacitance, Direct, Rotated, plan
from ..factor.border import border as border_kernel
from ..factor.border import missing as missing_kernel
from ..factor.capacitance import capacitance as capacitance_kernel
from ..factor.direct import direct as direct_kernel
from ..factor.rotated import rotated as rotated_kernel
from ..noise import rows_of
from ..rows.eigen import eigh, rounded
from .common import Covariance, Factored, Maybe
from .factorise import eigen, eigen_low_rank, whiten
from .solve import solve

__all__ = [
    "explained",
    "explained_pairs",
    "factorise_observed",
    "inverse_blocks",
    "inverse_pairs",
    "is_singular",
]

Tensors = tuple[Tensor, ...]


# --- the factorisation ---------------------------------------------------------------------------


def _outputs(K: Tensor, Sigma: Tensor, observed: Tensor) -> Tensors:
    """H with K = H Hᵀ, the N_t one below the other, and Σ_t log det Σ_t,oo.

    H has no rows where K is not positive semidefinite, N none where a Σ_t is singular.
    """
    D = K.shape[-1]
    H = _column_root(K)
    both = observed[..., :, :, None] * observed[..., :, None, :]
    padded = symmetric(rows_of(Sigma)) * both + torch.diag_embed(1 - observed)
    L, info = torch.linalg.cholesky_ex(padded)
    logdet = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1))
    if H is None:
        H = K[..., :0, :0].clone()
    if bool(info.any()):
        _require_semidefinite(padded)
        return H, Sigma[..., :0, :].clone(), logdet
    N = torch.cholesky_inverse(L) * both
    return H, N.reshape(*N.shape[:-3], -1, D), logdet


def _column_root(K: Tensor) -> Tensor | None:
    """From the correlations, so that the units of the outputs do not matter; without the columns
    that are zero in the whole batch."""
    K = symmetric(K)
    scale = K.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0)
    values, vectors = eigh(inverse[..., :, None] * K * inverse[..., None, :], K=K)
    values = rounded(values)
    if bool((values < 0).any()) or bool(((scale == 0)[..., None] & (K != 0)).any()):
        return None
    zeros = int((values == 0).cumprod(-1).sum(-1).amin()) if values.numel() else 0
    return (scale[..., :, None] * vectors * values.sqrt()[..., None, :])[..., zeros:].contiguous()


def _require_semidefinite(padded: Tensor) -> None:
    """A Σ_t with a zero variance is for routes that do not divide by it; an indefinite one is an
    error."""
    bad = (rounded(torch.linalg.eigvalsh(padded)) < 0).any(-1)
    if bool(bad.any()):
        not_positive_definite("the noise of a row", bad.any(-1))


def _features(s: Tensor, P: Tensor) -> Tensor:
    """F with M = F Fᵀ; no columns and rows where M is not semidefinite."""
    if bool((s < 0).any()):
        return P[..., :0, :0].clone()
    return P * s.sqrt()[..., None, :]


column_form = define_flat(
    "column_form(Tensor K, Tensor Sigma, Tensor observed) -> (Tensor H, Tensor N, Tensor logdet)",
    _outputs,
    lambda K, Sigma, observed: (
        K.new_empty(K.shape),
        Sigma.new_empty(_joint(Sigma, 2, observed, 2) + Sigma.shape[-2:]),
        Sigma.new_empty(_joint(Sigma, 2, observed, 2)),
    ),
)
register(column_form, core_dims=lambda *_: ([2, 2, 2], [2, 2, 0]))

row_features = define_flat(
    "row_features(Tensor s, Tensor P) -> Tensor", _features, lambda s, P: P.new_empty(P.shape)
)
register(row_features, core_dims=lambda *_: ([1, 2], [2]))

capacitance = define_flat(
    "capacitance(Tensor F, Tensor H, Tensor N) -> Tensor",
    capacitance_kernel,
    lambda F, H, N: F.new_empty(
        broadcast(F.shape[:-2], H.shape[:-2], N.shape[:-2]) + (F.shape[-1] * H.shape[-1],) * 2
    ),
)
register(capacitance, core_dims=lambda *_: ([2, 2, 2], [2]))

direct = define_flat(
    "direct(Tensor M, Tensor K, Tensor Sigma, Tensor observed, bool traced) "
    "-> (Tensor places, Tensor real, Tensor L)",
    direct_kernel,
    lambda M, K, Sigma, observed, traced: _direct_fake(M, K, Sigma, observed),
)
register(direct, core_dims=lambda *_: ([2, 2, 2, 2, None], [1, 1, 2]))


def _joint(X: Tensor, x: int, Y: Tensor, y: int) -> torch.Size:
    return broadcast(X.shape[: X.dim() - x], Y.shape[: Y.dim() - y])


def _direct_fake(M: Tensor, K: Tensor, Sigma: Tensor, observed: Tensor) -> Tensors:
    batch = broadcast(M.shape[:-2], K.shape[:-2], Sigma.shape[:-2])
    n = observed.shape[-2] * observed.shape[-1]
    places = M.new_empty((*batch, n), dtype=torch.int64)
    return places, M.new_empty((*batch, n)), M.new_empty((*batch, n, n))


rotated = define_flat(
    "rotated(Tensor s, Tensor K, Tensor Sigma) -> Tensor",
    rotated_kernel,
    lambda s, K, Sigma: s.new_empty(_rotated_shape(s, K, Sigma)),
)
register(rotated, core_dims=lambda *_: ([1, 2, 2], [2]))

missing = define_flat(
    "missing(Tensor observed) -> (Tensor places, Tensor real)",
    missing_kernel,
    lambda observed: _missing_fake(observed),
)
register(missing, core_dims=lambda *_: ([2], [1, 1]))

border = define_flat(
    "border(Tensor M, Tensor lam, Tensor R, Tensor places, Tensor real) "
    "-> (Tensor L, Tensor logdet, Tensor inverses, Tensor X, Tensor G)",
    border_kernel,
    lambda M, lam, R, places, real: _border_fake(M, lam, R, places, real),
)
register(border, core_dims=lambda *_: ([2, 1, 2, 1, 1], [3, 1, 3, 3, 2]))


def _rotated_shape(s: Tensor, K: Tensor, Sigma: Tensor) -> tuple[int, ...]:
    batch, D = broadcast(s.shape[:-1], K.shape[:-2], Sigma.shape[:-2]), K.shape[-1]
    return (*batch, s.shape[-1] * D, D)


def _missing_fake(observed: Tensor) -> Tensors:
    shape = observed.flatten(-2).shape
    return observed.new_empty(shape, dtype=torch.int64), observed.new_empty(shape)


def _border_fake(M: Tensor, lam: Tensor, R: Tensor, places: Tensor, real: Tensor) -> Tensors:
    (T, D), m = (M.shape[-1], R.shape[-1]), places.shape[-1]
    own = broadcast(M.shape[:-2], lam.shape[:-1])
    joint = broadcast(own, places.shape[:-1])
    shapes = ((*own, D, T, T), (*own, D), (*own, D, T, T), (*joint, T, D, m), (*joint, m, m))
    return tuple(map(M.new_empty, shapes))


def factorise_observed(
    parts: Covariance, observed: Tensor, method: str, noise: Any
) -> tuple[Factored, str]:
    """U at the observed entries with its factorisation, and the method that made it.

    Args:
        parts: U, with a noise for each row.
        observed: (*batch, T, D), 1 where observed and 0 elsewhere.
        method: of ``plan.OBSERVED_METHODS``.
        noise: the noise of all rows, None where they differ.

    While a graph is traced, shapes cannot depend on data: "auto" then stands for "dense".
    """
    (Sigma,) = parts.noise
    T, D = parts.shape
    tracing, is_singular = torch.compiler.is_compiling(), False
    if method == "capacitance" or (method == "auto" and not tracing):
        H, N, logdet = column_form(parts.K, Sigma, observed)
        is_singular = N.shape[-2] != T * D
        if N.shape[-2] == T * D and H.shape[-2] == D:
            limit = T if method == "capacitance" else plan.max_features(T, D, H.shape[-1])
            F = _row_features(parts.rows, limit, tracing)
            if F is not None:
                L = capacitance(F, H, N)
                return Factored(parts, Capacitance(F, H, N, L, logdet)), "capacitance"
        if method == "capacitance":
            raise_if_not_finite(**parts.named())
            raise LinAlgError(
                'method="capacitance" needs M and K positive semidefinite and the noise of every '
                'row positive definite: method="auto" does not'
            )
    if method == "border" or (method == "auto" and not tracing and noise is not None):
        if noise is None:
            raise ValueError('method="border" needs one noise for all rows, got one for each')
        places, real = missing(observed)
        if is_singular and places.shape[-1] == 0:
            s, P = _basis(parts.rows)
            return Factored(parts, Rotated(s, P, rotated(s, parts.K, noise.matrix()))), "rotated"
        costs = plan.costs(parts.K.device.type)
        prefers = not is_singular and costs.prefers_border(T, D, places.shape[-1])
        if method == "border" or prefers:
            lam, R, logdet_noise = whiten(parts.K, noise)
            L, logdet, *rest = border(parts.rows.dense(), lam, R, places, real)
            logdet = logdet.sum(-1) + T * logdet_noise
            inverses, X, G = rest
            factor = Border(L, inverses, lam, R, logdet, places, real, X, G)
            return Factored(parts, factor), "border"
    made = direct(parts.rows.dense(), parts.K, Sigma, observed, tracing)
    return Factored(parts, Direct(*made, observed)), "dense"


def _basis(rows: Any) -> tuple[Tensor, Tensor]:
    """All eigenvalues and eigenvectors of M."""
    basis = rows.basis()
    if basis is None or basis[1].shape[-1] < rows.size:
        basis = eigen(rows.dense())
    s, P = basis
    return s, P


def _row_features(rows: Any, limit: int, tracing: bool) -> Tensor | None:
    """F with M = F Fᵀ of at most so many columns, if there is one."""
    basis = rows.basis()
    s, P = eigen_low_rank(rows.dense(), limit, tracing) if basis is None else basis
    if P.shape[-2] != rows.size or P.shape[-1] > limit:
        return None
    F: Tensor = row_features(s, P)
    return F if F.shape[-2] == rows.size else None


def is_singular(noise: Any) -> bool:
    """Whether Σ, which has no Cholesky factor, is positive semidefinite all the same."""
    if not noise.is_matrix or torch.compiler.is_compiling():
        return False
    values = torch.linalg.eigvalsh(noise.matrix().detach())
    return bool(values.isfinite().all()) and bool((rounded(values) >= 0).all())


# --- functionals of Q ----------------------------------------------------------------------------


def _with_derivatives(
    U: Factored, value: Tensor, by_solves: Callable[[], Tensor], *more: Maybe
) -> Tensor:
    given = [*U.rows, U.K, *U.noise, *(x for x in more if x is not None)]
    if not may_be_differentiated(*given):
        return value
    out = by_solves()
    return value.detach() + (out - out.detach())


def _solved(U: Factored, X: Tensor, K: Tensor) -> Tensor:
    """Q (x_s ⊗ k_d) for the rows x of X (*batch, S, T) and k of K: (S, D, *batch, T, D)."""
    right = X[..., :, None, :, None] * K[..., None, :, None, :]
    out: Tensor = solve(right.movedim((-4, -3), (0, 1)), U, None)
    return out


def _eye(U: Factored, n: int) -> Tensor:
    return torch.eye(n, dtype=U.K.dtype, device=U.K.device)


def inverse_blocks(U: Factored, X: Maybe = None) -> Tensor:
    """(x_s ⊗ I)ᵀ Q (x_s ⊗ I) for the rows x of X; the Q_tt without: (*batch, S, D, D)."""

    def by_solves() -> Tensor:
        T, D = U.shape
        weights = _eye(U, T) if X is None else X
        return torch.einsum("...st,sd...te->...sde", weights, _solved(U, weights, _eye(U, D)))

    own = None if X is None else X.detach()
    return _with_derivatives(U, U.factor.blocks(own), by_solves, X)


def inverse_pairs(U: Factored, X: Tensor) -> Tensor:
    """(x_s ⊗ I)ᵀ Q (x_u ⊗ I) for all pairs of rows: (*batch, S, D, S, D)."""
    A = _solved(U, X, _eye(U, U.shape[1]))
    return torch.einsum("...ut,sd...te->...sdue", X, A)


def explained(U: Factored, X: Tensor) -> Tensor:
    """K (x_s ⊗ I)ᵀ Q (x_s ⊗ I) K: (*batch, S, D, D)."""
    K = symmetric(U.K)

    def by_solves() -> Tensor:
        return torch.einsum("...st,sd...te,...ef->...sdf", X, _solved(U, X, K), K)

    return _with_derivatives(U, U.factor.explained(X.detach(), K.detach()), by_solves, X)


def explained_pairs(U: Factored, X: Tensor) -> Tensor:
    """The same for all pairs of rows: (*batch, S, D, S, D)."""
    K = symmetric(U.K)

    def by_solves() -> Tensor:
        return torch.einsum("...ut,sd...te,...ef->...sduf", X, _solved(U, X, K), K)

    return _with_derivatives(U, U.factor.explained_pairs(X.detach(), K.detach()), by_solves, X)
