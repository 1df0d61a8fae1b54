"""The covariance U = M ⊗ K + I_T ⊗ Σ as an object, and the functions over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from .autocast import full_precision
from .checks import (
    check_broadcast,
    check_data,
    check_eigen,
    check_noise,
    check_sample_shape,
    check_square,
    check_uniform,
)
from .derivatives import may_be_differentiated
from .factor.batch import symmetric
from .factor.plan import check_method
from .rules.common import Covariance
from .rules.expansion import inverse_block_sum, inverse_blocks_diagonal
from .rules.factorise import eigen, factorise, known_rows
from .rules.finite import finite
from .rules.multiply import multiply
from .rules.quad_logdet import quad_logdet
from .rules.sample import root_matmul
from .rules.solve import solve
from .symmetric_eigen import SymmetricEigen

__all__ = ["KroneckerPlusNoise"]

_Maybe = TypeVar("_Maybe", Tensor, Tensor | None)
_Made = TypeVar("_Made")


class KroneckerPlusNoise:
    """The covariance U = M ⊗ K + I_T ⊗ Σ of a T×D matrix whose rows are stacked.

    It is factorised once, at the first operation that needs it; every later operation, derivatives
    included, uses that factorisation. U itself is never formed, except by :meth:`to_dense`.

    Args:
        M: (*batch, T, T) symmetric positive semidefinite, or a :class:`SymmetricEigen` (constant).
        K: (*batch, D, D) symmetric positive semidefinite.
        Sigma: (*batch, D, D) symmetric positive definite noise covariance; or
        log_noise: (*batch, D), the logarithms s of the noise variances, Σ = Diag(exp(s)).
        method: "auto", "spectral" (both factors diagonalised), "cholesky" (a T×T factorisation for
            each non-zero eigenvalue of K) or "low_rank" (M of low numerical rank; another M goes
            to "spectral"). Every method is exact to rounding; "auto" takes the cheapest. A
            SymmetricEigen is diagonalised already: every method is "spectral" then.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device or shape does not fit.

    The operations raise ValueError for an argument that is not finite and
    ``torch.linalg.LinAlgError`` where Sigma or U is not positive definite. An M whose negative
    eigenvalues are within rounding (T·eps times the largest one) may pass for semidefinite.

    Cost: O(T³ + D³) for the factorisation, O(T²·D + T·D²) for a solve; memory O(T² + T·D + D²).
    Source: Rakitsch, Lippert, Borgwardt, Stegle 2013.

    >>> U = KroneckerPlusNoise(torch.eye(3), torch.eye(2), log_noise=torch.zeros(2))
    >>> U.shape, U.logdet()
    (torch.Size([6, 6]), tensor(4.1589))
    """

    @full_precision
    def __init__(
        self,
        M: Tensor | SymmetricEigen,
        K: Tensor,
        *,
        Sigma: Tensor | None = None,
        log_noise: Tensor | None = None,
        method: str = "auto",
    ) -> None:
        self.M, self.K, self.Sigma, self.log_noise = M, K, Sigma, log_noise
        self._rows = M.eigenvectors if isinstance(M, SymmetricEigen) else M
        check_uniform(M=self._rows, K=K, Sigma=Sigma, log_noise=log_noise)
        check_square("M", self._rows, "T")
        check_square("K", K, "D")
        if isinstance(M, SymmetricEigen):
            check_eigen(M.eigenvalues, M.eigenvectors)
        check_noise(K, Sigma, log_noise)
        self._noise_batch = Sigma.shape[:-2] if log_noise is None else log_noise.shape[:-1]  # type: ignore[union-attr]
        self.batch_shape = check_broadcast(
            M=self._rows.shape[:-2], K=K.shape[:-2], noise=self._noise_batch
        )
        check_method(method)
        self._method = method
        self._factorised: Covariance | None = None
        self._full: Covariance | None = None
        self._versions: list[int] = []

    @property
    def event_shape(self) -> torch.Size:
        """(T, D)."""
        return torch.Size((self._rows.shape[-1], self.K.shape[-1]))

    @property
    def shape(self) -> torch.Size:
        """(*batch, T·D, T·D)."""
        n = self.event_shape.numel()
        return torch.Size((*self.batch_shape, n, n))

    @property
    def dtype(self) -> torch.dtype:
        return self.K.dtype

    @property
    def device(self) -> torch.device:
        return self.K.device

    @property
    def is_fresh(self) -> bool:
        """Whether "auto" is free to choose and nothing is factorised yet."""
        return self._method == "auto" and self._factorised is None

    @property
    def method_used(self) -> str:
        """The route that "auto" stands for here; asking factorises."""
        self._factorise()
        return self._method

    @full_precision
    def _factorise(self) -> Covariance:
        made = self._factorised
        if made is None:
            versions = self._current_versions()
            made, self._method = _outside_inference(self._make_factor)
            # Last, so that another thread finds all of it or nothing.
            self._versions, self._factorised = versions, made
        elif self._versions != self._current_versions():
            raise RuntimeError(
                "an argument of this KroneckerPlusNoise was changed in place after it was "
                "factorised: make a new one"
            )
        return made

    def _make_factor(self) -> tuple[Covariance, str]:
        K, Sigma, log_noise = self.K, self.Sigma, self.log_noise
        if isinstance(self.M, SymmetricEigen):
            s, P = self.M
            return known_rows(s, P, K, Sigma, log_noise), "spectral"
        return factorise(self.M, K, Sigma, log_noise, self._method)

    def _current_versions(self) -> list[int]:
        """How often each argument was changed in place; nothing while a graph is traced."""
        if torch.compiler.is_compiling():
            return []
        arguments = [*(self.M if isinstance(self.M, SymmetricEigen) else [self.M]), self.K]
        arguments += [x for x in (self.Sigma, self.log_noise) if x is not None]
        return [0 if x.is_inference() else x._version for x in arguments]

    def __getstate__(self) -> dict[str, Any]:
        """A copy is factorised anew, by the same route: its arguments are other tensors."""
        return {**self.__dict__, "_factorised": None, "_full": None}

    @full_precision
    def _spectral(self) -> Covariance:
        """The factorisation in the full spectral form, which some operations need."""
        c = self._factorise()
        if self._method != "spectral" and c.M is not None:
            if self._full is None:
                self._full = _outside_inference(partial(self._make_full, c.M))
            return self._full
        return c

    def _make_full(self, M: Tensor) -> Covariance:
        s, P = eigen(M)
        return known_rows(s, P, self.K, self.Sigma, self.log_noise, M)

    def _check_data(self, name: str, Y: Tensor) -> torch.Size:
        check_uniform(**{"M": self._rows, name: Y})
        check_data(name, Y, (self.event_shape[0], self.event_shape[1]))
        return check_broadcast(**{name: Y.shape[:-2], "U": self.batch_shape})

    @full_precision
    def matmul(self, Y: Tensor) -> Tensor:
        """U·Y = M Y K + Y Σ: (*batch, T, D), without a factorisation. Cost: O(T²·D + T·D²)."""
        self._check_data("Y", Y)
        out: Tensor = multiply(Y, *self._products())
        return out

    def _products(self) -> Covariance:
        """The factorisation where there is one, else anything of its shape: products do without."""
        if self._factorised is not None:
            return self._factorise()
        M, K = self._rows, self.K
        shapes = (M.diagonal(dim1=-2, dim2=-1), M, K[..., 0], K, K[..., 0, 0])
        if isinstance(self.M, SymmetricEigen):
            shapes = (*self.M, *shapes[2:])
        own = None if isinstance(self.M, SymmetricEigen) else M
        return Covariance(own, K, self.Sigma, self.log_noise, *shapes, "spectral")

    @full_precision
    def solve(self, Y: Tensor) -> Tensor:
        """U⁻¹·Y: (*batch, T, D). Cost: O(T²·D + T·D²) after the factorisation."""
        self._check_data("Y", Y)
        out: Tensor = solve(Y, *self._factorise(), None)
        return out

    @full_precision
    def logdet(self) -> Tensor:
        """log det U: (*batch)."""
        out: Tensor = quad_logdet(None, *self._factorise())[1]
        return out

    @full_precision
    def inv_quad_logdet(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """(vec(Y)ᵀ U⁻¹ vec(Y), log det U), each (*batch), from one factorisation."""
        batch = self._check_data("Y", Y)
        inv_quad, logdet = quad_logdet(Y, *self._factorise())[:2]
        return inv_quad, logdet.expand(batch)

    @full_precision
    def inverse_block_diag_sum(self) -> Tensor:
        """B, the sum of the D×D diagonal blocks of U⁻¹ and the gradient of log det U in Σ:
        (*batch, D, D). Cost: O(T·D²) after the factorisation, O(T³) with derivatives."""
        return self._finite(inverse_block_sum(self._spectral()))

    @full_precision
    def inverse_diagonal(self) -> Tensor:
        """diag(U⁻¹): (*batch, T, D). Cost: O(T²·D) after the factorisation, O(T³·D) with
        derivatives."""
        return self._finite(inverse_blocks_diagonal(self._spectral()))

    @full_precision
    def diagonal(self) -> Tensor:
        """diag(U), as (*batch, T, D): the variance of each entry."""
        noise = self.log_noise.exp() if self.log_noise is not None else _diagonal(self.Sigma)
        rows = (
            (self.M.eigenvectors.square() @ self.M.eigenvalues[..., None])
            if isinstance(self.M, SymmetricEigen)
            else _diagonal(self.M)[..., None]
        )
        return self._finite(rows * _diagonal(self.K)[..., None, :] + noise[..., None, :])

    @full_precision
    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws from N(0, U): (*sample_shape, *batch, T, D), reparameterised.

        Y = (P ⊗ LQ) Diag(√(1 + s_i λ_j)) (P ⊗ Q)ᵀ ε with Σ = L Lᵀ and standard normal ε, a smooth
        function of M, K and Σ: gradients flow through it, to first order.

        Cost: O(T²·D + T·D²) a draw after the factorisation.
        """
        check_sample_shape(sample_shape)
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        noise = torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)
        return self._finite(root_matmul(self._spectral(), noise))

    @full_precision
    def to_dense(self) -> Tensor:
        """U itself, (*batch, T·D, T·D): for small problems and for checking."""
        T, M = self.event_shape[0], self.M
        if isinstance(M, SymmetricEigen):
            M = (M.eigenvectors * M.eigenvalues[..., None, :]) @ M.eigenvectors.mT
        Sigma = self.Sigma if self.log_noise is None else torch.diag_embed(self.log_noise.exp())
        assert Sigma is not None
        M, K, Sigma = _symmetric(M), _symmetric(self.K), _symmetric(Sigma)
        eye = torch.eye(T, dtype=self.dtype, device=self.device)
        signal = M[..., :, None, :, None] * K[..., None, :, None, :]
        U = signal + eye[:, None, :, None] * Sigma[..., None, :, None, :]
        return self._finite(U.reshape(self.shape))

    def _finite(self, result: Tensor) -> Tensor:
        M = self.M
        rows = {"M": M} if isinstance(M, Tensor) else {f"M.{k}": x for k, x in M._asdict().items()}
        return finite(result, **rows, K=self.K, Sigma=self.Sigma, log_noise=self.log_noise)

    def __repr__(self) -> str:
        noise = "Sigma" if self.log_noise is None else "log_noise"
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, T={self.event_shape[0]}, "
            f"D={self.event_shape[1]}, noise={noise}, dtype={self.dtype}, device={self.device})"
        )


def _diagonal(X: Tensor | None) -> Tensor:
    assert X is not None
    return X.diagonal(dim1=-2, dim2=-1)


def _symmetric(X: _Maybe) -> _Maybe:
    """X, with a symmetric gradient."""
    return symmetric(X) if X is not None and may_be_differentiated(X) else X


def _outside_inference(make: Callable[[], _Made]) -> _Made:
    """Inference tensors could not be used for gradients later."""
    if torch.compiler.is_compiling():
        return make()
    with torch.inference_mode(False):
        return make()
