"""torch.library.opcheck, all of its tests, on every operator that the public functions call.

The calls are collected from real use, so a new operator is checked without a new test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from battery import ALL, ROUTES, from_leaves, gradients, leaves, map_problem, symmetrised
from devices import KERNELS, only_cpu, opcheck
from problems import BATCHES, Problem, make_problem
from torch import Tensor
from torch.func import jvp
from torch.utils._python_dispatch import TorchDispatchMode

import torch_kronlik as tk

# Arguments with a derivative; the others are constants, such as a factorisation.
DIFFERENTIABLE = {"Y", "M", "K", "Sigma", "log_noise", "x", "g_q", "g_l", "dM", "dK", "dSigma", "A"}
OF_ITS_OWN: dict[str, set[str]] = {
    "kron_diag_sums": {"s", "lam"},
    "kron_diag_scale": {"s", "lam", "Y"},
}
# In the factors these refuse a derivative: it is the third, or not meant to be there at all.
OF_ITS_OWN |= {"logdet_hvp": {"dM", "dK", "dSigma"}, "constant_eigen": set(), "root_values": set()}
# Their results' shapes depend on the data, so they are never traced.
UNTRACED = {"without_zeros", "eigen_low_rank", "pivoted_cholesky"}
# Without tensors, or checked in a file of their own with all their options.
ELSEWHERE = {
    "cpu_instruction_set",
    "cuda_architectures",
    "has_lapack",
    "block_diag_expand",
    "block_diag_sum",
}
# Of missing entries and singular noise: in test_observed_calls.py.
ELSEWHERE |= {
    "column_form",
    "row_features",
    "capacitance",
    "missing",
    "border",
    "direct",
    "rotated",
    "positive",
}
ELSEWHERE |= {"kernel_residual", "limited"}  # in test_kernel_derivatives.py
ELSEWHERE |= {"orthonormaliser"}  # in test_regression.py
ELSEWHERE |= {"small_nll", "gaussian_nll_small", "expm_action", "expm_gradient", "expm_jacobian"}

Calls = dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]]


class Collector(TorchDispatchMode):
    """One call of each operator for each pattern of given and missing arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Calls = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "torch_kronlik":
            return func(*args, **(kwargs or {}))
        key = (func, *(a is None for a in args), *(a for a in args if isinstance(a, str)))
        self.found.setdefault(key, (func, tuple(args)))
        with self:  # a mode is off while it handles a call: on again for the kernel's own calls
            return func.redispatch(KERNELS, *args)


def use_everything(p: Problem, method: str) -> None:
    """Values, gradients and second derivatives of every function, and of the object's others."""
    tangents = tuple(leaves(symmetrised(map_problem(torch.randn_like, p))).values())

    for f in ALL.values():

        def of_values(*values: Tensor, f: Any = f) -> Any:
            q = from_leaves(dict(zip(leaves(p), values, strict=True)))
            return list(gradients(lambda r: f.structured(r, method=method), q).values())

        def value(*values: Tensor, f: Any = f) -> Any:
            q = from_leaves(dict(zip(leaves(p), values, strict=True)))
            return f.structured(q, method=method)

        of_values(*leaves(p).values())
        jvp(value, tuple(leaves(p).values()), tangents)
    tk.KroneckerPlusNoise(p.M, p.K, **p.noise, method=method).sample()
    pair = tk.symmetric_eigen(p.M)
    tk.KroneckerPlusNoise(pair, p.K, **p.noise).sample()
    tk.KroneckerPlusNoise(tk.LowRankRoot(p.Y), p.K, **p.noise).logdet()
    cross, test = p.M[..., :1, :], p.M[..., :1, :1] + 1
    tk.condition(p.Y, p.M, p.K, cross, test, **p.noise, method=method).rsample((2,))
    twice(p, method)


def twice(p: Problem, method: str) -> None:
    values = [x.clone().requires_grad_() for x in leaves(p).values()]
    q = from_leaves(dict(zip(leaves(p), values, strict=True)))
    results = tk.kron_inv_quad_logdet(q.M, q.K, q.Y, **q.noise, method=method)
    first = torch.autograd.grad([x.sum() for x in results], values, create_graph=True)
    torch.autograd.grad([g.square().sum() for g in first], values)


def collect(p: Problem, method: str) -> Calls:
    collector = Collector()
    with collector:
        use_everything(p, method)
    return collector.found


CASES: dict[str, Callable[[], Problem]] = {
    "diagonal": lambda: make_problem(4, 3, noise="diagonal"),
    "full, batches": lambda: make_problem(3, 2, batch=BATCHES["crossed"]),
}


def fresh(op: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of the arguments; those with a derivative require it."""
    name = op._schema.name.split("::")[1]
    wanted = OF_ITS_OWN.get(name, DIFFERENTIABLE)
    out = []
    for declared, x in zip(op._schema.arguments, args, strict=True):
        if isinstance(x, Tensor):
            x = x.detach().clone()
            x.requires_grad_(declared.name in wanted and x.is_floating_point())
        out.append(x)
    return tuple(out)


@pytest.mark.parametrize(
    ("case", "method"), [("diagonal", m) for m in ROUTES] + [("full, batches", ROUTES[0])]
)
def test_operators_in_use(case: str, method: str) -> None:
    seen = set()
    for op, args in collect(CASES[case](), method).values():
        name = op._schema.name.split("::")[1]
        pattern = (name, *(x is None for x in args)) if method == ROUTES[0] else name
        if name in UNTRACED | ELSEWHERE or pattern in seen:
            continue
        seen.add(pattern)
        opcheck(op, fresh(op, args))


@only_cpu
def test_every_operator_is_used_somewhere() -> None:
    found = {op._schema.name for m in ROUTES for op, _ in collect(CASES["diagonal"](), m).values()}
    declared = {
        schema.name
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("torch_kronlik::")
    }
    missing = {name.split("::")[1] for name in declared - found}
    assert missing <= ELSEWHERE
