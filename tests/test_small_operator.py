"""Small problems: derivatives of the operator, when the likelihood takes it, direct calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from battery import NOISES, cotangents, double, from_leaves, gradients, leaves
from conftest import check_close
from devices import DEVICE, opcheck
from problems import Problem, condition_number, from_roots, make_problem, make_roots
from test_small import dense, native, nll
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

import torch_kronlik as tk
from torch_kronlik import ops
from torch_kronlik.factor import plan
from torch_kronlik.noise import make_noise
from torch_kronlik.rules import small
from torch_kronlik.rules.small import small_nll

each_noise = pytest.mark.parametrize("noise", NOISES)


# ---------------------------------------------------------------- derivatives of the operator


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each time the likelihood takes the kernel, whether with gradients."""
    made: list[bool] = []

    def counted(*args: Any) -> Any:
        made.append(args[-1])
        return small_nll(*args)

    monkeypatch.setattr(small, "small_nll", counted)
    return made


SHARED = {"Y": (3,), "M": (3,), "K": (), "noise": ()}


@each_noise
@pytest.mark.parametrize("batch", [(), (3,), (1, 2), (0,), SHARED], ids=str)
def test_gradients_through_the_likelihood(
    batch: Any, noise: str, dtype: torch.dtype, calls: list[bool]
) -> None:
    """Weighted, and summed where K and the noise are shared."""
    p = make_problem(5, 3, batch=batch, noise=noise, dtype=dtype)
    found = gradients(lambda q: (nll(q),), p)
    kappa, wanted = condition_number(p), gradients(lambda q: (dense(q),), double(p))
    for key, expected in wanted.items():
        dims = 1 if key == "log_noise" else 2
        check_close(found[key], expected, condition=kappa, quantity="gradient", dims=dims)
    assert calls == [True]


@each_noise
@pytest.mark.parametrize("rank", [None, 1])
def test_first_and_second_derivatives(noise: str, rank: int | None, calls: list[bool]) -> None:
    roots = make_roots(3, 2, rank=rank, noise=noise)
    f = lambda *r: nll(from_roots(*r, noise=noise))  # noqa: E731
    assert gradcheck(f, roots, check_forward_ad=True)
    assert gradgradcheck(f, roots, check_fwd_over_rev=True)
    assert calls


@each_noise
def test_hessian_products_where_arguments_are_shared(noise: str, calls: list[bool]) -> None:
    """With cotangents of the gradients in matrices that are not symmetric."""
    p = make_problem(4, 3, batch=SHARED, noise=noise)

    def product(f: Callable[[Problem], Tensor]) -> dict[str, Tensor]:
        values = {key: x.clone().requires_grad_() for key, x in leaves(p).items()}
        value = f(from_leaves(values))
        first = grad(value, list(values.values()), cotangents((value,))[0], create_graph=True)
        second = grad(first, list(values.values()), cotangents(first, 2))
        return dict(zip(values, second, strict=True))

    found, wanted = product(nll), product(dense)
    for key, expected in wanted.items():
        torch.testing.assert_close(found[key], expected, rtol=1e-10, atol=1e-10)
    assert calls == [True]


@pytest.mark.parametrize("key", ["Y", "M", "K", "Sigma"])
def test_second_derivative_in_one_argument(key: str, calls: list[bool]) -> None:
    p = make_problem(4, 3)

    def curvature(f: Callable[[Problem], Tensor]) -> Tensor:
        x = leaves(p)[key].clone().requires_grad_()
        (first,) = grad(f(from_leaves({**leaves(p), key: x})), x, create_graph=True)
        (second,) = grad(first.square().sum(), x)
        return second

    torch.testing.assert_close(curvature(nll), curvature(dense), rtol=1e-10, atol=1e-10)
    assert calls == [True]


@pytest.mark.parametrize("key", ["M", "K", "Sigma"])
def test_third_derivatives_are_refused(key: str) -> None:
    p = make_problem(3, 2)
    x = leaves(p)[key].clone().requires_grad_()
    (first,) = grad(nll(from_leaves({**leaves(p), key: x})), x, create_graph=True)
    (second,) = grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives"):
        grad(second.square().sum(), x)


def test_kernel_alone_refuses_derivatives() -> None:
    p = make_problem(3, 2)
    value = native(p._replace(Y=p.Y.requires_grad_()))[0]
    with pytest.raises(NotImplementedError, match=r"rules\.small\.small_nll"):
        value.backward()


# ---------------------------------------------------------------- when it is taken


@each_noise
def test_without_gradients_none_are_computed(noise: str, calls: list[bool]) -> None:
    p = make_problem(4, 3, batch=(2,), noise=noise)
    value, *found, status = native(p, gradients=False)
    assert all(g.shape == (0,) for g in found)
    assert torch.equal(value, native(p)[0])
    assert torch.equal(status, torch.zeros(2, dtype=torch.int64))
    nll(p)
    p.M.requires_grad_()
    with torch.no_grad():
        assert not nll(p).requires_grad
    with torch.inference_mode():
        nll(p)
    assert calls == [False] * 3


LARGEST = plan.costs(DEVICE.type).small_T
TAKEN = [(0, 1, ()), (1, 1, ()), (LARGEST, 16, ()), (LARGEST, 1, (2,)), (5, 3, (2, 3))]


