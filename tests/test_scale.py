"""What is computed, how often and how large: never more than the gradients asked for need."""

from __future__ import annotations

import pytest
import torch
from battery import FUNCTIONS, NOISES, ROUTES, Recorder, from_leaves, leaves
from problems import Problem, make_problem
from torch import Tensor
from torch.autograd import grad

import torch_kronlik as tk

each_noise = pytest.mark.parametrize("noise", NOISES)
each_route = pytest.mark.parametrize("method", ROUTES)


def recorded_gradient(p: Problem, chosen: list[str], method: str) -> Recorder:
    values = {key: x.clone().requires_grad_(key in chosen) for key, x in leaves(p).items()}
    q = from_leaves(values)
    recorded = Recorder()
    with recorded:
        value = tk.kron_gaussian_nll(q.Y, q.M, q.K, **q.noise, method=method)
        if chosen:
            grad(value, [values[key] for key in chosen])
    return recorded


# ---------------------------------------------------------------- how often


@each_noise
def test_one_eigendecomposition_of_each_factor(noise: str) -> None:
    """Value and all gradients together; K and the noise in a native kernel up to D = 16."""
    p = make_problem(7, 17, noise=noise)
    recorded = recorded_gradient(p, list(leaves(p)), "spectral")
    found = sorted(s for s in recorded.shapes("linalg_eigh") if len(s) == 2)
    assert found == [(7, 7), (17, 17)]
    assert recorded.count("linalg_cholesky_ex") == (noise == "full")
    p = make_problem(7, 16, noise=noise)
    recorded = recorded_gradient(p, list(leaves(p)), "spectral")
    assert [s for s in recorded.shapes("linalg_eigh") if len(s) == 2] == [(7, 7)]
    assert recorded.count("whiten_small") == 1
    assert recorded.count("linalg_cholesky_ex") == 0


@each_route
@each_noise
def test_second_use_factorises_nothing(noise: str, method: str) -> None:
    p = make_problem(7, 3, noise=noise)
    U = tk.KroneckerPlusNoise(p.M, p.K, **p.noise, method=method)

    def use() -> None:
        U.solve(p.Y)
        U.inv_quad_logdet(p.Y)
        U.inverse_block_diag_sum()
        U.inverse_diagonal()
        U.sample()
        U.matmul(p.Y)

    use()
    recorded = Recorder()
    with recorded:
        use()
    assert recorded.count("solve") == 1
    for name in ("linalg_eigh", "linalg_qr", "eigen", "whiten", "pivoted_cholesky"):
        assert recorded.count(name) == 0


@each_route
def test_constant_factor_is_diagonalised_once(method: str) -> None:
    p = make_problem(7, 3)
    with Recorder() as recorded:
        pair = tk.symmetric_eigen(p.M)
        for k in range(3):
            tk.kron_logdet(pair, p.K * (k + 1), **p.noise, method=method)
    assert recorded.shapes("linalg_eigh").count((7, 7)) == 1


# ---------------------------------------------------------------- only what is asked for


@pytest.mark.parametrize("method", ["spectral", "low_rank"])  # "cholesky" has T×T factors for all
@each_noise
def test_backward_forms_nothing_of_M_unless_asked(noise: str, method: str) -> None:
    """T×T results are M's own: without its gradient, backward makes none."""
    p = make_problem(9, 3, noise=noise)
    forward = recorded_gradient(p, [], method)
    others = recorded_gradient(p, ["Y", "K", *p.noise], method)
    with_M = recorded_gradient(p, ["Y", "M"], method)

    def squares(recorded: Recorder) -> int:
        """Matrices of size T×T that are computed; views of one are none."""
        views = {"mT", "t", "transpose", "permute", "expand", "detach", "alias", "view"}
        return sum((9, 9) in shapes for name, shapes in recorded.calls if name not in views)

    assert squares(others) == squares(forward)
    assert squares(with_M) > squares(forward)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradient_not_asked_for_is_none(name: str) -> None:
    p = make_problem(4, 3)
    K = p.K.clone().requires_grad_()
    results = FUNCTIONS[name].structured(p._replace(K=K))
    torch.stack([x.sum() for x in results]).sum().backward()
    assert K.grad is not None
    assert all(x.grad is None for x in (p.Y, p.M, p.noise["Sigma"]))
    assert all(x.grad_fn is None for x in FUNCTIONS[name].structured(p))


@each_route
def test_diagonal_noise_is_never_made_a_matrix(method: str) -> None:
    """With M and K constant no D×D matrix but K's own factorisation appears, gradient included."""
    p = make_problem(4, 6, noise="diagonal")
    s = p.noise["log_noise"].clone().requires_grad_()
    with Recorder() as recorded:
        grad(tk.kron_gaussian_nll(p.Y, p.M, p.K, log_noise=s, method=method), s)
    made = {name for name, shapes in recorded.calls if (6, 6) in shapes}
    assert not made & {"diag_embed", "diag", "eye", "linalg_cholesky_ex", "linalg_inv"}
    backward = [name for name, _ in recorded.calls]
    after = backward[backward.index("quad_logdet") + 1 :]
    assert "diag_embed" not in after


