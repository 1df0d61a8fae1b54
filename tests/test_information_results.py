"""Information matrices: parameters of every structure, standard errors, what is not identified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import make_problem
from test_information import Check, D, T, symmetric_normal
from torch import Tensor, nn

import torch_kronlik as tk
from torch_kronlik.estimates import Information
from torch_kronlik.information import fisher_information, observed_information

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]


# ---------------------------------------------------------------- parameters and results


class Network(nn.Module):
    """A module with a frozen parameter, a buffer and inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.log_length = nn.Parameter(torch.tensor(-1.0).double())
        self.root = nn.Parameter(torch.tensor([[1.0, 0.0], [0.5, 0.8]]).double())
        self.log_noise = nn.Parameter(torch.tensor([-2.0, -1.0]).double())
        self.frozen = nn.Parameter(torch.ones(()).double(), requires_grad=False)

    def forward(self, x: Tensor) -> tk.KroneckerPlusNoise:
        M = torch.exp(-(((x[:, None] - x) / self.log_length.exp()) ** 2) / 2)
        K = self.frozen * self.root @ self.root.mT
        return tk.KroneckerPlusNoise(M, K, log_noise=self.log_noise)


x_rows = torch.linspace(0, 1, 30, dtype=torch.float64)


def test_a_module_gives_what_its_function_gives(assert_close: Check) -> None:
    net = Network()
    of_module = fisher_information(net, inputs=(x_rows,))
    point = {k: v.detach() for k, v in net.named_parameters() if v.requires_grad}
    of_function = fisher_information(lambda p: torch.func.functional_call(net, p, (x_rows,)), point)
    assert of_module.names == [
        "log_length", "root[0, 0]", "root[0, 1]", "root[1, 0]", "root[1, 1]",
        "log_noise[0]", "log_noise[1]",
    ]  # fmt: skip
    assert torch.equal(of_module.matrix, of_function.matrix)
    assert all(x.grad is None for x in net.parameters())
    Y = torch.randn(30, 2).double()
    H = observed_information(net, Y=Y, inputs=(x_rows,))
    assert H.names == of_module.names


def test_what_is_identified_has_standard_errors_and_the_rest_an_error(assert_close: Check) -> None:
    """K = root·rootᵀ does not change when the root turns: one direction without information."""
    information = fisher_information(Network(), inputs=(x_rows,))
    with pytest.raises(
        LinAlgError, match=r"^root\[0, 1\].*: not identified.* along 1·root\[0, 1\] - 0.8"
    ):
        _ = information.standard_errors
    with pytest.raises(LinAlgError, match="not identified"):
        _ = information.covariance
    K = information.delta_method(lambda p: p["root"] @ p["root"].mT)
    rows, columns = torch.tril_indices(2, 2)

    def identified(p: dict[str, Tensor]) -> tk.KroneckerPlusNoise:
        lower = torch.zeros(2, 2).double().index_put((rows, columns), p["lower"])
        return Network_with_root(lower, p)

    net = Network()
    point = {
        "lower": net.root.detach()[rows, columns],
        "log_length": net.log_length.detach(),
        "log_noise": net.log_noise.detach(),
    }
    lower = fisher_information(identified, point)
    again = lower.delta_method(
        lambda p: (
            torch.zeros(2, 2).double().index_put((rows, columns), p["lower"]).tril()
            @ torch.zeros(2, 2).double().index_put((rows, columns), p["lower"]).tril().mT
        )
    )
    assert_close(K.values, again.values)
    assert_close(K.standard_errors, again.standard_errors, condition=1e4)
    assert_close(K.covariance, again.covariance, condition=1e4)
    length = information.delta_method(lambda p: p["log_length"]).standard_errors
    assert_close(length, lower.standard_errors["log_length"], condition=1e4, dims=0)


def Network_with_root(root: Tensor, p: dict[str, Tensor]) -> tk.KroneckerPlusNoise:
    own = {"root": root, "log_length": p["log_length"], "log_noise": p["log_noise"]}
    out: tk.KroneckerPlusNoise = torch.func.functional_call(Network(), own, (x_rows,))
    return out


def test_standard_errors_have_the_structure_of_the_parameters(assert_close: Check) -> None:
    matrix = symmetric_normal(4, 0) @ symmetric_normal(4, 0) + torch.eye(4).double()
    params = {"a": (torch.zeros(2).double(), [torch.ones(()).double()]), "b": torch.ones(1, 1)}
    information = Information(matrix, params, rounding=1e-14)
    assert information.names == ["a[0][0]", "a[0][1]", "a[1][0]", "b[0, 0]"]
    assert_close(information.covariance, torch.linalg.inv(matrix), condition=10)
    errors = information.standard_errors
    expected = torch.linalg.inv(matrix).diagonal().sqrt()
    flat = torch.stack([*errors["a"][0], errors["a"][1][0], errors["b"][0, 0]])
    assert_close(flat, expected, condition=10, dims=1)
    assert errors["b"].shape == (1, 1)
    assert isinstance(errors["a"], tuple)


