"""K and the noise diagonalised together, in the native kernel (D ≤ 16) and by LAPACK beyond."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath  # type: ignore[import-untyped]
import pytest
import torch
from devices import opcheck
from problems import LAYOUTS, make_problem, relayout
from torch import Tensor

from torch_kronlik.errors import LinAlgError
from torch_kronlik.factor import whiten
from torch_kronlik.noise import make_noise
from torch_kronlik.ops import whiten_small

Check = Callable[..., None]
SIZES = (1, 2, 5, 16, 17)
each_noise = pytest.mark.parametrize("noise", ["full", "diagonal"])
each_size = pytest.mark.parametrize("D", SIZES)


def arguments(D: int, noise: str, **options: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    p = make_problem(2, D, noise=noise, **options)
    return p.K, p.noise.get("Sigma"), p.noise.get("log_noise")


def whitened(
    K: Tensor, Sigma: Tensor | None, log_noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return whiten.whiten(K, make_noise(Sigma, log_noise))


def dense_noise(Sigma: Tensor | None, log_noise: Tensor | None) -> Tensor:
    return torch.diag_embed(log_noise.exp()) if log_noise is not None else Sigma  # type: ignore[return-value]


@each_size
@each_noise
@pytest.mark.parametrize("kind", ["generic", "rank_one_K", "zero_K", "identity", "huge_factors"])
def test_both_become_diagonal(D: int, noise: str, kind: str, dtype: torch.dtype) -> None:
    K, Sigma, log_noise = arguments(D, noise, kind=kind, batch=(3,), dtype=dtype)
    lam, R, logdet = whitened(K, Sigma, log_noise)
    S, eye = dense_noise(Sigma, log_noise).double(), torch.eye(D, dtype=torch.float64)
    R, K = R.double(), K.double()
    tolerance = 100 * D * torch.finfo(dtype).eps
    scale = lam.double().abs().amax(-1)[:, None, None]
    torch.testing.assert_close(R.mT @ S @ R, eye.expand(3, D, D), rtol=0, atol=tolerance)
    left = R.mT @ K @ R - torch.diag_embed(lam.double())
    assert bool((left.abs() <= tolerance * scale).all())
    torch.testing.assert_close(logdet.double(), torch.logdet(S), rtol=tolerance, atol=tolerance)


@each_size
@each_noise
def test_eigenvalues_ascend(D: int, noise: str) -> None:
    lam = whitened(*arguments(D, noise, batch=(4,)))[0]
    assert bool((lam.diff() >= 0).all())


@each_noise
def test_small_eigenvalues_of_graded_matrices_keep_their_digits(noise: str) -> None:
    """Noise variances over twenty decades, against 50 digits."""
    K, Sigma, log_noise = arguments(5, noise, kind="spread_noise")
    lam = whitened(K, Sigma, log_noise)[0]
    with mpmath.workdps(50):
        if log_noise is not None:
            S = mpmath.diag([mpmath.exp(x) for x in log_noise.tolist()])
        else:
            S = mpmath.matrix(Sigma.tolist())  # type: ignore[union-attr]
        L = mpmath.cholesky(S) ** -1
        expected = mpmath.eigsy(L * mpmath.matrix(K.tolist()) * L.T, eigvals_only=True)
        expected = torch.tensor([float(x) for x in sorted(expected)], dtype=torch.float64)
    torch.testing.assert_close(lam, expected, rtol=1e-12, atol=0)


@each_noise
@pytest.mark.parametrize("log_scale", [-700.0, -300.0, 300.0, 600.0])
def test_extreme_noise(noise: str, log_scale: float) -> None:
    """λ scales with 1/Σ, as far as float64 goes."""
    K, Sigma, log_noise = arguments(4, noise)
    lam = whitened(K, Sigma, log_noise)[0]
    factor = torch.tensor(log_scale, dtype=torch.float64).exp()
    scaled = whitened(
        K,
        None if Sigma is None else Sigma * factor,
        None if log_noise is None else log_noise + log_scale,
    )[0]
    torch.testing.assert_close(scaled * factor, lam, rtol=1e-12, atol=0)


@each_noise
@pytest.mark.parametrize("how", LAYOUTS)
def test_any_layout(noise: str, how: str) -> None:
    given = arguments(3, noise, batch=(2, 3))
    relaid = [None if x is None else relayout(x, how) for x in given]
    for actual, expected in zip(whitened(*relaid), whitened(*given), strict=True):
        torch.testing.assert_close(actual, expected.expand(actual.shape), rtol=0, atol=0)


@each_noise
@pytest.mark.parametrize("D", [3, 17])
def test_broadcast_batches(D: int, noise: str) -> None:
    """λ and R at the joint batch shape, log det Σ at that of the noise."""
    K, Sigma, log_noise = arguments(D, noise, batch={"Y": (), "M": (), "K": (2, 1), "noise": (3,)})
    lam, R, logdet = whitened(K, Sigma, log_noise)
    assert lam.shape == (2, 3, D)
    assert R.shape == (2, 3, D, D)
    for i in range(2):
        for j in range(3):
            one = (K[i, 0], *(None if x is None else x[j] for x in (Sigma, log_noise)))
            alone = whitened(*one)
            torch.testing.assert_close(lam[i, j], alone[0])
            torch.testing.assert_close(logdet.expand(2, 3)[i, j], alone[2])


@each_noise
def test_empty_batch(noise: str) -> None:
    lam, R, logdet = whitened(*arguments(3, noise, batch=(0,)))
    assert (lam.shape, R.shape, logdet.shape) == ((0, 3), (0, 3, 3), (0,))


@each_size
def test_indefinite_noise_is_named(D: int) -> None:
    K, Sigma, _ = arguments(D, "full", batch=(3,))
    assert Sigma is not None
    Sigma[1] = -Sigma[1]
    with pytest.raises(LinAlgError, match=r"Sigma is not positive definite \(batch element 1\)"):
        whitened(K, Sigma, None)


@each_size
@each_noise
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(D: int, noise: str, value: float) -> None:
    for which, name in enumerate(("K", "Sigma", "log_noise")):
        given = arguments(D, noise, batch=(2,))
        bad = given[which]
        if bad is not None:
            bad[(1, *(0 for _ in bad.shape[1:-1]), D - 1)] = value
            with pytest.raises(ValueError, match=f"{name} must be finite"):
                whitened(*given)


@each_size
def test_overflow_is_refused(D: int) -> None:
    K = torch.eye(D, dtype=torch.float64)
    with pytest.raises(OverflowError):
        whitened(K, None, torch.full((D,), -1500.0, dtype=torch.float64))


@each_noise
def test_result_does_not_depend_on_threads(noise: str) -> None:
    K, Sigma, log_noise = arguments(4, noise, batch=(300,))
    given = (K, Sigma if log_noise is None else log_noise, log_noise is None)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(whiten_small(*given))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@each_noise
def test_opcheck(noise: str) -> None:
    K, Sigma, log_noise = arguments(3, noise, batch=(2,))
    given = (K, Sigma if log_noise is None else log_noise, log_noise is None)
    opcheck(whiten_small, given)
