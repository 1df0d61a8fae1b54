"""KroneckerPlusNoise as an object, and the product U·Y, against the dense twin."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from battery import FUNCTIONS, NOISES, ROUTES, double, laid_out, leaves, map_problem
from devices import generator
from problems import BATCHES, KINDS, LAYOUTS, Problem, condition_number, kinds_for, make_problem
from torch import Tensor
from torch.autograd import grad, gradcheck

import torch_kronlik as tk
from torch_kronlik import reference

Check = Callable[..., None]
each_noise = pytest.mark.parametrize("noise", NOISES)
each_route = pytest.mark.parametrize("method", ROUTES)
each_batch = pytest.mark.parametrize("batch", BATCHES)


def covariance(p: Problem, **method: str) -> tk.KroneckerPlusNoise:
    return tk.KroneckerPlusNoise(p.M, p.K, **p.noise, **method)


# ---------------------------------------------------------------- what needs no factorisation


@each_noise
@each_batch
def test_dense_diagonal_and_product(batch: str, noise: str, dtype: torch.dtype) -> None:
    p = make_problem(4, 3, batch=BATCHES[batch], noise=noise, dtype=dtype)
    U, wide = covariance(p), double(p)
    expected = reference.covariance_matrix(wide.M, wide.K, **wide.noise)
    torch.testing.assert_close(U.to_dense().double(), expected, rtol=1e-5, atol=1e-6)
    diagonal = expected.diagonal(dim1=-2, dim2=-1).unflatten(-1, (4, 3))
    torch.testing.assert_close(U.diagonal().double(), diagonal, rtol=1e-5, atol=1e-6)
    product = reference.kron_matmul(wide.M, wide.K, wide.Y, **wide.noise)
    for actual in (U.matmul(p.Y), tk.kron_matmul(p.M, p.K, p.Y, **p.noise)):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), product, rtol=1e-5, atol=1e-5)


@each_noise
@pytest.mark.parametrize("kind", KINDS)
def test_product_is_exact_for_every_kind(kind: str, noise: str, assert_close: Check) -> None:
    for size in ((5, 3), (1, 1), (0, 2), (2, 6)):
        p = make_problem(*size, kind=kind, noise=noise)
        expected = reference.kron_matmul(p.M, p.K, p.Y, **p.noise)
        assert_close(tk.kron_matmul(p.M, p.K, p.Y, **p.noise), expected)


@pytest.mark.parametrize("how", LAYOUTS)
def test_layout_does_not_matter(how: str) -> None:
    p = make_problem(4, 3, batch=(2,))
    U, V = covariance(p), covariance(laid_out(p, how))
    Y = laid_out(p, how).Y
    for a, b in ((U.matmul(p.Y), V.matmul(Y)), (U.to_dense(), V.to_dense())):
        torch.testing.assert_close(b, a.expand_as(b), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(V.diagonal(), U.diagonal().expand_as(V.diagonal()))


@each_noise
def test_product_of_a_constant_factor(noise: str, assert_close: Check) -> None:
    p = make_problem(5, 3, noise=noise)
    U = tk.KroneckerPlusNoise(tk.symmetric_eigen(p.M), p.K, **p.noise)
    expected = covariance(p)
    assert_close(U.matmul(p.Y), expected.matmul(p.Y))
    assert_close(U.to_dense(), expected.to_dense())
    assert_close(U.diagonal(), expected.diagonal())


# ---------------------------------------------------------------- the object


@each_batch
def test_shapes(batch: str, dtype: torch.dtype) -> None:
    p = make_problem(4, 3, batch=BATCHES[batch], dtype=dtype)
    U = covariance(p)
    dense = reference.covariance_matrix(*(x.double() for x in (p.M, p.K)), Sigma=p.noise["Sigma"])
    assert U.shape == dense.shape
    assert U.batch_shape == dense.shape[:-2]
    assert U.event_shape == (4, 3)
    assert U.dtype == dtype
    assert U.device == p.K.device
    assert U.method_used in ROUTES
    assert "T=4, D=3" in repr(U)


@each_route
@each_noise
@each_batch
def test_methods_are_the_functions(batch: str, noise: str, method: str) -> None:
    p = make_problem(4, 3, batch=BATCHES[batch], noise=noise)
    U = covariance(p, method=method)
    assert U.method_used == method
    results = {
        "kron_solve": U.solve(p.Y),
        "kron_logdet": U.logdet(),
        "kron_inv_quad_logdet": U.inv_quad_logdet(p.Y),
        "inverse_block_diag_sum": U.inverse_block_diag_sum(),
        "inverse_diagonal": U.inverse_diagonal(),
    }
    for name, found in results.items():
        expected = FUNCTIONS[name].structured(p, method=method)
        actual = (found,) if isinstance(found, Tensor) else found
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), name


@each_route
@each_noise
def test_results_that_share_a_factorisation_are_differentiable(noise: str, method: str) -> None:
    """One object, several results, one backward; and first used without gradients."""
    p = map_problem(lambda x: x.requires_grad_(), make_problem(4, 3, batch=(2,), noise=noise))
    U, inputs = covariance(p, method=method), list(leaves(p).values())
    with torch.no_grad():
        U.logdet()
    loss = U.logdet().sum() + U.solve(p.Y).square().sum() + U.inverse_diagonal().sum()
    dense = (
        reference.kron_logdet(p.M, p.K, **p.noise).sum()
        + reference.kron_solve(p.M, p.K, p.Y, **p.noise).square().sum()
        + reference.inverse_diagonal(p.M, p.K, **p.noise).sum()
    )
    torch.testing.assert_close(grad(loss, inputs), grad(dense, inputs))


@each_route
@each_noise
def test_solve_inverts_the_product(noise: str, method: str, assert_close: Check) -> None:
    p = make_problem(30, 5, batch=(2,), noise=noise)
    U, kappa = covariance(p, method=method), condition_number(p)
    assert_close(U.solve(U.matmul(p.Y)), p.Y, condition=kappa)
    assert_close(U.matmul(U.solve(p.Y)), p.Y, condition=kappa)


def test_first_use_in_inference_mode() -> None:
    """Then with gradients: inference tensors must not be what is kept."""
    p = make_problem(4, 3)
    K = p.K.clone().requires_grad_()
    U = tk.KroneckerPlusNoise(p.M, K, **p.noise)
    with torch.inference_mode():
        U.logdet()
    (g,) = grad(U.logdet(), K)
    K2 = p.K.clone().requires_grad_()
    torch.testing.assert_close(g, grad(reference.kron_logdet(p.M, K2, **p.noise), K2)[0])


def test_argument_changed_in_place_after_the_factorisation() -> None:
    """An optimiser's step: the new value or an error, never a mixture of old and new."""
    p = make_problem(4, 3, noise="diagonal")
    s = p.noise["log_noise"].clone()
    U = tk.KroneckerPlusNoise(p.M, p.K, log_noise=s)
    U.logdet()
    s.add_(1.0)
    try:
        value = U.logdet()
    except RuntimeError:
        return
    torch.testing.assert_close(value, reference.kron_logdet(p.M, p.K, log_noise=s))


