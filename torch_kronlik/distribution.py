"""The matrix-valued normal distribution with covariance U = M ⊗ K + I_T ⊗ Σ."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints, register_kl
from torch.types import _size

from .autocast import full_precision
from .batch import expand_to
from .checks import check_broadcast, check_data, check_uniform
from .covariance import KroneckerPlusNoise
from .errors import raise_if_not_finite
from .records import expand_record
from .rows import RowCovariance, as_rows

__all__ = ["KroneckerNormal"]

_Result = TypeVar("_Result")


class KroneckerNormal(Distribution):
    """Normal distribution of a T×D matrix with rows and columns correlated: M ⊗ K + I_T ⊗ Σ.

    ``vec(Y) ~ N(vec(loc), U)``, U = M ⊗ K + I_T ⊗ Σ, vec(Y) = Y.reshape(T·D): the distribution of
    ``MultivariateNormal(loc.reshape(T·D), U)`` with event shape (T, D), and U never formed. It is
    factorised once for all operations, and ``expand`` keeps the factorisation. (Where that is by
    Cholesky factors of shifted matrices, the first ``rsample`` diagonalises M, also once.)

    Args:
        loc: (*batch, T, D), the mean.
        M: (*batch, T, T), covariance over rows, symmetric positive semidefinite; or a
            :class:`SymmetricEigen`, a constant diagonalised once, a
            :class:`LowRankRoot` or a :class:`KernelMatrix`.
        K: (*batch, D, D), covariance over outputs, symmetric positive semidefinite.
        Sigma: (*batch, D, D), noise covariance, symmetric positive semidefinite; or
        log_noise: (*batch, D), logarithms s of the noise variances, Σ = Diag(exp(s)).
        validate_args: as in ``torch.distributions``. Where true, the default, the arguments' values
            are looked at now: U is factorised here instead of at first use. Shapes, dtypes and
            devices are checked always.

    Raises:
        TypeError, ValueError: an argument does not fit, or is not finite.
        torch.linalg.LinAlgError: U is not positive definite, or Sigma is indefinite.

    Derivatives: of ``log_prob``, ``entropy`` and ``kl_divergence`` first and second, of ``rsample``
    first; a higher one raises NotImplementedError.
    Cost: O(T³ + D³) for the factorisation, then O(T²·D + T·D²) a density or draw and O(T·D) an
    entropy. Source: Rakitsch, Lippert, Borgwardt, Stegle 2013.

    >>> d = KroneckerNormal(torch.zeros(3, 2), torch.eye(3), torch.eye(2), log_noise=torch.zeros(2))
    >>> d.event_shape, d.sample((5,)).shape
    (torch.Size([3, 2]), torch.Size([5, 3, 2]))
    >>> d.log_prob(torch.zeros(3, 2))
    tensor(-7.5931)
    """

    # M and K are checked by factorising U: torch's own check of a semidefinite matrix refuses zero
    # eigenvalues that rounding has made negative.
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "loc": constraints.independent(constraints.real, 2),
        "M": constraints.positive_semidefinite,
        "K": constraints.positive_semidefinite,
        "Sigma": constraints.positive_definite,
        "log_noise": constraints.real_vector,
    }
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    @full_precision
    def __init__(
        self,
        loc: Tensor,
        M: RowCovariance,
        K: Tensor,
        *,
        Sigma: Tensor | None = None,
        log_noise: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        U = KroneckerPlusNoise(M, K, Sigma=Sigma, log_noise=log_noise)
        check_uniform(K=K, loc=loc)
        check_data("loc", loc, _pair(U.event_shape))
        batch_shape = check_broadcast(loc=loc.shape[:-2], covariance=U.batch_shape)
        self._covariance = U
        self.loc = loc.expand(batch_shape + U.event_shape)
        super().__init__(batch_shape, U.event_shape, validate_args=False)
        self._validate_args = type(self)._validate_args if validate_args is None else validate_args
        if self._validate_args:
            raise_if_not_finite(loc=loc)
            with torch.no_grad():
                U.logdet()

    def expand(
        self, batch_shape: _size, _instance: KroneckerNormal | None = None
    ) -> KroneckerNormal:
        """The same distribution with a larger batch shape, over the same factorisation."""
        new: KroneckerNormal = self._get_checked_instance(  # type: ignore[no-untyped-call]
            KroneckerNormal, _instance
        )
        batch_shape = torch.Size(batch_shape)
        new.loc = self.loc.expand(batch_shape + self.event_shape)
        new._covariance = self._covariance
        super(KroneckerNormal, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    # --- parameters -------------------------------------------------------------------------------

    @property
    def M(self) -> RowCovariance:
        """(*batch, T, T), or the row covariance that was given; a KernelMatrix at its own batch."""
        M = self._covariance.M
        if isinstance(M, tuple):
            wide: RowCovariance = expand_record(M, self.batch_shape)
            return wide
        return self._expanded(M, 2) if isinstance(M, Tensor) else M

    @property
    def K(self) -> Tensor:
        """(*batch, D, D)"""
        return self._expanded(self._covariance.K, 2)

    @property
    def Sigma(self) -> Tensor:
        """(*batch, D, D), Diag(exp(log_noise)) where that was given."""
        return self._expanded(self._covariance.new_noise.matrix(), 2)

    @property
    def log_noise(self) -> Tensor | None:
        """(*batch, D), or None where Sigma was given."""
        s = self._covariance.log_noise
        return None if s is None else self._expanded(s, 1)

    def _expanded(self, X: Tensor, core: int) -> Tensor:
        return expand_to(X, self.batch_shape, core)

    # --- moments ----------------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """(*batch, T, D)"""
        return self.loc

    @property
    def mode(self) -> Tensor:
        """(*batch, T, D)"""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """The variance of each entry: (*batch, T, D). Cost: O(T·D), without a factorisation."""
        return self._expanded(self._covariance.diagonal(), 2)

    @property
    def covariance_matrix(self) -> Tensor:
        """U itself, (*batch, T·D, T·D), rows stacked: for small problems and for checking."""
        return self._expanded(self._covariance.to_dense(), 2)

    # --- density and draws ------------------------------------------------------------------------

    @full_precision
    def log_prob(self, value: Tensor) -> Tensor:
        """log N(vec(value); vec(loc), U) in nats, for value (*sample, *batch, T, D):
        (*sample, *batch)."""
        check_uniform(loc=self.loc, value=value)
        check_data("value", value, _pair(self.event_shape))
        check_broadcast(value=value.shape[:-2], batch_shape=self.batch_shape)
        return -_diagnosed(
            lambda: self._covariance.nll(value - self.loc), value=value, loc=self.loc
        )

    @full_precision
    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """Draws (*sample_shape, *batch, T, D), reparameterised: see
        :meth:`KroneckerPlusNoise.sample`."""
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self._covariance.root_matmul(noise)

    @full_precision
    def entropy(self) -> Tensor:
        """½ (log det U + T·D·(1 + log 2π)), in nats: (*batch)."""
        n = self.event_shape.numel()
        H = 0.5 * (self._covariance.logdet() + n * (1 + math.log(2 * math.pi)))
        return H.expand(self.batch_shape)

    def __repr__(self) -> str:
        names = ("loc", "M", "K", *self._covariance.new_noise.named())
        parts = ((name, getattr(self, name)) for name in names)
        return f"{type(self).__name__}({', '.join(f'{n}: {_size_of(x)}' for n, x in parts)})"


@register_kl(KroneckerNormal, KroneckerNormal)  # type: ignore[untyped-decorator]
@full_precision
def _kl_kronecker_normal(p: KroneckerNormal, q: KroneckerNormal) -> Tensor:
    """½ [tr(U_q⁻¹ U_p) + (μ_q − μ_p)ᵀ U_q⁻¹ (μ_q − μ_p) − T·D + log det U_q − log det U_p].

    tr(U_q⁻¹ (I ⊗ Σ_p)) = ⟨B_q, Σ_p⟩ with B_q the sum of the diagonal blocks of U_q⁻¹.
    """
    if p.event_shape != q.event_shape:
        raise ValueError(
            "the event shapes must agree for a KL divergence, "
            f"got p {tuple(p.event_shape)} and q {tuple(q.event_shape)}"
        )
    check_uniform(p=p.loc, q=q.loc)
    check_broadcast(p=p.batch_shape, q=q.batch_shape)
    U_p, U_q = p._covariance, q._covariance
    signal = U_q.inverse_trace(U_p.rows.dense(), U_p.K)
    noise = (U_q.inverse_block_diag_sum() * U_p.new_noise.matrix()).sum((-2, -1))
    inv_quad, logdet = _diagnosed(
        lambda: U_q.inv_quad_logdet(q.loc - p.loc), **{"p.loc": p.loc, "q.loc": q.loc}
    )
    divergence: Tensor = 0.5 * (
        signal + noise - p.event_shape.numel() + inv_quad + logdet - U_p.logdet()
    )
    return divergence


def _diagnosed(result: Callable[[], _Result], **arguments: Tensor) -> _Result:
    """A failure for want of finite values is of these arguments, not of their difference."""
    try:
        return result()
    except ValueError:
        raise_if_not_finite(**arguments)
        raise


def _pair(shape: torch.Size) -> tuple[int, int]:
    return shape[0], shape[1]


def _size_of(X: RowCovariance) -> torch.Size:
    if isinstance(X, Tensor):
        return X.size()
    rows = as_rows(X)
    return torch.Size((*rows.batch, rows.size, rows.size))
