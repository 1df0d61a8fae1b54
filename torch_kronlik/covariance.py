"""The covariance U = M ⊗ K + I_T ⊗ Σ as an object, and the functions over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from .autocast import full_precision
from .batch import symmetric
from .checks import (
    check_broadcast,
    check_data,
    check_noise,
    check_sample_shape,
    check_square,
    check_uniform,
)
from .factor.plan import check_method
from .guards import finite
from .noise import make_noise
from .rows import RowCovariance, as_rows
from .rules.common import Covariance, Factored
from .rules.expansion import inverse_block_sum, inverse_blocks_diagonal
from .rules.factorise import factorise, spectral
from .rules.multiply import multiply
from .rules.quad_logdet import quad_logdet
from .rules.sample import root_matmul
from .rules.solve import solve

__all__ = ["KroneckerPlusNoise"]

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
        M: RowCovariance,
        K: Tensor,
        *,
        Sigma: Tensor | None = None,
        log_noise: Tensor | None = None,
        method: str = "auto",
    ) -> None:
        self.M, self.K, self.Sigma, self.log_noise = M, K, Sigma, log_noise
        rows = as_rows(M)
        check_uniform(**rows.named(), K=K, Sigma=Sigma, log_noise=log_noise)
        rows.check()
        check_square("K", K, "D")
        check_noise(K, Sigma, log_noise)
        self._parts = Covariance(rows, K, make_noise(Sigma, log_noise))
        self.batch_shape = check_broadcast(
            M=rows.batch, K=K.shape[:-2], noise=self._parts.noise.batch
        )
        check_method(method)
        self._method = method
        self._factorised: Factored | None = None
        self._full: Factored | None = None
        self._versions: list[int] = []

    @property
    def rows(self) -> Any:
        """M as a row covariance."""
        return self._parts.rows

    @property
    def noise(self) -> Any:
        """Σ as a noise."""
        return self._parts.noise

    @property
    def event_shape(self) -> torch.Size:
        """(T, D)."""
        return torch.Size(self._parts.shape)

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
    def _factorise(self) -> Factored:
        made = self._factorised
        if made is None:
            versions = self._current_versions()
            made, self._method = _outside_inference(partial(factorise, self._parts, self._method))
            # Last, so that another thread finds all of it or nothing.
            self._versions, self._factorised = versions, made
        elif self._versions != self._current_versions():
            raise RuntimeError(
                "an argument of this KroneckerPlusNoise was changed in place after it was "
                "factorised: make a new one"
            )
        return made

    def _current_versions(self) -> list[int]:
        """How often each argument was changed in place; nothing while a graph is traced."""
        if torch.compiler.is_compiling():
            return []
        arguments = self._parts.named().values()
        return [0 if x.is_inference() else x._version for x in arguments]

    def __getstate__(self) -> dict[str, Any]:
        """A copy is factorised anew, by the same route: its arguments are other tensors."""
        return {**self.__dict__, "_factorised": None, "_full": None}

    @full_precision
    def _spectral(self) -> Factored:
        """The factorisation in the full spectral form, which some operations need."""
        U = self._factorise()
        if self._method == "spectral":
            return U
        if self._full is None:
            self._full = _outside_inference(partial(spectral, U))
        return self._full

    def _check_data(self, name: str, Y: Tensor) -> torch.Size:
        check_uniform(**{"K": self.K, name: Y})
        check_data(name, Y, (self.event_shape[0], self.event_shape[1]))
        return check_broadcast(**{name: Y.shape[:-2], "U": self.batch_shape})

    @full_precision
    def matmul(self, Y: Tensor) -> Tensor:
        """U·Y = M Y K + Y Σ: (*batch, T, D), without a factorisation. Cost: O(T²·D + T·D²)."""
        self._check_data("Y", Y)
        out: Tensor = multiply(Y, self._parts)
        return out

    @full_precision
    def solve(self, Y: Tensor) -> Tensor:
        """U⁻¹·Y: (*batch, T, D). Cost: O(T²·D + T·D²) after the factorisation."""
        self._check_data("Y", Y)
        out: Tensor = solve(Y, self._factorise(), None)
        return out

    @full_precision
    def logdet(self) -> Tensor:
        """log det U: (*batch)."""
        out: Tensor = quad_logdet(None, self._factorise()).logdet
        return out

    @full_precision
    def inv_quad_logdet(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """(vec(Y)ᵀ U⁻¹ vec(Y), log det U), each (*batch), from one factorisation."""
        batch = self._check_data("Y", Y)
        made = quad_logdet(Y, self._factorise())
        return made.inv_quad, made.logdet.expand(batch)

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
        rows, K, noise = self._parts
        signal = rows.diagonal()[..., :, None] * K.diagonal(dim1=-2, dim2=-1)[..., None, :]
        return self._finite(signal + noise.diagonal()[..., None, :])

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
        T, Sigma = self.event_shape[0], self.noise.matrix()
        M, K = symmetric(self.rows.dense()), symmetric(self.K)
        eye = torch.eye(T, dtype=self.dtype, device=self.device)
        signal = M[..., :, None, :, None] * K[..., None, :, None, :]
        U = signal + eye[:, None, :, None] * Sigma[..., None, :, None, :]
        return self._finite(U.reshape(self.shape))

    def _finite(self, result: Tensor) -> Tensor:
        return finite(result, **self._parts.named())

    def __repr__(self) -> str:
        (noise,) = self.noise.named()
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, T={self.event_shape[0]}, "
            f"D={self.event_shape[1]}, noise={noise}, dtype={self.dtype}, device={self.device})"
        )


def _outside_inference(make: Callable[[], _Made]) -> _Made:
    """Inference tensors could not be used for gradients later."""
    if torch.compiler.is_compiling():
        return make()
    with torch.inference_mode(False):
        return make()
