"""What the operators on a factorised U share: their arguments, batch shapes and products with U."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..factor import CORE_DIMS, ROUTES, Cholesky, Spectral
from ..factor.batch import broadcast, outer_to, sum_to, symmetric

Maybe = Tensor | None
Shape = Sequence[int]

COVARIANCE = (
    "Tensor? M, Tensor K, Tensor? Sigma, Tensor? log_noise,"
    " Tensor f0, Tensor f1, Tensor f2, Tensor f3, Tensor f4, str route"
)


class Covariance(NamedTuple):
    """The arguments ``COVARIANCE`` of every operator, in order.

    (M, K, Sigma, log_noise) are what it is differentiated with respect to; f0 … f4 are the tensors
    of the factorisation it computes with, constants for differentiation. M is None where it is
    known by its eigenvalues and eigenvectors only.
    """

    M: Maybe
    K: Tensor
    Sigma: Maybe
    log_noise: Maybe
    f0: Tensor
    f1: Tensor
    f2: Tensor
    f3: Tensor
    f4: Tensor
    route: str

    @property
    def factor(self) -> Spectral | Cholesky:
        return ROUTES[self.route](*self[4:9])

    def spectral(self) -> Spectral:
        """The factor, where it is known to be in spectral form."""
        assert self.route == "spectral"
        return Spectral(*self[4:9])

    @property
    def shape(self) -> tuple[int, int]:
        """(T, D)"""
        return self.factor.size, self.K.shape[-1]

    @property
    def noise_batch(self) -> torch.Size:
        return noise_batch(self.Sigma, self.log_noise)

    @property
    def batch(self) -> torch.Size:
        rows = self.f0.shape[:-1] if self.M is None else self.M.shape[:-2]
        return broadcast(rows, self.K.shape[:-2], self.noise_batch)

    @property
    def core(self) -> list[Any]:
        """The trailing dimensions of each argument that are not batch."""
        return [2, 2, 2, 1, *CORE_DIMS[self.route], None]

    def named(self) -> dict[str, Maybe]:
        rows = {"M.eigenvalues": self.f0, "M.eigenvectors": self.f1} if self.M is None else {}
        own = {"M": self.M, "K": self.K, "Sigma": self.Sigma, "log_noise": self.log_noise}
        return {**rows, **own}

    def targets(self, needs: Sequence[bool]) -> list[Shape | None]:
        """The batch shape of the gradient in (M, K, Sigma, log_noise), None where not needed."""
        cores = zip(self[:4], (2, 2, 2, 1), needs, strict=True)
        return [x.shape[: x.dim() - c] if need and x is not None else None for x, c, need in cores]


def noise_batch(Sigma: Maybe, log_noise: Maybe) -> torch.Size:
    if Sigma is not None:
        return Sigma.shape[:-2]
    assert log_noise is not None
    return log_noise.shape[:-1]


def refuse_rows(*_: object) -> NoReturn:
    raise ValueError(
        "M requires a gradient, but a SymmetricEigen is a constant: pass M.detach() to "
        "symmetric_eigen, or pass M itself to the likelihood"
    )


def rows_matmul(c: Covariance, X: Tensor) -> Tensor:
    """M @ X."""
    if c.M is not None:
        return c.M @ X
    s, P = c.f0, c.f1
    return P @ (s[..., :, None] * (P.mT @ X))


def noise_matmul(c: Covariance, X: Tensor) -> Tensor:
    """X @ Sigma."""
    if c.log_noise is not None:
        return X * c.log_noise.exp()[..., None, :]
    assert c.Sigma is not None
    return X @ c.Sigma


def product_gradients(
    Z: Tensor, A: Tensor, c: Covariance, to: Sequence[Shape | None], *, symmetrise: bool = True
) -> list[Maybe]:
    """Gradients of ⟨Z, M A K + A Σ⟩ in (M, K, Sigma, log_noise), summed to batch shapes ``to``.

    They are symmetric by themselves where Z is a multiple of A.
    """
    sym = symmetric if symmetrise else torch.Tensor.contiguous
    to_M, to_K, to_Sigma, to_log = to
    gM = gK = gSigma = glog = None
    if to_M is not None:
        gM = sym(outer_to(Z @ c.K, A, to_M))
    if to_K is not None:
        gK = sym(outer_to(Z.mT, rows_matmul(c, A).mT, to_K))
    if to_Sigma is not None:
        gSigma = sym(outer_to(Z.mT, A.mT, to_Sigma))
    if to_log is not None and c.log_noise is not None:
        root = torch.exp(0.5 * c.log_noise)[..., None, :]  # exp(s) itself may overflow
        glog = sum_to(((root * Z) * (root * A)).sum(-2), to_log, 1)
    return [gM, gK, gSigma, glog]


def product_tangent(A: Tensor, c: Covariance, V: Sequence[Maybe]) -> Maybe:
    """dU·A = dM A K + M A dK + A dΣ for V = (dM, dK, dΣ, d log_noise); None where nothing moves.

    Functions of symmetric matrices move along the symmetric part of a direction.
    """
    dM, dK, dSigma, dlog = V
    terms = []
    if dM is not None:
        terms.append(symmetric(dM) @ A @ c.K)
    if dK is not None:
        terms.append(rows_matmul(c, A @ symmetric(dK)))
    if dSigma is not None:
        terms.append(A @ symmetric(dSigma))
    if dlog is not None and c.log_noise is not None:
        terms.append(A * (c.log_noise.exp() * dlog)[..., None, :])
    return sum(terms[1:], terms[0]) if terms else None


def minus(a: Maybe, b: Maybe) -> Maybe:
    """a − b, with None for zero."""
    if b is None:
        return a
    return -b if a is None else a - b


def plus(a: Maybe, b: Maybe) -> Maybe:
    """a + b, with None for zero."""
    if a is None or b is None:
        return b if a is None else a
    return a + b
