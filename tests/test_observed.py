"""Missing entries and noise that differs between rows, against U at the observed entries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from dense_observed import PATTERNS, ROW_NOISES, Observed, make_observed
from devices import opcheck
from highprec import _exact, _float64, _inverse_and_logdet
from problems import KINDS, normal
from torch import Tensor
from torch.autograd import grad
from torch.func import functional_call, jacfwd, jacrev, vmap

import torch_kronlik as tk
from torch_kronlik.factor import plan
from torch_kronlik.factor.plan import OBSERVED_METHODS

ROUTES = list(OBSERVED_METHODS)
each_route = pytest.mark.parametrize("method", ROUTES)
each_noise = pytest.mark.parametrize("noise", ROW_NOISES)
EPS = torch.finfo(torch.float64).eps


def condition(p: Observed) -> float:
    """Of U, or of U beside the noise, which the capacitance form divides by."""
    values, noise = (torch.linalg.eigvalsh(x) for x in (p.double().U(), p.double().row_noise()))
    return float(values[-1] / min(values[0], noise.min()))


def close(actual: Tensor, expected: Tensor, bound: float = 1e-11) -> None:
    assert actual.shape == expected.shape
    scale = expected.abs().max().clamp_min(1e-300) if expected.numel() else 1.0
    error = (actual.double() - expected.double()).abs().max() if expected.numel() else 0.0
    assert error <= bound * scale, f"{float(error):.1e} of {float(scale):.1e}"


def value_and_gradients(f: Callable[[Observed], Tensor], p: Observed) -> list[Tensor]:
    leaves = {key: x.clone().requires_grad_() for key, x in p.leaves().items()}
    value = f(p.at(leaves))
    return [value.detach(), *grad(value, list(leaves.values()))]


def skip_border(noise: str, method: str) -> None:
    if method == "border" and noise.startswith("row"):
        pytest.skip("needs one noise for all rows, up to a factor")


def by_route(method: str) -> Callable[[Observed], Tensor]:
    return lambda p: p.covariance(method=method).nll(p.Y)


# ---------------------------------------------------------------- the likelihood


@each_route
@each_noise
@pytest.mark.parametrize("mask", PATTERNS)
def test_value_and_gradients(mask: str, noise: str, method: str) -> None:
    skip_border(noise, method)
    p = make_observed(7, 3, mask=mask, noise=noise)
    expected = value_and_gradients(Observed.nll, p)
    actual = value_and_gradients(by_route(method), p)
    for a, b in zip(actual, expected, strict=True):
        close(a, b, 1e3 * EPS * condition(p))


@each_route
@pytest.mark.parametrize("noise", ["full", "row_diagonal"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("tiny_noise", "spread_noise")])
def test_every_structure(kind: str, noise: str, method: str) -> None:
    """Singular and repeated M and K, smooth and rough, in all units."""
    skip_border(noise, method)
    p = make_observed(6, 3, mask="random_60", noise=noise, kind=kind)
    expected = value_and_gradients(Observed.nll, p)
    actual = value_and_gradients(by_route(method), p)
    for a, b in zip(actual, expected, strict=True):
        close(a, b, 1e4 * EPS * condition(p))


@each_route
@each_noise
def test_float32(noise: str, method: str) -> None:
    skip_border(noise, method)
    p = make_observed(7, 3, noise=noise, dtype=torch.float32)
    expected = value_and_gradients(Observed.nll, p.double())
    actual = value_and_gradients(by_route(method), p)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        close(a, b, 1e3 * torch.finfo(torch.float32).eps * condition(p) ** 0.5)


@each_route
@each_noise
def test_second_derivatives(noise: str, method: str) -> None:
    """Along a line, in both mixed modes and in reverse twice."""
    skip_border(noise, method)
    p = make_observed(4, 2, mask="one_missing", noise=noise)
    d = {key: normal(*x.shape, seed=i) for i, (key, x) in enumerate(p.leaves().items())}

    def along(f: Callable[[Observed], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda t: f(p.at({key: x + t * d[key] for key, x in p.leaves().items()}))

    zero = torch.zeros((), dtype=torch.float64)
    expected = jacrev(jacrev(along(Observed.nll)))(zero)
    for outer, inner in ((jacrev, jacrev), (jacfwd, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)):
        close(outer(inner(along(by_route(method))))(zero), expected, 1e-10)


@each_route
def test_a_third_derivative_is_refused(method: str) -> None:
    p = make_observed(3, 2, mask="one_missing")
    with pytest.raises(NotImplementedError, match="third derivatives"):
        jacrev(jacrev(jacrev(lambda K: p._replace(K=K).covariance(method=method).logdet())))(p.K)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e300])
@each_route
def test_what_is_not_observed_is_not_looked_at(garbage: float, method: str) -> None:
    p = make_observed(6, 2, mask="random_60")
    q = p._replace(Y=torch.where(p.observed, p.Y, garbage))
    for a, b in zip(*(value_and_gradients(by_route(method), x) for x in (p, q)), strict=True):
        assert torch.equal(a, b)
    gY = value_and_gradients(by_route(method), q)[1]
    assert (gY[~p.observed] == 0).all()
    assert (gY[p.observed] != 0).all()


@each_route
@each_noise
def test_batches_with_different_entries(noise: str, method: str) -> None:
    """As many problems of their own, an empty one among them."""
    skip_border(noise, method)
    p = make_observed(5, 2, noise=noise)
    masks = [make_observed(5, 2, mask=mask).observed for mask in PATTERNS]
    masks.append(torch.zeros_like(masks[0]))
    joint = p._replace(observed=torch.stack(masks))
    value = by_route(method)(joint)
    each = torch.stack([by_route(method)(p._replace(observed=m)) for m in masks])
    close(value, each)
    assert value[-1] == 0
    mapped = vmap(lambda m: by_route(method)(p._replace(observed=m)))(torch.stack(masks))
    close(mapped, each)


@pytest.mark.parametrize("mask", ["all", "row"])
@each_route
def test_complete_rows_are_the_complete_problem(mask: str, method: str) -> None:
    p = make_observed(6, 3, mask=mask, noise="diagonal")
    rows = p.observed.all(-1)
    expected = tk.kron_gaussian_nll(p.Y[rows], p.M[rows][:, rows], p.K, **p.noise)
    close(by_route(method)(p), expected)


BATCHES: list[dict[str, tuple[int, ...]]] = [
    {"Y": (3,), "M": (), "K": (), "noise": ()},
    {"Y": (), "M": (3,), "K": (), "noise": ()},
    {"Y": (), "M": (), "K": (2,), "noise": (2,)},
    {"Y": (2, 1), "M": (3,), "K": (2, 3), "noise": (1, 1)},
]


@each_route
@pytest.mark.parametrize("noise", ["full", "diagonal", "scaled", "row_diagonal"])
@pytest.mark.parametrize("batch", BATCHES)
def test_gradients_in_batches(batch: Any, noise: str, method: str) -> None:
    """Of whatever has a batch, summed over what it is broadcast with; M = F Fᵀ too."""
    skip_border(noise, method)
    p = make_observed(5, 2, noise=noise, batch=batch, kind="rank_deficient")
    masks = torch.stack([make_observed(5, 2, mask=m).observed for m in ("row", "one_missing")])
    p = p._replace(observed=masks[:, None])
    roots = {"F": normal(*batch["M"], 5, 2, seed=3)}
    leaves = {k: x.clone().requires_grad_() for k, x in {**p.leaves(), **roots}.items()}
    F = leaves.pop("F")

    def structured(rows: Any, q: Observed) -> Tensor:
        return q.covariance(rows, method=method).nll(q.Y)

    def dense(q: Observed) -> Tensor:
        parts = torch.broadcast_shapes(
            q.Y.shape[:-2], q.M.shape[:-2], q.K.shape[:-2], q.row_noise().shape[:-3], (2, 1)
        )
        shaped = [x.expand(*parts, *x.shape[-2:]) for x in (q.Y, q.M, q.K, q.observed)]
        noises = q.row_noise().expand(*parts, 5, 2, 2)
        flat = zip(*(x.flatten(0, len(parts) - 1) for x in (*shaped, noises)), strict=True)
        each = [Observed(Y, M, K, {"row_Sigma": N}, o).nll() for Y, M, K, o, N in flat]
        return torch.stack(each).reshape(parts)

    q = p.at(leaves)
    for rows, other in ((q.M, q), (tk.LowRankRoot(F), q._replace(M=F @ F.mT))):
        wanted = [*leaves.values(), F]
        values = structured(rows, q), dense(other)
        close(values[0].detach().expand(values[1].shape), values[1].detach())
        weights = normal(*values[1].shape, seed=9)
        found = [grad((v * weights).sum(), wanted, allow_unused=True) for v in values]
        for a, b in zip(*found, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                close(a, b, 1e-9)


@each_route
def test_low_rank_root_and_eigen_as_rows(method: str) -> None:
    p = make_observed(7, 3, mask="random_60", kind="rank_deficient")
    F = normal(7, 2, seed=1).requires_grad_()
    q = p._replace(M=F @ F.mT)
    value = p.covariance(tk.LowRankRoot(F), method=method).nll(p.Y)
    close(value.detach(), q.nll().detach())
    close(grad(value, F)[0], grad(q.nll(), F)[0])
    eigen = tk.symmetric_eigen(p.M)
    close(p.covariance(eigen, method=method).nll(p.Y), p.nll())


def test_auto_finds_the_structure() -> None:
    complete = make_observed(256, 2, kind="matern12", noise="scaled")._replace(observed=None)
    assert complete.covariance().method_used == "cholesky"
    smooth = make_observed(80, 2, kind="rbf")
    assert smooth.covariance().method_used == "capacitance"
    rough = make_observed(40, 2, kind="matern12")
    assert rough.covariance().method_used == "border"
    few = make_observed(40, 2, kind="matern12", mask="all_but_one")
    assert few.covariance().method_used == "dense"
    by_row = make_observed(40, 2, kind="matern12", noise="row_full")
    assert by_row.covariance().method_used == "dense"


def test_zero_noise_where_U_is_positive_definite() -> None:
    """An exact observation, and the matrix normal, with no noise at all."""
    p = make_observed(5, 2, kind="matern12", mask="one_missing", noise="row_full")
    for rows in (slice(0, 1), slice(None)):
        Sigma = p.noise["row_Sigma"].clone()
        Sigma[rows] = 0
        q = p._replace(noise={"row_Sigma": Sigma})
        assert q.covariance().method_used == "dense"
        for a, b in zip(
            value_and_gradients(by_route("auto"), q),
            value_and_gradients(Observed.nll, q),
            strict=True,
        ):
            close(a, b, 1e-10)


@pytest.mark.parametrize("scale", [1e-10, 1e-5, 1.0, 1e10])
def test_smooth_rows_against_60_digits(scale: float) -> None:
    """With tiny noise, and M of low rank, far better than the Cholesky factor of U."""
    p, F = make_observed(12, 2), normal(12, 3, seed=2)
    signal = F @ normal(3, 2, seed=6) @ torch.linalg.cholesky(p.K).mT
    p = p._replace(
        M=F @ F.mT,
        Y=signal + scale**0.5 * normal(12, 2, seed=7),
        noise={"Sigma": scale * p.noise["Sigma"]},
    )
    with mpmath.workdps(60):
        exact = [_exact(x) for x in (F, p.K, p.noise["Sigma"], p.Y, torch.eye(12).double())]
        F_, K, Sigma, Y, eye = exact
        seen = p.places().cpu().numpy()
        U = (np.kron(F_ @ F_.T, K) + np.kron(eye, Sigma))[np.ix_(seen, seen)]
        inverse, logdet = _inverse_and_logdet(U)
        y = Y.reshape(-1)[seen]
        expected = [_float64((y * (inverse @ y)).sum()), _float64(logdet)]
    found = p.covariance(tk.LowRankRoot(F), method="capacitance").inv_quad_logdet(p.Y)
    for a, b, bound in zip(found, expected, (1e-10, 1e-14), strict=True):
        close(a, b, bound)


# ---------------------------------------------------------------- everything else on U


@each_route
@each_noise
def test_linear_algebra(noise: str, method: str) -> None:
    skip_border(noise, method)
    p = make_observed(6, 3, mask="random_60", noise=noise)
    U, seen = p.covariance(method=method), p.observed.flatten()
    Q = p.padded_inverse()
    y = torch.where(seen, p.Y.flatten(), 0)
    close(U.to_dense(), p.U())
    close(U.solve(p.Y), (Q @ y).reshape(p.Y.shape))
    close(U.matmul(p.Y), torch.where(seen, p.whole() @ y, 0).reshape(p.Y.shape))
    close(U.logdet(), p.U().logdet())
    close(U.diagonal(), torch.where(seen, p.whole().diagonal(), 0).reshape(p.Y.shape))
    close(U.inverse_diagonal(), Q.diagonal().reshape(p.Y.shape))
    blocks = Q.unflatten(0, p.Y.shape).unflatten(2, p.Y.shape).diagonal(dim1=0, dim2=2)
    close(U.inverse_block_diag_sum(), blocks.sum(-1))
    inv_quad, logdet = U.inv_quad_logdet(p.Y)
    constant = int(seen.sum()) * math.log(2 * math.pi)
    close(-0.5 * (inv_quad + logdet + constant), p.density().log_prob(p.y()))


def new_rows(p: Observed, S: int) -> tuple[Observed, Tensor, Tensor]:
    """A problem whose M, M_cross and M_test are parts of one covariance."""
    T = len(p.M)
    X = normal(T + S, T + 2, seed=8)
    joint = X @ X.mT / T
    return p._replace(M=joint[:T, :T]), joint[T:, :T], joint[T:, T:]


@each_route
@pytest.mark.parametrize("noise", ["full", "diagonal", "scaled"])
def test_posterior(noise: str, method: str) -> None:
    skip_border(noise, method)
    S, D = 3, 2
    p, M_cross, M_test = new_rows(make_observed(6, D, mask="random_60", noise=noise), S)
    post = p.covariance(method=method).condition(p.Y, M_cross, M_test)
    cross = torch.kron(M_cross, p.K)
    mean, covariance = p.given_the_rest(cross, torch.kron(M_test.contiguous(), p.K))
    close(post.mean, mean.reshape(S, D))
    close(post.covariance_matrix, covariance)
    close(post.variance, covariance.diagonal().reshape(S, D))
    blocks = covariance.unflatten(0, (S, D)).unflatten(2, (S, D)).diagonal(dim1=0, dim2=2)
    close(post.row_covariance, blocks.movedim(-1, 0))
    base = p._replace(noise={k: x for k, x in p.noise.items() if k != "row_scale"})
    noisy = covariance + torch.block_diag(*base.row_noise()[:1].expand(S, D, D))
    close(post.observation_variance, noisy.diagonal().reshape(S, D))
    Y_new = normal(S, D, seed=4)
    expected = torch.distributions.MultivariateNormal(mean, noisy).log_prob(Y_new.flatten())
    close(post.log_prob(Y_new), expected)


@each_route
def test_derivatives_of_posterior_variances(method: str) -> None:
    p, M_cross, M_test = new_rows(make_observed(5, 2, mask="one_missing"), 2)
    leaves = {**p.leaves(), "M_cross": M_cross}

    def structured(x: dict[str, Tensor]) -> Tensor:
        q = p.at({k: v for k, v in x.items() if k != "M_cross"})
        return q.covariance(method=method).condition(q.Y, x["M_cross"], M_test).variance

    def dense(x: dict[str, Tensor]) -> Tensor:
        q = p.at({k: v for k, v in x.items() if k != "M_cross"})
        K = ((q.K + q.K.mT) / 2).contiguous()
        rows = torch.kron(x["M_cross"].contiguous(), K)
        covariance = q.given_the_rest(rows, torch.kron(M_test.contiguous(), K))[1]
        return covariance.diagonal().reshape(2, 2)

    for transform in (jacrev, lambda f: jacfwd(jacrev(f))):
        actual, expected = transform(structured)(leaves), transform(dense)(leaves)
        flat = zip(*(torch.utils._pytree.tree_leaves(x) for x in (actual, expected)), strict=True)
        for a, b in flat:
            assert (a - b).abs().max() < 1e-10


@each_route
@each_noise
def test_leaving_out(noise: str, method: str) -> None:
    """Each entry, and each row, from what is observed elsewhere."""
    skip_border(noise, method)
    p = make_observed(5, 3, mask="random_10", noise=noise)
    U = p.covariance(method=method)
    mean, variance = U.leave_one_out(p.Y)
    row_mean, row_covariance = U.leave_one_row_out(p.Y)
    whole, total, rows_total = p.whole(), 0.0, 0.0
    for t in range(5):
        others, seen = p.observed.clone(), p.observed[t]
        others[t] = False
        own = [t * 3 + int(d) for d in seen.nonzero()[:, 0]]
        if own:
            rest = p._replace(observed=others)
            m, C = rest.given_the_rest(whole[own], whole[own][:, own])
            close(row_mean[t][seen], m)
            close(row_covariance[t][seen][:, seen], C)
            rows_total += torch.distributions.MultivariateNormal(m, C).log_prob(p.Y[t][seen])
        for d in range(3):
            i, without = t * 3 + d, p.observed.clone()
            if not without[t, d]:
                assert mean[t, d] == variance[t, d] == 0
                continue
            without[t, d] = False
            rest = p._replace(observed=without)
            m, C = rest.given_the_rest(whole[[i]], whole[[i]][:, [i]])
            close(mean[t, d], m[0])
            close(variance[t, d], C[0, 0])
            total += torch.distributions.Normal(m[0], C[0, 0].sqrt()).log_prob(p.Y[t, d])
    close(U.leave_one_out_log_prob(p.Y), torch.as_tensor(total))
    close(U.leave_one_row_out_log_prob(p.Y), torch.as_tensor(rows_total))


@each_route
@each_noise
@pytest.mark.parametrize("mask", ["row", "random_60", "all"])
def test_impute(mask: str, noise: str, method: str) -> None:
    skip_border(noise, method)
    p = make_observed(5, 3, mask=mask, noise=noise)
    Y = torch.where(p.observed, p.Y, torch.nan)
    mean, variance = p.covariance(method=method).impute(Y)
    m, C = p.given_the_rest(p.whole(), p.whole())
    close(mean, torch.where(p.observed, p.Y, m.reshape(p.Y.shape)))
    close(variance, torch.where(p.observed, 0, C.diagonal().reshape(p.Y.shape)))


def test_impute_without_a_mask_wants_all_entries() -> None:
    p = make_observed(4, 2)._replace(observed=None)
    assert torch.equal(p.covariance().impute(p.Y)[0], p.Y)
    with pytest.raises(ValueError, match=r"Y must be finite, but Y\[1, 0\] is nan"):
        p.covariance().impute(p.Y.index_fill(0, torch.tensor([1]), torch.nan))


@each_route
def test_draws_have_the_covariance(method: str) -> None:
    p = make_observed(3, 2, mask="one_missing", noise="scaled")
    generator = torch.Generator(p.Y.device).manual_seed(0)
    draws = p.covariance(method=method).sample((100_000,), generator)
    assert (draws[:, ~p.observed] == 0).all()
    found = draws[:, p.observed].mT.cov()
    assert (found - p.U()).abs().max() < 0.05 * p.U().abs().max()


@each_route
def test_posterior_draws(method: str) -> None:
    p, M_cross, M_test = new_rows(make_observed(4, 2, mask="random_60"), 2)
    post = p.covariance(method=method).condition(p.Y, M_cross, M_test)
    generator = torch.Generator(p.Y.device).manual_seed(0)
    draws = post.rsample((100_000,), generator, observation_noise=True).flatten(1)
    scale = post.covariance_matrix.abs().max()
    noise = torch.block_diag(*[p.noise["Sigma"]] * 2)
    assert (draws.mean(0) - post.mean.flatten()).abs().max() < 0.03 * scale.sqrt()
    assert (draws.mT.cov() - post.covariance_matrix - noise).abs().max() < 0.05 * scale


@each_route
@each_noise
def test_information(noise: str, method: str) -> None:
    """Expected: ½ tr(Q ∂U Q ∂U) and the mean's part; observed: the Hessian."""
    skip_border(noise, method)
    p = make_observed(4, 2, mask="random_60", noise=noise)
    key = next(k for k in p.noise if k != "row_scale")
    point = torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=torch.float64)

    def at(v: Tensor) -> Observed:
        M, K = p.M * (1 + v[0] ** 2), p.K + v[1].exp() * torch.ones_like(p.K)
        shifted = p.noise[key] * (2 + v[2])
        return p._replace(M=M, K=K, noise={**p.noise, key: shifted}, Y=p.Y - v[3])

    def model(v: Tensor) -> tk.KroneckerPlusNoise:
        return at(v).covariance(method=method)

    U = at(point).U()
    moves = torch.func.jacfwd(lambda v: at(v).U())(point)
    turned = [torch.linalg.solve(U, moves[..., i]) for i in range(3)]
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for i, a in enumerate(turned):
        for j, b in enumerate(turned):
            expected[i, j] = 0.5 * (a @ b).trace()
    close(tk.fisher_information(model, point).matrix[:3, :3], expected[:3, :3])
    hessian = jacrev(jacrev(lambda v: at(v)._replace(Y=p.Y).nll()))(point)
    close(tk.observed_information(model, point, Y=p.Y).matrix, hessian, 1e-9)


