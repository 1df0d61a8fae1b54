"""torch.compile and torch.export of the structured functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from battery import ALL, NOISES, from_leaves, leaves
from devices import no_compiler
from problems import make_problem
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import grad

import torch_kronlik as tk

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    # What the compiler says of its caches being off, and of its own internals.
    pytest.mark.filterwarnings(
        "ignore:dynamo_pgo force disabled:UserWarning",
        "ignore::DeprecationWarning",
        "ignore:.*online softmax.*:UserWarning",
    ),
]

NAMES = ["kron_gaussian_nll", "kron_solve", "kron_matmul", "inverse_diagonal"]


def total(name: str, noise: str) -> Callable[..., Tensor]:
    keys = list(leaves(make_problem(1, 1, noise=noise)))

    def f(*values: Tensor) -> Tensor:
        p = from_leaves(dict(zip(keys, values, strict=True)))
        total: Tensor = ALL[name].structured(p)[0].square().sum()
        return total

    return f


def inputs(noise: str, T: int = 5, **options: Any) -> list[Tensor]:
    return [x.requires_grad_() for x in leaves(make_problem(T, 3, noise=noise, **options)).values()]


def check(compiled: Callable[..., Tensor], f: Callable[..., Tensor], values: list[Tensor]) -> None:
    actual, expected = compiled(*values), f(*values)
    torch.testing.assert_close(actual, expected)
    found = grad(actual, values, materialize_grads=True)
    torch.testing.assert_close(found, grad(expected, values, materialize_grads=True))


@pytest.mark.parametrize(("name", "noise"), list(zip(NAMES, NOISES * 2, strict=True)))
def test_one_graph_forward_and_backward(name: str, noise: str) -> None:
    f = total(name, noise)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    check(compiled, f, inputs(noise))
    check(compiled, f, inputs(noise, seed=1))
    assert counter.frame_count == 1


@no_compiler
def test_generated_code() -> None:
    """The default backend, which writes and compiles code."""
    f = total("kron_gaussian_nll", "diagonal")
    compiled = torch.compile(f, fullgraph=True)
    check(compiled, f, inputs("diagonal"))


def test_new_sizes_do_not_compile_again() -> None:
    """Sizes marked as dynamic: neither a new batch nor a new T needs another graph."""
    f = total("kron_gaussian_nll", "full")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter, dynamic=True)
    check(compiled, f, inputs("full", 5, batch=(2,)))
    compiled_once = counter.frame_count
    for n, T in ((3, 5), (7, 6), (4, 9)):
        check(compiled, f, inputs("full", T, batch=(n,)))
    assert counter.frame_count == compiled_once


def test_gradient_inside_the_compiled_function() -> None:
    f = total("kron_gaussian_nll", "diagonal")
    g = torch.func.grad(f, argnums=(0, 1, 2, 3))
    values = [x.detach() for x in inputs("diagonal")]
    compiled = torch.compile(g, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*values), g(*values))


def test_vmap_inside_the_compiled_function() -> None:
    f = torch.func.vmap(total("kron_gaussian_nll", "full"), (0, None, 0, None))
    p = make_problem(4, 3, batch={"Y": (2,), "M": (), "K": (2,), "noise": ()})
    values = list(leaves(p).values())
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*values), f(*values))


class Model(torch.nn.Module):
    def forward(self, Y: Tensor, M: Tensor, K: Tensor, log_noise: Tensor) -> Tensor:
        nll: Tensor = tk.kron_gaussian_nll(Y, M, K, log_noise=log_noise)
        return nll


def test_export() -> None:
    """Our operators stay whole in the exported program, which takes other batch sizes."""
    first, second = (
        tuple(leaves(make_problem(4, 3, batch=(n,), noise="diagonal")).values()) for n in (2, 5)
    )
    batch = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(Model(), first, dynamic_shapes=(batch,) * 4)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "torch_kronlik.quad_logdet.dense_diagonal_spectral" in names
    for values in (first, second):
        torch.testing.assert_close(program.module()(*values), Model()(*values))