def test_delta_method_is_linear_propagation(assert_close: Check) -> None:
    matrix = torch.tensor([[4.0, 1.0], [1.0, 2.0]]).double()
    params = {"u": torch.tensor(0.5).double(), "v": torch.tensor(2.0).double()}
    found = Information(matrix, params, rounding=1e-14).delta_method(
        lambda p: {"product": p["u"] * p["v"], "constant": torch.ones(2).double()}
    )
    J = torch.tensor([2.0, 0.5]).double()
    expected = (J @ torch.linalg.inv(matrix) @ J).sqrt()
    assert_close(found.values["product"], torch.tensor(1.0).double(), dims=0)
    assert_close(found.standard_errors["product"], expected, dims=0)
    assert torch.equal(found.standard_errors["constant"], torch.zeros(2).double())
    assert not found.standard_errors["product"].requires_grad
    assert str(found).splitlines()[0] == f"product      1.0000 ± {float(expected):.4f}"


def test_a_function_with_reverse_mode_alone_is_enough(assert_close: Check) -> None:
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
            ctx.save_for_backward(factor)
            return x * factor

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            return g * ctx.saved_tensors[0], None

    p = make_problem(T, D)

    def model(scale: Tensor, apply: Callable[..., Tensor]) -> tk.KroneckerPlusNoise:
        return tk.KroneckerPlusNoise(apply(scale, p.M), p.K, **p.noise)

    one = torch.ones(()).double()
    found = fisher_information(model, one, inputs=(Scaled.apply,)).matrix
    assert_close(found, fisher_information(model, one, inputs=(torch.mul,)).matrix)


def test_no_square_matrix_of_all_entries_is_needed() -> None:
    """T·D = 12000: U alone would take 1.15 GB, its derivatives as much each."""
    x = torch.linspace(0, 1, 300, dtype=torch.float64)

    def model(p: dict[str, Tensor]) -> tk.KroneckerPlusNoise:
        M = torch.exp(-((x[:, None] - x) / p["length"]).abs())
        return tk.KroneckerPlusNoise(M, torch.eye(40).double(), log_noise=p["log_noise"])

    point = {"length": torch.tensor(0.2).double(), "log_noise": torch.zeros(40).double()}
    F = fisher_information(model, point)
    assert (F.standard_errors["log_noise"] > (2 / 300) ** 0.5).all()


# ---------------------------------------------------------------- errors


def test_a_parameter_without_effect_is_named() -> None:
    p = make_problem(T, D, noise="diagonal")

    def model(q: dict[str, Tensor]) -> tk.KroneckerPlusNoise:
        return tk.KroneckerPlusNoise(p.M, p.K, log_noise=q["used"])

    point = {"used": p.noise["log_noise"], "unused": torch.zeros(()).double()}
    for information in (
        fisher_information(model, point), observed_information(model, point, Y=p.Y)
    ):  # fmt: skip
        with pytest.raises(LinAlgError, match=r"unused: not identified.*along 1·unused"):
            _ = information.standard_errors


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_shared_scale_of_both_factors_is_named(scale: float) -> None:
    p = make_problem(T, D, noise="diagonal")

    def model(q: dict[str, Tensor]) -> tk.KroneckerPlusNoise:
        return tk.KroneckerPlusNoise(q["m"] * p.M, q["k"] * p.K, **p.noise)

    point = {"m": torch.tensor(scale).double(), "k": torch.tensor(1.0).double()}
    with pytest.raises(LinAlgError, match=r"m, k: not identified.*·m - .*·k$"):
        _ = fisher_information(model, point).covariance


def test_a_point_that_is_no_minimum_is_refused() -> None:
    Y = torch.full((4, 1), 0.1)

    def model(variance: Tensor) -> tk.KroneckerPlusNoise:
        return tk.KroneckerPlusNoise(torch.zeros(4, 4), torch.eye(1), log_noise=variance.log())

    information = observed_information(model, torch.ones(1), Y=Y)
    with pytest.raises(LinAlgError, match=r"negative along 1·params\[0\]; .* not at a minimum"):
        _ = information.standard_errors


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="params must be given, unless model"):
        fisher_information(lambda: None)
    with pytest.raises(ValueError, match="params must hold at least one number"):
        fisher_information(lambda p: None, {})
    with pytest.raises(TypeError, match=r"a\[1\] must be a tensor, or a dict.*got float"):
        fisher_information(lambda p: None, {"a": (torch.ones(1), 2.0)})
    with pytest.raises(TypeError, match="a must be a floating-point tensor, got"):
        fisher_information(lambda p: None, {"a": torch.ones(1, dtype=torch.int64)})
    with pytest.raises(TypeError, match=r"model must return a KroneckerNormal or .* got Tensor"):
        fisher_information(lambda p: p, torch.ones(1))