# ---------------------------------------------------------------- functions and modules


def test_function_and_loss_take_the_keywords() -> None:
    p = make_observed(6, 2, mask="random_60", noise="diagonal")
    scale = normal(6, seed=2).exp()
    q = p._replace(noise={**p.noise, "row_scale": scale})
    keywords = {"observed": p.observed, "row_scale": scale}
    nll = tk.kron_gaussian_nll(p.Y, p.M, p.K, **p.noise, **keywords)
    close(nll, q.nll())
    variances = p.noise["log_noise"].exp()
    loss = tk.KroneckerGaussianNLLLoss(2, init_noise=variances, dtype=torch.float64)
    close(loss(p.Y, p.M, p.K, **keywords).detach(), q.nll() / p.observed.sum())
    other = make_observed(6, 2, mask="row").observed
    both = torch.stack([p.observed, other])
    total = q.nll() + q._replace(observed=other).nll()
    mean = functional_call(loss, {}, (p.Y, p.M, p.K), {"observed": both, "row_scale": scale})
    close(mean.detach(), total / both.sum())


def test_compiles_in_one_graph(fresh_compiler: None) -> None:
    p = make_observed(6, 2, mask="random_60", noise="diagonal")

    def step(Y: Tensor, M: Tensor, K: Tensor, s: Tensor, observed: Tensor) -> Tensor:
        return tk.kron_gaussian_nll(Y, M, K, log_noise=s, observed=observed)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    args = (p.Y, p.M, p.K.clone().requires_grad_(), p.noise["log_noise"], p.observed)
    close(compiled(*args).detach(), p.nll())
    actual = grad(compiled(*args), args[2])[0]
    close(actual, grad(step(*args), args[2])[0])


