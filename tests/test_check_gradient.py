"""A right formula passes, and each usual slip in a wrong one is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torch_kronlik.matcalc import Random, check_gradient, commutation_matrix, vec

T, D = 4, 3
SPD = Random((D, D), "positive_definite")
Formula = Callable[..., Tensor]


def quad(X: Tensor, Y: Tensor) -> Tensor:
    """tr(Yᵀ X⁻¹ Y), gradient −X⁻¹ Y Yᵀ X⁻¹ in X."""
    return (Y * torch.linalg.solve(X, Y)).sum()


def quad_gradient(X: Tensor, Y: Tensor) -> Tensor:
    W = torch.linalg.solve(X, Y)
    return -W @ W.T


INPUTS = {"X": SPD, "Y": (D, D)}


@pytest.mark.parametrize(
    ("f", "claim", "inputs"),
    [
        (torch.logdet, torch.linalg.inv, {"X": SPD}),
        (lambda X: torch.linalg.slogdet(X)[1], lambda X: torch.linalg.inv(X).T, {"X": (D, D)}),
        (quad, quad_gradient, INPUTS),
        (lambda X, A: (A * X).sum(), lambda X, A: A, {"X": (T, D), "A": (T, D)}),
        (lambda x: (x * x).sum(), lambda x: 2 * x, {"x": (D,)}),
        (lambda s: s.exp(), lambda s: s.exp(), {"s": ()}),
        (lambda s: s.log().sum(), lambda s: 1 / s, {"s": Random((D,), "positive")}),
    ],
)
def test_right_formulas_pass(f: Formula, claim: Formula, inputs: dict[str, Random]) -> None:
    report = check_gradient(f, claim, inputs)
    assert report.ok
    assert "right" in str(report)
    (verdict,) = report.inputs.values()
    assert verdict.error < 1e-10
    assert verdict.finite_difference_error < 1e-8
    assert verdict.diagnosis is None


def test_a_vec_in_any_shape_is_accepted() -> None:
    inputs = {"X": Random((T, D)), "A": Random((T, D))}
    for reshape in (lambda g: g, lambda g: g[None], lambda g: g[:, None]):
        report = check_gradient(
            lambda X, A: (A * X * X).sum(), lambda X, A, r=reshape: r(vec(2 * A * X)), inputs
        )
        assert report.ok


WRONG: dict[str, tuple[Formula, Formula, dict[str, object], str]] = {
    "factor_half": (quad, lambda X, Y: -2 * quad_gradient(X, Y), INPUTS, "multiply by -1/2"),
    "factor_two": (torch.logdet, lambda X: torch.linalg.inv(X) / 2, {"X": SPD}, "multiply by 2"),
    "sign": (torch.logdet, lambda X: -torch.linalg.inv(X), {"X": SPD}, "multiply by -1"),
    "irrational": (torch.logdet, lambda X: 2**0.5 * X.inverse(), {"X": SPD}, "by 0.707107"),
    "transpose": (
        lambda X: torch.linalg.slogdet(X)[1],
        torch.linalg.inv,
        {"X": (D, D)},
        "transpose the claim",
    ),
    "transposed_shape": (
        lambda X, A: (A * X).sum(),
        lambda X, A: A.T,
        {"X": (T, D), "A": (T, D)},
        "shape (3, 4), not (4, 3); transpose the claim",
    ),
    "transpose_and_factor": (
        lambda X, A: (A * X).sum(),
        lambda X, A: 2 * A.T,
        {"X": (D, D), "A": (D, D)},
        "transpose the claim; then multiply by 1/2",
    ),
    "symmetrisation": (
        lambda X, A: (A @ X).trace(),
        lambda X, A: A,
        {"X": SPD, "A": (D, D)},
        "missing symmetrisation",
    ),
    "free_entries": (
        torch.logdet,
        lambda X: 2 * X.inverse() - torch.diag(X.inverse().diagonal()),
        {"X": SPD},
        "off-diagonal entries counted twice",
    ),
    "permuted_vec": (
        lambda X, A: (A * X).sum(),
        lambda X, A: A.reshape(-1),
        {"X": (T, D), "A": (T, D)},
        "a permuted vec: the entries are stacked by rows",
    ),
    "other_order": (
        quad,
        lambda X, Y: -(W := torch.linalg.solve(X, Y)).T @ W,
        INPUTS,
        "W Wᵀ for Wᵀ W",
    ),
    "other_order_and_shape": (
        quad,
        lambda X, Y: -(W := torch.linalg.solve(X, Y)).T @ W,
        {"X": SPD, "Y": (D, T)},
        "shape (4, 4), not (3, 3); the same factors multiplied in the other order",
    ),
    "chain_rule_of_exp": (
        lambda s, A: torch.logdet(A @ A.T + torch.diag(s.exp())),
        lambda s, A: (A @ A.T + torch.diag(s.exp())).inverse().diagonal(),
        {"s": (D,), "A": (D, T)},
        "the chain rule of exp(X)",
    ),
    "missing_factor": (
        lambda x: x.log().square().sum() / 2,
        lambda x: x.log(),
        {"x": Random((D,), "positive")},
        "is too much",
    ),
    "surplus_factor": (
        lambda x: x.square().sum() / 2,
        lambda x: torch.ones_like(x),
        {"x": (D,)},
        "a factor X, entry by entry, is missing",
    ),
}


@pytest.mark.parametrize("slip", WRONG)
def test_usual_slips_are_named(slip: str) -> None:
    f, claim, inputs, expected = WRONG[slip]
    report = check_gradient(f, claim, inputs)  # type: ignore[arg-type]
    (verdict,) = report.inputs.values()
    assert not report.ok
    assert verdict.error > 1e-3
    assert verdict.diagnosis is not None
    assert expected in verdict.diagnosis
    assert "WRONG" in str(report)
    assert expected in str(report)


def test_an_unusual_error_is_wrong_without_a_diagnosis() -> None:
    for claim in (lambda X: X, lambda X: X.inverse() + 1e-5 * X, torch.zeros_like):
        report = check_gradient(torch.logdet, claim, {"X": SPD})
        assert not report.ok
        assert report.inputs["X"].diagnosis is None
        assert "none of the usual slips" in str(report)


def test_a_factor_that_depends_on_the_input_is_no_constant_factor() -> None:
    report = check_gradient(
        torch.logdet, lambda X: torch.linalg.inv(X) * X.trace(), {"X": SPD}, trials=2
    )
    assert not report.ok
    assert report.inputs["X"].diagnosis is None


# ---------------------------------------------------------------- Jacobians


def test_jacobians_in_the_order_of_vec() -> None:
    inputs = {"X": Random((T, D)), "A": Random((2, T)), "B": Random((D, 5))}

    def value(X: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return A @ X @ B

    def right(X: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return torch.kron(B.T.contiguous(), A)

    assert check_gradient(value, right, inputs).ok
    rows = commutation_matrix(2, 5, dtype=torch.float64)
    columns = commutation_matrix(T, D, dtype=torch.float64).T
    claims: dict[str, Formula] = {
        "rows are in the order": lambda *x: rows @ right(*x),
        "columns are in the order": lambda *x: right(*x) @ columns,
        "rows and columns are": lambda *x: rows @ right(*x) @ columns,
        "transpose the claim": lambda *x: right(*x).T,
        "multiply by -1/2": lambda *x: -2 * right(*x),
        "the right rows in another order": lambda *x: right(*x).flip(0),
    }
    for expected, claim in claims.items():
        diagnosis = check_gradient(value, claim, inputs).inputs["X"].diagnosis
        assert diagnosis is not None
        assert expected in diagnosis


# ---------------------------------------------------------------- several inputs, errors


def test_several_claims_are_judged_one_by_one() -> None:
    claims = {
        "X": quad_gradient,
        "Y": lambda X, Y: torch.linalg.solve(X, Y),
    }
    report = check_gradient(quad, claims, {"X": SPD, "Y": (D, T)})
    assert report.inputs["X"].ok
    assert report.inputs["Y"].diagnosis == "a constant factor: multiply by 2"
    assert not report.ok
    assert str(report).count("gradient in") == 2


def test_tensors_stay_as_they_are_and_runs_repeat() -> None:
    A = torch.arange(9.0, dtype=torch.float64).reshape(D, D)
    seen = []

    def f(X: Tensor, B: Tensor) -> Tensor:
        seen.append(X.detach().clone())
        assert torch.equal(A, B)
        return (X * B).sum()

    for _ in range(2):
        assert check_gradient(f, lambda X, B: B, {"X": (D, D), "B": A}, trials=1).ok
    half = len(seen) // 2
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))


def test_a_function_hidden_from_differentiation_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="f in X disagree by"):
        check_gradient(
            lambda X: X.detach().square().sum() + X.sum(), torch.ones_like, {"X": (D, D)}
        )


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"claimed names \['Z'\], inputs are \['X'\]"):
        check_gradient(torch.sum, {"Z": torch.ones_like}, {"X": (D, D)})
    with pytest.raises(ValueError, match=r"X: structure must be one of .* got 'spd'"):
        check_gradient(torch.sum, torch.ones_like, {"X": Random((D, D), "spd")})
    with pytest.raises(ValueError, match=r"X: a symmetric matrix must be square, got \(3, 4\)"):
        check_gradient(torch.sum, torch.ones_like, {"X": Random((D, T), "symmetric")})
    with pytest.raises(ValueError, match="trials must be at least 1, got 0"):
        check_gradient(torch.sum, torch.ones_like, {"X": (D, D)}, trials=0)
    with pytest.raises(TypeError, match="f must return a tensor, got float"):
        check_gradient(lambda X: 1.0, torch.ones_like, {"X": (D, D)})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the claimed gradient must return a tensor, got int"):
        check_gradient(torch.sum, lambda X: 1, {"X": (D, D)})  # type: ignore[arg-type]
