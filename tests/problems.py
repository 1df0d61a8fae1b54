"""Problems to test on: (Y, M, K, noise) of every structure that has broken such code before.

Tests import it as `from problems import make_problem`.  Numbers are drawn in float64 on the CPU and
then converted, so one seed gives the same problem in every dtype and on every device: the one that
is asked for, or the default one, which is that of the test run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Batch = tuple[int, ...]
Build = Callable[[int, Batch, torch.Generator], Tensor]  # an n × n positive semidefinite matrix


class Problem(NamedTuple):
    """Residuals, factors, and the noise keyword: call `f(M, K, Y, **noise)`."""

    Y: Tensor  # (*batch, T, D)
    M: Tensor  # (*batch, T, T)
    K: Tensor  # (*batch, D, D)
    noise: dict[str, Tensor]  # {"Sigma": (*batch, D, D)} or {"log_noise": (*batch, D)}


class NewRows(NamedTuple):
    """A problem together with S rows to predict."""

    problem: Problem
    M_cross: Tensor  # (*batch, S, T)
    M_test: Tensor  # (*batch, S, S)
    Y_test: Tensor  # (*batch, S, D)


# ---------------------------------------------------------------- matrices


def psd(R: Tensor) -> Tensor:
    """R Rᵀ: symmetric for every R, of rank at most the number of columns."""
    return R @ R.mT


def spd(R: Tensor) -> Tensor:
    """R Rᵀ + I: the symmetric parametrisation in which gradcheck is run."""
    return psd(R) + torch.eye(R.shape[-2], dtype=R.dtype, device=R.device)


def _normal(shape: Batch, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal float64, the same on every device."""
    return _normal(shape, torch.Generator("cpu").manual_seed(seed)).to(torch.get_default_device())


def _symmetric(X: Tensor) -> Tensor:
    return (X + X.mT) / 2  # to the last bit, so that no code's choice of triangle shows


def _gram(n: int, rank: int, batch: Batch, generator: torch.Generator) -> Tensor:
    return psd(_normal((*batch, n, rank), generator)) / max(rank, 1)


def full_rank(n: int, batch: Batch, generator: torch.Generator) -> Tensor:
    return _gram(n, n + 3, batch, generator)


def rank_one(n: int, batch: Batch, generator: torch.Generator) -> Tensor:
    return _gram(n, 1, batch, generator)