def test_operators() -> None:
    """Those whose shapes do not depend on data."""
    p = make_observed(5, 2, mask="random_60")
    ops, observed = torch.ops.torch_kronlik, p.observed.double()
    Sigma = p.noise["Sigma"].expand(5, 2, 2).flatten(0, 1)
    H, N, _ = ops.column_form(p.K, Sigma, observed)
    places, real = ops.missing(observed)
    lam, R = torch.linalg.eigh(p.K)
    calls = [
        (ops.capacitance.default, (torch.linalg.cholesky(p.M + torch.eye(5)), H, N)),
        (ops.border.default, (p.M, lam, R, places, real)),
        (ops.direct.default, (p.M, p.K, Sigma, observed, True)),
        (ops.rotated.default, (torch.rand(5).double(), p.K, p.noise["Sigma"])),
        (ops.positive.default, (torch.ones(3).double().requires_grad_(), "row_scale")),
    ]
    for op, args in calls:
        opcheck(op, args)


# ---------------------------------------------------------------- one object, many operations


@pytest.mark.parametrize("base", ["full", "diagonal"])
def test_scaled_noise_of_complete_data(base: str) -> None:
    """By scaling rows, so that the routes for complete data serve."""
    p = make_observed(6, 2, mask="all", noise=base)
    scale = normal(6, seed=3).exp()
    p = p._replace(noise={**p.noise, "row_scale": scale})
    q = p._replace(observed=None)

    def whole(x: Observed) -> Tensor:
        return x._replace(observed=p.observed).nll()

    found = value_and_gradients(lambda x: x.covariance().nll(x.Y), q)
    for a, b in zip(found, value_and_gradients(whole, q), strict=True):
        close(a, b, 1e-10)
    U, V = q.covariance(), p.covariance(method="dense")
    for name in ("logdet", "inverse_diagonal", "inverse_block_diag_sum", "to_dense", "diagonal"):
        close(getattr(U, name)(), getattr(V, name)())
    for name in ("solve", "matmul", "nll", "leave_one_out_log_prob", "leave_one_row_out_log_prob"):
        close(getattr(U, name)(p.Y), getattr(V, name)(p.Y))
    posts = [x.condition(p.Y, p.M[:2], p.M[:2, :2]) for x in (U, V)]
    for name in ("mean", "row_covariance", "covariance_matrix", "observation_variance"):
        close(*(getattr(x, name) for x in posts), 1e-10)
    assert U.sample((3,)).shape == (3, 6, 2)


