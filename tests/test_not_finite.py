"""NaN, infinity and the edge of the floating-point range: an error that says so, never a NaN."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from battery import FUNCTIONS, NOISES, Tensors, from_leaves, gradients, leaves
from problems import make_problem
from test_errors import LinAlgError, arguments, changed
from torch import Tensor

import torch_kronlik as tk
from torch_kronlik import errors
from torch_kronlik.factor import whiten
from torch_kronlik.factor.plan import METHODS

each_function = pytest.mark.parametrize("name", FUNCTIONS)
each_noise = pytest.mark.parametrize("noise", NOISES)
each_route = pytest.mark.parametrize("method", METHODS)

# ---------------------------------------------------------------- what is not finite


def spoilt(x: Tensor, bad: float, position: tuple[int, ...], matrix: bool) -> Tensor:
    """One entry replaced; the mirrored one too, since symmetry is taken as given."""
    x = x.clone()
    x[position] = bad
    if matrix:
        mirrored = (*position[:-2], position[-1], position[-2])
        x[mirrored] = bad
    return x


@each_route
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@each_noise
@each_function
def test_not_finite(name: str, noise: str, bad: float, method: str, dtype: torch.dtype) -> None:
    """At a corner, off the diagonal, in a batch element: a ValueError that names the argument."""
    f = FUNCTIONS[name]
    for D in (1, 3):
        p = make_problem(4, D, batch=(2,), noise=noise, dtype=dtype)
        for key in arguments(f, p):
            x = leaves(p)[key]
            first, last = (1, *[0] * (x.dim() - 1)), (0, *[n - 1 for n in x.shape[1:]])
            for position in (first, last, (*first[:-1], x.shape[-1] - 1)):
                wrong = changed(p, **{key: spoilt(x, bad, position, key not in ("Y", "log_noise"))})
                with pytest.raises(ValueError, match=rf"^{key} must be finite, but {key}\["):
                    f.structured(wrong, method=method)


def test_matmul_refuses_minus_infinite_log_noise() -> None:
    p = make_problem(4, 3, noise="diagonal")
    with pytest.raises(ValueError, match=r"^log_noise must be finite"):
        tk.kron_matmul(p.M, p.K, p.Y, log_noise=torch.full_like(p.noise["log_noise"], -math.inf))


@pytest.mark.parametrize("position", [(0, 1), (1, 0)])
@pytest.mark.parametrize("key", ["M", "K", "Sigma"])
@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_nan_in_one_triangle_only(name: str, key: str, position: tuple[int, int]) -> None:
    """No error, or no NaN: a value from the other triangle with a NaN gradient is neither."""
    p = make_problem(4, 3)
    x = leaves(p)[key].clone()
    x[position] = math.nan
    try:
        found = gradients(FUNCTIONS[name].structured, from_leaves({**leaves(p), key: x}))
    except ValueError:
        return
    assert all(torch.isfinite(g).all() for g in found.values())


def test_nan_eigenvalues_are_named() -> None:
    p = make_problem(4, 3)
    s, P = tk.symmetric_eigen(p.M)
    for pair in (
        tk.SymmetricEigen(s * math.nan, P),
        tk.SymmetricEigen(s, P * math.nan),
    ):
        with pytest.raises(ValueError, match=r"^M"):
            tk.kron_solve(pair, p.K, p.Y, **p.noise)
        with pytest.raises(ValueError, match=r"^M"):
            tk.kron_logdet(pair, p.K, **p.noise)
        with pytest.raises(ValueError, match=r"^M"):
            tk.inverse_diagonal(pair, p.K, **p.noise)


def test_error_for_a_leaf_does_not_warn() -> None:
    """float(tensor that requires a gradient) warns, once a process."""
    p = make_problem(4, 3)
    M = torch.full_like(p.M, math.nan).requires_grad_()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ValueError, match="M must be finite"):
                tk.kron_logdet(M, p.K, **p.noise)
    finally:
        torch.set_warn_always(False)


# ---------------------------------------------------------------- the range of the numbers


@each_route
@each_function
def test_never_nan_at_the_edge_of_the_range(name: str, method: str, dtype: torch.dtype) -> None:
    """Finite inputs whose result would not be: an error that says so, or a finite result."""
    big = torch.finfo(dtype).max / 10
    f, p = FUNCTIONS[name], make_problem(3, 2, noise="diagonal", dtype=dtype)
    for key in arguments(f, p):
        scale = 0.9 * math.log(big) if key == "log_noise" else big / 100
        for sign in (1.0, -1.0) if key in ("Y", "log_noise") else (1.0,):
            q = changed(p, **{key: sign * scale * torch.ones_like(leaves(p)[key])})
            try:
                results: Tensors = f.structured(q, method=method)
            except (OverflowError, LinAlgError):
                continue
            assert all(torch.isfinite(x).all() for x in results), key


@each_function
def test_error_in_the_middle_leaves_nothing_behind(name: str) -> None:
    """After a refused input the next call is right."""
    f, p = FUNCTIONS[name], make_problem(4, 3)
    expected = gradients(f.structured, p)
    with pytest.raises(ValueError, match="M must be finite"):
        f.structured(changed(p, M=torch.full_like(p.M, math.nan)))
    for key, g in gradients(f.structured, p).items():
        assert torch.equal(g, expected[key])


@pytest.mark.parametrize("noise", NOISES)
def test_a_fault_in_a_captured_graph_of_constant_rows(
    noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host cannot wait for a check then, and a replay cannot raise."""
    for module in (errors, whiten):
        monkeypatch.setattr(module, "is_captured", lambda x: True)
    p = make_problem(6, 3, batch=(4,), noise=noise)
    M = tk.symmetric_eigen(p.M)
    (key,) = p.noise
    for name, bad in (("K", -50.0), ("K", math.nan), ("Y", math.inf), (key, math.nan)):
        values = {k: x.clone() for k, x in leaves(p).items() if k != "M"}
        values[name][2] *= bad
        found = tk.kron_gaussian_nll(values["Y"], M, values["K"], **{key: values[key]})
        assert found.isfinite().tolist() == [True, True, False, True], (name, bad)
