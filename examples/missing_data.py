"""A record with real gaps: weekly carbon dioxide at Mauna Loa, 1958 to 2001, filled with bands.

Rows are years, outputs are the 52 weeks of a year. Some weeks were not measured: 59 in the middle
of the record, and the first twelve. The model sees the concentration less a quadratic trend,

    Y ~ N(0, M ⊗ K + I ⊗ noise)    at the observed entries

M is a kernel over years: a Matérn-3/2 kernel plus a constant, for the season that is the same in
all years. K is a kernel over weeks: one that is periodic in the year plus one that is not. Their
scales and the noise are learnt from what is observed.

Then one week in ten is held out as well, once scattered and once in blocks of eight weeks, and
imputed from the rest. For comparison: a line between the neighbouring observed weeks, and Gaussian
processes over years, one for each week by itself. One picture is written:

* ``missing.png``: the first years with the imputed weeks and their central 95 %; and, in the year
  with most of them, weeks that were held out in blocks beside their imputation.

Data: the ``co2`` set of statsmodels, in the public domain; Keeling and Whorf, Scripps Institution
of Oceanography.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from statsmodels.datasets import co2
from torch import Tensor, nn
from tqdm import tqdm

import torch_kronlik as tk

WEEKS = 52
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#7F7F7F"


class Table(NamedTuple):
    years: Tensor  # (T)
    time: Tensor  # (T, 52), in years
    ppm: Tensor  # (T, 52), NaN where nothing was measured


def load() -> Table:
    series = co2.load_pandas().data["co2"]
    years = series.index.year.to_numpy()
    week = (series.index.day_of_year.to_numpy() - 1) // 7
    table = np.full((years.max() - years.min() + 1, WEEKS), np.nan)
    kept = week < WEEKS  # the last day or two of a year make no week
    table[years[kept] - years.min(), week[kept]] = series.to_numpy()[kept]
    rows = torch.arange(years.min(), years.max() + 1, dtype=torch.float64)
    time = rows[:, None] + (torch.arange(WEEKS) + 0.5) / WEEKS
    return Table(rows, time, torch.from_numpy(table))


def trend(table: Table, observed: Tensor) -> Tensor:
    """A quadratic of time, by least squares: (T, 52)."""
    t = (table.time - table.time.mean()) / 20
    X = torch.stack([t**0, t, t**2], -1)
    solved = torch.linalg.lstsq(X[observed], table.ppm[observed][:, None]).solution
    return (X @ solved).squeeze(-1)


class Model(nn.Module):
    """The logarithms of scales and lengths."""

    def __init__(self, coupled: bool) -> None:
        super().__init__()
        self.coupled = coupled  # or each week by itself
        start = {"years": 3.0, "constant": 1.0, "season": 0.3, "weeks": 0.3, "other": 0.3}
        self.log = nn.ParameterDict(
            {name: torch.tensor(x).double().log() for name, x in start.items()}
        )
        self.loss = tk.KroneckerGaussianNLLLoss(WEEKS, init_noise=0.1, dtype=torch.float64)

    def factors(self, years: Tensor) -> tuple[Tensor, Tensor]:
        p = {name: x.exp() for name, x in self.log.items()}
        d = 3**0.5 * (years[:, None] - years).abs() / p["years"]
        M = p["constant"] + (1 + d) * torch.exp(-d)
        phase = torch.arange(WEEKS, dtype=torch.float64) / WEEKS
        lag = phase[:, None] - phase
        if not self.coupled:
            return M, torch.eye(WEEKS, dtype=torch.float64)
        season = torch.exp(-2 * (torch.sin(torch.pi * lag) / p["season"]) ** 2)
        return M, 4 * season + p["other"] * torch.exp(-lag.abs() / p["weeks"])

    def forward(self, Y: Tensor, years: Tensor, observed: Tensor) -> Tensor:
        return self.loss(Y, *self.factors(years), observed=observed)

    def impute(self, Y: Tensor, years: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, standard deviation)"""
        U = tk.KroneckerPlusNoise(
            *self.factors(years), log_noise=self.loss.log_noise, observed=observed
        )
        mean, variance = U.impute(Y)
        return mean.detach(), variance.detach().sqrt()


