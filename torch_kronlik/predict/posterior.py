"""The posterior at new rows, from the factorisation that the likelihood made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..autocast import full_precision
from ..batch import expand_to, symmetric
from ..checks import check_broadcast, check_sample_shape, check_uniform
from ..guards import finite
from ..waist import Waist
from .joint import JointPrior

__all__ = ["KroneckerPosterior"]


class KroneckerPosterior:
    """The Gaussian posterior of S new rows, given data Y with covariance U = M ⊗ K + I_T ⊗ Σ.

    With A = U⁻¹·Y, and f the latent function (the observations without their noise):

        mean               M_* A K
        covariance of f    M_** ⊗ K − (M_* ⊗ K) U⁻¹ (M_*ᵀ ⊗ K)
        observations add   I_S ⊗ Σ

    Every attribute is computed when it is asked for, differentiably in Y, M, K, M_cross, M_test and
    the noise, from the one factorisation that ``U`` keeps: an object whose likelihood was evaluated
    is not factorised again.

    Args:
        U: the covariance of the data.
        Y: (*batch, T, D), the data, less their mean.
        M_cross: M_*, (*batch, S, T), covariance of the new rows with the rows of the data.
        M_test: M_**, (*batch, S, S), covariance of the new rows, or its diagonal alone,
            (*batch, S). It is read as the full matrix if its last two sizes are S and S, so a batch
            of S diagonals is given as full matrices. ``covariance_matrix``, ``rsample`` and
            ``log_prob`` need the full matrix.

    Raises:
        TypeError, ValueError: an argument does not fit, or is not finite.
        torch.linalg.LinAlgError: U is not positive definite, or Sigma is indefinite.

    New observations have the noise Σ of all rows, with ``row_scale`` too. With ``row_Sigma`` or
    ``row_log_noise`` their noise is not known: ``observation_variance``, ``log_prob`` and draws of
    observations raise ValueError.

    Accuracy: variances are what the data leave of the prior variance, computed as this difference
    and not clamped: their error is of the order of eps·M_**[t,t]·K[d,d], however small the result.
    No other formula does better from these arguments, whose own rounding moves the result by as
    much. Where the noise is below eps times the prior variance, a variance can come out negative.

    Derivatives: first and second in every mode of PyTorch; of samples, first.
    Cost: after the factorisation O(T²·D + T·S·D) for the mean, O(T²·S + T·S·D + S·D³) for the
    variances; memory O(T² + S·T + S·D²).

    >>> import torch_kronlik as tk
    >>> U = tk.KroneckerPlusNoise(torch.eye(2), torch.eye(1), log_noise=torch.zeros(1))
    >>> posterior = KroneckerPosterior(U, torch.ones(2, 1), torch.eye(1, 2), torch.ones(1))
    >>> posterior.mean, posterior.variance
    (tensor([[0.5000]]), tensor([[0.5000]]))
    """

    @full_precision
    def __init__(self, U: Waist, Y: Tensor, M_cross: Tensor, M_test: Tensor) -> None:
        self.U, self.Y, self.M_cross, self.M_test = U, Y, M_cross, M_test
        batch = U.check_data("Y", Y)
        check_uniform(K=U.K, M_cross=M_cross, M_test=M_test)
        T, D = U.event_shape
        if M_cross.dim() < 2 or M_cross.shape[-1] != T:
            raise ValueError(
                f"M_cross must have shape (*batch, S, T) with T = {T} (from M), "
                f"got {tuple(M_cross.shape)}"
            )
        S = M_cross.shape[-2]
        self.event_shape = torch.Size((S, D))
        self._full = M_test.shape[-2:] == (S, S)
        if M_test.dim() < 1 or M_test.shape[-1] != S:
            raise ValueError(
                "M_test must have shape (*batch, S, S), or (*batch, S) for its diagonal, with "
                f"S = {S} (from M_cross), got {tuple(M_test.shape)}"
            )
        self._joint_prior: JointPrior | None = None
        test_batch = M_test.shape[: M_test.dim() - (2 if self._full else 1)]
        self.batch_shape = check_broadcast(
            **{"Y and U": batch, "M_cross": M_cross.shape[:-2], "M_test": test_batch}
        )

    @property
    @full_precision
    def mean(self) -> Tensor:
        """M_* A K, the mean of f and of the observations: (*batch, S, D)."""
        return self._expand(finite(self._krige(self.Y), M_cross=self.M_cross), 2)

    @property
    @full_precision
    def variance(self) -> Tensor:
        """The variances of f: (*batch, S, D)."""
        return self.row_covariance.diagonal(dim1=-2, dim2=-1)

    @property
    @full_precision
    def observation_variance(self) -> Tensor:
        """The variances of new observations, noise included: (*batch, S, D)."""
        variance: Tensor = self.variance + self._new_noise().diagonal()
        return variance

    @property
    @full_precision
    def row_covariance(self) -> Tensor:
        """The covariance of f between the outputs in each row: (*batch, S, D, D).

        ``M_**[t,t] K − K (M_*t ⊗ I) U⁻¹ (M_*tᵀ ⊗ I) K``
        """
        K = symmetric(self.U.K)[..., None, :, :]
        prior = self.M_test.diagonal(dim1=-2, dim2=-1) if self._full else self.M_test
        out = prior[..., None, None] * K - self.U.explained(self.M_cross)
        return self._expand(finite(out, M_cross=self.M_cross, M_test=self.M_test), 3)

    @property
    @full_precision
    def covariance_matrix(self) -> Tensor:
        """The covariance of f between all S·D entries, row by row: (*batch, S·D, S·D).

        Cost: O(T²·S + S²·T·D + S²·D³), with derivatives O(T²·S·D + S²·T·D³) and memory for S·T·D²
        numbers more.
        """
        M_test, K = symmetric(self._full_test("covariance_matrix")), symmetric(self.U.K)
        prior = M_test[..., :, None, :, None] * K[..., None, :, None, :]
        out = prior - self.U.explained_pairs(self.M_cross)
        out = finite(out, M_cross=self.M_cross, M_test=M_test)
        n = self.event_shape.numel()
        return self._expand(out.reshape(*out.shape[:-4], n, n), 2)

    @full_precision
    def log_prob(self, Y_test: Tensor) -> Tensor:
        """The joint log density of new observations Y_test, noise included: (*batch).

        The smaller of two exact computations: the Cholesky factor of their S·D × S·D covariance if
        S·D ≤ T, else log p(Y, Y_test) − log p(Y), with one more factorisation, of [M, M_*ᵀ; M_*,
        M_**]. Cost: O(T²·S·D) or O((T + S)³). Derivatives: first and second.
        """
        self._full_test("log_prob")
        check_uniform(K=self.U.K, Y_test=Y_test)
        if Y_test.dim() < 2 or Y_test.shape[-2:] != self.event_shape:
            raise ValueError(
                f"Y_test must have shape (*batch, S, D) with (S, D) = {tuple(self.event_shape)}, "
                f"got {tuple(Y_test.shape)}"
            )
        check_broadcast(Y_test=Y_test.shape[:-2], posterior=self.batch_shape)
        Y_test = finite(Y_test, Y_test=Y_test)
        self.U.method_used  # noqa: B018  factorises: a singular noise shows
        if self.U.is_per_row or self.event_shape.numel() <= self.U.event_shape[0]:
            return self._log_prob_dense(Y_test)
        return self._log_prob_joint(Y_test)

    @full_precision
    def rsample(
        self,
        sample_shape: Sequence[int] = (),
        generator: torch.Generator | None = None,
        *,
        observation_noise: bool = False,
    ) -> Tensor:
        """Draws of f at the new rows: (*sample_shape, *batch, S, D), reparameterised.

        A draw (f, f_*) from the prior of all T + S rows is moved onto the data (Matheron's rule),
        with standard normal ε: ``f_* + M_* U⁻¹·(Y − f − ε Lᵀ) K``, Σ = L Lᵀ.

        Its derivative, of first order, is taken through the symmetric roots of [M, M_*ᵀ; M_*, M_**]
        and K. Where these are singular, it is the one along the directions that keep their rank.

        Args:
            sample_shape: leading dimensions of the draws.
            generator: the source of randomness.
            observation_noise: draw new observations, noise included. Their derivative is smooth
                whether or not M and K are singular.

        Cost: O((T + S)³) for the first draw, then O((T + S)²·D + (T + S)·D²) for each.
        Source: Wilson et al. 2020.
        """
        check_sample_shape(sample_shape)
        joint, (T, D) = self._joint("rsample"), self.U.event_shape
        white = self._normal(
            (*sample_shape, *self.batch_shape, T + self.event_shape[0], D), generator
        )
        if observation_noise and not self.U.is_per_row:
            data, new = _split(joint.observations(white), T)
        else:
            data, new = _split(joint.latent(white), T)
            data = data + self.U.noise_draw(self._normal(data.shape, generator))
            if observation_noise:
                new = new + self._new_noise().root_matmul(self._normal(new.shape, generator))
        return self.mean + new - self._krige(data)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch_shape={tuple(self.batch_shape)}, "
            f"event_shape={tuple(self.event_shape)}, M_test={'full' if self._full else 'diagonal'})"
        )

    # --- the parts -------------------------------------------------------------------------------

    def _krige(self, Y: Tensor) -> Tensor:
        """M_* U⁻¹·Y K."""
        mean: Tensor = self.M_cross @ self.U.inverse_matmul(Y) @ symmetric(self.U.K)
        return mean

    def _new_noise(self) -> Any:
        """Σ of the new rows: the one of all rows."""
        if self.U.new_noise is None:
            raise ValueError(
                "the noise of new rows is not known: row_Sigma and row_log_noise are of the rows "
                "of the data; add the noise of the new rows to variance or covariance_matrix"
            )
        return self.U.new_noise

    def _expand(self, x: Tensor, core: int) -> Tensor:
        return expand_to(x, self.batch_shape, core)

    def _full_test(self, what: str) -> Tensor:
        if not self._full:
            raise ValueError(
                f"{what} needs the full M_test, (*batch, S, S) with S = {self.event_shape[0]}, "
                f"but only its diagonal was given, {tuple(self.M_test.shape)}"
            )
        return self.M_test

    def _joint(self, what: str) -> JointPrior:
        M_test = self._full_test(what)
        if self._joint_prior is None:
            self._joint_prior = JointPrior(self.U, self.M_cross, M_test)
        return self._joint_prior

    def _normal(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        U = self.U
        return torch.randn(shape, generator=generator, dtype=U.dtype, device=U.device)

    def _log_prob_dense(self, Y_test: Tensor) -> Tensor:
        S, D = self.event_shape
        eye = torch.eye(S, dtype=Y_test.dtype, device=Y_test.device)
        noise = eye[:, None, :, None] * self._new_noise().matrix()[..., None, :, None, :]
        covariance = self.covariance_matrix + noise.reshape(*noise.shape[:-4], S * D, S * D)
        G = torch.linalg.cholesky(symmetric(covariance))
        residual = (Y_test - self.mean).flatten(-2)[..., None]
        white = torch.linalg.solve_triangular(G, residual, upper=False)
        logdet = 2 * G.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        density: Tensor = white.square().sum((-2, -1)) + logdet + S * D * math.log(2 * math.pi)
        return -0.5 * density

    def _log_prob_joint(self, Y_test: Tensor) -> Tensor:
        joint = self._joint("log_prob").covariance
        batch = torch.broadcast_shapes(self.Y.shape[:-2], Y_test.shape[:-2])
        both = [Y.expand(*batch, *Y.shape[-2:]) for Y in (self.Y, Y_test)]
        out = self.U.gaussian_nll(self.Y) - joint.gaussian_nll(torch.cat(both, -2))
        density: Tensor = out.expand(torch.broadcast_shapes(self.batch_shape, batch))
        return density


def _split(X: Tensor, T: int) -> tuple[Tensor, Tensor]:
    return X[..., :T, :], X[..., T:, :]