# ---------------------------------------------------------------- samples


def root(U: tk.KroneckerPlusNoise, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """F of U = F Fᵀ: the draws whose standard normal numbers are the unit vectors."""
    n = U.shape[-1]

    def unit_vectors(shape: tuple[int, ...], **options: object) -> Tensor:
        eye = torch.eye(n, dtype=U.dtype).reshape(n, *[1] * len(U.batch_shape), *U.event_shape)
        return eye.expand(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", unit_vectors)
        draws: Tensor = U.sample((n,))
    return draws.flatten(-2).movedim(0, -1)


@each_route
@each_noise
@pytest.mark.parametrize("kind", kinds_for(torch.float32))
def test_sample_is_a_root_of_U(
    kind: str, noise: str, method: str, monkeypatch: pytest.MonkeyPatch, assert_close: Check
) -> None:
    p = make_problem(5, 3, kind=kind, batch=(2,), noise=noise)
    F = root(covariance(p, method=method), monkeypatch)
    expected = reference.covariance_matrix(p.M, p.K, **p.noise)
    assert_close(F @ F.mT, expected, condition=condition_number(p))


@each_batch
def test_sample_shapes_and_generator(batch: str) -> None:
    p = make_problem(4, 3, batch=BATCHES[batch])
    U = covariance(p)
    assert U.sample().shape == (*U.batch_shape, 4, 3)
    draws = [U.sample((5, 2), generator=generator(seed)) for seed in (1, 1, 2)]
    assert draws[0].shape == (5, 2, *U.batch_shape, 4, 3)
    assert torch.equal(draws[0], draws[1])
    assert draws[0].numel() == 0 or not torch.equal(draws[0], draws[2])


@each_route
@each_noise
@pytest.mark.parametrize("kind", ["generic", "identity", "zero_M", "zero_K", "rank_deficient"])
def test_samples_are_differentiable(kind: str, noise: str, method: str) -> None:
    """The draw moves smoothly with M, K and the noise, repeated eigenvalues or not."""
    p = make_problem(3, 2, kind=kind, noise=noise)

    def draw(M: Tensor, K: Tensor, noise_argument: Tensor) -> Tensor:
        M, K = (M + M.mT) / 2, (K + K.mT) / 2
        key = next(iter(p.noise))
        Sigma = (noise_argument + noise_argument.mT) / 2 if key == "Sigma" else noise_argument
        U = tk.KroneckerPlusNoise(M, K, **{key: Sigma}, method=method)
        sample: Tensor = U.sample((2,), generator=generator(3))
        return sample

    inputs = tuple(x.requires_grad_() for x in (p.M, p.K, *p.noise.values()))
    assert gradcheck(draw, inputs, check_forward_ad=True)


def test_a_copy_takes_the_same_route() -> None:
    p = make_problem(6, 2)
    U = tk.KroneckerPlusNoise(p.M, p.K, **p.noise)
    used, twin = U.method_used, copy.deepcopy(U)
    assert twin.method_used == used
    assert torch.equal(twin.solve(p.Y), U.solve(p.Y))
