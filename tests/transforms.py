"""The README's table of supported transforms, made by trying each one on each function.

`python tests/transforms.py` prints it. A cell is ✓ where the transform gives what the dense twin
gives, and "raises" where it is refused with NotImplementedError; anything else is an exception.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from battery import ALL, NOISES, as_tuple, from_leaves, leaves, symmetrised
from devices import DEVICE
from problems import make_problem
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close

import torch_kronlik as tk
from torch_kronlik import expm, reference

Scalar = Callable[..., Tensor]


class Case(NamedTuple):
    """A function and its dense twin, each as a scalar made of its results."""

    structured: Scalar
    dense: Scalar
    values: tuple[Tensor, ...]

    @property
    def every(self) -> tuple[int, ...]:
        return tuple(range(len(self.values)))

    def agree(self, transform: Callable[[Scalar], Callable[..., Any]]) -> None:
        """The transform of both, at the same point."""
        same(transform(self.structured)(*self.values), transform(self.dense)(*self.values))


def same(actual: Any, expected: Any) -> None:
    assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def scalar(f: Callable[..., Any]) -> Scalar:
    """The sum of the sines of all results: curved, so that every order of derivative shows."""
    return lambda *values: sum(x.sin().sum() for x in as_tuple(f(*values)))  # type: ignore[return-value]


# ---------------------------------------------------------------- functions


def _structured_case(name: str, noise: str) -> Case:
    problem = make_problem(3, 2, noise=noise)
    keys = list(leaves(problem))

    def of_leaves(f: Callable[..., Any]) -> Scalar:
        return scalar(
            lambda *values: f(symmetrised(from_leaves(dict(zip(keys, values, strict=True)))))
        )

    return Case(
        of_leaves(ALL[name].structured), of_leaves(ALL[name].dense), tuple(leaves(problem).values())
    )


def _block_case(f: Callable[..., Tensor], g: Callable[..., Tensor]) -> list[Case]:
    A = torch.randn(4, 6, dtype=torch.float64)
    return [Case(scalar(f), scalar(g), (A,))]


def _expm_case(f: Callable[..., Tensor], g: Callable[..., Tensor]) -> list[Case]:
    d, v = torch.rand(2, 3, dtype=torch.float64)
    return [Case(scalar(f), scalar(g), (d, torch.randn(3, 3).double() / 3, v))]


def _dense_exponential(d: Tensor, A: Tensor, v: Tensor) -> Tensor:
    return torch.linalg.matrix_exp(d[..., None] * A) @ v


def _dense_jacobian(d: Tensor, A: Tensor, v: Tensor) -> Tensor:
    """The Fréchet derivatives as corners of larger exponentials."""
    X, n = d[:, None] * A, len(d)
    columns = []
    for k in range(n):
        E = torch.zeros_like(X).index_put((torch.tensor([k]),), A[None, k])
        block = torch.cat([torch.cat([X, E], 1), torch.cat([torch.zeros_like(X), X], 1)])
        columns.append(torch.linalg.matrix_exp(block)[:n, n:] @ v)
    return torch.stack(columns, 1)


def cases() -> dict[str, list[Case]]:
    """By public name."""
    torch.manual_seed(0)
    found = {name: [_structured_case(name, noise) for noise in NOISES] for name in sorted(ALL)}
    found["block_diag_sum"] = _block_case(
        lambda A: tk.block_diag_sum(A, 2), lambda A: reference.block_diag_sum(A, 2)
    )
    found["block_diag"] = _block_case(
        lambda A: tk.block_diag(A, 1, 2), lambda A: reference.block_diag(A, 1, 2)
    )
    found["expm_diag_multiply"] = _expm_case(expm.expm_diag_multiply, _dense_exponential)
    found["expm_diag_jacobian"] = _expm_case(expm.expm_diag_jacobian, _dense_jacobian)
    return found


# ---------------------------------------------------------------- transforms


def _gradient(f: Scalar, before: int = 0) -> Callable[..., list[Tensor]]:
    """By plain autograd, after ``before`` other gradients, each summed by its sines."""

    def of(*values: Tensor) -> list[Tensor]:
        xs = [x.clone().requires_grad_() for x in values]
        y = f(*xs)
        for _ in range(before):
            gs = torch.autograd.grad(y, xs, create_graph=True, allow_unused=True)
            y = torch.stack([g.sin().sum() for g in gs if g is not None]).sum()
        return list(torch.autograd.grad(y, xs, allow_unused=True, materialize_grads=True))

    return of


def _forward(f: Scalar) -> Callable[..., Tensor]:
    """By dual numbers, all tensors moved at once."""

    def of(*values: Tensor) -> Tensor:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, x.cos()) for x in values]
            tangent = forward_ad.unpack_dual(f(*duals)).tangent
        assert tangent is not None
        return tangent

    return of


def _jvp(f: Scalar) -> Callable[..., Any]:
    return lambda *values: jvp(f, values, tuple(x.cos() for x in values))


def _mapped(f: Callable[..., Any], c: Case) -> Any:
    many = [torch.stack([x, x * 1.1]) for x in c.values]
    return vmap(f)(*many)


def _looped(f: Callable[..., Any], c: Case) -> Any:
    each = [f(*(x * k for x in c.values)) for k in (1.0, 1.1)]
    if isinstance(each[0], Tensor):
        return torch.stack(each)
    return tuple(torch.stack(x) for x in zip(*each, strict=True))


def _check_compiled(c: Case, backward: bool) -> None:
    # aot_eager: what is captured is the question here; inductor's kernels have tests of their own
    torch.compiler.reset()
    compiled = torch.compile(c.structured, fullgraph=True, backend="aot_eager")
    if backward:
        same(_gradient(compiled)(*c.values), _gradient(c.dense)(*c.values))
    else:
        same(compiled(*c.values), c.dense(*c.values))


class _Module(torch.nn.Module):
    def __init__(self, f: Scalar) -> None:
        super().__init__()
        self.f = f

    def forward(self, *values: Tensor) -> Tensor:
        return self.f(*values)


def _check_exported(c: Case) -> None:
    exported = torch.export.export(_Module(c.structured), c.values)
    same(exported.module()(*c.values), c.dense(*c.values))


def _check_autocast(c: Case) -> None:
    """float32 arguments keep every bit, half-precision ones are cast up."""
    single = [x.float() for x in c.values]
    half = [x.bfloat16() for x in c.values]
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert torch.equal(c.structured(*single), _without(c.structured, single))
        found = c.structured(*half)
        assert torch.equal(found, _without(c.structured, [x.float() for x in half]))


def _without(f: Scalar, values: list[Tensor]) -> Tensor:
    with torch.autocast(DEVICE.type, enabled=False):
        return f(*values)


TRANSFORMS: dict[str, Callable[[Case], None]] = {
    "reverse": lambda c: c.agree(_gradient),
    "forward": lambda c: c.agree(_forward),
    "rev/rev": lambda c: c.agree(lambda f: _gradient(f, 1)),
    "fwd/rev": lambda c: c.agree(lambda f: _jvp_of_gradient(f, c)),
    "third": lambda c: c.agree(lambda f: _gradient(f, 2)),
    "`grad`": lambda c: c.agree(lambda f: grad(f, c.every)),
    "`jvp`": lambda c: c.agree(_jvp),
    "`hessian`": lambda c: c.agree(lambda f: hessian(f, c.every)),
    "`jacfwd(jacrev)`": lambda c: c.agree(lambda f: jacfwd(jacrev(f, c.every), c.every)),
    "`vmap`": lambda c: same(_mapped(c.structured, c), _looped(c.dense, c)),
    "`vmap(grad)`": lambda c: same(
        _mapped(grad(c.structured, c.every), c), _looped(grad(c.dense, c.every), c)
    ),
    "compile": lambda c: _check_compiled(c, backward=False),
    "compile, backward": lambda c: _check_compiled(c, backward=True),
    "export": _check_exported,
    "autocast": _check_autocast,
}


def _jvp_of_gradient(f: Scalar, c: Case) -> Callable[..., Any]:
    return lambda *values: jvp(grad(f, c.every), values, tuple(x.cos() for x in values))


# ---------------------------------------------------------------- the table


def cell(check: Callable[[Case], None], of: list[Case]) -> str:
    try:
        for case in of:
            check(case)
    except NotImplementedError:
        return "raises"
    return "✓"


def row(name: str, of: list[Case]) -> str:
    cells = [cell(check, of) for check in TRANSFORMS.values()]
    return f"| `{name}` | {' | '.join(cells)} |"


def header() -> list[str]:
    return [f"| function | {' | '.join(TRANSFORMS)} |", "| --- |" + " :-: |" * len(TRANSFORMS)]


def table() -> str:
    return "\n".join([*header(), *(row(name, of) for name, of in cases().items())])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(table())
