"""Missing entries and noise by row as they are called: functions, one object, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_observed import (
    Observed,
    close,
    each_route,
    make_observed,
    new_rows,
    value_and_gradients,
)
from devices import opcheck
from problems import normal
from torch import Tensor
from torch.autograd import grad
from torch.func import functional_call

import torch_kronlik as tk
from torch_kronlik import machine

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
    p = make_observed(256, 2, kind="rbf", noise="scaled")
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
    monkeypatch.setattr(machine, "memory", lambda device: 10_000)
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