@pytest.mark.parametrize(("T", "D", "batch"), TAKEN)
def test_taken(T: int, D: int, batch: tuple[int, ...], calls: list[bool]) -> None:
    p = make_problem(T, D, batch=batch)
    torch.testing.assert_close(nll(p), nll(p, method="spectral"))
    assert calls == [False]


def test_not_taken(calls: list[bool]) -> None:
    """Larger problems, M that several share, a constant or factorised M, a method asked for."""
    shared_M = make_problem(4, 3, batch={"Y": (2,), "M": (), "K": (), "noise": ()})
    many_K = make_problem(4, 3, batch={"Y": (), "M": (), "K": (2,), "noise": ()})
    for p in (make_problem(LARGEST + 1, 2), make_problem(5, 17), shared_M, many_K):
        torch.testing.assert_close(nll(p), dense(p))
    p = make_problem(4, 3)
    nll(p._replace(M=tk.symmetric_eigen(p.M)))  # type: ignore[arg-type]
    nll(p, method="cholesky")
    U = tk.KroneckerPlusNoise(p.M, p.K, **p.noise)
    U.logdet()
    U.nll(p.Y)
    assert calls == []


@each_noise
def test_transforms_take_the_general_operators(noise: str, calls: list[bool]) -> None:
    p = make_problem(4, 3, batch=(2,), noise=noise)
    values, keys = tuple(leaves(p).values()), list(leaves(p))

    def f(*x: Tensor) -> Tensor:
        return nll(from_leaves(dict(zip(keys, x, strict=True))))

    every, expected = (0, 1, 2, 3), nll(p, method="spectral")
    wanted = gradients(lambda q: (nll(q, method="spectral").sum(),), p)
    scale = cotangents((torch.zeros(()),))[0]
    wanted_list = [g / scale for g in wanted.values()]
    torch.testing.assert_close(torch.func.vmap(f)(*values), expected)
    found = torch.func.grad(lambda *x: f(*x).sum(), argnums=every)(*values)
    torch.testing.assert_close(list(found), wanted_list)
    mapped = torch.func.vmap(torch.func.grad(f, argnums=every))(*values)
    torch.testing.assert_close(list(mapped), wanted_list)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    leaves_ = [x.clone().requires_grad_() for x in values]
    torch.testing.assert_close(list(grad(compiled(*leaves_).sum(), leaves_)), wanted_list)
    with torch.autograd.forward_ad.dual_level():
        Y = torch.autograd.forward_ad.make_dual(p.Y, torch.ones_like(p.Y))
        tangent = torch.autograd.forward_ad.unpack_dual(nll(p._replace(Y=Y))).tangent
    torch.testing.assert_close(tangent, wanted_list[0].sum((-2, -1)))
    assert calls == []


# ---------------------------------------------------------------- the operators


@pytest.mark.parametrize(("batch", "noise"), [((), "diagonal"), (SHARED, "full")], ids=str)
@pytest.mark.parametrize("with_gradients", [True, False])
def test_opcheck(batch: Any, noise: str, with_gradients: bool) -> None:
    p = make_problem(3, 2, batch=batch, noise=noise)
    (form,) = p.noise.values()
    opcheck(ops.small_nll, (p.Y, p.M, p.K, form, noise == "full", with_gradients))
    for x in leaves(p).values():
        x.requires_grad_(with_gradients)
    opcheck(small_nll.overload(type(make_noise(**p.noise))), (p.Y, p.M, p.K, form, with_gradients))


@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (1, None, None, 0), (None, 0, 2, None)])
def test_vmap_of_the_operator(in_dims: tuple[int | None, ...]) -> None:
    p = make_problem(4, 3, batch=(2,))
    args = [
        x if d is None else torch.stack([x, 2 * x, 3 * x], d)
        for x, d in zip(leaves(p).values(), in_dims, strict=True)
    ]
    mapped = torch.func.vmap(lambda *x: native(Problem(*x[:3], {"Sigma": x[3]})), in_dims)(*args)
    for b in range(3):
        one = [x if d is None else x.select(d, b) for x, d in zip(args, in_dims, strict=True)]
        alone = native(Problem(*one[:3], {"Sigma": one[3]}))
        assert all(torch.equal(x[b], y) for x, y in zip(mapped, alone, strict=True))


MISFITS: list[tuple[dict[str, tuple[int, ...]], bool]] = [
    ({"M": (4, 5)}, True),
    ({"K": (2, 2)}, True),
    ({"noise": (3, 2)}, True),
    ({"noise": (2,)}, False),
    ({"Y": (3,)}, True),
    ({"Y": (129, 3), "M": (129, 129)}, True),
    ({"Y": (4, 17), "K": (17, 17), "noise": (17,)}, False),
    ({"Y": (2, 4, 3), "M": (3, 4, 4)}, True),
]


@pytest.mark.parametrize(("shapes", "full"), MISFITS)
def test_direct_call_refuses_what_does_not_fit(
    shapes: dict[str, tuple[int, ...]], full: bool
) -> None:
    fitting = {"Y": (4, 3), "M": (4, 4), "K": (3, 3), "noise": (3, 3) if full else (3,)}
    with pytest.raises(RuntimeError, match="small_nll"):
        ops.small_nll(*(torch.ones(s) for s in {**fitting, **shapes}.values()), full, True)
    mixed = [torch.ones(s) for s in fitting.values()]
    with pytest.raises(RuntimeError, match="dtype"):
        ops.small_nll(mixed[0].double(), *mixed[1:], full, True)
