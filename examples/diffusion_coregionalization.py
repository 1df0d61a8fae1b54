"""How fast does a state take after its neighbours? Diffusion on a graph as a coregionalisation.

Rows are years (1929 to 2009), outputs are the 48 contiguous US states: log personal income per
head, as its deviation from the mean of all states in that year. States that share a border are
linked.

    Y ~ N(0, M ⊗ K + σ² I),    K = F Diag(b²) Fᵀ,    F = exp(Diag(r) A),    A = P − I

P averages over the neighbours of a state, so F takes 48 independent sources and lets state i move
towards the mean of its neighbours at the rate r_i = exp(s_i): near zero, a state goes its own way;
the larger the rate, the more it shares with the states around it. The rates are learnt through
``expm_diag_multiply`` inside the likelihood, with the amplitudes b of the sources, the noise σ²,
and for M the timescale of a Matérn-3/2 kernel and the rate at which incomes have grown alike since
1929.

Compared are independent states (all rates zero), one rate for all, and a rate for each. Each state
is then predicted from all other states: its whole series is left out (but not its share in the
parameters), which is a leave-one-row-out of Yᵀ, because the noise is the same everywhere. The mean
of the neighbours is there for comparison. Two pictures are written:

* ``rates.png``: the graph at the places of the states, with the learnt rates.
* ``left_out.png``: the states with the smallest, middle and largest errors, each predicted from all
  others with the central 95 % for an observation.

Data: ``data/us_income.csv``, Bureau of Economic Analysis, U.S. Department of Commerce (public
domain).
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm import tqdm

import torch_kronlik as tk

DATA = Path(__file__).parent / "data" / "us_income.csv"
BLUE, ORANGE = "#0072B2", "#D55E00"


class Data(NamedTuple):
    names: list[str]
    codes: list[str]
    places: Tensor  # (D, 2), longitude and latitude
    adjacency: Tensor  # (D, D), one where two states share a border
    years: Tensor  # (T,)
    Y: Tensor  # (T, D), log income less its mean over the states


class Left(NamedTuple):
    """Every state predicted from all others."""

    mean: Tensor  # (T, D)
    deviation: Tensor  # (T, D), of an observation
    log_density: Tensor  # (), per entry, of the whole left-out series


class DiffusionModel(nn.Module):
    """M, K and the noise; ``rates`` is "zero", "one" or "each"."""

    def __init__(self, data: Data, rates: str) -> None:
        super().__init__()
        D = len(data.names)
        sizes = {"zero": 0, "one": 1, "each": D}
        self.log_rates = nn.Parameter(torch.zeros(sizes[rates], dtype=data.Y.dtype))
        self.log_amplitudes = nn.Parameter(data.Y.std(0).log())
        self.log_timescale = nn.Parameter(torch.tensor(20.0, dtype=data.Y.dtype).log())
        self.log_noise = nn.Parameter((0.01 * data.Y.var()).log())
        self.generator = data.adjacency / data.adjacency.sum(1, keepdim=True) - torch.eye(D)
        self.decline = nn.Parameter(torch.zeros((), dtype=data.Y.dtype))
        self.time = (data.years - data.years[0]) / 100
        self.lag = (data.years[:, None] - data.years).abs()

    @property
    def rates(self) -> Tensor:
        D = len(self.generator)
        return self.log_rates.exp().expand(D) if len(self.log_rates) else torch.zeros(D).double()

    def K(self) -> Tensor:
        # Column k of the root is exp(Diag(r) A) b_k e_k; a batch of vectors is a batch of rows.
        sources = torch.diag(self.log_amplitudes.exp())
        root = tk.expm_diag_multiply(self.rates, self.generator, sources).mT
        return root @ root.mT

    def M(self) -> Tensor:
        x = math.sqrt(3) * self.lag / self.log_timescale.exp()
        scale = torch.exp(-self.decline * self.time)
        return scale[:, None] * (1 + x) * torch.exp(-x) * scale


def load() -> Data:
    with DATA.open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    years = [key for key in rows[0] if key.isdigit()]
    codes = [row["code"] for row in rows]
    neighbours = [row["neighbours"].split() for row in rows]
    linked = [[float(code in near) for code in codes] for near in neighbours]
    income = torch.tensor([[float(row[year]) for row in rows] for year in years]).double().log()
    places = [[float(row["longitude"]), float(row["latitude"])] for row in rows]
    return Data(
        [row["state"] for row in rows],
        codes,
        torch.tensor(places),
        torch.tensor(linked, dtype=torch.float64),
        torch.tensor([float(year) for year in years], dtype=torch.float64),
        income - income.mean(1, keepdim=True),
    )


def fit(data: Data, rates: str, steps: int, bar: tqdm) -> DiffusionModel:
    """Maximum likelihood by L-BFGS."""
    model = DiffusionModel(data, rates)
    optimiser = torch.optim.LBFGS(
        model.parameters(), max_iter=steps, max_eval=2 * steps, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = objective(data, model) / data.Y.numel()
        loss.backward()
        bar.update()
        bar.set_postfix_str(f"{rates}: {loss.item():.4f} nats per entry")
        return loss

    optimiser.step(closure)
    return model


def objective(data: Data, model: DiffusionModel) -> Tensor:
    """Negative log likelihood, with wide priors: log rates within 1.5, log amplitudes within 1."""
    log_noise = model.log_noise.expand(data.Y.shape[1])
    nll = tk.kron_gaussian_nll(data.Y, model.M(), model.K(), log_noise=log_noise)
    spread = model.log_amplitudes - model.log_amplitudes.mean()
    return nll + (model.log_rates / 1.5).square().sum() / 2 + spread.square().sum() / 2


@torch.no_grad()
def leave_states_out(data: Data, model: DiffusionModel) -> Left:
    Y = data.Y.mT.contiguous()
    log_noise = model.log_noise.expand(len(data.years))
    mean, covariance = tk.leave_one_row_out(Y, model.K(), model.M(), log_noise=log_noise)
    density = torch.distributions.MultivariateNormal(mean, covariance).log_prob(Y)
    deviation = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    return Left(mean.mT, deviation.mT, density.sum() / Y.numel())


def rms(x: Tensor, dim: int | None = None) -> Tensor:
    return x.square().mean(dim).sqrt()


def report(data: Data, models: dict[str, DiffusionModel], left: dict[str, Left]) -> str:
    near = data.Y @ (data.adjacency / data.adjacency.sum(1, keepdim=True)).mT
    lines = [f"{'':28}{'log likelihood':>15}{'RMSE left out':>15}{'log density':>13}{'in 95 %':>9}"]
    lines.append(f"{'mean of the neighbours':28}{'':15}{rms(data.Y - near):15.3f}")
    for name, model in models.items():
        mean, deviation, density = left[name]
        with torch.no_grad():
            noise = model.log_noise.expand(data.Y.shape[1])
            likelihood = -tk.kron_gaussian_nll(data.Y, model.M(), model.K(), log_noise=noise)
        error = data.Y - mean
        inside = 100 * ((error / deviation).abs() <= 1.96).double().mean()
        numbers = f"{likelihood:15.1f}{rms(error):15.3f}{density:13.3f}{inside:9.1f}"
        lines.append(f"{name:28}{numbers}")
    return "\n".join(lines)


def plot_rates(path: Path, data: Data, model: DiffusionModel) -> None:
    log_rates = model.log_rates.detach() / math.log(10)
    figure, axis = plt.subplots(figsize=(11, 6.2), layout="constrained")
    for i, j in data.adjacency.triu().nonzero().tolist():
        axis.plot(*data.places[[i, j]].T, color="0.8", lw=1.2, zorder=1)
    dots = axis.scatter(*data.places.T, c=log_rates, s=280, cmap="viridis", ec="white", zorder=2)
    middle = float((log_rates.min() + log_rates.max()) / 2)
    for code, place, rate in zip(data.codes, data.places.tolist(), log_rates, strict=True):
        color = "black" if rate > middle else "white"
        axis.text(*place, code, ha="center", va="center", fontsize=6.5, color=color, zorder=3)
    figure.colorbar(dots, ax=axis, label="log₁₀ of the rate", shrink=0.8)
    axis.set(aspect=1.25, xticks=[], yticks=[])
    axis.set_frame_on(False)
    axis.set_title("How much a state shares with its neighbours: learnt rates of diffusion")
    save(figure, path)


def plot_left_out(path: Path, data: Data, left: Left) -> None:
    order = rms(data.Y - left.mean, 0).argsort().tolist()
    middle = len(order) // 2
    chosen = [*order[:2], *order[middle - 1 : middle + 1], *order[-2:]]
    figure, axes = plt.subplots(
        2, 3, figsize=(12, 6), sharex=True, sharey=True, layout="constrained"
    )
    for axis, i in zip(axes.T.flat, chosen, strict=True):
        mean, half = left.mean[:, i], 1.96 * left.deviation[:, i]
        near = data.Y[:, data.adjacency[i] > 0].mean(1)
        band = {"color": BLUE, "alpha": 0.2, "lw": 0}
        axis.fill_between(data.years, mean - half, mean + half, **band, label="central 95 %")
        axis.plot(data.years, mean, color=BLUE, label="predicted from all other states")
        axis.plot(data.years, near, "--", color=ORANGE, lw=1, label="mean of the neighbours")
        axis.plot(data.years, data.Y[:, i], color="black", lw=1.4, label="observed")
        axis.axhline(0, color="0.85", lw=0.8, zorder=0)
        axis.set_title(data.names[i], fontsize=10)
        axis.set_ylim(-1.1, 1.1)
    for axis in axes[:, 0]:
        axis.set_ylabel("log income, less the mean")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"wrote {path}")


def main(arguments: Sequence[str] | None = None) -> dict[str, Left]:
    parser = argparse.ArgumentParser(description="Diffusion on a graph as a coregionalisation")
    parser.add_argument("--steps", type=int, default=150, help="iterations of L-BFGS for each fit")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    data = load()
    titles = {"zero": "independent states", "one": "one rate", "each": "a rate for each state"}
    with tqdm(unit="evaluation") as bar:
        models = {title: fit(data, rates, options.steps, bar) for rates, title in titles.items()}
    left = {name: leave_states_out(data, model) for name, model in models.items()}
    print(f"\n{report(data, models, left)}\n")
    chosen = titles["each"]
    plot_rates(options.output / "rates.png", data, models[chosen])
    plot_left_out(options.output / "left_out.png", data, left[chosen])
    return left


if __name__ == "__main__":
    main()
