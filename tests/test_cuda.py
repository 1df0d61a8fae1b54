"""What only a GPU can show: streams, graphs, waiting, a second device, and the same results there.

Collected with ``--device cuda`` alone, see conftest.py. The kernels' index arithmetic is in
test_cuda_emulated.py, which needs no GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import test_small as small
import torch
from battery import ALL, FUNCTIONS, NOISES, ROUTES, gradients, leaves, map_problem
from conftest import check_close
from problems import Problem, condition_number, make_new_rows, make_problem, relayout
from test_small import (  # noqa: F401  the same tests, on the device
    test_a_fault_is_told_and_stays_in_its_problem,
    test_any_shape_batch_and_layout,
    test_every_batch_pattern,
    test_every_kind,
    test_every_memory_layout,
    test_same_bits_whatever_shares_the_lanes,
)
from torch import Tensor
from torch.distributions import kl_divergence

import torch_kronlik as tk
from torch_kronlik import ops
from torch_kronlik.factor import plan

each_noise = pytest.mark.parametrize("noise", NOISES)
LONG = 100_000_000  # clock cycles: some 50 ms


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    monkeypatch.setattr(small, "make_problem", partial(make_problem, device=device))
    with torch.cuda.device(device):
        yield


def moved(p: Problem, device: torch.device) -> Problem:
    return map_problem(lambda x: x.to(device), p)


# ---------------------------------------------------------------- calls that are tried in each way


def value_and_gradients(p: Problem, M: Any = None, **options: Any) -> list[Tensor]:
    """The likelihood, and its gradients in all but an M that is given here."""
    own = {k: x.detach().requires_grad_() for k, x in leaves(p).items() if k != "M" or M is None}
    noise = {k: x for k, x in own.items() if k not in ("Y", "M", "K")}
    nll = tk.kron_gaussian_nll(own["Y"], own.get("M", M), own["K"], **noise, **options)
    return [nll, *torch.autograd.grad(nll.sum(), list(own.values()))]


def constant_rows(p: Problem) -> list[Tensor]:
    return value_and_gradients(p, tk.symmetric_eigen(p.M))


def kernels(p: Problem) -> list[Tensor]:
    """Every native operator."""
    (noise,) = p.noise.values()
    full = "Sigma" in p.noise
    lam, R, logdet, _ = ops.whiten_small(p.K, noise, full)
    s = p.M.diagonal(dim1=-2, dim2=-1).contiguous()
    T = p.Y.shape[-2]
    return [
        *(x for x in ops.small_nll(p.Y, p.M, p.K, noise, full, True) if x.is_floating_point()),
        lam, R, logdet, *ops.kron_diag_sums(s, lam), *ops.kron_diag_scale(s, lam, p.Y),
        ops.pivoted_cholesky(p.M, T)[0], ops.block_diag_sum(p.M, T // 2),
        ops.block_diag_expand(p.K, T),
    ]  # fmt: skip


CALLS: dict[str, Callable[[Problem], list[Tensor]]] = {
    "kernels": kernels,
    "small": value_and_gradients,
    **{route: partial(value_and_gradients, method=route) for route in ROUTES},
    "constant": constant_rows,
}


def batch_of_small(device: torch.device, noise: str = "full", **options: Any) -> Problem:
    return make_problem(32, 4, batch=(6,), noise=noise, device=device, **options)


# ---------------------------------------------------------------- streams


@each_noise
@pytest.mark.parametrize("name", CALLS)
def test_work_goes_to_the_current_stream(name: str, noise: str, device: torch.device) -> None:
    """On another stream the inputs would still be NaN: they are written after a long wait."""
    p, f = batch_of_small(device, noise), CALLS[name]
    expected = f(p)
    late = map_problem(lambda x: torch.full_like(x, torch.nan), p)
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        for x, y in zip(leaves(late).values(), leaves(p).values(), strict=True):
            x.copy_(y)
        found = f(late)
    stream.synchronize()
    for x, y in zip(found, expected, strict=True):
        assert x.device == p.Y.device
        torch.testing.assert_close(x, y)


def test_kernels_return_before_they_are_done(device: torch.device) -> None:
    p = batch_of_small(device)
    kernels(p)  # the first call may have to load code, which waits
    torch.cuda.synchronize(device)
    torch.cuda._sleep(LONG)
    done = torch.cuda.Event()
    kernels(p)
    done.record()
    assert not done.query()
    torch.cuda.synchronize(device)


# ---------------------------------------------------------------- small problems


@each_noise
@pytest.mark.parametrize("size", [size for size in small.SIZES if plan.CUDA.fits_small(*size)])
def test_every_small_size(size: tuple[int, int], noise: str, dtype: torch.dtype) -> None:
    small.test_every_size(size, noise, dtype)


# ---------------------------------------------------------------- waiting for the device


def waits(f: Callable[[], object]) -> int:
    """How often f makes the host wait for a result."""
    f()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # which warns itself, once
            f()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


@each_noise
def test_operators_and_products_never_wait(noise: str, device: torch.device) -> None:
    p = batch_of_small(device, noise)
    assert waits(lambda: torch.ones(1, device=device).item()) == 1, "waits are counted"
    assert waits(lambda: kernels(p)) == 0
    assert waits(lambda: tk.block_diag_sum(p.M, 8)) == 0
    assert waits(lambda: tk.kron_matmul(p.M, p.K, p.Y, **p.noise)) == 0


@each_noise
def test_the_likelihood_waits_for_its_checks_alone(noise: str, device: torch.device) -> None:
    """One status for a small problem. With constant rows: of the whitening, of the rows, of their
    eigenvalues with λ, of each of the two results."""
    p = batch_of_small(device, noise)
    M = tk.symmetric_eigen(p.M)
    assert waits(lambda: value_and_gradients(p)) == 1
    assert waits(lambda: value_and_gradients(p, M)) == 5


# ---------------------------------------------------------------- graphs


def captured(f: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            f()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = f()
    return graph, out


def replay(graph: torch.cuda.CUDAGraph, static: Problem, p: Problem) -> None:
    for x, y in zip(leaves(static).values(), leaves(p).values(), strict=True):
        x.copy_(y)
    graph.replay()
    torch.cuda.synchronize()


@each_noise
@pytest.mark.parametrize("name", ["kernels", "small", "constant"])
def test_a_graph_computes_on_new_inputs(
    name: str, noise: str, dtype: torch.dtype, device: torch.device
) -> None:
    static = batch_of_small(device, noise, dtype=dtype)
    rows = tk.symmetric_eigen(static.M)
    f = CALLS[name] if name != "constant" else partial(value_and_gradients, M=rows)
    graph, out = captured(lambda: f(static))
    for seed in (1, 2):
        p = batch_of_small(device, noise, dtype=dtype, seed=seed)
        replay(graph, static, p)
        for x, y in zip(out, f(p), strict=True):
            torch.testing.assert_close(x, y)


@each_noise
def test_a_fault_in_a_graph_is_a_nan_and_stays_in_its_problem(
    noise: str, device: torch.device
) -> None:
    static = batch_of_small(device, noise)
    graph, out = captured(lambda: value_and_gradients(static))
    good = batch_of_small(device, noise, seed=1)
    others = [0, 1, 2, 4, 5]
    for key, factor in (("M", -50.0), ("K", -50.0), ("Y", torch.nan), ("M", torch.inf)):
        bad = map_problem(torch.clone, good)
        leaves(bad)[key][3] *= factor
        replay(graph, static, bad)
        for x, y in zip(out, value_and_gradients(good), strict=True):
            assert x[3].isnan().all(), (key, factor)
            assert torch.equal(x[others], y[others]), (key, factor)


def test_a_fault_in_a_graph_of_constant_rows_is_not_finite(device: torch.device) -> None:
    static = batch_of_small(device)
    M = tk.SymmetricEigen(*tk.symmetric_eigen(static.M))
    graph, out = captured(lambda: value_and_gradients(static, M))
    good = batch_of_small(device)
    for key, factor in (("K", -50.0), ("Sigma", -1.0), ("K", torch.nan), ("Y", torch.inf)):
        bad = map_problem(torch.clone, good)
        leaves(bad)[key][3] *= factor
        replay(graph, static, bad)
        assert out[0].isfinite().tolist() == [True, True, True, False, True, True], (key, factor)


# ---------------------------------------------------------------- another device


@pytest.mark.parametrize("name", CALLS)
def test_the_tensors_decide_on_which_device(name: str, device: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    p, f = batch_of_small(device), CALLS[name]
    found = f(moved(p, other))
    assert all(x.device == other for x in found)
    assert torch.cuda.current_device() != other.index
    for x, y in zip(found, f(p), strict=True):
        torch.testing.assert_close(x.cpu(), y.cpu())


# ---------------------------------------------------------------- beside the CPU

SIZES = [(6, 3), (64, 16), (40, 17), (130, 2), (150, 9)]  # each route, both ways to whiten
HARD = ["generic", "rank_one_M", "zero_K", "repeated_blocks", "rbf", "spread_noise"]


@each_noise
@pytest.mark.parametrize("method", ["auto", *ROUTES])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_function_and_gradient_as_on_the_cpu(
    size: tuple[int, int], method: str, noise: str, dtype: torch.dtype, device: torch.device
) -> None:
    p = make_problem(*size, noise=noise, dtype=dtype)
    check_as_on_the_cpu(p, device, method)


@each_noise
@pytest.mark.parametrize("kind", HARD)
def test_hard_problems_as_on_the_cpu(
    kind: str, noise: str, dtype: torch.dtype, device: torch.device
) -> None:
    for size in ((7, 3), (100, 3)):
        p = make_problem(*size, kind=kind, noise=noise, dtype=dtype, batch=(2,))
        if condition_number(p) * torch.finfo(dtype).eps < 1e-4:
            check_as_on_the_cpu(p, device, "auto")


def check_as_on_the_cpu(p: Problem, device: torch.device, method: str) -> None:
    wide, there = map_problem(torch.Tensor.double, p), moved(p, device)
    kappa, floor = condition_number(p), float(p.Y.shape[-2] * p.Y.shape[-1])
    for name, f in ALL.items():
        options = {"method": method} if name in FUNCTIONS else {}
        run = partial(f.structured, **options)
        for x, y in zip(run(there), run(wide), strict=True):
            assert x.device == there.Y.device
            check_close(x, y, condition=kappa, dims=f.dims, floor=0 if f.dims else floor)
        found, expected = gradients(run, there), gradients(run, wide)
        for key, x in found.items():
            dims = 1 if key == "log_noise" else 2
            check_close(x, expected[key], condition=kappa, quantity="gradient", dims=dims)


def others(p: Problem, rows: Any) -> dict[str, Tensor]:
    """What is built on these functions, by name."""
    U = tk.KroneckerPlusNoise(p.M, p.K, **p.noise)
    d = tk.KroneckerNormal(0 * p.Y, p.M, p.K, **p.noise)
    post = tk.condition(p.Y, p.M, p.K, rows.M_cross, rows.M_test, **p.noise)
    s, _ = tk.symmetric_eigen(p.M)
    a = p.K[0] / 3
    return {
        "diagonal": U.diagonal(), "to_dense": U.to_dense(), "matmul": U.matmul(p.Y),
        "log_prob": d.log_prob(p.Y), "entropy": d.entropy(), "variance": d.variance,
        "kl": kl_divergence(d, tk.KroneckerNormal(p.Y, p.M, 2 * p.K, **p.noise)),
        "mean": post.mean, "observation_variance": post.observation_variance,
        "row_covariance": post.row_covariance, "test_log_prob": post.log_prob(rows.Y_test),
        "leave_one_out": torch.stack(tk.leave_one_out(p.Y, p.M, p.K, **p.noise)),
        "leave_one_row_out": tk.leave_one_row_out(p.Y, p.M, p.K, **p.noise)[1],
        "eigenvalues": s, "block": tk.block_diag(p.M, 1, 2), "blocks": tk.block_diag_sum(p.M, 2),
        "expm": tk.expm_diag_multiply(a, p.K, a), "jacobian": tk.expm_diag_jacobian(a, p.K, a),
    }  # fmt: skip


@each_noise
def test_what_is_built_on_them_as_on_the_cpu(
    noise: str, dtype: torch.dtype, device: torch.device
) -> None:
    rows = make_new_rows(20, 4, 3, noise=noise, dtype=dtype)
    there = rows._replace(
        problem=moved(rows.problem, device),
        **{k: getattr(rows, k).to(device) for k in rows._fields[1:]},
    )
    found, expected = others(there.problem, there), others(rows.problem, rows)
    rounding = 1e4 * torch.finfo(dtype).eps
    for name, x in found.items():
        assert x.device == there.problem.Y.device, name
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(
            x.cpu(), expected[name], rtol=rounding, atol=rounding * scale, msg=name
        )


@each_noise
def test_loss_and_samples(noise: str, device: torch.device) -> None:
    p = make_problem(20, 3, noise=noise, device=device)
    loss = tk.KroneckerGaussianNLLLoss(3).to(device, torch.float64)
    twin = tk.KroneckerGaussianNLLLoss(3).double()
    torch.testing.assert_close(loss(p.Y, p.M, p.K).cpu(), twin(*moved(p, torch.device("cpu"))[:3]))
    generator = torch.Generator(device).manual_seed(0)
    U = tk.KroneckerPlusNoise(p.M, p.K, **p.noise)
    draws = U.sample((20_000,), generator=generator).flatten(-2)
    dense = U.to_dense()
    assert draws.device == dense.device
    assert (torch.cov(draws.mT) - dense).abs().max() < 0.1 * dense.abs().max()


def test_other_devices_are_refused_by_name(device: torch.device) -> None:
    p = make_problem(4, 2, device=device)
    with pytest.raises(ValueError, match="K must be on the device of M"):
        tk.kron_gaussian_nll(p.Y, p.M, p.K.cpu(), **p.noise)
    with pytest.raises(RuntimeError, match="on different devices"):
        ops.kron_diag_sums(p.M[0], p.K[0].cpu())


@pytest.mark.parametrize("how", ["transposed", "strided", "offset", "batch_inside"])
def test_layouts_of_every_kernel(how: str, dtype: torch.dtype, device: torch.device) -> None:
    p = batch_of_small(device, dtype=dtype)
    found, expected = kernels(map_problem(lambda x: relayout(x, how), p)), kernels(p)
    for x, y in zip(found, expected, strict=True):
        check_close(x, y.double(), condition=100.0)