@each_route
def test_two_backward_passes_through_one_covariance(method: str) -> None:
    p = make_observed(5, 2, noise="diagonal")
    s = p.noise["log_noise"].clone().requires_grad_()
    U = p._replace(noise={"log_noise": s}).covariance(method=method)
    first, second = (grad(U.nll(Y), s)[0] for Y in (p.Y, p.Y))
    assert torch.equal(first, second)


def test_two_backward_passes_where_rows_are_scaled() -> None:
    p = make_observed(100, 2, kind="rbf", noise="scaled")
    v = p.noise["row_scale"].clone().requires_grad_()
    U = p._replace(noise={**p.noise, "row_scale": v}, observed=None).covariance()
    assert U.method_used == "low_rank"
    first, second = (grad(U.inverse_diagonal().sum(), v)[0] for _ in range(2))
    assert torch.equal(first, second)


@each_route
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_made_where_no_gradient_is_recorded(mode: Any, method: str) -> None:
    p = make_observed(5, 2, noise="diagonal")
    s = p.noise["log_noise"].clone().requires_grad_()
    q = p._replace(noise={"log_noise": s})
    with mode():
        U = q.covariance(method=method)
        U.logdet()
    close(grad(U.nll(p.Y), s)[0], grad(q.covariance(method=method).nll(p.Y), s)[0])


