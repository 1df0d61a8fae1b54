"""What the structured functions have in common: each beside its dense twin, and how to call both.

Tests import it as `from battery import FUNCTIONS, ROUTES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from devices import KERNELS
from problems import Problem, relayout
from torch import Tensor
from torch.autograd import grad
from torch.utils._python_dispatch import TorchDispatchMode

import torch_kronlik as tk
from torch_kronlik import ops, reference
from torch_kronlik.factor.plan import METHODS

ROUTES = [m for m in METHODS if m != "auto"]
NOISES = ("full", "diagonal")
Tensors = tuple[Tensor, ...]
Call = Callable[..., Any]


class Function(NamedTuple):
    """`structured(p, method=…)` and `dense(p)` of a problem, each a tuple of results."""

    structured: Callable[..., Tensors]
    dense: Callable[[Problem], Tensors]
    dims: int  # trailing dimensions of each result that are not batch
    uses_Y: bool = True
    third: bool = False  # whether its third derivatives are there


def as_tuple(result: Any) -> Tensors:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _of_data(name: str, dims: int, **options: Any) -> Function:
    f, g = getattr(tk, name), getattr(reference, name)
    return Function(
        lambda p, **method: as_tuple(f(p.M, p.K, p.Y, **p.noise, **method)),
        lambda p: as_tuple(g(p.M, p.K, p.Y, **p.noise)),
        dims,
        **options,
    )


def _of_covariance(name: str, dims: int) -> Function:
    f, g = getattr(tk, name), getattr(reference, name)
    return Function(
        lambda p, **method: as_tuple(f(p.M, p.K, **p.noise, **method)),
        lambda p: as_tuple(g(p.M, p.K, **p.noise)),
        dims,
        uses_Y=False,
    )


FUNCTIONS: dict[str, Function] = {
    "kron_solve": _of_data("kron_solve", 2, third=True),
    "kron_logdet": _of_covariance("kron_logdet", 0),
    "kron_inv_quad_logdet": _of_data("kron_inv_quad_logdet", 0),
    "inverse_block_diag_sum": _of_covariance("inverse_block_diag_sum", 2),
    "inverse_diagonal": _of_covariance("inverse_diagonal", 2),
    "kron_gaussian_nll": Function(
        lambda p, **method: (tk.kron_gaussian_nll(p.Y, p.M, p.K, **p.noise, **method),),
        lambda p: (reference.kron_gaussian_nll(p.Y, p.M, p.K, **p.noise),),
        0,
    ),
}
# U·Y has no method: it needs no factorisation.
MATMUL = Function(
    lambda p, **method: (tk.kron_matmul(p.M, p.K, p.Y, **p.noise),),
    lambda p: (reference.kron_matmul(p.M, p.K, p.Y, **p.noise),),
    2,
    third=True,
)
ALL = {**FUNCTIONS, "kron_matmul": MATMUL}


def kernels(p: Problem) -> list[Tensor]:
    """The results of every native operator that each device has."""
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


# ---------------------------------------------------------------- problems


def leaves(p: Problem) -> dict[str, Tensor]:
    return {"Y": p.Y, "M": p.M, "K": p.K, **p.noise}


def from_leaves(values: dict[str, Tensor]) -> Problem:
    noise = {key: x for key, x in values.items() if key not in ("Y", "M", "K")}
    return Problem(values["Y"], values["M"], values["K"], noise)


def map_problem(f: Callable[[Tensor], Tensor], p: Problem) -> Problem:
    return from_leaves({key: f(x) for key, x in leaves(p).items()})


def double(p: Problem) -> Problem:
    return map_problem(torch.Tensor.double, p)


def moved(p: Problem, device: torch.device | str) -> Problem:
    return map_problem(lambda x: x.to(device), p)


def laid_out(p: Problem, how: str) -> Problem:
    return map_problem(lambda x: relayout(x, how), p)


def symmetrised(p: Problem) -> Problem:
    """M, K and Sigma by their symmetric parts, so that every entry may be moved alone."""
    values = leaves(p)
    for key in ("M", "K", "Sigma"):
        if key in values:
            values[key] = (values[key] + values[key].mT) / 2
    return from_leaves(values)


# ---------------------------------------------------------------- gradients


def cotangents(results: Tensors, seed: int = 1) -> Tensors:
    """Random weights in float64, to be cast to the dtype of the results."""
    generator = torch.Generator("cpu").manual_seed(seed)
    like = {"dtype": torch.float64, "device": "cpu"}  # the same numbers on every device
    drawn = [torch.randn(x.shape, generator=generator, **like) for x in results]
    return tuple(w.to(x.device) for w, x in zip(drawn, results, strict=True))


def gradients(f: Callable[[Problem], Tensors], p: Problem) -> dict[str, Tensor]:
    """The gradients of a random combination of all results in every argument, zero if unused."""
    p = map_problem(lambda x: x.detach().requires_grad_(), p)
    results = f(p)
    weights = [w.to(x.dtype) for w, x in zip(cotangents(results), results, strict=True)]
    found = grad(results, list(leaves(p).values()), weights, allow_unused=True)
    named = zip(leaves(p).items(), found, strict=True)
    return {key: torch.zeros_like(x) if g is None else g for (key, x), g in named}


def value_and_gradients(p: Problem, M: Any = None, **options: Any) -> list[Tensor]:
    """The likelihood, and its gradients in all but an M that is given here."""
    own = {k: x.detach().requires_grad_() for k, x in leaves(p).items() if k != "M" or M is None}
    noise = {k: x for k, x in own.items() if k not in ("Y", "M", "K")}
    nll = tk.kron_gaussian_nll(own["Y"], own.get("M", M), own["K"], **noise, **options)
    return [nll, *torch.autograd.grad(nll.sum(), list(own.values()))]


# ---------------------------------------------------------------- what is computed


class Recorder(TorchDispatchMode):
    """Every operator call with its results' shapes, those inside this library's kernels too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "torch_kronlik":
            with self:  # a mode is off while it handles a call: on again for the kernel's own calls
                out = func.redispatch(KERNELS, *args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else (out,)
        shapes = [tuple(x.shape) for x in results if isinstance(x, Tensor)]
        # a composite operator comes as itself or, below autograd, as the one that it stands for
        self.calls.append((func._schema.name.split("::")[1].lstrip("_"), shapes))
        return out

    def count(self, name: str) -> int:
        return sum(called == name for called, _ in self.calls)

    def shapes(self, name: str | None = None) -> list[tuple[int, ...]]:
        return [s for called, found in self.calls for s in found if name in (None, called)]
