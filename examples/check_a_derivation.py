"""Which derivation is right? Gradient formulas put to the check, and the verdict on each.

The question is the derivative of a Gaussian log likelihood in the noise covariance Σ (D×D), where
the covariance of T·D numbers is U = M ⊗ K + I_T ⊗ Σ. For φ = log det U − yᵀU⁻¹y, three answers:

1. "vec(Γ)ᵀ = vec(U⁻¹)ᵀ (vec(I_T) ⊗ I_{D²})" for ∂ log det U/∂Σ;
2. "WᵀW" for ∂(−yᵀU⁻¹y)/∂Σ, W the D×T matrix whose columns are the blocks of U⁻¹y;
3. the sums of diagonal blocks Σ_t [U⁻¹]_tt and Σ_t [U⁻¹y yᵀU⁻¹]_tt.

vec stacks columns. Everything is evaluated on random matrices; nothing is assumed. Run it:

    python examples/check_a_derivation.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_kronlik.matcalc import (
    GradientReport,
    Random,
    check_gradient,
    kron,
    kron_identity_matrix,
    partial_trace,
    unvec,
    vec,
)


def covariance(Sigma: Tensor, M: Tensor, K: Tensor) -> Tensor:
    """U, (T·D, T·D)"""
    return kron(M, K) + kron(identity(len(M)), Sigma)


def identity(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


# ---------------------------------------------------------------- the functions


def logdet(Sigma: Tensor, M: Tensor, K: Tensor, y: Tensor) -> Tensor:
    return torch.logdet(covariance(Sigma, M, K))


def minus_quad(Sigma: Tensor, M: Tensor, K: Tensor, y: Tensor) -> Tensor:
    return -y @ torch.linalg.solve(covariance(Sigma, M, K), y)


# ---------------------------------------------------------------- the claims


def logdet_by_vec_of_identity(Sigma: Tensor, M: Tensor, K: Tensor, y: Tensor) -> Tensor:
    """vec(U⁻¹)ᵀ (vec(I_T) ⊗ I_{D²}), a row vector that should be vec(Γ)ᵀ"""
    return vec(covariance(Sigma, M, K).inverse())[None] @ tempting_matrix(len(M), len(K))


def tempting_matrix(T: int, D: int) -> Tensor:
    """vec(I_T) ⊗ I_{D²}, which would be right if vec(I_T ⊗ Σ) were vec(I_T) ⊗ vec(Σ)"""
    return kron(vec(identity(T))[:, None], identity(D * D))


def logdet_by_selection(Sigma: Tensor, M: Tensor, K: Tensor, y: Tensor) -> Tensor:
    """The same with N, for which vec(I_T ⊗ Σ) = N vec(Σ)"""
    return (
        vec(covariance(Sigma, M, K).inverse())[None] @ kron_identity_matrix(len(M), len(K)).double()
    )


def logdet_by_blocks(Sigma: Tensor, M: Tensor, K: Tensor, y: Tensor) -> Tensor:
    """Σ_t [U⁻¹]_tt"""
    return partial_trace(covariance(Sigma, M, K).inverse(), len(M))


def solved(Sigma: Tensor, M: Tensor, K: Tensor, y: Tensor) -> Tensor:
    """W, (D, T): column t is block t of U⁻¹y"""
    return unvec(torch.linalg.solve(covariance(Sigma, M, K), y), len(K))


def quad_by_inner_product(*inputs: Tensor) -> Tensor:
    W = solved(*inputs)
    return W.T @ W


def quad_by_outer_product(*inputs: Tensor) -> Tensor:
    W = solved(*inputs)
    return W @ W.T


def quad_by_blocks(Sigma: Tensor, M: Tensor, K: Tensor, y: Tensor) -> Tensor:
    """Σ_t [U⁻¹y yᵀU⁻¹]_tt"""
    Uy = torch.linalg.solve(covariance(Sigma, M, K), y)
    return partial_trace(torch.outer(Uy, Uy), len(M))


def blocks_of_identity(Sigma: Tensor, M: Tensor) -> Tensor:
    """I_T ⊗ Σ"""
    return kron(identity(len(M)), Sigma)


# ---------------------------------------------------------------- the verdicts


def judge(
    title: str, f: Callable[..., Tensor], claim: Callable[..., Tensor], **inputs: Random
) -> bool:
    report: GradientReport = check_gradient(f, claim, inputs)
    print(f"{title}\n{indent(str(report))}\n")
    return report.ok


def indent(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


def judge_likelihood(T: int, D: int) -> list[bool]:
    inputs = {
        "Sigma": Random((D, D), "positive_definite"),
        "M": Random((T, T), "positive_definite"),
        "K": Random((D, D), "positive_definite"),
        "y": Random((T * D,)),
    }
    claims = [
        ("log det U, vec(U⁻¹)ᵀ (vec(I_T) ⊗ I_{D²})", logdet, logdet_by_vec_of_identity),
        ("log det U, vec(U⁻¹)ᵀ N", logdet, logdet_by_selection),
        ("log det U, sum of the diagonal blocks of U⁻¹", logdet, logdet_by_blocks),
        ("−yᵀU⁻¹y, WᵀW", minus_quad, quad_by_inner_product),
        ("−yᵀU⁻¹y, W Wᵀ", minus_quad, quad_by_outer_product),
        ("−yᵀU⁻¹y, sum of the diagonal blocks of U⁻¹y yᵀU⁻¹", minus_quad, quad_by_blocks),
    ]
    return [judge(title, f, claim, **inputs) for title, f, claim in claims]


def judge_vec(T: int, D: int) -> list[bool]:
    inputs = {"Sigma": Random((D, D)), "M": Random((T, T))}
    claims = [
        ("vec(I_T ⊗ Σ) = (vec(I_T) ⊗ I_{D²}) vec(Σ)", tempting_matrix),
        ("vec(I_T ⊗ Σ) = N vec(Σ)", lambda T, D: kron_identity_matrix(T, D).double()),
    ]
    return [
        judge(title, blocks_of_identity, lambda Sigma, M, N=N: N(T, D), **inputs)
        for title, N in claims
    ]


def counterexample() -> None:
    """T = 2, D = 2: small enough to see."""
    Sigma = torch.tensor([[1.0, 3.0], [2.0, 4.0]], dtype=torch.float64)
    true = vec(kron(identity(2), Sigma))
    rows = {
        "vec(I ⊗ Σ)": true,
        "(vec(I) ⊗ I) vec(Σ)": tempting_matrix(2, 2) @ vec(Sigma),
        "N vec(Σ)": kron_identity_matrix(2, 2).double() @ vec(Sigma),
    }
    print("For T = 2 and Σ with vec(Σ) = (1, 2, 3, 4):")
    for name, x in rows.items():
        shown = " ".join(f"{int(v)}" for v in x)
        print(f"    {name:<20} = {shown}   {'right' if torch.equal(x, true) else 'WRONG'}")
    print()


CONCLUSION = """\
Verdict
  log det U:  vec(I_T) ⊗ I_{D²} puts the entries of Σ one after the other, T times, and not where
              the diagonal blocks of I_T ⊗ Σ are: its rows are those of N in another order. What
              it reads of vec(U⁻¹) are T runs of D² entries, not the diagonal blocks of U⁻¹.
              Right: vec(Γ)ᵀ = vec(U⁻¹)ᵀ N, that is Γ = Σ_t [U⁻¹]_tt.
  −yᵀU⁻¹y:    WᵀW is T×T and cannot be a gradient in Σ. Right: W Wᵀ = Σ_t [U⁻¹y yᵀU⁻¹]_tt, for W
              of size D×T. (For W of size T×D, rows being the blocks of U⁻¹y, it is WᵀW.)
  The sums of diagonal blocks are right, for any symmetric positive definite Σ."""


def main(arguments: Sequence[str] | None = None) -> list[bool]:
    parser = argparse.ArgumentParser(description="Gradient formulas put to the check")
    parser.add_argument("--rows", type=int, default=4, help="T")
    parser.add_argument("--outputs", type=int, default=3, help="D")
    options = parser.parse_args(arguments)
    if min(options.rows, options.outputs) < 2:
        parser.error("with one row or one output all these formulas agree")
    print(f"T = {options.rows}, D = {options.outputs}\n")
    verdicts = judge_likelihood(options.rows, options.outputs)
    verdicts += judge_vec(options.rows, options.outputs)
    counterexample()
    print(CONCLUSION)
    return verdicts


if __name__ == "__main__":
    main()
