"""Inside autocast regions everything computes in float32, whatever precision its arguments have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from battery import ALL, from_leaves, leaves, map_problem
from devices import DEVICE, not_emulated
from problems import make_problem
from torch import Tensor
from torch.func import hessian

import torch_kronlik as tk
from torch_kronlik import expm

HALF = [torch.bfloat16, torch.float16]
each_half = pytest.mark.parametrize("half", HALF, ids=["bfloat16", "float16"])
each_function = pytest.mark.parametrize("name", [*ALL, "block_diag_sum", "expm_diag_multiply"])


def function(name: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A scalar with a gradient in all arguments, and the arguments in float32."""
    if name in ALL:
        p = make_problem(6, 3, dtype=torch.float32)
        keys = list(leaves(p))

        def total(*values: Tensor) -> Tensor:
            results = ALL[name].structured(from_leaves(dict(zip(keys, values, strict=True))))
            return torch.stack([x.square().sum() for x in results]).sum()

        return total, list(leaves(p).values())
    A = torch.randn(6, 6)
    if name == "block_diag_sum":
        return lambda A: tk.block_diag_sum(A, 3).square().sum(), [A]
    f = getattr(expm, name)
    return lambda d, A, v: f(d, A, v).square().sum(), [torch.rand(6), A / 6, torch.randn(6)]


def region(half: torch.dtype, enabled: bool = True) -> Any:
    return torch.autocast(DEVICE.type, dtype=half, enabled=enabled)


@each_half
@each_function
def test_float32_stays_float32(name: str, half: torch.dtype) -> None:
    """Bit for bit what it is outside, the gradient included."""
    f, values = function(name)
    outside, inside = ([x.clone().requires_grad_() for x in values] for _ in range(2))
    expected = f(*outside)
    with region(half):
        value = f(*inside)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    found = torch.autograd.grad(value, inside, allow_unused=True)
    for x, y in zip(found, torch.autograd.grad(expected, outside, allow_unused=True), strict=True):
        assert (x is None) == (y is None)
        assert x is None or y is None or torch.equal(x, y)


@each_half
@each_function
def test_half_precision_arguments_are_cast_up(name: str, half: torch.dtype) -> None:
    f, values = function(name)
    values = [x.to(half) for x in values]
    wide = [x.float().requires_grad_() for x in values]
    expected = f(*wide)
    leaves = [x.clone().requires_grad_() for x in values]
    with region(half):
        value = f(*leaves)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    pairs = zip(
        torch.autograd.grad(value, leaves, allow_unused=True),
        torch.autograd.grad(expected, wide, allow_unused=True),
        strict=True,
    )
    for x, y in pairs:
        assert (x is None) == (y is None)
        assert x is None or torch.equal(x, y.to(half))


@each_half
def test_hessian_of_the_likelihood_inside_the_region(half: torch.dtype) -> None:
    """The rules of the operators run inside it too."""
    p = make_problem(4, 2, dtype=torch.float32)

    def nll(M: Tensor, K: Tensor, Sigma: Tensor) -> Tensor:
        return tk.kron_gaussian_nll(p.Y, M, K, Sigma=Sigma)

    values = (p.M, p.K, p.noise["Sigma"])
    expected = hessian(nll, (0, 1, 2))(*values)
    with region(half):
        found = hessian(nll, (0, 1, 2))(*values)
    for row, expected_row in zip(found, expected, strict=True):
        for x, y in zip(row, expected_row, strict=True):
            assert torch.equal(x, y)


@each_half
@not_emulated("autocast casts nothing there")
def test_compiled_inside_the_region(half: torch.dtype) -> None:
    p = make_problem(4, 2, dtype=torch.float32)
    net = torch.nn.Linear(2, 2)

    def loss(Y: Tensor) -> Tensor:
        residuals = net(Y)
        assert residuals.dtype == half
        return tk.kron_gaussian_nll(residuals, p.M, p.K, **p.noise)

    with region(half):
        expected = loss(p.Y)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(p.Y)
    assert compiled.dtype == torch.float32
    torch.testing.assert_close(compiled, expected)
    compiled.backward()
    assert net.weight.grad is not None


def test_half_precision_outside_a_region_is_refused() -> None:
    p = map_problem(torch.Tensor.bfloat16, make_problem(4, 2))
    with pytest.raises(TypeError, match=r"M must be float32 or float64, got torch\.bfloat16"):
        tk.kron_gaussian_nll(p.Y, p.M, p.K, **p.noise)
    with (
        region(torch.bfloat16, enabled=False),
        pytest.raises(TypeError, match="A must be float32 or float64"),
    ):
        tk.block_diag_sum(p.M, 2)
