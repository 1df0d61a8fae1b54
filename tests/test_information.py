"""Information matrices against the dense ½ tr(U⁻¹ dU U⁻¹ dU), 50 digits and closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from battery import NOISES, ROUTES
from devices import to_numpy
from problems import BATCHES, Problem, condition_number, kinds_for, make_problem, normal
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian

import torch_kronlik as tk
from torch_kronlik import reference
from torch_kronlik.distribution import KroneckerNormal
from torch_kronlik.estimates import Information
from torch_kronlik.information import fisher_information, observed_information

Check = Callable[..., None]
LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]
T, D = 5, 3
each_noise = pytest.mark.parametrize("noise", NOISES)


# ---------------------------------------------------------------- the models


def symmetric_normal(n: int, seed: int) -> Tensor:
    X = normal(n, n, seed=seed)
    return (X + X.mT) / 2


class Curved:
    """M, K, the noise and the mean move on curves through a problem: c is shared by all of them."""

    def __init__(self, p: Problem) -> None:
        self.p, (t, d) = p, p.Y.shape[-2:]
        self.name, self.noise = next(iter(p.noise.items()))
        parts = [symmetric_normal(n, seed) for seed, n in enumerate((t, t, d, d, d, d))]
        self.M1, self.M2, self.K1, self.K2, self.S1, self.S2 = (x.to(p.M) for x in parts)
        if self.name == "log_noise":
            self.S1, self.S2 = self.S1[0], self.S2[0]

    def params(self) -> dict[str, Tensor]:
        return {key: torch.zeros(()).to(self.p.M) for key in "abc"}

    def parts(self, a: Tensor, b: Tensor, c: Tensor) -> Problem:
        """The problem at (a, b, c), with the mean in place of Y."""
        M = self.p.M + a * self.M1 + (a + c) ** 2 * self.M2
        K = self.p.K * (b + c).exp() + b * self.K1 + a * b * self.K2
        noise = self.noise * (1 + c) + (b - c).sin() * self.S1 * 0.3 + c**2 * self.S2
        return Problem(self.p.Y * c + b, M, K, {self.name: noise})

    def normal(self, params: dict[str, Tensor], **options: Any) -> KroneckerNormal:
        q = self.parts(**params)
        return KroneckerNormal(q.Y, q.M, q.K, **q.noise)

    def covariance(self, params: dict[str, Tensor], method: str = "auto") -> tk.KroneckerPlusNoise:
        q = self.parts(**params)
        return tk.KroneckerPlusNoise(q.M, q.K, **q.noise, method=method)

    def dense_fisher(self, with_mean: bool) -> Tensor:
        """Summed over the joint batch, from the Jacobians of U and of the mean."""
        zeros = tuple(x.double() for x in self.params().values())
        if self.p.Y.numel() == 0:
            return torch.zeros(3, 3).double()

        def U(*abc: Tensor) -> Tensor:
            q = self.parts(*abc)
            return reference.covariance_matrix(q.M, q.K, **q.noise)

        def mean(*abc: Tensor) -> Tensor:
            return self.parts(*abc).Y.double()

        V, dU = torch.linalg.inv(U(*zeros)), jacobian(U, zeros)
        batch = mean(*zeros).shape[:-2] if with_mean else V.shape[:-2]
        batch = torch.broadcast_shapes(batch, V.shape[:-2])
        VdU = torch.stack([(V @ d).expand(*batch, *V.shape[-2:]) for d in dU])
        F = 0.5 * torch.einsum("a...ij,b...ji->ab...", VdU, VdU)
        if with_mean:
            dm = torch.stack([d.flatten(-2).expand(*batch, -1) for d in jacobian(mean, zeros)])
            F = F + torch.einsum("a...i,...ij,b...j->ab...", dm, V.expand(*batch, -1, -1), dm)
        return F.reshape(3, 3, batch.numel()).sum(-1)

    def dense_hessian(self, Y: Tensor) -> Tensor:
        def nll(*abc: Tensor) -> Tensor:
            q = self.parts(*abc)
            return reference.kron_gaussian_nll(Y - q.Y, q.M, q.K, **q.noise).sum()

        zeros = tuple(x.double() for x in self.params().values())
        if Y.numel() == 0:
            return torch.zeros(3, 3).double()
        return torch.stack([torch.stack(row) for row in hessian(nll, zeros)])


def to_double(p: Problem) -> Problem:
    return Problem(*(x.double() for x in p[:3]), {k: x.double() for k, x in p.noise.items()})


# ---------------------------------------------------------------- against the dense twin


@pytest.mark.parametrize("kind", kinds_for(torch.float64))
@each_noise
def test_fisher_of_every_kind(
    kind: str, noise: str, dtype: torch.dtype, assert_close: Check
) -> None:
    if kind not in kinds_for(dtype):
        return
    p = make_problem(T, D, kind=kind, noise=noise, dtype=dtype)
    actual = fisher_information(Curved(p).normal, Curved(p).params())
    wide = Curved(to_double(p))
    assert actual.matrix.dtype == dtype
    assert actual.names == ["a", "b", "c"]
    kappa = condition_number(p)
    assert_close(actual.matrix, wide.dense_fisher(True), condition=kappa, quantity="gradient")


@pytest.mark.parametrize("kind", kinds_for(torch.float64))
@each_noise
def test_observed_of_every_kind(
    kind: str, noise: str, dtype: torch.dtype, assert_close: Check
) -> None:
    if kind not in kinds_for(dtype):
        return
    p = make_problem(T, D, kind=kind, noise=noise, dtype=dtype)
    curved, Y = Curved(p), torch.randn(T, D, dtype=dtype)
    actual = observed_information(curved.normal, curved.params(), Y=Y)
    expected = Curved(to_double(p)).dense_hessian(Y.double())
    kappa = condition_number(p)
    # Along c, s moves by s itself: terms s² of each datum cancel
    floor = T * float(curved.noise.square().sum()) if noise == "diagonal" else 0.0
    assert_close(actual.matrix, expected, condition=kappa, quantity="gradient", floor=floor)
    assert torch.equal(actual.matrix, actual.matrix.mT)


@pytest.mark.parametrize("batch", BATCHES)
@each_noise
def test_batch_elements_add(batch: str, noise: str, assert_close: Check) -> None:
    curved = Curved(make_problem(T, D, batch=BATCHES[batch], noise=noise))
    point = curved.params()
    F = fisher_information(curved.normal, point).matrix
    assert_close(F, curved.dense_fisher(True), condition=100)
    F = fisher_information(curved.covariance, point).matrix
    assert_close(F, curved.dense_fisher(False), condition=100)
    Y = torch.randn(curved.p.Y.shape, dtype=torch.float64)
    H = observed_information(curved.normal, point, Y=Y).matrix
    assert_close(H, curved.dense_hessian(Y), condition=1000)


@pytest.mark.parametrize("method", ROUTES)
def test_every_route_gives_the_same(method: str, assert_close: Check) -> None:
    curved = Curved(make_problem(T, D, kind="rank_deficient"))
    Y = torch.randn(T, D, dtype=torch.float64)
    point, options = curved.params(), {"inputs": (method,)}
    assert_close(
        fisher_information(curved.covariance, point, **options).matrix,
        curved.dense_fisher(False),
        condition=100,
    )
    H = observed_information(curved.covariance, point, Y=Y, **options).matrix
    expected = observed_information(curved.covariance, point, Y=Y).matrix
    assert_close(H, expected, condition=100)


# ---------------------------------------------------------------- identities


@each_noise
def test_mean_observed_information_is_fishers(noise: str, assert_close: Check) -> None:
    """Exactly, over n = T·D data sets whose second moments are U's: √n times a root's columns."""
    curved = Curved(make_problem(T, D, noise=noise, kind="repeated_blocks"))
    U = curved.covariance(curved.params())
    n = T * D
    Y = n**0.5 * torch.linalg.cholesky(U.to_dense()).mT.reshape(n, T, D)
    H = observed_information(curved.covariance, curved.params(), Y=Y).matrix
    F = fisher_information(curved.covariance, curved.params()).matrix
    assert_close(H / n, F, condition=100)


def test_mean_observed_information_of_draws_approaches_fishers() -> None:
    """40 means over 50 draws each: their own spread gives the standard error of the total."""
    curved = Curved(make_problem(T, D))
    point = curved.params()
    F = fisher_information(curved.normal, point).matrix
    draws = curved.normal(point).sample((40, 50))
    means = [observed_information(curved.normal, point, Y=Y).matrix / 50 for Y in draws]
    mean, spread = torch.stack(means).mean(0), torch.stack(means).std(0)
    # nine entries, six of them distinct: beyond 4.5 standard errors once in 10⁴ seeds
    assert ((mean - F).abs() <= 4.5 * spread / 40**0.5).all()
    assert (spread / 40**0.5 <= 0.1 * F.abs().max()).all()  # the bound says something


def test_independent_rows_give_the_wishart_information(assert_close: Check) -> None:
    """M = 0: F = T/2 tr(Σ⁻¹ E_a Σ⁻¹ E_b); for variances on the log scale T/2 each."""
    Sigma = make_problem(T, D).noise["Sigma"]
    rows, columns = torch.tril_indices(D, D)

    def model(entries: Tensor) -> tk.KroneckerPlusNoise:
        lower = torch.zeros(D, D).double().index_put((rows, columns), entries)
        full = lower + lower.mT - torch.diag_embed(lower.diagonal())
        return tk.KroneckerPlusNoise(torch.zeros(T, T).double(), Sigma, Sigma=full)

    found = fisher_information(model, Sigma[rows, columns])
    V = torch.linalg.inv(Sigma)
    basis = [jacobian(lambda e: model(e).Sigma, Sigma[rows, columns])[..., a] for a in range(6)]
    expected = [[T / 2 * torch.trace(V @ Ea @ V @ Eb) for Eb in basis] for Ea in basis]
    assert_close(found.matrix, torch.tensor(expected).double(), condition=100)
    # The variance of a sample covariance: Var Σ̂_ij = (Σ_ii Σ_jj + Σ_ij²)/T.
    variance = (Sigma[rows, rows] * Sigma[columns, columns] + Sigma[rows, columns] ** 2) / T
    assert_close(found.standard_errors.square(), variance, condition=100, dims=1)

    def logs(s: Tensor) -> tk.KroneckerPlusNoise:
        zero = torch.zeros(T, T).double()
        return tk.KroneckerPlusNoise(zero, torch.eye(D).double(), log_noise=s)

    expected = T / 2 * torch.eye(D).double()
    assert_close(fisher_information(logs, torch.randn(D).double()).matrix, expected)


def test_information_of_a_mean_is_that_of_least_squares(assert_close: Check) -> None:
    p, X = make_problem(T, D), torch.randn(T, 2, dtype=torch.float64)

    def model(b: Tensor) -> KroneckerNormal:
        return KroneckerNormal(X @ b, p.M, p.K, **p.noise)

    x = reference.kron(X, torch.eye(D).double())
    expected = x.mT @ torch.linalg.solve(reference.covariance_matrix(p.M, p.K, **p.noise), x)
    b = torch.randn(2, D).double()
    assert_close(fisher_information(model, b).matrix, expected, condition=100)
    assert_close(observed_information(model, b, Y=p.Y).matrix, expected, condition=100)


def test_small_signals_keep_their_digits(assert_close: Check) -> None:
    """Beside a large noise the curvature of U is 1/(s λ) times the information: left out."""
    p = make_problem(T, D, kind="huge_noise")

    def model(p_: tuple[Tensor, Tensor]) -> tk.KroneckerPlusNoise:
        return tk.KroneckerPlusNoise(p.M * p_[0], p.K * p_[1], **p.noise)

    one = torch.ones(()).double()
    F = fisher_information(model, (one, one)).matrix
    V = torch.linalg.inv(p.noise["Sigma"])  # U⁻¹ = I ⊗ Σ⁻¹ up to 1e-10
    expected = 0.5 * p.M.square().sum() * torch.trace(V @ p.K @ V @ p.K)
    assert (F / expected - 1).abs().max() < 1e-8


# ---------------------------------------------------------------- 50 digits


@pytest.mark.parametrize("kind", ["generic", "identity", "repeated_blocks", "rank_deficient"])
@each_noise
def test_fisher_at_high_precision(kind: str, noise: str, assert_close: Check) -> None:
    """M, K and Σ along fixed directions, so that every derivative is exact."""
    p = make_problem(4, 2, kind=kind, noise=noise)
    name, value = next(iter(p.noise.items()))
    dM, dK, dS = symmetric_normal(4, 0), symmetric_normal(2, 1), symmetric_normal(2, 2)
    dS = dS[0] if noise == "diagonal" else dS

    def model(t: Tensor) -> tk.KroneckerPlusNoise:
        return tk.KroneckerPlusNoise(p.M + t[0] * dM, p.K + t[1] * dK, **{name: value + t[2] * dS})

    found = fisher_information(model, torch.zeros(3).double()).matrix
    with mpmath.workdps(50):
        M, K, S, M1, K1, S1 = (exact(x) for x in (p.M, p.K, value, dM, dK, dS))
        if noise == "diagonal":
            S = np.diag([mpmath.exp(x) for x in S])
            S1 = S @ np.diag(S1)
        I4 = exact(torch.eye(4))
        V = mpmath.matrix((np.kron(M, K) + np.kron(I4, S)).tolist()) ** -1
        dU = [np.kron(M1, K), np.kron(M, K1), np.kron(I4, S1)]
        VdU = [V * mpmath.matrix(d.tolist()) for d in dU]
        entries = [[sum((x * y)[i, i] for i in range(8)) / 2 for y in VdU] for x in VdU]
        expected = torch.tensor([[float(e) for e in row] for row in entries], dtype=torch.float64)
    assert_close(found, expected, condition=condition_number(p))


def exact(x: Tensor) -> Any:
    return np.vectorize(mpmath.mpf, otypes=[object])(to_numpy(x.double()))


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