# ---------------------------------------------------------------- how large


def largest(recorded: Recorder) -> int:
    return max(int(torch.Size(shape).numel()) for shape in recorded.shapes())


@each_route
@each_noise
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_intermediate_larger_than_its_inputs(name: str, noise: str, method: str) -> None:
    """T = D = 40: values and gradients of the likelihood, the solve and the log-determinant in
    two matrices of 40×40; U has 1600×1600 entries. The D×D functionals, whose gradients need a
    D×D block for each row, may take T·D², and the Cholesky factors for each output T²·D."""
    p = make_problem(40, 40, noise=noise)
    values = {key: x.requires_grad_() for key, x in leaves(p).items()}
    f = FUNCTIONS[name]
    with Recorder() as recorded:
        results = f.structured(from_leaves(values), method=method)
        loss = torch.stack([x.sum() for x in results]).sum()
        grad(loss, list(values.values()), allow_unused=True)
    blocks = name.startswith("inverse_") or method == "cholesky"
    assert largest(recorded) <= (40**3 if blocks else 2 * 40**2)


@pytest.mark.parametrize("method", ["auto", "spectral", "low_rank"])
@each_noise
def test_runs_where_U_would_not_fit(noise: str, method: str) -> None:
    """T = D = 500: U has 6·10¹⁰ entries, 500 GB. Value, solve, all gradients in 500×500 parts."""
    p = make_problem(500, 500, noise=noise)
    values = {key: x.requires_grad_() for key, x in leaves(p).items()}
    q = from_leaves(values)
    with Recorder() as recorded:
        U = tk.KroneckerPlusNoise(q.M, q.K, **q.noise, method=method)
        A = U.solve(q.Y)
        inv_quad, logdet = U.inv_quad_logdet(q.Y)
        grads = grad(inv_quad + logdet, list(values.values()))
    assert largest(recorded) <= 2 * 500**2
    torch.testing.assert_close(U.matmul(A), q.Y, rtol=1e-8, atol=1e-8)
    check_scaling(p, grads, inv_quad, logdet)


def check_scaling(p: Problem, grads: tuple[Tensor, ...], inv_quad: Tensor, logdet: Tensor) -> None:
    """Euler's identities, independent of any other computation: c·U changes log det U by T·D·log c
    and yᵀU⁻¹y by 1/c, and M and Sigma scaled by c make c·U; likewise K and Sigma."""
    gradient = dict(zip(leaves(p), grads, strict=True))
    expected = p.Y.numel() - inv_quad
    noise = (
        gradient["log_noise"].sum()
        if "log_noise" in gradient
        else (gradient["Sigma"] * p.noise["Sigma"]).sum()
    )
    for key in ("M", "K"):
        along = (gradient[key] * leaves(p)[key]).sum() + noise
        torch.testing.assert_close(along, expected, rtol=1e-9, atol=1e-6)
    torch.testing.assert_close((gradient["Y"] * p.Y).sum(), 2 * inv_quad, rtol=1e-10, atol=0)
    assert torch.isfinite(logdet)


@each_route
@pytest.mark.parametrize(("T", "D"), [(1500, 2), (2, 1000)])
def test_long_and_wide(T: int, D: int, method: str) -> None:
    """One side large: nothing is larger than that side's own square."""
    p = make_problem(T, D, kind="identity", noise="diagonal")
    s = p.noise["log_noise"].clone().requires_grad_()
    with Recorder() as recorded:
        (g,) = grad(tk.kron_gaussian_nll(p.Y, p.M, p.K, log_noise=s, method=method), s)
    assert largest(recorded) <= 2 * max(T, D) ** 2
    u = 1 + s.detach().exp()
    expected = s.detach().exp() * (T / u - (p.Y / u).square().sum(0)) / 2
    torch.testing.assert_close(g, expected, rtol=1e-9, atol=1e-9)


def test_data_that_share_a_cholesky_factor_are_columns_of_one_solve() -> None:
    """A triangular solve with a batch would copy the factor out to it."""
    p = make_problem(5, 3, batch={"Y": (4, 2), "M": (), "K": (), "noise": ()})
    with Recorder() as recorded:
        tk.kron_solve(p.M, p.K, p.Y, **p.noise, method="cholesky")
    assert set(recorded.shapes("linalg_solve_triangular")) == {(5, 8)}
    p = make_problem(5, 3, batch={"Y": (4, 2), "M": (4, 1), "K": (), "noise": ()})
    with Recorder() as recorded:
        tk.kron_solve(p.M, p.K, p.Y, **p.noise, method="cholesky")
    assert set(recorded.shapes("linalg_solve_triangular")) == {(4, 5, 2)}
