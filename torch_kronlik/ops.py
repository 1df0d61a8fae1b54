"""The native operators: loads the library and gives each operator its fake and derivative rules.

``block_diag_sum`` and ``block_diag_expand`` are linear and each other's adjoint.
``kron_diag_sums`` and ``kron_diag_scale`` are the elementwise middle of the spectral form,
W_ij = 1 / (1 + s_i λ_j); their rules are written in differentiable operations of the inputs, so
they hold at every order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .derivatives import register

__all__ = [
    "KronDiag",
    "block_diag_expand",
    "block_diag_sum",
    "kron_diag",
    "kron_diag_scale",
    "kron_diag_sums",
    "pivoted_cholesky",
    "shifted_cholesky",
    "shifted_inverses",
    "small_nll",
    "whiten_small",
]

_HERE = Path(__file__).parent
BUILD = "pip install -c constraints.txt -e ."


def _find(name: str) -> Path | None:
    return next(iter(sorted(_HERE.glob(f"{name}.*"))), None)


def _load(name: str) -> None:
    path = _find(name)
    if path is None:
        raise ImportError(
            f"the native library torch_kronlik/{name} is not built; "
            f"build it in the source folder with:  {BUILD}"
        )
    torch.ops.load_library(str(path))


def cuda_library() -> Path | None:
    """The CUDA kernels, where torch is a CUDA build and they are built."""
    return _find("_C_cuda") if torch.version.cuda else None


def _cuda_not_built(*_: object) -> None:
    raise NotImplementedError(
        "the CUDA kernels of torch_kronlik are not built: install a CUDA toolkit and build again "
        f"in the source folder with:  {BUILD}"
    )


_load("_C")
if cuda_library() is not None:
    _load("_C_cuda")

_native = torch.ops.torch_kronlik
block_diag_sum = _native.block_diag_sum.default  # (A, num_blocks) -> out
block_diag_expand = _native.block_diag_expand.default  # (S, num_blocks) -> I_p ⊗ S
kron_diag_sums = _native.kron_diag_sums.default  # (s, lam) -> logdet, row_sum, col_sum_s, col_sum_1
kron_diag_scale = _native.kron_diag_scale.default  # (s, lam, Y) -> Z, inv_quad
pivoted_cholesky = _native.pivoted_cholesky.default  # (M, max_rank) -> F, rank (-1: too high)
small_nll = _native.small_nll.default
# (Y, M, K, noise, full_noise, gradients) -> nll, gY, gM, gK, gnoise, status
HAS_LAPACK: bool = _native.has_lapack()
shifted_cholesky = _native.shifted_cholesky.default  # (M, lam) -> L, logdet, status
shifted_inverses = _native.shifted_inverses.default  # (L, M, lam) -> rows, with_M, plain
whiten_small = _native.whiten_small.default
# (K, noise, full_noise) -> lam, R, logdet_noise, status; D ≤ 16


class KronDiag(NamedTuple):
    """What :func:`kron_diag` returns; *b is the batch of (s, λ), *batch that of (s, λ, Y)."""

    Z: Tensor  # (*batch, T, D), or (0,) without Y
    logdet: Tensor  # (*b)
    inv_quad: Tensor  # (*batch), or (0,) without Y
    row_sum: Tensor  # (*b, T)
    col_sum_s: Tensor  # (*b, D)
    col_sum_1: Tensor  # (*b, D)


def kron_diag(s: Tensor, lam: Tensor, Y: Tensor | None = None) -> KronDiag:
    """The elementwise middle of the spectral form, with W_ij = 1 / (1 + s_i λ_j).

    Z = W ⊙ Y, logdet = Σ_ij log(1 + s_i λ_j), inv_quad = ⟨Y, Z⟩, row_sum = W λ,
    col_sum_s = Wᵀ s, col_sum_1 = Wᵀ 1. Sums are taken in float64 in a fixed order. Nothing is
    checked: where 1 + s_i λ_j is not positive, logdet is not finite.

    Args:
        s: (*batch, T), eigenvalues of M.
        lam: (*batch, D), eigenvalues λ of L⁻¹ K L⁻ᵀ.
        Y: (*batch, T, D), the transformed data, or None for the sums alone.

    Cost: 2·T·D divisions, one pass over Y, a few logarithms.
    """
    logdet, row_sum, col_sum_s, col_sum_1 = kron_diag_sums(s, lam)
    if Y is None:
        Z = inv_quad = s.new_empty(0)
    else:
        Z, inv_quad = kron_diag_scale(s, lam, Y)
    return KronDiag(Z, logdet, inv_quad, row_sum, col_sum_s, col_sum_1)


# --- shapes -------------------------------------------------------------------------------------


def _block_diag_sum_fake(A: Tensor, num_blocks: int) -> Tensor:
    rows, cols = A.shape[-2:]
    return A.new_empty((*A.shape[:-2], rows // num_blocks, cols // num_blocks))


def _block_diag_expand_fake(S: Tensor, num_blocks: int) -> Tensor:
    m, n = S.shape[-2:]
    return S.new_empty((*S.shape[:-2], num_blocks * m, num_blocks * n))


def _kron_diag_sums_fake(s: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b = torch.broadcast_shapes(s.shape[:-1], lam.shape[:-1])
    T, D = s.shape[-1], lam.shape[-1]
    return s.new_empty(b), s.new_empty((*b, T)), s.new_empty((*b, D)), s.new_empty((*b, D))


def _kron_diag_scale_fake(s: Tensor, lam: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    batch = torch.broadcast_shapes(s.shape[:-1], lam.shape[:-1], Y.shape[:-2])
    return Y.new_empty((*batch, *Y.shape[-2:])), Y.new_empty(batch)


def _pivoted_cholesky_fake(M: Tensor, max_rank: int) -> tuple[Tensor, Tensor]:
    batch, T = M.shape[:-2], M.shape[-1]
    return M.new_empty((*batch, max_rank, T)).mT, M.new_empty(batch, dtype=torch.int64)


def _small_nll_fake(
    Y: Tensor, M: Tensor, K: Tensor, noise: Tensor, full_noise: bool, gradients: bool
) -> tuple[Tensor, ...]:
    core = 2 if full_noise else 1
    batches = [x.shape[:-2] for x in (Y, M, K)] + [noise.shape[: noise.dim() - core]]
    batch, (T, D) = torch.broadcast_shapes(*batches), Y.shape[-2:]
    cores = [(T, D), (T, T), (D, D), (D, D) if full_noise else (D,)]
    found = [Y.new_empty((*batch, *c) if gradients else (0,)) for c in cores]
    return Y.new_empty(batch), *found, Y.new_empty(batch, dtype=torch.int64)


def _shifted_cholesky_fake(M: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, n = torch.broadcast_shapes(M.shape[:-2], lam.shape[:-1]), lam.shape[-1]
    L, logdet = M.new_empty((*batch, n, *M.shape[-2:])), M.new_empty((*batch, n))
    return L, logdet, M.new_empty((*batch, n), dtype=torch.int64)


def _shifted_inverses_fake(L: Tensor, M: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, n = torch.broadcast_shapes(M.shape[:-2], lam.shape[:-1]), lam.shape[-1]
    rows = M.new_empty((*batch, *M.shape[-2:]))
    return rows, M.new_empty((*batch, n)), M.new_empty((*batch, n))


def _whiten_small_fake(K: Tensor, noise: Tensor, full_noise: bool) -> tuple[Tensor, ...]:
    own = noise.shape[: noise.dim() - (2 if full_noise else 1)]
    batch, D = torch.broadcast_shapes(K.shape[:-2], own), K.shape[-1]
    shapes = ((*batch, D), (*batch, D, D), own)
    return *(K.new_empty(x) for x in shapes), K.new_empty(batch, dtype=torch.int64)


_FAKES: dict[Any, Callable[..., Any]] = {
    block_diag_sum: _block_diag_sum_fake,
    block_diag_expand: _block_diag_expand_fake,
    kron_diag_sums: _kron_diag_sums_fake,
    kron_diag_scale: _kron_diag_scale_fake,
    pivoted_cholesky: _pivoted_cholesky_fake,
    shifted_cholesky: _shifted_cholesky_fake,
    shifted_inverses: _shifted_inverses_fake,
    small_nll: _small_nll_fake,
    whiten_small: _whiten_small_fake,
}
_library = torch.library.Library("torch_kronlik", "IMPL")
for _op, _fake in _FAKES.items():
    torch.library.register_fake(_op, _fake)
    if cuda_library() is None:
        _library.impl(_op, _cuda_not_built, "CUDA")


# --- derivatives --------------------------------------------------------------------------------

_Rule = tuple[Tensor | None, ...]
_Maybe = Sequence[Tensor | None]


def _sum_rule(inputs: Sequence[Any], outputs: Any, grads: _Maybe, needs: Any = None) -> _Rule:
    return (None if grads[0] is None else block_diag_sum(grads[0], inputs[1]), None)


def _expand_rule(inputs: Sequence[Any], outputs: Any, grads: _Maybe, needs: Any = None) -> _Rule:
    return (None if grads[0] is None else block_diag_expand(grads[0], inputs[1]), None)


def _linear(rule: Callable[..., _Rule]) -> Callable[..., _Rule]:
    """A linear operator's jvp: the operator itself, without the slot of num_blocks."""
    return lambda inputs, outputs, tangents: rule(inputs, outputs, tangents)[:1]


