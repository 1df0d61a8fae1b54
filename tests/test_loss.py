"""The loss module: its parameters, its reductions, and that it trains."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from conftest import check_close
from devices import no_compiler
from problems import BATCHES, Problem, condition_number, make_problem, spd
from torch import Tensor
from torch.func import functional_call

from torch_kronlik import reference
from torch_kronlik.distribution import KroneckerNormal
from torch_kronlik.loss import KroneckerGaussianNLLLoss
from torch_kronlik.rows import symmetric_eigen

T, D = 5, 3
NOISES = ("diagonal", "full")
REDUCTIONS = ("mean", "sum", "none")


def make_loss(noise: str = "full", **options: Any) -> KroneckerGaussianNLLLoss:
    """With every noise parameter off its starting value."""
    loss = KroneckerGaussianNLLLoss(D, noise=noise, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.copy_(torch.linspace(-0.8, 0.4, parameter.numel()))
    return loss


def with_noise_of(loss: KroneckerGaussianNLLLoss, problem: Problem) -> Problem:
    return problem._replace(noise={"Sigma": loss.Sigma.detach()})


# ---------------------------------------------------------------- value


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(
    ("reduction", "batch"),
    # there is no mean of nothing: see test_mean_of_no_entries_is_refused
    [(r, b) for r in REDUCTIONS for b in BATCHES if (r, b) != ("mean", "empty")],
)
def test_value_is_reference(
    noise: str, reduction: str, batch: str, dtype: torch.dtype, device: torch.device
) -> None:
    problem = make_problem(T, D, batch=BATCHES[batch], dtype=dtype, device=device)
    loss = make_loss(noise, reduction=reduction, dtype=dtype, device=device)
    Y, M, K, _ = problem = with_noise_of(loss, problem)
    nll = reference.kron_gaussian_nll(Y, M, K, **problem.noise)
    expected = {"none": nll, "sum": nll.sum(), "mean": nll.mean() / (T * D)}[reduction]
    check_close(loss(Y, M, K), expected, condition=condition_number(problem), dims=0)


def test_mean_divides_by_entries_of_Y() -> None:
    Y, M, K, _ = make_problem(T, D, batch=(2, 4))
    loss = make_loss(reduction="sum", dtype=torch.float64)
    total = loss(Y, M, K)
    loss.reduction = "mean"
    torch.testing.assert_close(loss(Y, M, K), total / Y.numel())


def test_row_factor_may_be_diagonalised_once() -> None:
    Y, M, K, _ = make_problem(T, D, kind="rank_one_M")
    loss = make_loss(dtype=torch.float64)
    torch.testing.assert_close(loss(Y, symmetric_eigen(M), K), loss(Y, M, K))


# ---------------------------------------------------------------- parameters


def test_parameters_of_diagonal_noise() -> None:
    loss = KroneckerGaussianNLLLoss(D)
    assert {n: tuple(p.shape) for n, p in loss.named_parameters()} == {"log_noise": (D,)}
    assert loss.reduction == "mean"


@pytest.mark.parametrize("num_outputs", [1, 2, 4])
def test_parameters_of_full_noise(num_outputs: int) -> None:
    loss = KroneckerGaussianNLLLoss(num_outputs, noise="full")
    below = num_outputs * (num_outputs - 1) // 2
    shapes = {n: tuple(p.shape) for n, p in loss.named_parameters()}
    assert shapes == {"noise_log_diagonal": (num_outputs,), "noise_lower": (below,)}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(
    "init", [0.1, 2, (0.5, 1e-3, 40.0), torch.tensor(0.3), torch.tensor([1.0, 2.0, 3.0])], ids=str
)
def test_initial_noise(noise: str, init: Any, dtype: torch.dtype) -> None:
    loss = KroneckerGaussianNLLLoss(D, noise=noise, init_noise=init, dtype=dtype)  # type: ignore[arg-type]
    expected = torch.as_tensor(init, dtype=dtype).expand(D)
    torch.testing.assert_close(loss.noise, expected)
    torch.testing.assert_close(loss.Sigma, torch.diag(expected))


def test_default_initial_noise() -> None:
    torch.testing.assert_close(KroneckerGaussianNLLLoss(2).noise, torch.tensor([0.1, 0.1]))


def test_initial_noise_is_copied() -> None:
    init = torch.ones(D, requires_grad=True)
    loss = KroneckerGaussianNLLLoss(D, init_noise=init)
    assert loss.log_noise.is_leaf
    with torch.no_grad():
        init.mul_(7)
    torch.testing.assert_close(loss.noise, torch.ones(D))


def test_Sigma_is_the_product_of_the_documented_factor() -> None:
    loss = make_loss(dtype=torch.float64)
    a, b, c = loss.noise_log_diagonal.exp()
    d, e, f = loss.noise_lower
    zero = torch.zeros((), dtype=torch.float64)
    L = torch.stack([*(a, zero, zero), *(d, b, zero), *(e, f, c)]).view(3, 3)
    torch.testing.assert_close(loss.Sigma, L @ L.mT)
    torch.testing.assert_close(loss.noise, (L @ L.mT).diagonal())


def test_dtype_and_device_of_parameters(dtype: torch.dtype) -> None:
    for noise in NOISES:
        loss = make_loss(noise, dtype=dtype)
        assert {p.dtype for p in loss.parameters()} == {dtype}
        moved = make_loss(noise).to(dtype)
        assert moved.Sigma.dtype == dtype
        with torch.device("meta"):
            assert {p.device.type for p in KroneckerGaussianNLLLoss(D).parameters()} == {"meta"}


def test_extra_repr() -> None:
    loss = KroneckerGaussianNLLLoss(2, noise="full", reduction="sum")
    assert repr(loss) == "KroneckerGaussianNLLLoss(2, noise='full', reduction='sum')"


# ---------------------------------------------------------------- derivatives


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives_first_and_second(noise: str, reduction: str) -> None:
    loss = make_loss(noise, reduction=reduction, dtype=torch.float64)
    names = [name for name, _ in loss.named_parameters()]
    leaves = [p.detach().clone() for p in loss.parameters()]
    leaves += [torch.randn(2, 3, D).double(), torch.randn(3, 3).double() / 2]
    leaves += [torch.randn(D, D).double() / 2]
    inputs = tuple(leaf.requires_grad_() for leaf in leaves)

    def f(*args: Tensor) -> Tensor:
        *values, Y, R_M, R_K = args
        return functional_call(loss, dict(zip(names, values, strict=True)), (Y, spd(R_M), spd(R_K)))

    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("noise", NOISES)
def test_gradient_is_reference(noise: str, dtype: torch.dtype, device: torch.device) -> None:
    problem = make_problem(T, D, kind="repeated_blocks", batch=(2,), dtype=dtype, device=device)
    loss = make_loss(noise, reduction="sum", dtype=dtype, device=device)
    Y, M, K, _ = with_noise_of(loss, problem)
    twin = copy.deepcopy(loss).double()
    reference.kron_gaussian_nll(Y, M, K, Sigma=twin.Sigma).sum().backward()  # type: ignore[no-untyped-call]
    loss(Y, M, K).backward()
    condition = condition_number(with_noise_of(loss, problem))
    for p, q in zip(loss.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        # the gradient is a cancelling difference of two terms of the size of T per batch element
        check_close(p.grad, q.grad, condition=condition, quantity="gradient", dims=1, floor=2.0 * T)


# ---------------------------------------------------------------- training


def draws(truth: dict[str, Tensor], M: Tensor, K: Tensor, count: int) -> Tensor:
    return KroneckerNormal(torch.zeros(M.shape[-1], D).to(M), M, K, **truth).sample((count,))


@pytest.mark.parametrize("noise", NOISES)
def test_training_recovers_the_noise(noise: str) -> None:
    """The estimate lies within 6 standard errors of the truth, by the observed information."""
    _, M, K, truth = make_problem(12, D, noise=noise, kind="matern12", seed=3)
    Y = draws(truth, M, K, 200)
    loss = KroneckerGaussianNLLLoss(D, noise=noise, reduction="sum", dtype=torch.float64)  # type: ignore[arg-type]
    optimiser = torch.optim.LBFGS(loss.parameters(), line_search_fn="strong_wolfe", max_iter=60)

    def closure() -> Tensor:
        optimiser.zero_grad()
        value: Tensor = loss(Y, M, K)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(closure)  # type: ignore[arg-type]
    estimate = torch.cat([p.detach() for p in loss.parameters()])
    error = estimate - true_parameters(truth)
    sizes = [p.numel() for p in loss.parameters()]
    names = [name for name, _ in loss.named_parameters()]

    def nll(theta: Tensor) -> Tensor:
        parts = dict(zip(names, theta.split(sizes), strict=True))
        result: Tensor = functional_call(loss, parts, (Y, M, K))
        return result

    information = torch.func.hessian(nll)(estimate)
    standard_error = torch.linalg.inv(information).diagonal().sqrt()
    assert (standard_error < 0.2).all()
    assert (error.abs() < 6 * standard_error).all()


def true_parameters(truth: dict[str, Tensor]) -> Tensor:
    if "log_noise" in truth:
        return truth["log_noise"]
    L = torch.linalg.cholesky(truth["Sigma"])
    below = L[tuple(torch.tril_indices(D, D, -1))]
    return torch.cat([L.diagonal().log(), below])


@pytest.mark.parametrize("noise", NOISES)
def test_adam_decreases_the_loss_at_every_step(noise: str, dtype: torch.dtype) -> None:
    _, M, K, truth = make_problem(8, D, noise="full", dtype=dtype)
    Y = draws(truth, M, K, 20)
    loss = KroneckerGaussianNLLLoss(D, noise=noise, init_noise=20.0, dtype=dtype)  # type: ignore[arg-type]
    optimiser = torch.optim.Adam(loss.parameters(), lr=0.01)
    values = []
    for _ in range(10):
        optimiser.zero_grad()
        value = loss(Y, M, K)
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert all(later < earlier for earlier, later in itertools.pairwise(values))


# ---------------------------------------------------------------- as a module


@pytest.mark.parametrize("noise", NOISES)
def test_state_dict_round_trip(noise: str) -> None:
    loss, other = make_loss(noise), KroneckerGaussianNLLLoss(D, noise=noise)  # type: ignore[arg-type]
    assert not torch.equal(loss.Sigma, other.Sigma)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(loss.Sigma, other.Sigma)


def test_state_dict_of_the_other_noise_is_refused() -> None:
    with pytest.raises(RuntimeError, match="log_noise"):
        make_loss("diagonal").load_state_dict(make_loss("full").state_dict())


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_equal_and_independent(noise: str, copied: Any) -> None:
    Y, M, K, _ = make_problem(T, D, dtype=torch.float32)
    loss = make_loss(noise, reduction="sum")
    twin = copied(loss)
    value = loss(Y, M, K)
    assert torch.equal(twin(Y, M, K), value)
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert torch.equal(loss(Y, M, K), value)
    assert not torch.equal(twin(Y, M, K), value)


# what torch's compiler says to itself
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch._prims_common.check.*:FutureWarning")
@pytest.mark.parametrize(
    ("noise", "backend"),
    [("diagonal", "aot_eager"), pytest.param("full", "inductor", marks=no_compiler)],
)
def test_compiles_without_graph_breaks(noise: str, backend: str) -> None:
    Y, M, K, _ = make_problem(T, D, batch=(2,))
    M.requires_grad_()
    loss = make_loss(noise, dtype=torch.float64)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    leaves = [M, *loss.parameters()]
    value, expected = compiled(Y, M, K), loss(Y, M, K)
    torch.testing.assert_close(value, expected)
    for g, e in zip(
        torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(g, e)


def test_ensemble_of_noises_by_vmap() -> None:
    Y, M, K, _ = make_problem(T, D)
    loss = make_loss("diagonal", dtype=torch.float64)
    many = torch.linspace(-1, 1, 4 * D).double().view(4, D)
    values = torch.vmap(lambda s: functional_call(loss, {"log_noise": s}, (Y, M, K)))(many)
    expected = [functional_call(loss, {"log_noise": s}, (Y, M, K)) for s in many]
    torch.testing.assert_close(values, torch.stack(expected))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_outputs": 0}, "num_outputs must be a positive integer, got 0"),
        ({"num_outputs": 2.0}, "num_outputs must be a positive integer, got 2.0"),
        ({"noise": "scalar"}, "noise must be one of diagonal, full, got 'scalar'"),
        ({"reduction": "avg"}, "reduction must be one of mean, sum, none, got 'avg'"),
        ({"init_noise": 0.0}, "init_noise must be positive and finite, got 0.0"),
        ({"init_noise": [1.0, -1.0, 1.0]}, "init_noise must be positive and finite"),
        ({"init_noise": float("nan")}, "init_noise must be positive and finite, got nan"),
        ({"init_noise": float("inf")}, "init_noise must be positive and finite, got inf"),
        ({"init_noise": [1.0, 1.0]}, r"shape \(D,\) with D = 3, got \(2,\)"),
        ({"init_noise": torch.ones(1)}, r"shape \(D,\) with D = 3, got \(1,\)"),
    ],
)
def test_constructor_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KroneckerGaussianNLLLoss(**{"num_outputs": D, **arguments})


@pytest.mark.parametrize("noise", NOISES)
def test_wrong_number_of_outputs_names_K(noise: str) -> None:
    Y, M, K, _ = make_problem(T, 2, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"K must have shape .* with D = 3, got \(2, 2\)"):
        make_loss(noise)(Y, M, K)


def test_non_tensor_is_a_type_error() -> None:
    Y, M, _, _ = make_problem(T, D, dtype=torch.float32)
    with pytest.raises(TypeError, match="K must be a tensor, got NoneType"):
        make_loss()(Y, M, None)


@pytest.mark.parametrize(("noise", "name"), [("diagonal", "log_noise"), ("full", "Sigma")])
def test_dtype_of_data_must_be_that_of_the_parameters(noise: str, name: str) -> None:
    Y, M, K, _ = make_problem(T, D, dtype=torch.float64)
    with pytest.raises(TypeError, match=f"{name} must have the dtype of M"):
        make_loss(noise)(Y, M, K)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_not_finite_names_the_argument(position: int) -> None:
    arguments = list(make_problem(T, D, dtype=torch.float32)[:3])
    arguments[position][0, 0] = torch.nan
    with pytest.raises(ValueError, match=rf"{'YMK'[position]} must be finite"):
        make_loss()(*arguments)


@pytest.mark.parametrize("empty", [{"batch": (0,)}, {"T": 0}], ids=str)
def test_mean_of_no_entries_is_refused(empty: dict[str, Any]) -> None:
    Y, M, K, _ = make_problem(**{"T": T, "D": D, "dtype": torch.float32, **empty})
    with pytest.raises(ValueError, match="no entries to take the mean over"):
        make_loss()(Y, M, K)
    assert make_loss(reduction="sum")(Y, M, K).item() == 0
