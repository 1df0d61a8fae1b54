"""Expected and observed information of the likelihood in user parameters.

With E_a = (P ⊗ R)ᵀ ∂_aU (P ⊗ R) and U⁻¹ = (P ⊗ R) Diag(W) (P ⊗ R)ᵀ, the expected information is

    F_ab = ½ tr(U⁻¹ ∂_aU U⁻¹ ∂_bU) + ⟨∂_aμ, U⁻¹ ∂_bμ⟩,   ½ tr(…) = ½ Σ_uv W_u (E_a)_uv W_v (E_b)_vu,
    (E_a)_(ij),(kl) = M̂_ik λ_j δ_jl + δ_ik (s_i K̂ + Σ̂)_jl,   M̂ = Pᵀ ∂_aM P, K̂ = Rᵀ ∂_aK R, Σ̂ alike,

a weighted inner product for each pair of factors. It is the part of the log-det Hessian
without U's own curvature, written without the subtraction, which would cancel where the noise
dominates. Nothing is divided by a difference of eigenvalues.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .batch import sum_to, symmetric
from .covariance import KroneckerPlusNoise
from .distribution import KroneckerNormal
from .estimates import Information, leaves_of, rebuild
from .noise import rows_of

__all__ = ["fisher_information", "observed_information"]

Likelihood = KroneckerNormal | KroneckerPlusNoise
Model = Callable[..., Likelihood] | nn.Module
Moved = tuple[list[int], Tensor]  # which parameters move a tensor, and its derivatives in them


def fisher_information(
    model: Model, params: Any = None, *, inputs: Sequence[Any] = ()
) -> Information:
    """Expected information of the Gaussian likelihood in the parameters of a model.

    ``F_ab = ½ tr(U⁻¹ ∂_aU U⁻¹ ∂_bU) + ⟨∂_aμ, U⁻¹ ∂_bμ⟩``, the mean over data Y ~ N(μ, U) of the
    Hessian of the negative log likelihood; its inverse is the asymptotic covariance of the maximum
    likelihood estimate. Exact at repeated and zero eigenvalues; U is not formed.

    Args:
        model: a function of ``params`` (and of ``inputs``) that returns the distribution of the
            data, a :class:`KroneckerNormal`, or a :class:`KroneckerPlusNoise` for mean zero; or an
            ``nn.Module`` whose ``forward(*inputs)`` does. Batch elements are independent data sets,
            whose information adds.
        params: the point: a tensor, or a dict, tuple or list (nested at will) of tensors. None for
            a module: its parameters that require a gradient.
        inputs: further arguments of ``model``.

    Returns:
        :class:`Information`: ``matrix`` (p, p) for the p entries of ``params`` in their order,
        ``covariance``, ``standard_errors``, and ``delta_method`` for functions of the parameters.

    Raises:
        TypeError: ``params`` holds something that is no floating-point tensor, or ``model`` returns
            something else than a distribution or covariance.
        ValueError: there are no parameters, or an argument is not finite.
        torch.linalg.LinAlgError: U is not positive definite, or Sigma is indefinite.

    Cost: with p parameters, p_M of them in M: the derivatives of M, K, Σ by p reverse passes
    through ``model``, then O(p_M·T³ + p_M²·T² + p²·D² + T²·D); memory O(p_M·T² + p·D²). With
    missing entries or a noise for each row: O(p·(T·D)³) and O(p·(T·D)²).
    Source: Mardia & Marshall 1984, "Maximum likelihood estimation of models for residual
    covariance in spatial regression".

    >>> import torch_kronlik as tk
    >>> x = torch.linspace(0, 1, 40, dtype=torch.float64)
    >>> def functions(p):  # of the parameters that the optimiser sees
    ...     root, noise_root = p["root"].tril(), p["noise_root"].tril()
    ...     return {"length": p["log_length"].exp(), "K": root @ root.T,
    ...             "Sigma": noise_root @ noise_root.T}
    >>> def model(p):
    ...     f = functions(p)
    ...     M = torch.exp(-0.5 * ((x[:, None] - x) / f["length"]) ** 2)
    ...     return tk.KroneckerPlusNoise(M, f["K"], Sigma=f["Sigma"])
    >>> fit = {"log_length": torch.tensor(-1.6), "root": torch.tensor([[1.0, 0.0], [0.5, 0.8]]),
    ...        "noise_root": torch.tensor([[0.3, 0.0], [0.1, 0.6]])}
    >>> fit = {name: value.double() for name, value in fit.items()}
    >>> print(fisher_information(model, fit).delta_method(functions))
    length       0.2019 ± 0.0416
    K[0, 0]      1.0000 ± 0.6901
    K[0, 1]      0.5000 ± 0.5102
    K[1, 0]      0.5000 ± 0.5102
    K[1, 1]      0.8900 ± 0.6394
    Sigma[0, 0]  0.0900 ± 0.0223
    Sigma[0, 1]  0.0300 ± 0.0321
    Sigma[1, 0]  0.0300 ± 0.0321
    Sigma[1, 1]  0.3700 ± 0.0899
    """
    point, leaves, likelihood = _evaluate(model, params, inputs)
    U, loc = _parts(likelihood)
    U.method_used  # noqa: B018  factorises: a singular noise shows
    moved = [_tangents(X, leaves) for X in (*_factors(U), loc)]
    with torch.no_grad():
        matrix = _expected(U, likelihood.batch_shape, moved, _size(leaves))
    return _information(matrix, point, likelihood)


def observed_information(
    model: Model, params: Any = None, *, Y: Tensor, inputs: Sequence[Any] = ()
) -> Information:
    """Observed information: the Hessian of the negative log likelihood at the data Y.

    ``H_ab = ∂_a ∂_b Σ ½ (log det U + (y − μ)ᵀ U⁻¹ (y − μ))``, summed over the batch, by the closed
    form of the second derivatives; it has the curvature of ``model`` in it, and is the
    precision of the Laplace approximation at a minimum. Where the gradient is not zero it depends
    on the parametrisation.

    Args:
        model, params, inputs: see :func:`fisher_information`.
        Y: (*batch, T, D), the data; residuals where ``model`` returns a covariance.

    Returns:
        :class:`Information`, as :func:`fisher_information`.

    Raises:
        TypeError, ValueError: an argument does not fit, or is not finite.
        torch.linalg.LinAlgError: U is not positive definite, or Sigma is indefinite.

    Cost: p Hessian-vector products, each two reverse passes through ``model`` and
    O(T³ + T²·D + T·D²). Source: Efron & Hinkley 1978; Zhou & Stephens 2014.

    >>> Y = torch.tensor([[1.0], [2.0], [-1.0], [0.5]])
    >>> def model(log_noise):  # four independent rows
    ...     return KroneckerPlusNoise(torch.zeros(4, 4), torch.zeros(1, 1), log_noise=log_noise)
    >>> observed_information(model, torch.zeros(1), Y=Y).matrix  # ½ Σ y² exp(−s)
    tensor([[3.1250]])
    """
    point, leaves, likelihood = _evaluate(model, params, inputs)
    U, loc = _parts(likelihood)
    nll = U.nll(Y if loc is None else Y - loc).sum()
    gradient = _flat(_grad(nll, leaves, create_graph=True), leaves)
    rows = [_flat(_grad(g, leaves, retain_graph=True), leaves) for g in gradient]
    return _information(symmetric(torch.stack(rows)), point, likelihood)


# --- the model at the point ----------------------------------------------------------------------


def _evaluate(model: Model, params: Any, inputs: Sequence[Any]) -> tuple[Any, list[Tensor], Any]:
    """(params detached, their leaves that require a gradient, what the model returns there)."""
    if params is None:
        if not isinstance(model, nn.Module):
            raise ValueError("params must be given, unless model is an nn.Module")
        params = {name: x for name, x in model.named_parameters() if x.requires_grad}
    leaves = [x.detach().clone().requires_grad_() for _, x in leaves_of(params)]
    if _size(leaves) == 0:
        raise ValueError("params must hold at least one number, got none")
    own = rebuild(params, leaves)
    with torch.enable_grad():
        if isinstance(model, nn.Module):
            likelihood = torch.func.functional_call(model, own, tuple(inputs))
        else:
            likelihood = model(own, *inputs)
    if not isinstance(likelihood, (KroneckerNormal, KroneckerPlusNoise)):
        raise TypeError(
            "model must return a KroneckerNormal or a KroneckerPlusNoise, "
            f"got {type(likelihood).__name__}"
        )
    return rebuild(params, [x.detach() for x in leaves]), leaves, likelihood


def _parts(likelihood: Likelihood) -> tuple[KroneckerPlusNoise, Tensor | None]:
    if isinstance(likelihood, KroneckerNormal):
        return likelihood._covariance, likelihood.loc
    return likelihood, None


def _factors(U: KroneckerPlusNoise) -> tuple[Tensor, ...]:
    """M and K as matrices, and the noise's own tensor."""
    return U.rows.dense(), U.K, *U.noise


