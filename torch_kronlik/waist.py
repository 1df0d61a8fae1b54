"""The narrow waist: everything that anybody asks of U and of U⁻¹.

What is below (``rows``, ``noise``, ``factor``, ``rules``) is reached through this class alone by
what is above: prediction, validation, distributions, information, the adapters for other libraries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import rules
from .autocast import full_precision
from .batch import places_of, submatrix, symmetric
from .checks import check_broadcast, check_data, check_uniform, versions
from .derivatives import may_be_differentiated
from .errors import LinAlgError
from .guards import finite, positive
from .noise import make_row_noise
from .rules import (
    WITH_BASIS,
    Covariance,
    Factored,
    MatrixRoot,
    check_method,
    check_observed_method,
)

__all__ = ["MatrixRoot", "Waist", "check_method", "check_observed_method"]

_Made = TypeVar("_Made")


class Waist:
    """U = M ⊗ K + I_T ⊗ Σ, factorised once, at the first operation that needs it.

    Args:
        rows: M as a row covariance, see :mod:`.rows`, or a function that returns it.
        K: (*batch, D, D).
        noise: Σ as a noise, see :mod:`.noise`; for a noise of each row a function that returns it,
            so that it is made anew, as the arguments stand, for each operation.
        method: of the routes, checked already.
        observed: (*batch, T, D), True for the entries that U is the covariance of; for a noise of
            each row alone. None stands for all.
        new_noise: Σ of rows that are not among the data, None where that is not known.
        has_one_noise: whether new_noise is the noise of every row.

    With ``observed``, U⁻¹ below is zero outside of these entries, and data are read there alone.
    """

    def __init__(
        self,
        rows: Any,
        K: Tensor,
        noise: Any,
        method: str,
        observed: Tensor | None = None,
        new_noise: Any = None,
        has_one_noise: bool = True,
    ) -> None:
        self._rows, self.K, self._noise, self.observed = rows, K, noise, observed
        self._scaled: Waist | None = None
        rows = self.rows
        self.new_noise = new_noise if self.is_per_row else noise
        self.has_one_noise = has_one_noise
        noise = self.noise
        self.batch_shape = check_broadcast(M=rows.batch, K=K.shape[:-2], noise=noise.batch)
        self._method = method
        self._watched = [*rows.named().values(), K]
        self._watched += [] if self.is_per_row else noise.named().values()
        self._factorised: Factored | None = None
        self._completed: Factored | None = None
        self._versions: list[int] = []

    @property
    def event_shape(self) -> torch.Size:
        """(T, D)."""
        return torch.Size((self.rows.size, self.K.shape[-1]))

    @property
    def dtype(self) -> torch.dtype:
        return self.K.dtype

    @property
    def device(self) -> torch.device:
        return self.K.device

    @property
    def is_per_row(self) -> bool:
        """Whether entries may be missing or the noise may differ between rows."""
        return callable(self._noise)

    @property
    def rows(self) -> Any:
        """M."""
        return self._rows() if callable(self._rows) else self._rows

    @property
    def noise(self) -> Any:
        """Σ, or that of each row."""
        return self._noise() if callable(self._noise) else self._noise

    @property
    def _parts(self) -> Covariance:
        return Covariance(self.rows, self.K, self.noise)

    @property
    def num_observed(self) -> int | Tensor:
        """How many entries the density is of; (*batch), a floating number, where masked."""
        if self.observed is None:
            return self.event_shape.numel()
        return self.observed.sum((-2, -1)).to(self.dtype)

    def seen(self, Y: Tensor) -> Tensor:
        """Y with zeros where it is not observed, whatever stands there."""
        return Y if self.observed is None else torch.where(self.observed, Y, 0)

    # --- the factorisation -----------------------------------------------------------------------

    @property
    def method_used(self) -> str:
        """The route that "auto" stands for here; asking factorises."""
        if self._scaled is not None:
            return self._scaled.method_used
        self._factorise()
        return self._method

    def prefer_basis(self) -> None:
        """Let "auto" take a route with a basis of M, which serves diagonal blocks of U⁻¹ best."""
        if self._method == "auto":
            self._method = WITH_BASIS

    @full_precision
    def _factorise(self) -> Factored:
        made = self._factorised
        if made is None:
            current = versions(self._watched)
            make = partial(self._make, self._method)
            made, self._method = _outside_inference(make)
            # Last, so that another thread finds all of it or nothing.
            self._versions, self._factorised = current, made
        elif self._versions != versions(self._watched):
            raise RuntimeError(
                f"an argument of this {type(self).__name__} was changed in place after it was "
                "factorised: make a new one"
            )
        made_anew = callable(self._noise) or callable(self._rows)
        return made._replace(parts=self._parts) if made_anew else made

    def _make(self, method: str) -> tuple[Factored, str]:
        if not self.is_per_row:
            try:
                return rules.factorise(self._parts, method)
            except LinAlgError:
                if not rules.observed.is_singular(self.noise):
                    raise
            self._give_each_row_its_noise()
            method = "auto"
        if method == "rotated" or (method == "border" and not self.has_one_noise):
            method = "auto"  # of a copy; or beside the problem with scaled rows
        mask = self.observed
        if mask is None:
            mask = torch.ones(self.event_shape, dtype=torch.bool, device=self.device)
        noise = self.new_noise if self.has_one_noise else None
        return rules.observed.factorise_observed(self._parts, mask.to(self.dtype), method, noise)

    def _give_each_row_its_noise(self) -> None:
        """A singular Σ is for routes that do not divide by it, which have a noise for each row."""
        shape = self.event_shape[0], self.event_shape[1]
        self._noise = partial(make_row_noise, self._noise, None, None, None, shape, None)

    def scale_rows(self, row_scale: Tensor, method: str) -> None:
        """U⁻¹ from the problem with one noise that rows divided by √v_t have, where Σ_t = v_t Σ:
        U = (√V ⊗ I) U' (√V ⊗ I) with M' = V^−½ M V^−½."""
        self._row_scale = row_scale
        noise, shape = self.new_noise, (self.event_shape[0], self.event_shape[1])
        if self.observed is not None:
            noise = partial(make_row_noise, noise, None, None, None, shape, self.observed)
        rows = partial(_scaled_rows, self._rows, row_scale)
        inner = Waist(rows, self.K, noise, method, self.observed, self.new_noise)
        inner._watched = self._watched
        self._scaled = inner

    def _inverse_root_scale(self) -> Tensor:
        """(*batch, T, 1)"""
        root: Tensor = positive(self._row_scale, "row_scale").rsqrt()[..., None]
        return root

    def _counts(self) -> Tensor:
        """How many entries of each row the density is of: (*batch, T) or a number."""
        if self.observed is None:
            return self.K.new_tensor(self.event_shape[1])
        return self.observed.sum(-1).to(self.dtype)

    def _of_rows(self) -> Factored | None:
        """The factorisation, where every row has a noise of its own; None otherwise."""
        U = self._factorise()
        return U if self.is_per_row else None

    def __getstate__(self) -> dict[str, Any]:
        """A copy is factorised anew, by the same route: its arguments are other tensors."""
        return {**self.__dict__, "_factorised": None, "_completed": None}

    @full_precision
    def _complete(self) -> Factored:
        """With a complete basis of M: made of the factorisation once, where something needs it."""
        U = self._factorise()
        if self.is_per_row:
            raise NotImplementedError(
                "this is not implemented for observed entries or a noise for each row"
            )
        if self._completed is None:
            self._completed = _outside_inference(partial(rules.completed, U))
        return self._completed._replace(parts=U.parts)

    def _differentiable(self) -> Factored:
        """The factorisation as the derivatives of functionals need it: on the low-rank route, the
        complement of the basis moves with M."""
        U = self._factorise()
        low = U.factor.complement > 0
        return (
            self._complete() if low and may_be_differentiated(*self._parts.named().values()) else U
        )

    # --- checks ----------------------------------------------------------------------------------

    def check_data(self, name: str, Y: Tensor) -> torch.Size:
        """The joint batch shape of U and data Y (*batch, T, D), which have to fit."""
        check_uniform(**{"K": self.K, name: Y})
        check_data(name, Y, (self.event_shape[0], self.event_shape[1]))
        return check_broadcast(**{name: Y.shape[:-2], "U": self.batch_shape})

    def finite(self, result: Tensor) -> Tensor:
        """``result``, after a check that it is finite; if not, the argument at fault is named."""
        return finite(result, **self._parts.named())

    # --- U ---------------------------------------------------------------------------------------

    @full_precision
    def multiply(self, Y: Tensor) -> Tensor:
        """U·Y, for M, K and Σ as they stand."""
        out: Tensor = rules.multiply(self.seen(Y), self._parts)
        return self.seen(out)

    @full_precision
    def diagonal(self) -> Tensor:
        """diag(U), as (*batch, T, D): the variance of each entry."""
        rows, K, noise = self._parts
        signal = rows.diagonal()[..., :, None] * K.diagonal(dim1=-2, dim2=-1)[..., None, :]
        return self.seen(self.finite(signal + noise.diagonal()))

    @full_precision
    def dense(self) -> Tensor:
        """U as a matrix, (*batch, T·D, T·D), or its observed rows and columns."""
        T, n = self.event_shape[0], self.event_shape.numel()
        M, K = symmetric(self.rows.dense()), symmetric(self.K)
        eye = torch.eye(T, dtype=self.dtype, device=self.device)
        signal = M[..., :, None, :, None] * K[..., None, :, None, :]
        U = signal + eye[:, None, :, None] * self.noise.blocks()[..., :, :, None, :]
        U = self.finite(U.reshape(*self.batch_shape, n, n))
        return U if self.observed is None else _rows_and_columns(U, self.observed.flatten(-2))

    @full_precision
    def root_matmul(self, E: Tensor) -> Tensor:
        """F·E with U = F Fᵀ, smooth in M, K and Σ: for standard normal E a draw."""
        U = self._differentiable()
        has_basis = isinstance(U.factor, rules.Spectral)
        return rules.root_matmul(U if has_basis else self._complete(), E)

    @full_precision
    def noise_draw(self, E: Tensor) -> Tensor:
        """The noise of every row, for standard normal E."""
        if not self.is_per_row:
            drawn: Tensor = self.noise.root_matmul(E)
            return drawn
        root = MatrixRoot(self.noise.blocks(), "the noise of a row")
        return root.matmul(E[..., None]).squeeze(-1)

    # --- the functionals of U⁻¹ ------------------------------------------------------------------

    @full_precision
    def inverse_matmul(self, Y: Tensor) -> Tensor:
        """A = U⁻¹·Y."""
        if self._scaled is not None:
            c = self._inverse_root_scale()
            return c * self._scaled.inverse_matmul(c * self.seen(Y))
        out: Tensor = rules.solve(self.seen(Y), self._factorise(), None)
        return out

    @full_precision
    def quad_logdet(self, Y: Tensor | None) -> tuple[Tensor, Tensor]:
        """(yᵀU⁻¹y, log det U), from one pass over the data; Y = None asks for log det U alone."""
        if self._scaled is not None:
            c = self._inverse_root_scale()
            data = None if Y is None else c * self.seen(Y)
            inv_quad, logdet = self._scaled.quad_logdet(data)
            return inv_quad, logdet - 2 * (self._counts() * c.squeeze(-1).log()).sum(-1)
        made = rules.quad_logdet(None if Y is None else self.seen(Y), self._factorise())
        return made.inv_quad, made.logdet

    @full_precision
    def inverse_block_sum(self) -> Tensor:
        """B = Σ_t (U⁻¹)_tt, (*batch, D, D)."""
        if self._scaled is not None:
            return self.finite(self.inverse_own_blocks().sum(-3))
        U = self._of_rows()
        if U is not None:
            return self.finite(rules.observed.inverse_blocks(U).sum(-3))
        return self.finite(rules.inverse_block_sum(self._differentiable()))

    @full_precision
    def inverse_blocks(self, F: Tensor) -> Tensor:
        """(f_s ⊗ I)ᵀ U⁻¹ (f_s ⊗ I) for each row f_s of F (*batch, S, T): (*batch, S, D, D)."""
        if self._scaled is not None:
            return self._scaled.inverse_blocks(F * self._inverse_root_scale().mT)
        U = self._of_rows()
        if U is not None:
            return rules.observed.inverse_blocks(U, F)
        return rules.inverse_blocks(self._differentiable(), F)

    @full_precision
    def inverse_own_blocks(self) -> Tensor:
        """(U⁻¹)_tt, (*batch, T, D, D)."""
        if self._scaled is not None:
            c = self._inverse_root_scale()
            return c.square()[..., None] * self._scaled.inverse_own_blocks()
        U = self._of_rows()
        if U is not None:
            return rules.observed.inverse_blocks(U)
        return self.inverse_blocks(
            torch.eye(self.event_shape[0], dtype=self.dtype, device=self.device)
        )

    @full_precision
    def explained(self, F: Tensor) -> Tensor:
        """K (f_s ⊗ I)ᵀ U⁻¹ (f_s ⊗ I) K: what data explain of the variances, (*batch, S, D, D)."""
        if self._scaled is not None:
            return self._scaled.explained(F * self._inverse_root_scale().mT)
        U = self._of_rows()
        if U is not None:
            return rules.observed.explained(U, F)
        K = symmetric(self.K)[..., None, :, :]
        return K @ self.inverse_blocks(F) @ K

    @full_precision
    def explained_pairs(self, F: Tensor) -> Tensor:
        """The same for all pairs of rows of F: (*batch, S, D, S, D)."""
        if self._scaled is not None:
            return self._scaled.explained_pairs(F * self._inverse_root_scale().mT)
        U = self._of_rows()
        if U is not None:
            return rules.observed.explained_pairs(U, F)
        K = symmetric(self.K)
        return torch.einsum("...ad,...sdue,...eb->...saub", K, self.inverse_pairs(F), K)

    @full_precision
    def inverse_blocks_diagonal(self, F: Tensor | None = None) -> Tensor:
        """The diagonals of :meth:`inverse_blocks`, (*batch, S, D); F = None is the identity."""
        if self._scaled is not None:
            c = self._inverse_root_scale()
            if F is None:
                return c.square() * self._scaled.inverse_blocks_diagonal()
            return self._scaled.inverse_blocks_diagonal(F * c.mT)
        U = self._of_rows()
        if U is not None:
            blocks = rules.observed.inverse_blocks(U, F)
            return blocks.diagonal(dim1=-2, dim2=-1)
        return rules.inverse_blocks_diagonal(self._differentiable(), F)

    @full_precision
    def inverse_pairs(self, F: Tensor) -> Tensor:
        """(f_s ⊗ I)ᵀ U⁻¹ (f_u ⊗ I) for all pairs of rows of F: (*batch, S, D, S, D)."""
        if self._scaled is not None:
            return self._scaled.inverse_pairs(F * self._inverse_root_scale().mT)
        U = self._of_rows()
        if U is not None:
            return rules.observed.inverse_pairs(U, F)
        return rules.inverse_pairs(self._differentiable(), F)

    @full_precision
    def inverse_trace(self, M2: Tensor, K2: Tensor) -> Tensor:
        """tr(U⁻¹ (M2 ⊗ K2)), (*batch)."""
        return rules.inverse_trace(self._differentiable(), M2, K2)

    def inverse_matrix(self) -> Tensor:
        """U⁻¹ as a matrix, (*batch, T·D, T·D), a constant; where each row has its own noise."""
        Q: Tensor = self._factorise().factor.inverse()
        return Q

    def spectral_form(self) -> Any:
        """(s, P, λ, R) of :mod:`.factor.spectral`, constants for differentiation."""
        return self._complete().factor

    # --- the density -----------------------------------------------------------------------------

    @full_precision
    def gaussian_nll(self, Y: Tensor) -> Tensor:
        """−log N(vec Y; 0, U) in nats, constant included: (*batch)."""
        batch = self.check_data("Y", Y)
        # Where "auto" is free to choose and nothing is factorised yet, one native call may serve.
        is_fresh = self._method == "auto" and self._factorised is None and not self.is_per_row
        if is_fresh and rules.is_small(self._parts, batch):
            try:
                return rules.small_likelihood(Y, self._parts)
            except LinAlgError:
                if not rules.observed.is_singular(self.noise):
                    raise
        inv_quad, logdet = self.quad_logdet(Y)
        return 0.5 * (inv_quad + logdet + self.num_observed * math.log(2 * math.pi))


def _scaled_rows(rows: Any, row_scale: Tensor) -> Any:
    return rows.scaled(positive(row_scale, "row_scale").rsqrt())


def _rows_and_columns(U: Tensor, observed: Tensor) -> Tensor:
    """At the observed entries, which have to be equally many in the whole batch."""
    counts = observed.sum(-1)
    if counts.numel() and bool((counts != counts.flatten()[0]).any()):
        raise ValueError("to_dense needs as many observed entries in each batch element")
    places = places_of(observed)
    return submatrix(U, places.expand(*U.shape[:-2], places.shape[-1]))


def _outside_inference(make: Callable[[], _Made]) -> _Made:
    """Inference tensors could not be used for gradients later."""
    if torch.compiler.is_compiling():
        return make()
    with torch.inference_mode(False):
        return make()
