"""Row covariances: M by a thin root, and one that this file makes up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
from battery import NOISES, Recorder
from conftest import check_close
from problems import make_problem, normal
from torch import Tensor
from torch.autograd import forward_ad, grad, gradcheck, gradgradcheck

import torch_kronlik as tk
from torch_kronlik import reference
from torch_kronlik.records import Vector
from torch_kronlik.rows import RowMatrix, Rows

each_noise = pytest.mark.parametrize("noise", NOISES)


# ---------------------------------------------------------------- a made-up one: one class


@Rows.register
class Independent(NamedTuple):
    """M = Diag(d)."""

    d: Vector

    @property
    def is_constant(self) -> bool:
        return False

    @property
    def is_curved(self) -> bool:
        return False

    @property
    def method(self) -> str:
        return "spectral"

    @property
    def size(self) -> int:
        return self.d.shape[-1]

    @property
    def batch(self) -> torch.Size:
        return self.d.shape[:-1]

    def check(self) -> None:
        pass

    def named(self) -> dict[str, Tensor]:
        return {"M.d": self.d}

    def matmul(self, X: Tensor) -> Tensor:
        return self.d[..., None] * X

    def transposed_matmul(self, X: Tensor) -> Tensor:
        return self.matmul(X)

    def symmetric_matmul(self, X: Tensor) -> Tensor:
        return self.matmul(X)

    def diagonal(self) -> Tensor:
        return self.d

    def dense(self) -> Tensor:
        return torch.diag_embed(self.d)

    def basis(self) -> tuple[Tensor, Tensor]:
        return self.d.detach(), torch.eye(self.size, dtype=self.d.dtype).expand(*self.batch, -1, -1)

    def matmul_tangent(self, X: Tensor, along: Any) -> Tensor | None:
        return None if along.d is None else along.d[..., None] * X

    def matmul_pull_back(self, Z: Tensor, X: Tensor, to: Any) -> Any:
        return Independent((Z * X).sum(-1).sum_to_size(*to, self.size))

    def tangent(self, along: Any) -> RowMatrix | None:
        return None if along.d is None else RowMatrix(self.size, whole=torch.diag_embed(along.d))

    def pull_back(self, G: RowMatrix, to: Any) -> Any:
        return Independent(G.dense(to).diagonal(dim1=-2, dim2=-1))

    def curvature(self, G: RowMatrix, along: Any, to: Any) -> NoReturn:
        raise AssertionError("M is linear in d")


# ---------------------------------------------------------------- every kind against the dense twin

Make = Callable[[Tensor], Any]


class Kind(NamedTuple):
    own: Callable[[], Tensor]
    make: Make  # the row covariance of its own tensor
    dense: Callable[[Tensor], Tensor]


def _draw(*shape: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(2)
    return torch.randn(*shape, dtype=torch.float64, device="cpu", generator=generator).to(
        torch.get_default_device()
    )


def _root(*shape: int) -> Kind:
    return Kind(lambda: _draw(*shape), tk.LowRankRoot, lambda F: F @ F.mT)


def _deficient() -> Tensor:
    F = _draw(5, 3)
    return torch.cat([F, F[:, :1], torch.zeros_like(F[:, :1])], -1)


KINDS = {
    "root": _root(5, 2),
    "root, no columns": _root(5, 0),
    "root, more columns than rows": _root(3, 5),
    "root, dependent columns": Kind(_deficient, tk.LowRankRoot, lambda F: F @ F.mT),
    "root, batch": _root(2, 1, 5, 2),
    "made up": Kind(lambda: _draw(5).square(), Independent, torch.diag_embed),
}

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "nll": lambda tk, Y, M, K, **noise: tk.kron_gaussian_nll(Y, M, K, **noise),
    "logdet": lambda tk, Y, M, K, **noise: tk.kron_logdet(M, K, **noise),
    "solve": lambda tk, Y, M, K, **noise: tk.kron_solve(M, K, Y, **noise),
    "matmul": lambda tk, Y, M, K, **noise: tk.kron_matmul(M, K, Y, **noise),
    "B": lambda tk, Y, M, K, **noise: tk.inverse_block_diag_sum(M, K, **noise),
    "diagonal": lambda tk, Y, M, K, **noise: tk.inverse_diagonal(M, K, **noise),
    "leave one out": lambda tk, Y, M, K, **noise: tk.leave_one_out(Y, M, K, **noise)[1],
    "leave one row out": lambda tk, Y, M, K, **noise: tk.leave_one_row_out(Y, M, K, **noise)[0],
    "variance": lambda tk, Y, M, K, **noise: tk.condition(
        Y, M, K, torch.ones_like(Y[..., :2, :1]) * Y[..., 0, 0, None, None].expand(
            *Y.shape[:-2], 2, Y.shape[-2]
        ), torch.ones_like(Y[..., 0, :1]).expand(*Y.shape[:-2], 2), **noise
    ).row_covariance,
}  # fmt: skip


def _problem(kind: str, noise: str) -> tuple[Kind, list[Tensor], str]:
    k = KINDS[kind]
    x = k.own()
    p = make_problem(k.dense(x).shape[-1], 3, noise=noise, seed=4)
    (name,) = p.noise
    return k, [x, p.Y, p.K, p.noise[name]], name


def _symmetric(X: Tensor) -> Tensor:
    return (X + X.mT) / 2


@each_noise
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_derivatives(kind: str, noise: str) -> None:
    """First and second derivatives of every function, named in the message."""
    k, values, name = _problem(kind, noise)
    for what, f in FUNCTIONS.items():
        found = []
        for library, M in ((tk, k.make), (reference, k.dense)):
            x, Y, K, s = (v.clone().requires_grad_() for v in values)
            noise_argument = {name: _symmetric(s) if noise == "full" else s}
            value = f(library, Y, M(x), _symmetric(K), **noise_argument)
            weights = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
            leaves = [x, Y, K, s]
            first = grad((weights * value).sum(), leaves, create_graph=True, materialize_grads=True)
            moving = sum((g.square() * (1 + g.detach())).sum() for g in first)
            second = grad(moving, leaves, materialize_grads=True)
            found.append([value, *first, *second])
        for i, (a, b) in enumerate(zip(*found, strict=True)):
            scale = float(b.detach().abs().max()) if b.numel() else 0.0
            torch.testing.assert_close(
                a, b, rtol=1e-8, atol=1e-12 + 1e-8 * scale,
                msg=lambda m, what=what, i=i: f"{what}, result {i}: {m}",
            )  # fmt: skip


@each_noise
def test_gradcheck(noise: str) -> None:
    _, values, name = _problem("root", noise)
    values = [v.requires_grad_() for v in values]

    def f(F: Tensor, Y: Tensor, K: Tensor, s: Tensor) -> Tensor:
        return tk.kron_gaussian_nll(Y, tk.LowRankRoot(F), _symmetric(K), **{
            name: _symmetric(s) if noise == "full" else s})  # fmt: skip

    assert gradcheck(f, values, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, values, check_fwd_over_rev=True)


def test_no_square_matrix_is_made() -> None:
    T, r, D = 60, 4, 3
    F, p = _draw(T, r).requires_grad_(), make_problem(T, D, noise="diagonal")
    with Recorder() as recorded:
        value = tk.kron_gaussian_nll(p.Y, tk.LowRankRoot(F), p.K, **p.noise)
        (g,) = grad(value, F)
    assert g.shape == F.shape
    assert all(shape.count(T) < 2 for shape in recorded.shapes())


def test_route_and_repr() -> None:
    U = tk.KroneckerPlusNoise(tk.LowRankRoot(_draw(6, 2)), torch.eye(2).double(),
                              log_noise=torch.zeros(2).double())  # fmt: skip
    assert U.method_used == "low_rank"
    assert U.shape == (12, 12)
    check_close(U.diagonal(), U.to_dense().diagonal().reshape(6, 2), condition=1.0, dims=2)


def test_forward_mode_of_a_product() -> None:
    k, (F, Y, K, s), name = _problem("root", "diagonal")
    dF = torch.ones_like(F)
    with forward_ad.dual_level():
        moved = tk.kron_matmul(k.make(forward_ad.make_dual(F, dF)), K, Y, **{name: s})
        tangent = forward_ad.unpack_dual(moved).tangent
    torch.testing.assert_close(tangent, (dF @ F.mT + F @ dF.mT) @ Y @ K.mT)


@pytest.mark.parametrize(
    ("F", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"M\.F must have shape \(\*batch, T, r\), got \(3,\)"),
        (torch.zeros(3, 1, dtype=torch.int64), TypeError, r"M\.F must be float32 or float64"),
        (torch.full((3, 1), torch.nan), ValueError, r"M\.F must be finite, but M\.F\[0, 0\]"),
    ],
)
def test_refused(F: Tensor, error: type[Exception], message: str) -> None:
    F = F.to(torch.get_default_device())
    with pytest.raises(error, match=message):
        tk.kron_logdet(tk.LowRankRoot(F), torch.eye(2), log_noise=torch.zeros(2))


def test_root_under_a_batch_of_data() -> None:
    """The log-det part of the gradient counts once for each data set, and no more."""
    F = normal(5, 2, seed=0).requires_grad_()
    p = make_problem(5, 3, batch={"Y": (4,), "M": (), "K": (2, 1), "noise": ()})
    for method in ("auto", "spectral"):
        found = [
            torch.autograd.grad(
                tk.kron_gaussian_nll(p.Y, M, p.K, **p.noise, method=method).sum(), F
            )[0]
            for M in (tk.LowRankRoot(F), F @ F.mT)
        ]
        torch.testing.assert_close(*found)
