"""What only a GPU can show: streams, graphs, a second device.

Collected with ``--device cuda`` alone, see conftest.py. The kernels' index arithmetic is in
test_cuda_emulated.py, which needs no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from battery import NOISES, ROUTES, kernels, leaves, map_problem, moved, value_and_gradients
from problems import Problem, make_problem
from torch import Tensor

import torch_kronlik as tk

each_noise = pytest.mark.parametrize("noise", NOISES)
LONG = 100_000_000  # clock cycles: some 50 ms


@pytest.fixture(autouse=True)
def on_the_device(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    with torch.cuda.device(device):
        yield


# ---------------------------------------------------------------- calls that are tried in each way


def constant_rows(p: Problem) -> list[Tensor]:
    return value_and_gradients(p, tk.symmetric_eigen(p.M))


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
