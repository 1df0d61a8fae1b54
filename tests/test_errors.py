"""Every refused input: the error's type, the argument that it names, what it expected and got."""

from __future__ import annotations

import math
import re

import pytest
import torch
from battery import FUNCTIONS, NOISES, ROUTES, Function, from_leaves, leaves
from problems import Problem, make_problem
from torch import Tensor
from torch.func import jvp

import torch_kronlik as tk

LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
each_function = pytest.mark.parametrize("name", FUNCTIONS)
each_noise = pytest.mark.parametrize("noise", NOISES)
each_route = pytest.mark.parametrize("method", ROUTES)


def changed(p: Problem, **values: Tensor) -> Problem:
    return from_leaves({**leaves(p), **values})


def arguments(f: Function, p: Problem) -> list[str]:
    return [key for key in leaves(p) if f.uses_Y or key != "Y"]


# ---------------------------------------------------------------- what does not fit

WRONG_SHAPES: list[tuple[str, tuple[int, ...], str]] = [
    ("M", (4, 5), r"M must have shape \(\*batch, T, T\), got \(4, 5\)"),
    ("M", (4,), r"M must have shape \(\*batch, T, T\), got \(4,\)"),
    ("K", (3, 2), r"K must have shape \(\*batch, D, D\), got \(3, 2\)"),
    ("K", (), r"K must have shape \(\*batch, D, D\), got \(\)"),
    ("Sigma", (2, 2), r"Sigma must have shape .* with D = 3, got \(2, 2\)"),
    ("Sigma", (3,), r"Sigma must have shape .*, got \(3,\)"),
    ("Y", (3, 4), r"Y must have shape .* T = 4 .* D = 3 .*got \(3, 4\)"),
    ("Y", (4,), r"Y must have shape .*got \(4,\)"),
    ("Y", (2, 12), r"Y must have shape .*got \(2, 12\)"),
]


@pytest.mark.parametrize(("key", "shape", "message"), WRONG_SHAPES)
@each_function
def test_wrong_shape(name: str, key: str, shape: tuple[int, ...], message: str) -> None:
    f, p = FUNCTIONS[name], make_problem(4, 3)
    if key in arguments(f, p):
        with pytest.raises(ValueError, match=message):
            f.structured(changed(p, **{key: torch.ones(shape, dtype=torch.float64)}))


@pytest.mark.parametrize("shape", [(2,), (4, 2), ()])
@each_function
def test_wrong_shape_of_log_noise(name: str, shape: tuple[int, ...]) -> None:
    p = make_problem(4, 3, noise="diagonal")
    wrong = changed(p, log_noise=torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"log_noise must have shape .* D = 3, got \("):
        FUNCTIONS[name].structured(wrong)


@each_function
def test_outputs_of_K_and_of_the_noise_disagree(name: str) -> None:
    """Either may be the wrong one: both are named, with their shapes."""
    p = make_problem(4, 3)
    eye = torch.eye(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"K \(2, 2\) and Sigma \(3, 3\) disagree about D"):
        FUNCTIONS[name].structured(changed(p, K=eye))
    p = make_problem(4, 3, noise="diagonal")
    with pytest.raises(ValueError, match=r"K \(2, 2\) and log_noise \(3,\) disagree about D"):
        FUNCTIONS[name].structured(changed(p, K=eye))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning")
@each_noise
@each_function
def test_tensors_that_are_not_dense(name: str, noise: str) -> None:
    f, p = FUNCTIONS[name], make_problem(4, 3, noise=noise)
    for key in arguments(f, p):
        x = leaves(p)[key].cpu()  # not every device has these tensors; the type is looked at first
        nested = torch.nested.as_nested_tensor([x, x], layout=torch.strided)
        quantised = torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)
        for bad, got in (
            (x.to_sparse(), r"a dense tensor, got layout torch\.sparse_coo"),
            (nested, "a dense tensor, got a nested tensor"),
            (quantised, r"float32 or float64, got torch\.qint8"),
        ):
            with pytest.raises(TypeError, match=rf"^{key} must be {got}"):
                f.structured(changed(p, **{key: bad}))


@each_function
def test_batches_that_do_not_broadcast(name: str) -> None:
    p = make_problem(4, 3)
    with pytest.raises(ValueError, match=r"broadcast.*M \(2,\).*K \(3,\)"):
        FUNCTIONS[name].structured(changed(p, M=p.M.expand(2, 4, 4), K=p.K.expand(3, 3, 3)))
    if FUNCTIONS[name].uses_Y:
        with pytest.raises(ValueError, match=r"broadcast.*Y \(3,\).*\(2,\)"):
            FUNCTIONS[name].structured(changed(p, M=p.M.expand(2, 4, 4), Y=p.Y.expand(3, 4, 3)))


