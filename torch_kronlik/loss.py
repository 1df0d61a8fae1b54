"""The Gaussian negative log likelihood as a module that owns the noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .autocast import full_precision
from .checks import check_floating, check_square
from .covariance import KroneckerPlusNoise
from .rows import RowCovariance

__all__ = ["KroneckerGaussianNLLLoss"]

_NOISES = ("diagonal", "full")
_REDUCTIONS = ("mean", "sum", "none")


class KroneckerGaussianNLLLoss(nn.Module):
    """Negative log density of vec(Y) ~ N(0, M ⊗ K + I_T ⊗ Σ), with Σ learnt.

    ``½ (log det U + vec(Y)ᵀ U⁻¹ vec(Y) + T·D·log 2π)``, U = M ⊗ K + I_T ⊗ Σ

    Args:
        num_outputs: D.
        noise: "diagonal" for Σ = Diag(exp(log_noise)), "full" for Σ = L Lᵀ.
        init_noise: the noise variances to start from, in squared units of Y: a positive number, or
            D of them. Outputs start uncorrelated.
        reduction: "mean" divides by the number of (observed) entries of Y, batch included (Y as
            broadcast with M and K); "sum" adds the batch; "none" gives (*batch).
        device, dtype: of the parameters, as in every module of ``torch.nn``.

    Parameters:
        ``log_noise`` (D,), where noise = "diagonal": logarithms of the noise variances.
        ``noise_log_diagonal`` (D,), ``noise_lower`` (D·(D−1)/2,), where noise = "full": logarithms
        of the diagonal of L, and its entries below the diagonal, row by row.

    Call with:
        Y: (*batch, T, D), residuals: the mean is subtracted.
        M: (*batch, T, T), covariance over rows, symmetric positive semidefinite; or a
            :class:`SymmetricEigen`, a constant diagonalised once, a
            :class:`LowRankRoot` or a :class:`KernelMatrix`.
        K: (*batch, D, D), covariance over outputs, symmetric positive semidefinite.
        observed: (*batch, T, D) of bool, which entries of Y are observed, as in
            :func:`kron_gaussian_nll`.
        row_scale: (*batch, T), positive: row t has the noise v_t Σ.

    Returns:
        A scalar, or (*batch) where reduction = "none", in nats.

    Raises:
        TypeError, ValueError: an argument does not fit, or is not finite; the mean of no entries.
        torch.linalg.LinAlgError: Σ or U is not positive definite.

    Cost: O(T³ + D³ + T²·D + T·D²), value and gradient from one factorisation.
    Source: Rakitsch, Lippert, Borgwardt, Stegle 2013.

    >>> loss = KroneckerGaussianNLLLoss(2, init_noise=1.0)
    >>> loss(torch.zeros(3, 2), torch.eye(3), torch.eye(2))
    tensor(1.2655, grad_fn=<DivBackward0>)
    """

    def __init__(
        self,
        num_outputs: int,
        *,
        noise: Literal["diagonal", "full"] = "diagonal",
        init_noise: float | Sequence[float] | Tensor = 0.1,
        reduction: Literal["mean", "sum", "none"] = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_choice("noise", noise, _NOISES)
        _check_choice("reduction", reduction, _REDUCTIONS)
        self.num_outputs = num_outputs
        self.noise_structure = noise
        self.reduction = reduction
        log_variance = _variances(init_noise, num_outputs).log()

        def parameter(size: int, value: Tensor) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype).copy_(value))

        if noise == "diagonal":
            self.log_noise = parameter(num_outputs, log_variance)
        else:
            below = num_outputs * (num_outputs - 1) // 2
            self.noise_log_diagonal = parameter(num_outputs, log_variance / 2)
            self.noise_lower = parameter(below, log_variance.new_zeros(()))

    @property
    def noise(self) -> Tensor:
        """The noise variances, the diagonal of Σ: (D,)."""
        if self.noise_structure == "diagonal":
            return self.log_noise.exp()
        return self.Sigma.diagonal()

    @property
    @full_precision
    def Sigma(self) -> Tensor:
        """The noise covariance Σ between outputs: (D, D)."""
        if self.noise_structure == "diagonal":
            return torch.diag_embed(self.noise)
        D = self.num_outputs
        rows, columns = torch.tril_indices(D, D, -1, device=self.noise_lower.device)
        L = torch.diag_embed(self.noise_log_diagonal.exp())
        L = L.index_put((rows, columns), self.noise_lower)
        return L @ L.mT

    @full_precision
    def forward(
        self,
        Y: Tensor,
        M: RowCovariance,
        K: Tensor,
        *,
        observed: Tensor | None = None,
        row_scale: Tensor | None = None,
        X: Tensor | None = None,
    ) -> Tensor:
        """The loss of residuals Y (*batch, T, D) at M (*batch, T, T) and K (*batch, D, D).

        Args:
            observed, row_scale: see :class:`KroneckerPlusNoise`.
            X: (*batch, T, c), covariates whose effects on every output are profiled out by
                restricted maximum likelihood, see :class:`Regression`. Y is then the data, not
                their residuals.

        Returns:
            () or, with ``reduction="none"``, (*batch,); in nats, by default per (observed) entry.

        Raises:
            TypeError, ValueError, torch.linalg.LinAlgError: as :func:`kron_gaussian_nll`.
        """
        check_floating(K=K)
        check_square("K", K, "D", self.num_outputs)
        is_diagonal = self.noise_structure == "diagonal"
        U = KroneckerPlusNoise(
            M,
            K,
            log_noise=self.log_noise if is_diagonal else None,
            Sigma=None if is_diagonal else self.Sigma,
            observed=observed,
            row_scale=row_scale,
        )
        nll = U.nll(Y) if X is None else U.regress(Y, X).nll
        if observed is None or self.reduction != "mean":
            return _reduce(nll, nll.numel() * Y.shape[-2] * Y.shape[-1], self.reduction)
        entries = observed.sum((-2, -1)).expand(nll.shape).sum()
        return _reduce(nll, entries, self.reduction)

    def extra_repr(self) -> str:
        return f"{self.num_outputs}, noise={self.noise_structure!r}, reduction={self.reduction!r}"


def _reduce(nll: Tensor, entries: int | Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return nll
    if reduction == "sum":
        return nll.sum()
    if entries == 0:
        raise ValueError('Y has no entries to take the mean over; reduction="sum" gives 0')
    return nll.sum() / entries


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _variances(init_noise: float | Sequence[float] | Tensor, num_outputs: int) -> Tensor:
    """Checked, () or (D,), in float64 so that the logarithm is rounded once."""
    if not isinstance(num_outputs, int) or num_outputs < 1:
        raise ValueError(f"num_outputs must be a positive integer, got {num_outputs!r}")
    # On the CPU whatever the default device, which may be "meta".
    variances = torch.as_tensor(init_noise, dtype=torch.float64, device="cpu")
    if variances.shape not in ((), (num_outputs,)):
        raise ValueError(
            f"init_noise must be a number or have shape (D,) with D = {num_outputs}, "
            f"got {tuple(variances.shape)}"
        )
    if not bool(((variances > 0) & variances.isfinite()).all()):
        raise ValueError(f"init_noise must be positive and finite, got {init_noise!r}")
    return variances