def _size(leaves: Sequence[Tensor]) -> int:
    return sum(x.numel() for x in leaves)


def _information(matrix: Tensor, params: Any, likelihood: Likelihood) -> Information:
    # The information is the Gram matrix of p vectors of one entry per datum or more.
    n = max(likelihood.event_shape.numel() * likelihood.batch_shape.numel(), len(matrix))
    return Information(matrix, params, rounding=n * torch.finfo(matrix.dtype).eps)


# --- derivatives of the model --------------------------------------------------------------------


def _grad(f: Tensor, leaves: Sequence[Tensor], **options: Any) -> Sequence[Tensor | None]:
    if not f.requires_grad:
        return [None] * len(leaves)
    return torch.autograd.grad(f, leaves, allow_unused=True, **options)


def _flat(gradients: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> Tensor:
    pairs = zip(gradients, leaves, strict=True)
    return torch.cat([(torch.zeros_like(x) if g is None else g).flatten() for g, x in pairs])


def _tangents(X: Tensor | None, leaves: Sequence[Tensor]) -> Moved | None:
    """Which parameters X depends on, and its derivatives in them: (q, *X.shape).

    v ↦ (∂X)ᵀ v is linear, and its transpose is the derivative: two reverse passes do what forward
    mode would, with operations that may have no forward mode.
    """
    if X is None or not X.requires_grad:
        return None
    v = torch.zeros_like(X, requires_grad=True)
    which: list[int] = []
    found: list[Tensor] = []
    start = 0
    for leaf, pulled in zip(
        leaves, _grad(X, leaves, grad_outputs=v, create_graph=True), strict=True
    ):
        if pulled is not None and pulled.requires_grad:
            which += range(start, start + leaf.numel())
            found += [_flat(_grad(p, [v], retain_graph=True), [v]) for p in pulled.flatten()]
        start += leaf.numel()
    return (which, torch.stack(found).reshape(len(found), *X.shape)) if found else None


# --- the expected information --------------------------------------------------------------------


def _expected(
    U: KroneckerPlusNoise, batch: torch.Size, moved: Sequence[Moved | None], size: int
) -> Tensor:
    """F, from the derivatives of (M, K, the noise's own tensor, mean)."""
    if U.is_per_row:
        return _expected_at_observed(U, batch, moved, size)
    f = U.spectral_form()
    W = f.weights().expand(*batch, *U.event_shape)
    s, lam = f.s[..., :, None], f.lam[..., None, :]
    sW, W2 = s * W, W.square()
    M, K, Sigma, mean = _in_basis(U, moved, len(batch))
    F = W.new_zeros(size, size)
    _add(F, M, M, _gram, (W * lam.square()) @ W.mT)
    _add(F, K, K, _gram, sW.mT @ sW)
    _add(F, Sigma, Sigma, _gram, W.mT @ W)
    _add(F, K, Sigma, _gram, sW.mT @ W)
    _add(F, M, K, _diagonal_gram, s * lam * W2)
    _add(F, M, Sigma, _diagonal_gram, lam * W2)
    F = 0.5 * F
    if mean is not None:
        which, d = mean
        A = U.inverse_matmul(d)
        F[_grid(which, which)] += d.flatten(1) @ A.flatten(1).mT
    return symmetric(F)


def _expected_at_observed(
    U: KroneckerPlusNoise, batch: torch.Size, moved: Sequence[Moved | None], size: int
) -> Tensor:
    """The same with U⁻¹ as a matrix, zero where nothing is observed: O(p·(T·D)³)."""
    (T, D), n = U.event_shape, U.event_shape.numel()
    M, K = symmetric(U.rows.dense()), symmetric(U.K)
    moves = torch.zeros(size, *batch, T, D, T, D, dtype=U.dtype, device=U.device)
    *factors, mean = moved
    dM, dK, noise = (X and (X[0], _padded(X[1], len(batch))) for X in factors)
    if dM is not None:
        moves[dM[0]] += symmetric(dM[1])[..., :, None, :, None] * K[..., None, :, None, :]
    if dK is not None:
        moves[dK[0]] += M[..., :, None, :, None] * symmetric(dK[1])[..., None, :, None, :]
    if noise is not None:
        blocks = symmetric(rows_of(noise[1]))
        moves.diagonal(dim1=-4, dim2=-2)[noise[0]] += blocks.movedim(-3, -1)
    turned = U.inverse_matrix() @ moves.reshape(size, *batch, n, n)
    F = 0.5 * turned.flatten(1) @ turned.mT.flatten(1).mT
    if mean is not None:
        which, d = mean
        F[_grid(which, which)] += U.seen(d).flatten(1) @ U.inverse_matmul(d).flatten(1).mT
    return symmetric(F)


def _in_basis(
    U: KroneckerPlusNoise, moved: Sequence[Moved | None], rank: int
) -> list[Moved | None]:
    """(M̂, K̂, Σ̂) and the mean's; every one with ``rank`` batch dimensions."""
    M, K, own, mean = moved
    Sigma = own and (own[0], U.noise.tangent(type(U.noise)(own[1])))
    f = U.spectral_form()
    rotated = [
        X and (X[0], B.mT @ symmetric(_padded(X[1], rank)) @ B)
        for X, B in ((M, f.P), (K, f.R), (Sigma, f.R))
    ]
    return [*rotated, mean]


def _padded(X: Tensor, rank: int) -> Tensor:
    """(q, *batch, n, n) with ones in front of ``batch``, as broadcasting aligns it."""
    return X.reshape(X.shape[0], *[1] * (rank - X.dim() + 3), *X.shape[1:])


def _add(
    F: Tensor, a: Moved | None, b: Moved | None, gram: Callable[..., Tensor], weights: Tensor
) -> None:
    """Add the block of a pair of factors, and its transpose for two different ones."""
    if a is None or b is None:
        return
    block = gram(a[1], weights, b[1])
    F[_grid(a[0], b[0])] += block
    if a is not b:
        F[_grid(b[0], a[0])] += block.mT


def _grid(rows: list[int], columns: list[int]) -> tuple[Tensor, Tensor]:
    row, column = (torch.tensor(x, device="cpu") for x in (rows, columns))  # indices for any device
    return row[:, None], column[None]


def _gram(X: Tensor, weights: Tensor, Y: Tensor) -> Tensor:
    """Σ w_jl X_a,jl Y_b,jl over all entries and the batch, for all a and b."""
    weights = sum_to(weights, X.shape[1:-2], 2)
    return (X * weights).flatten(1) @ Y.flatten(1).mT


def _diagonal_gram(X: Tensor, weights: Tensor, Y: Tensor) -> Tensor:
    """Σ w_ij X_a,ii Y_b,jj over all entries and the batch, for all a and b."""
    x, y = (Z.diagonal(dim1=-2, dim2=-1) for Z in (X, Y))
    columns = (x[..., None, :] @ weights).squeeze(-2)
    columns = columns.sum_to_size(len(x), *y.shape[1:])
    return columns.flatten(1) @ y.flatten(1).mT