@each_route
def test_changes_before_the_first_use_count(method: str) -> None:
    p = make_observed(5, 2, noise="diagonal")
    U = p.covariance(method=method)
    p.noise["log_noise"].add_(1.0)
    close(U.nll(p.Y), p.nll())
    close(U.to_dense(), p.U())


@each_route
def test_asymmetry_of_the_size_of_rounding_changes_nothing(method: str) -> None:
    p = make_observed(60, 2, kind="rank_one_M")
    N = normal(60, 60, seed=4)
    q = p._replace(M=p.M + 1e-13 * (N - N.mT))
    U = q.covariance(method=method)
    close(U.nll(p.Y), p.nll(), 1e-9)
    assert method in ("auto", U.method_used)
    assert q.covariance().method_used == "capacitance"


# ---------------------------------------------------------------- errors

T, D = 4, 2
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"observed": torch.ones(T, D)}, TypeError, "observed must be a tensor of bool.*float32"),
    ({"observed": [True]}, TypeError, "observed must be a tensor of bool.*list"),
    ({"observed": torch.ones(T, D + 1).bool()}, ValueError, r"observed must have .*got \(4, 3\)"),
    ({"row_Sigma": torch.ones(T, D, D).double()}, ValueError, "exactly one of.*Sigma and row_Sig"),
    ({"Sigma": None}, ValueError, "exactly one of .* must be given, got none"),
    ({"row_scale": torch.ones(T + 1).double()}, ValueError, r"row_scale must have shape.*\(5,\)"),
    ({"row_scale": torch.ones(T)}, TypeError, "row_scale must have the dtype of M"),
    ({"Sigma": None, "row_log_noise": torch.ones(D, T).double()}, ValueError, "row_log_noise must"),
    ({"Sigma": None, "row_Sigma": torch.ones(T, D).double()}, ValueError, "row_Sigma must have sh"),
    (
        {"Sigma": None, "row_log_noise": torch.zeros(T, D).double(),
         "row_scale": torch.ones(T).double()},
        ValueError, "row_scale goes with Sigma or log_noise, got row_log_noise",
    ),
    ({"method": "spectral"}, ValueError, "must be one of auto, capacitance, border, dense"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "kind", "message"), WRONG)
