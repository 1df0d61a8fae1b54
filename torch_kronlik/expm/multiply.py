"""The public functions: w = exp(Diag(d) A) v and its Jacobian in d."""

from __future__ import annotations

import torch
from torch import Tensor

from ..autocast import full_precision
from ..levels import WithoutTransforms
from .check import METHODS, check_arguments
from .jacobian import expm_jacobian
from .operators import expm_action

__all__ = ["expm_diag_jacobian", "expm_diag_multiply"]


@full_precision
def expm_diag_multiply(d: Tensor, A: Tensor, v: Tensor, *, method: str = "auto") -> Tensor:
    """The exponential of a matrix with scaled rows, applied to a vector: ``exp(Diag(d) A) v``.

    With X = Diag(d) A and a cotangent g of w = exp(X) v, the gradients are, for
    ``G = ∫₀¹ (e^(Xᵀ(1−τ)) g) (e^(Xτ) v)ᵀ dτ``,

        ∂/∂d_k = Σ_j G_kj A_kj,    ∂/∂A = Diag(d) G,    ∂/∂v = exp(X)ᵀ g.

    Differentiable to every order in all three arguments, in reverse and forward mode.

    Args:
        d: (*batch, n), the rates that scale the rows of A.
        A: (*batch, n, n), any real matrix, or (n, n) as a sparse CSR tensor, whose gradient then
            has A's sparsity (torch.compile takes no sparse tensors). X = Diag(d) A has no unit:
            rates times a time.
        v: (*batch, n), in any unit, which is also that of the result. The batch dimensions
            broadcast; a shared A is never copied.
        method: "action", scaled Taylor steps with products by A and Aᵀ only; "dense", the matrix
            exponential by scaling and squaring; "auto", the cheaper one, always "action" for a
            sparse A. Both are exact to rounding, amplified by about max(1, ‖X‖).

    Returns:
        (*batch, n).

    Raises:
        TypeError: an argument is not a float32 or float64 tensor of a dtype with the others.
        ValueError: shapes or devices do not fit, or an entry is NaN or infinite.
        OverflowError: the result exceeds the range of the dtype.

    Cost: "action" some 10·max(1, ‖X‖) products with A (‖X‖ the least of the 1- and the ∞-norm,
    X shifted by its mean eigenvalue), three times that with the gradient, whose memory is some
    20·max(1, ‖X‖) vectors; "dense" some 10 + log₂‖X‖ products of n×n matrices.

    >>> d = torch.tensor([0.5, 2.0], dtype=torch.float64)
    >>> A = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    >>> v = torch.tensor([1.0, 1.0], dtype=torch.float64)
    >>> expm_diag_multiply(d, A, v)
    tensor([1.5000, 1.0000], dtype=torch.float64)

    Sources: Al-Mohy & Higham 2011 (action), 2009 (Fréchet derivative); Higham 2005 (scaling and
    squaring).
    """
    check_arguments(d, A, v)
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if method == "dense" and A.layout == torch.sparse_csr:
        raise ValueError("method='dense' needs a dense A; call A.to_dense() first")
    entries, crow, col = _components(A)
    w: Tensor = expm_action(d.unsqueeze(-2), entries, v.unsqueeze(-2), crow, col, method)
    return w.squeeze(-2)


def _components(A: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The entries of A with their dimension of coefficients, and their places if it is sparse."""
    if A.layout == torch.strided:
        return A.unsqueeze(-3), None, None
    # torch.func can wrap the components, but not the sparse tensor that they are taken from.
    with WithoutTransforms():
        return A.values().unsqueeze(-2), A.crow_indices(), A.col_indices()


@full_precision
def expm_diag_jacobian(d: Tensor, A: Tensor, v: Tensor) -> Tensor:
    """The Jacobian in d of ``w = exp(Diag(d) A) v``: entry [i, k] is ∂w_i/∂d_k.

    ``∂w/∂d = ∫₀¹ exp(X(1−τ)) Diag(A exp(Xτ) v) dτ`` with X = Diag(d) A.

    Args:
        d: (*batch, n).
        A: (*batch, n, n), or (n, n) as a sparse CSR tensor.
        v: (*batch, n).

    Returns:
        (*batch, n, n), dense, differentiable to every order (a derivative of it costs n times as
        much as one of `expm_diag_multiply`).

    Raises:
        TypeError, ValueError, OverflowError: as `expm_diag_multiply`.

    Cost: about 20 + ‖X‖ products of n×n matrices, and the memory of some 20 of them.

    >>> d = torch.tensor([0.5, 2.0], dtype=torch.float64)
    >>> A = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    >>> v = torch.tensor([1.0, 3.0], dtype=torch.float64)
    >>> expm_diag_jacobian(d, A, v)
    tensor([[3., 0.],
            [0., 0.]], dtype=torch.float64)
    """
    check_arguments(d, A, v)
    if A.layout == torch.sparse_csr:
        with WithoutTransforms():
            A = A.to_dense()
    J: Tensor = expm_jacobian(d, A, v)
    return J