@each_noise
@each_function
def test_mixed_dtypes(name: str, noise: str) -> None:
    f, p = FUNCTIONS[name], make_problem(4, 3, noise=noise)
    for key in arguments(f, p):
        with pytest.raises(TypeError, match=r"must have the dtype.*float(32|64).*float(32|64)"):
            f.structured(changed(p, **{key: leaves(p)[key].float()}))


@each_noise
@each_function
def test_dtypes_that_are_not_supported(name: str, noise: str) -> None:
    f, p = FUNCTIONS[name], make_problem(4, 3, noise=noise)
    for key in arguments(f, p):
        for dtype in (torch.float16, torch.int64, torch.complex128):
            with pytest.raises(TypeError, match=rf"^{key} must be float32 or float64, got {dtype}"):
                f.structured(changed(p, **{key: leaves(p)[key].to(dtype)}))
        kind = r"a tensor or a row covariance \(.*\)" if key == "M" else "a tensor"
        with pytest.raises(TypeError, match=rf"^{key} must be {kind}, got list"):
            f.structured(from_leaves({**leaves(p), key: [1.0]}))  # type: ignore[dict-item]


@each_noise
@each_function
def test_mixed_devices(name: str, noise: str) -> None:
    f, p = FUNCTIONS[name], make_problem(4, 3, noise=noise)
    for key in arguments(f, p):
        with pytest.raises(ValueError, match=r"must be on the device of \w+, .*(meta|cpu)"):
            f.structured(changed(p, **{key: leaves(p)[key].to("meta")}))