def test_wrong_arguments(wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    device = torch.get_default_device()
    p = make_observed(T, D)
    wrong = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in wrong.items()}
    keywords = {**p.noise, "observed": p.observed, **wrong}
    with pytest.raises(kind, match=message):
        tk.KroneckerPlusNoise(p.M, p.K, **keywords)


@each_route
def test_faults_in_the_data_are_named(method: str) -> None:
    p = make_observed(T, D, mask="one_missing")
    bad = p.Y.clone()
    bad[0, 1] = torch.nan
    with pytest.raises(ValueError, match=r"Y must be finite, but Y\[0, 1\] is nan"):
        p.covariance(method=method).nll(bad)
    for name in ("M", "K"):
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            p._replace(**{name: getattr(p, name) * torch.nan}).covariance(method=method).logdet()
    noise = {**p.noise, "row_scale": torch.full((T,), torch.inf, dtype=torch.float64)}
    with pytest.raises(ValueError, match="row_scale must be finite"):
        p._replace(noise=noise).covariance(method="dense").logdet()
    for least in (0.0, -0.1):
        scale = torch.linspace(least, 1, T, dtype=torch.float64)
        negative = p._replace(noise={**p.noise, "row_scale": scale})
        with pytest.raises(ValueError, match=r"row_scale must be positive, but row_scale\[0\]"):
            negative.covariance(method=method).logdet()
    with pytest.raises(torch.linalg.LinAlgError, match="positive definite"):
        p._replace(noise={"Sigma": -p.noise["Sigma"]}).covariance(method=method).logdet()


def test_what_does_not_fit_is_an_error_with_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    p = make_observed(40, 2, kind="matern12", noise="row_full")
    monkeypatch.setattr(plan, "memory", lambda device: 10_000)
    with pytest.raises(ValueError, match=r"72 observed entries.*size 80.*smooth"):
        p.covariance().logdet()


def test_changes_in_place_are_noticed() -> None:
    p = make_observed(T, D)
    for x in (p.observed, p.noise["Sigma"], p.M):
        U = p.covariance()
        U.logdet()
        x.logical_not_() if x.dtype == torch.bool else x.mul_(2)
        with pytest.raises(RuntimeError, match="changed in place"):
            U.logdet()


def test_unknown_noise_of_new_rows_is_an_error() -> None:
    p, M_cross, M_test = new_rows(make_observed(T, D, noise="row_full"), 2)
    post = p.covariance().condition(p.Y, M_cross, M_test)
    assert post.variance.shape == (2, D)
    with pytest.raises(ValueError, match="noise of new rows is not known"):
        _ = post.observation_variance