def half_rank(n: int, batch: Batch, generator: torch.Generator) -> Tensor:
    return _gram(n, (n + 1) // 2, batch, generator)


def identity(n: int, batch: Batch, generator: torch.Generator) -> Tensor:
    return torch.eye(n, dtype=torch.float64).expand(*batch, n, n).clone()


def zero(n: int, batch: Batch, generator: torch.Generator) -> Tensor:
    return torch.zeros(*batch, n, n, dtype=torch.float64)


def repeated_blocks(n: int, batch: Batch, generator: torch.Generator) -> Tensor:
    """I ⊗ (2 × 2 block), cut to n: every eigenvalue many times over."""
    blocks = torch.kron(
        torch.eye((n + 1) // 2, dtype=torch.float64), spd(torch.ones(2, 1).double())
    )
    return blocks[:n, :n].expand(*batch, n, n).clone()


def replicates(n: int, batch: Batch, generator: torch.Generator) -> Tensor:
    """Every row of the design occurs (at least) twice, so M has equal rows."""
    index = torch.arange(n) // 2
    return full_rank((n + 1) // 2, batch, generator)[..., index, :][..., index]


def _distances(n: int, batch: Batch, generator: torch.Generator) -> Tensor:
    x = torch.rand((*batch, n), generator=generator, dtype=torch.float64).sort(-1).values
    return (x[..., :, None] - x[..., None, :]).abs()


def rbf(n: int, batch: Batch, generator: torch.Generator) -> Tensor:
    """A smooth kernel on a line: numerically of low rank, eigenvalues down to rounding level."""
    return torch.exp(-((_distances(n, batch, generator) / 0.3) ** 2) / 2)


def matern12(n: int, batch: Batch, generator: torch.Generator) -> Tensor:
    """A rough kernel on a line: full rank, slowly decaying eigenvalues."""
    return torch.exp(-_distances(n, batch, generator) / 0.3)


# ---------------------------------------------------------------- kinds


class Kind(NamedTuple):
    M: Build = full_rank
    K: Build = full_rank
    factor_scale: float = 1.0  # multiplies M
    noise_scale: float = 1.0  # multiplies Σ
    noise_spread: float = 1.0  # ratio of the largest to the smallest noise variance


KINDS: dict[str, Kind] = {
    "generic": Kind(),
    "identity": Kind(M=identity, K=identity),
    "rank_one_M": Kind(M=rank_one),
    "rank_one_K": Kind(K=rank_one),
    "zero_M": Kind(M=zero),
    "zero_K": Kind(K=zero),
    "rank_deficient": Kind(M=half_rank, K=half_rank),
    "repeated_blocks": Kind(M=repeated_blocks, K=repeated_blocks),
    "replicates": Kind(M=replicates),
    "rbf": Kind(M=rbf),
    "matern12": Kind(M=matern12),
    "tiny_factors": Kind(factor_scale=1e-6),
    "huge_factors": Kind(factor_scale=1e6),
    "tiny_noise": Kind(noise_scale=1e-10),
    "huge_noise": Kind(noise_scale=1e10),
    "spread_noise": Kind(noise_spread=1e20),
}

# Their condition number, about 1e7 and 1e11, exceeds 1/eps of float32: rounding the inputs alone
# makes U indefinite or moves every digit of the answer, so nothing could be compared.
FLOAT64_ONLY = frozenset({"huge_factors", "tiny_noise", "spread_noise"})


def kinds_for(dtype: torch.dtype) -> list[str]:
    """The kinds that are meaningful problems in this dtype."""
    return [k for k in KINDS if dtype == torch.float64 or k not in FLOAT64_ONLY]


BATCHES: dict[str, Mapping[str, Batch] | Batch] = {
    "none": (),
    "one": (3,),
    "two": (2, 3),
    "singleton": (1,),
    "empty": (0,),
    "only_Y": {"Y": (3,), "M": (), "K": (), "noise": ()},
    "only_M": {"Y": (), "M": (3,), "K": (), "noise": ()},
    "only_K": {"Y": (), "M": (), "K": (3,), "noise": ()},
    "only_noise": {"Y": (), "M": (), "K": (), "noise": (3,)},
    "crossed": {"Y": (2, 1), "M": (3,), "K": (2, 3), "noise": (1, 1)},
}


def make_problem(
    T: int,
    D: int,
    *,
    batch: Mapping[str, Batch] | Batch = (),
    noise: str = "full",
    kind: str = "generic",
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Problem:
    """A problem of size T, D; `batch` is one shape or one per argument, as in `BATCHES`."""
    shapes = batch if isinstance(batch, Mapping) else dict.fromkeys(("Y", "M", "K", "noise"), batch)
    place = device or torch.get_default_device()
    with torch.device("cpu"):
        Y, M, K, noise_kwargs = _draw(T, D, shapes, noise, KINDS[kind], seed)
    cast = {name: tensor.to(place, dtype) for name, tensor in noise_kwargs.items()}
    return Problem(Y.to(place, dtype), M.to(place, dtype), K.to(place, dtype), cast)


def _draw(
    T: int, D: int, shapes: Mapping[str, Batch], noise: str, build: Kind, seed: int
) -> Problem:
    generator = torch.Generator("cpu").manual_seed(seed)
    M = _symmetric(build.M(T, shapes["M"], generator) * build.factor_scale)
    K = _symmetric(build.K(D, shapes["K"], generator))
    noise_kwargs = _make_noise(D, shapes["noise"], noise, build, generator)
    Y = _normal((*shapes["Y"], T, D), generator)
    return Problem(Y, M, K, noise_kwargs)


def _make_noise(
    D: int, batch: Batch, noise: str, build: Kind, generator: torch.Generator
) -> dict[str, Tensor]:
    """Σ = V^½ C V^½ with variances V over the kind's spread, C a well-conditioned correlation."""
    half = torch.tensor(build.noise_spread, dtype=torch.float64).log() / 2
    position = torch.linspace(-1, 1, D, dtype=torch.float64) if D > 1 else torch.zeros(1)
    log_variance = 0.3 * _normal((*batch, D), generator) + half * position
    log_variance = log_variance + torch.tensor(build.noise_scale, dtype=torch.float64).log()
    if noise == "diagonal":
        return {"log_noise": log_variance}
    if noise != "full":
        raise ValueError(f"noise: expected 'full' or 'diagonal', got {noise!r}")
    C = spd(_normal((*batch, D, 2), generator) / 2)
    scale = (log_variance / 2).exp() / C.diagonal(dim1=-2, dim2=-1).sqrt()
    return {"Sigma": _symmetric(scale[..., :, None] * C * scale[..., None, :])}


def make_new_rows(T: int, S: int, D: int, **options: object) -> NewRows:
    """A problem on T rows and S more rows of the same kind, jointly positive semidefinite."""
    Y, M, K, noise = make_problem(T + S, D, **options)  # type: ignore[arg-type]
    problem = Problem(Y[..., :T, :].clone(), M[..., :T, :T].clone(), K, noise)
    return NewRows(problem, M[..., T:, :T].clone(), M[..., T:, T:].clone(), Y[..., T:, :].clone())


def condition_number(problem: Problem) -> float:
    """The largest condition number of U in the batch, once each output is measured in its noise.

    That is 1 + max s_i λ_j, times the condition number of the noise correlation: scaling an output
    costs no accuracy, so it must not loosen a tolerance.
    """
    Sigma = dense_noise(problem).double()
    d = Sigma.diagonal(dim1=-2, dim2=-1).rsqrt()
    C = torch.linalg.eigvalsh(d[..., :, None] * Sigma * d[..., None, :])
    G = torch.linalg.inv(torch.linalg.cholesky(Sigma))
    whitened = torch.linalg.eigvalsh(G @ problem.K.double() @ G.mT)[..., -1]
    largest = torch.linalg.eigvalsh(problem.M.double())[..., -1:].sum(-1) * whitened
    kappa = (1 + largest.abs()) * C[..., -1] / C[..., 0]
    return float(kappa.max()) if kappa.numel() else 1.0


def dense_noise(problem: Problem) -> Tensor:
    """Σ as a matrix, whichever keyword the problem has."""
    if "Sigma" in problem.noise:
        return problem.noise["Sigma"]
    return torch.diag_embed(problem.noise["log_noise"].exp())


# ---------------------------------------------------------------- derivatives


def make_roots(
    T: int,
    D: int,
    *,
    rank: int | None = None,
    batch: Batch = (),
    noise: str = "full",
    device: torch.device | str | None = None,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """Unconstrained float64 leaves (Y, R_M, R_K, R_noise) for gradcheck; see `from_roots`."""
    place = device or torch.get_default_device()
    generator = torch.Generator("cpu").manual_seed(seed)
    R_noise: Batch = (D, D) if noise == "full" else (D,)
    shapes = [(T, D), (T, rank or T), (D, rank or D), R_noise]
    leaves = [_normal((*batch, *shape), generator) / 2 for shape in shapes]
    return tuple(leaf.to(place).requires_grad_() for leaf in leaves)


def from_roots(
    Y: Tensor, R_M: Tensor, R_K: Tensor, R_noise: Tensor, *, noise: str = "full"
) -> Problem:
    """M = R Rᵀ + I, K = R Rᵀ + I (R Rᵀ alone where R is thin: singular), Σ = R Rᵀ + I or s = R."""
    M, K = (spd(R) if R.shape[-1] == R.shape[-2] else psd(R) for R in (R_M, R_K))
    return Problem(Y, M, K, {"Sigma": spd(R_noise)} if noise == "full" else {"log_noise": R_noise})


# ---------------------------------------------------------------- memory layouts

LAYOUTS = ("contiguous", "transposed", "strided", "offset", "batch_inside", "expanded")


def relayout(tensor: Tensor, how: str) -> Tensor:
    """The same values in another memory layout; "expanded" also prepends a batch of 2, stride 0."""
    if how == "contiguous":
        return tensor.contiguous()
    if how == "transposed":  # the last two dimensions column by column
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor.clone()
    if how == "strided":  # every second entry of a larger buffer, in every dimension
        buffer = tensor.new_full([2 * n for n in tensor.shape], torch.nan)
        view = buffer[tuple(slice(None, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor)
    if how == "offset":  # starts one scalar into the storage: not aligned for vector loads
        return tensor.new_full([tensor.numel() + 1], torch.nan)[1:].view(tensor.shape).copy_(tensor)
    if how == "batch_inside":  # the first batch dimension varies fastest in memory
        return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    if how == "expanded":
        return tensor.expand(2, *tensor.shape)
    raise ValueError(f"how: expected one of {LAYOUTS}, got {how!r}")