def _matrix(X: Tensor, num_blocks: int) -> tuple[list[Any], list[int]]:
    return [2, None], [2]


register(block_diag_sum, vjp=_expand_rule, jvp=_linear(_sum_rule), core_dims=_matrix)
register(block_diag_expand, vjp=_sum_rule, jvp=_linear(_expand_rule), core_dims=_matrix)


def _weights(s: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s as a column, λ as a row, and W."""
    column, row = s[..., :, None], lam[..., None, :]
    return column, row, 1 / (1 + column * row)


def _sums_vjp(inputs: Sequence[Tensor], outputs: Any, grads: _Maybe, needs: Any) -> _Rule:
    """With X = s λᵀ: d log(1 + X) = W dX and dW = −W² dX."""
    s, lam, W = _weights(*inputs)
    g_logdet, g_row, g_col_s, g_col_1 = (W.new_zeros(()) if g is None else g for g in grads)
    g_row = g_row[..., :, None] if g_row.dim() else g_row
    g_col_s, g_col_1 = (g[..., None, :] if g.dim() else g for g in (g_col_s, g_col_1))
    g_W = g_row * lam + g_col_s * s + g_col_1
    g_X = W * (g_logdet[..., None, None] - W * g_W)
    g_s = (g_X * lam + W * g_col_s).sum(-1)
    g_lam = (g_X * s + W * g_row).sum(-2)
    return g_s.sum_to_size(inputs[0].shape), g_lam.sum_to_size(inputs[1].shape)


def _sums_jvp(inputs: Sequence[Tensor], outputs: Any, tangents: _Maybe) -> _Rule:
    s, lam, W = _weights(*inputs)
    d_s, d_lam = _factor_tangents(tangents, W)
    d_X = d_s * lam + s * d_lam
    d_W = -W.square() * d_X
    return (
        (W * d_X).sum((-2, -1)),
        (d_W * lam + W * d_lam).sum(-1),
        (d_W * s + W * d_s).sum(-2),
        d_W.sum(-2),
    )


def _scale_vjp(inputs: Sequence[Tensor], outputs: Any, grads: _Maybe, needs: Any) -> _Rule:
    s, lam, W = _weights(*inputs[:2])
    Y = inputs[2]
    g_Z, g_quad = (W.new_zeros(()) if g is None else g for g in grads)
    g_quad = g_quad[..., None, None]
    g_X = -W.square() * (g_Z * Y + g_quad * Y.square())
    g_Y = W * (g_Z + 2 * g_quad * Y)
    found = ((g_X * lam).sum(-1), (g_X * s).sum(-2), g_Y)
    return tuple(g.sum_to_size(x.shape) for g, x in zip(found, inputs, strict=True))


def _scale_jvp(inputs: Sequence[Tensor], outputs: Any, tangents: _Maybe) -> _Rule:
    s, lam, W = _weights(*inputs[:2])
    Y = inputs[2]
    d_s, d_lam = _factor_tangents(tangents[:2], W)
    d_Y = W.new_zeros(()) if tangents[2] is None else tangents[2]
    d_Z = W * (d_Y - W * (d_s * lam + s * d_lam) * Y)
    # y² W has the tangent y (dZ + W dy)
    return d_Z, (Y * (d_Z + W * d_Y)).sum((-2, -1))


def _factor_tangents(tangents: _Maybe, W: Tensor) -> tuple[Tensor, Tensor]:
    d_s, d_lam = tangents
    zero = W.new_zeros(())
    return (
        zero if d_s is None else d_s[..., :, None],
        zero if d_lam is None else d_lam[..., None, :],
    )


register(
    kron_diag_sums,
    vjp=_sums_vjp,
    jvp=_sums_jvp,
    core_dims=lambda s, lam: ([1, 1], [0, 1, 1, 1]),
)
register(
    kron_diag_scale,
    vjp=_scale_vjp,
    jvp=_scale_jvp,
    core_dims=lambda s, lam, Y: ([1, 1, 2], [2, 0]),
)

# Parts of a factorisation, which is a constant for differentiation.
register(pivoted_cholesky, core_dims=lambda M, max_rank: ([2, None], [2, 0]))
register(shifted_cholesky, core_dims=lambda M, lam: ([2, 1], [3, 1, 1]))
register(shifted_inverses, core_dims=lambda L, M, lam: ([3, 2, 1], [2, 1, 1]))
register(
    whiten_small,
    core_dims=lambda K, noise, full: ([2, 2 if full else 1, None], [1, 2, 0, 0]),
)


def _refused(*_: object) -> NoReturn:
    raise NotImplementedError("differentiate rules.small.small_nll, which wraps this operator")


register(
    small_nll,
    vjp=_refused,
    jvp=_refused,
    core_dims=lambda Y, M, K, noise, full, gradients: (
        [2, 2, 2, 2 if full else 1, None, None],
        [0, 2, 2, 2, 2 if full else 1, 0],
    ),
)