@each_function
def test_exactly_one_noise_argument(name: str) -> None:
    p = make_problem(4, 3)
    with pytest.raises(ValueError, match=r"exactly one of Sigma and log_noise .*got neither"):
        FUNCTIONS[name].structured(p._replace(noise={}))
    both = {**p.noise, "log_noise": torch.zeros(3, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"exactly one of Sigma and log_noise .*got both"):
        FUNCTIONS[name].structured(p._replace(noise=both))


@pytest.mark.parametrize("method", ["dense", "", "SPECTRAL", "auto, with a basis of M", None])
@each_function
def test_unknown_method(name: str, method: str | None) -> None:
    with pytest.raises(ValueError, match=rf"method must be one of auto, .*got {method!r}"):
        FUNCTIONS[name].structured(make_problem(4, 3), method=method)


def test_symmetric_eigen_refuses() -> None:
    with pytest.raises(TypeError, match=r"M must be a tensor, got list"):
        tk.symmetric_eigen([[1.0]])
    with pytest.raises(TypeError, match=r"M must be float32 or float64, got torch.int64"):
        tk.symmetric_eigen(torch.eye(2).long())
    with pytest.raises(ValueError, match=r"M must have shape \(\*batch, T, T\), got \(2, 3\)"):
        tk.symmetric_eigen(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"M requires a gradient.*M.detach\(\)"):
        tk.symmetric_eigen(torch.eye(2, requires_grad=True))
    with pytest.raises(ValueError, match=r"M must be finite, but M\[1, 0\] is nan"):
        tk.symmetric_eigen(torch.tensor([[1.0, math.nan], [math.nan, 1.0]]).tril())


@pytest.mark.parametrize("part", ["eigenvalues", "eigenvectors"])
def test_a_constant_factor_with_a_gradient_is_refused(part: str) -> None:
    p = make_problem(4, 3)
    M = tk.symmetric_eigen(p.M)
    M = M._replace(**{part: getattr(M, part).clone().requires_grad_()})
    with pytest.raises(ValueError, match=rf"^M\.{part} requires a gradient"):
        tk.kron_logdet(M, p.K, **p.noise)


def test_symmetric_eigen_refuses_forward_mode() -> None:
    """Reverse mode is refused; forward mode gives a silent zero."""
    p = make_problem(4, 3)
    with pytest.raises(ValueError, match=r"M requires a gradient|M .*tangent|constant"):
        jvp(
            lambda M: tk.kron_logdet(tk.symmetric_eigen(M), p.K, **p.noise),
            (p.M,),
            (torch.eye(4, dtype=torch.float64),),
        )


def test_eigenvalues_that_do_not_fit_are_refused() -> None:
    p = make_problem(4, 3)
    s, P = tk.symmetric_eigen(p.M)
    for wrong in (s.float(), s[:3], s[:1]):
        with pytest.raises((TypeError, ValueError), match=r"^M|eigenvalues"):
            tk.kron_solve(tk.SymmetricEigen(wrong, P), p.K, p.Y, **p.noise)


# ---------------------------------------------------------------- what is not positive definite


@each_route
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@each_function
def test_Sigma_not_positive_definite(
    name: str, batch: tuple[int, ...], method: str, dtype: torch.dtype
) -> None:
    p = make_problem(4, 3, batch=batch, dtype=dtype)
    Sigma = p.noise["Sigma"].clone()
    Sigma[tuple(n - 1 for n in batch)] -= 10 * torch.eye(3, dtype=dtype)
    where = {(): "$", (3,): r" \(batch element 2\)", (2, 3): r" \(batch element \(1, 2\)\)"}[batch]
    with pytest.raises(LinAlgError, match=f"Sigma is not positive definite{where}"):
        FUNCTIONS[name].structured(changed(p, Sigma=Sigma), method=method)


@each_route
@each_noise
@pytest.mark.parametrize("key", ["M", "K"])
@each_function
def test_U_not_positive_definite(
    name: str, key: str, noise: str, method: str, dtype: torch.dtype
) -> None:
    """Which U, in which batch element; indefinite by its least or by its greatest eigenvalues."""
    for sign, batch in ((-1.0, ()), (-1.0, (3,)), (1.0, (2, 2))):
        p = make_problem(5, 3, batch=batch, noise=noise, dtype=dtype)
        x = leaves(p)[key].clone()
        where = tuple(n - 1 for n in batch)
        mixed = torch.linspace(-100, 30, x.shape[-1], dtype=dtype).diag()
        x[where] = mixed if sign > 0 else -50 * x[where]
        element = {0: "$", 1: " (batch element 2)", 2: " (batch element (1, 1))"}[len(batch)]
        match = "^U = .* is not positive definite" + (re.escape(element) if batch else "$")
        with pytest.raises(LinAlgError, match=match):
            FUNCTIONS[name].structured(changed(p, **{key: x}), method=method)


@each_route
@each_noise
@each_function
def test_indefinite_factor_of_a_positive_definite_U(
    name: str, noise: str, method: str, dtype: torch.dtype
) -> None:
    """M with a negative eigenvalue that the noise outweighs: U is a covariance, so it is served."""
    if method != "spectral":
        return
    p = make_problem(4, 3, noise=noise)
    p = changed(p, M=p.M - 0.5 * torch.eye(4, dtype=torch.float64), K=0.1 * p.K)
    assert torch.linalg.eigvalsh(p.M)[0] < 0
    for actual, expected in zip(
        FUNCTIONS[name].structured(p, method=method), FUNCTIONS[name].dense(p), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@each_noise
@each_function
def test_singular_U_is_refused(name: str, noise: str) -> None:
    """1 + s λ = 0 exactly."""
    eye = torch.eye(3, dtype=torch.float64)
    value = {"full": {"Sigma": eye}, "diagonal": {"log_noise": torch.zeros(3).double()}}[noise]
    with pytest.raises(LinAlgError, match=r"^U = .* is not positive definite"):
        FUNCTIONS[name].structured(Problem(eye, -eye, eye, value))


def test_indefinite_by_unsorted_eigenvalues() -> None:
    """A hand-made pair (of a circulant, of a grid) need not be sorted: NaN must not come of it."""
    p = make_problem(4, 3)
    s, P = torch.tensor([1.0, -1e3, 2.0, 3.0]).double(), torch.eye(4).double()
    with pytest.raises((ValueError, torch.linalg.LinAlgError)):  # type: ignore[attr-defined]
        tk.kron_solve(tk.SymmetricEigen(s, P), p.K, p.Y, **p.noise)


def test_a_number_of_samples_is_no_shape() -> None:
    p = make_problem(4, 3)
    expected = r"sample_shape must be a sequence of ints, such as \(5,\), got 5"
    with pytest.raises(TypeError, match=expected):
        tk.KroneckerPlusNoise(p.M, p.K, **p.noise).sample(5)  # type: ignore[arg-type]
    posterior = tk.condition(p.Y, p.M, p.K, p.M[:2], p.M[:2, :2], **p.noise)
    with pytest.raises(TypeError, match=expected):
        posterior.rsample(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["Y", "M", "K"])
def test_none_for_an_argument_is_named(name: str) -> None:
    p = make_problem(3, 2)
    given = {"Y": p.Y, "M": p.M, "K": p.K, name: None}
    with pytest.raises(TypeError, match=f"{name} must be a tensor.*got NoneType"):
        tk.kron_gaussian_nll(**given, **p.noise)
    with pytest.raises(TypeError, match="M_cross must be a tensor, got NoneType"):
        tk.KroneckerPlusNoise(p.M, p.K, **p.noise).condition(p.Y, None, p.M)


@pytest.mark.parametrize("shape", [(-1,), (1.5,), None, "ab"])
def test_what_is_no_sample_shape_is_refused(shape: object) -> None:
    p = make_problem(3, 2)
    with pytest.raises(TypeError, match="sample_shape must be a sequence of ints, none negative"):
        tk.KroneckerPlusNoise(p.M, p.K, **p.noise).sample(shape)