def fitted(Y: Tensor, years: Tensor, observed: Tensor, coupled: bool, steps: int) -> Model:
    model = Model(coupled)
    optimiser = torch.optim.LBFGS(
        model.parameters(), max_iter=steps, line_search_fn="strong_wolfe", history_size=20
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = model(Y, years, observed)
        loss.backward()
        return loss

    optimiser.step(closure)
    return model


def held_out(observed: Tensor, blocks: bool, seed: int = 0) -> Tensor:
    """One observed week in ten, scattered or in blocks of eight weeks."""
    generator = torch.Generator().manual_seed(seed)
    length = 8 if blocks else 1
    starts = torch.rand(observed.numel(), generator=generator) < 0.1 / length
    out = starts.clone()
    for k in range(1, length):
        out[k:] |= starts[:-k]
    return out.reshape(observed.shape) & observed


def line(table: Table, seen: Tensor) -> Tensor:
    """Between the neighbouring observed weeks."""
    t, y, at = (x.flatten().numpy() for x in (table.time, table.ppm, seen))
    return torch.from_numpy(np.interp(t, t[at], y[at])).reshape(table.ppm.shape)


class Score(NamedTuple):
    mean: Tensor
    deviation: Tensor | None

    def row(self, name: str, truth: Tensor, out: Tensor) -> str:
        error = (self.mean - truth)[out]
        cells = f"{name:34}{error.square().mean().sqrt():8.2f}"
        if self.deviation is None:
            return cells
        z = error / self.deviation[out]
        density = torch.distributions.Normal(self.mean[out], self.deviation[out])
        log_density = density.log_prob(truth[out]).mean()
        return f"{cells}{log_density:13.2f}{100 * (z.abs() < 1.96).double().mean():12.0f} %"


def compare(table: Table, blocks: bool, steps: int) -> tuple[str, Tensor, Score]:
    observed = ~table.ppm.isnan()
    out = held_out(observed, blocks)
    seen = observed & ~out
    base = trend(table, seen)
    Y = table.ppm - base
    lines = [f"{'held out ' + ('in blocks' if blocks else 'scattered'):34}    RMSE  log density"]
    found = {}
    for name, coupled in (("weeks and years together", True), ("each week by itself", False)):
        model = fitted(Y, table.years, seen, coupled, steps)
        mean, deviation = model.impute(Y, table.years, seen)
        found[name] = Score(mean + base, deviation)
    found["line between neighbouring weeks"] = Score(line(table, seen), None)
    lines += [score.row(name, table.ppm, out) for name, score in found.items()]
    lines[0] += "  inside 95 %"
    return "\n".join(lines), out, found["weeks and years together"]


def plot(path: Path, table: Table, whole: Score, out: Tensor, blocks: Score) -> None:
    t, y, missing = table.time.flatten(), table.ppm.flatten(), table.ppm.isnan().flatten()
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(12, 7), layout="constrained")
    first = t < 1968
    draw(top, t, whole, first & missing, BLUE, "imputed, 95 %")
    top.plot(t[first], y[first], ".", color="black", ms=3, label="measured")
    top.set(ylabel="CO₂ (ppm)", title="the gaps of the record")
    year = int(out.sum(1).argmax())
    near = (t >= table.years[year] - 0.5) & (t < table.years[year] + 1.5)
    hidden = out.flatten() & near
    draw(bottom, t, blocks, hidden, ORANGE, "held out, imputed, 95 %")
    bottom.plot(t[near & ~hidden], y[near & ~hidden], ".", color="black", ms=4, label="measured")
    bottom.plot(t[hidden], y[hidden], "o", mfc="none", mec="black", ms=5, label="held out")
    bottom.set(ylabel="CO₂ (ppm)", xlabel="year", title="weeks held out in blocks")
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"wrote {path}")


def draw(axis: plt.Axes, t: Tensor, score: Score, at: Tensor, color: str, label: str) -> None:
    assert score.deviation is not None
    mean, deviation = score.mean.flatten()[at], score.deviation.flatten()[at]
    axis.errorbar(
        t[at], mean, 1.96 * deviation, fmt="o", ms=3, color=color, elinewidth=1, label=label
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fill the gaps of a carbon dioxide record")
    parser.add_argument("--steps", type=int, default=60, help="iterations of L-BFGS for each fit")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)

    table = load()
    observed = ~table.ppm.isnan()
    base = trend(table, observed)
    Y = table.ppm - base
    print(f"{int(observed.sum())} weeks measured, {int((~observed).sum())} not")
    for blocks in tqdm((False, True), unit="comparison"):
        text, out, score = compare(table, blocks, options.steps)
        print(f"\n{text}")
    model = fitted(Y, table.years, observed, True, options.steps)
    mean, deviation = model.impute(Y, table.years, observed)
    plot(options.output / "missing.png", table, Score(mean + base, deviation), out, score)


if __name__ == "__main__":
    main()
