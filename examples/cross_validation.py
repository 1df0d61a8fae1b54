"""Leave-one-out validation of sixty years of sea temperatures, without refitting once.

Rows are seasons (April 1950 to March 2010), outputs are the twelve months of a season: the surface
temperature of the Pacific off Peru, where El Niño is felt first, less its mean for the month.

    Y ~ N(0, M ⊗ K + I ⊗ Diag(noise))

M is a Matérn-1/2 kernel over seasons, K the covariance of the months within a season. They are
learnt twice, by maximum likelihood and by maximum leave-one-out predictive density. Then, from one
factorisation each,

* every month is predicted from all other months: how well would a gap in the record be filled?
* every season is predicted from all other seasons: how much does one season know of another?

The data that are predicted are left out, but not their share in M, K and the noise. For comparison:
the mean of the other seasons, and a straight line between the neighbouring months. The line does
better in March and April, at the seams: M ⊗ K ties whole seasons together, not one's last month to
the next one's first. Two pictures are written:

* ``residuals.png``: the predictions of single months with their central 95 %, and below them the
  errors in predicted standard deviations. Marked are those beyond 3.
* ``calibration.png``: how often the central p % of a prediction hold the observation, against p;
  the grey band is where 95 % of such curves would lie if the predictions were right and
  independent. Beside it the error in each month.

Data: the ``elnino`` set of statsmodels, in the public domain; monthly means over 0–10° S, 80–90° W
from NOAA's National Weather Service.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from statsmodels.datasets import elnino
from torch import Tensor, nn
from tqdm import tqdm

import torch_kronlik as tk

MONTHS = ["Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec", "Jan", "Feb", "Mar"]
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"
MONTH, SEASON = "month from all other months", "season from all other seasons"
LINE, CLIMATE = "line between neighbouring months", "mean of the other seasons"
COLOR = {MONTH: BLUE, SEASON: ORANGE, LINE: GREEN, CLIMATE: GREY}


class Prediction(NamedTuple):
    mean: Tensor  # (T, D)
    deviation: Tensor  # (T, D), standard deviation

    def standardised(self, Y: Tensor) -> Tensor:
        return (Y - self.mean) / self.deviation


class SeasonModel(nn.Module):
    """The factors of the covariance of Y (T, D)."""

    def __init__(self, Y: Tensor) -> None:
        super().__init__()
        self.log_timescale = nn.Parameter(torch.zeros((), dtype=Y.dtype))  # in seasons
        self.root = nn.Parameter(torch.linalg.cholesky(0.9 * Y.T.cov()).contiguous())
        self.log_noise = nn.Parameter((0.1 * Y.var(0)).log())
        self.lag = (torch.arange(len(Y))[:, None] - torch.arange(len(Y))).abs()

    def forward(self) -> dict[str, Tensor]:
        L = self.root.tril()
        M = torch.exp(-self.lag / self.log_timescale.exp())
        return {"M": M, "K": L @ L.mT, "log_noise": self.log_noise}


def load() -> tuple[Tensor, Tensor]:
    """The months' times in years (T, D), and their anomalies in °C (T, D), season by season."""
    data = elnino.load_pandas().data
    months = torch.tensor(data.to_numpy(), dtype=torch.float64)
    Y = months[:, 1:].flatten()[3:-9].reshape(-1, 12)
    t = months[0, 0] + (torch.arange(Y.numel(), dtype=Y.dtype) + 3.5) / 12
    return t.reshape(Y.shape), Y - Y.mean(0)


def fit(Y: Tensor, objective: Callable[..., Tensor], steps: int, bar: tqdm) -> SeasonModel:
    """Maximise a log density of Y by L-BFGS."""
    model = SeasonModel(Y)
    optimiser = torch.optim.LBFGS(
        model.parameters(), max_iter=steps, max_eval=2 * steps, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -objective(Y, **model()) / Y.numel()
        loss.backward()
        bar.update()
        bar.set_postfix_str(f"{loss.item():.3f} nats per entry")
        return loss

    optimiser.step(closure)
    return model


def log_likelihood(Y: Tensor, **covariance: Tensor) -> Tensor:
    return -tk.kron_gaussian_nll(Y, **covariance)


@torch.no_grad()
def predict_left_out(Y: Tensor, model: SeasonModel) -> dict[str, Prediction]:
    mean, variance = tk.leave_one_out(Y, **model())
    row_mean, covariance = tk.leave_one_row_out(Y, **model())
    return {
        MONTH: Prediction(mean, variance.sqrt()),
        SEASON: Prediction(row_mean, covariance.diagonal(dim1=-2, dim2=-1).sqrt()),
    }


def baselines(Y: Tensor) -> dict[str, Prediction]:
    T = len(Y)
    others = -Y / (T - 1)  # the column means are zero
    spread = ((Y.square().sum(0) - Y.square()) / (T - 1) - others.square()).sqrt()
    series = Y.flatten()
    line = series.clone()
    line[1:-1] = (series[:-2] + series[2:]) / 2
    line[0], line[-1] = series[1], series[-2]
    line = line.reshape(Y.shape)
    return {
        LINE: Prediction(line, (Y - line).std(0).expand_as(Y)),
        CLIMATE: Prediction(others, spread),
    }


def rms(x: Tensor, dim: int | None = None) -> Tensor:
    return x.square().mean(dim).sqrt()


def coverage(prediction: Prediction, Y: Tensor, levels: Tensor) -> Tensor:
    """How often the central interval of each level holds the observation."""
    half_width = math.sqrt(2) * torch.erfinv(levels)
    return (prediction.standardised(Y).abs().flatten()[:, None] <= half_width).double().mean(0)


def report(predictions: dict[str, Prediction], Y: Tensor) -> str:
    levels = torch.tensor([0.5, 0.8, 0.95], dtype=Y.dtype)
    lines = [f"{'':34}{'RMSE/°C':>9}{'log density':>13}{'inside 50 %':>13}{'80 %':>7}{'95 %':>7}"]
    for name, prediction in predictions.items():
        normal = torch.distributions.Normal(prediction.mean, prediction.deviation)
        inside = (100 * coverage(prediction, Y, levels)).tolist()
        numbers = f"{rms(Y - prediction.mean):9.3f}{normal.log_prob(Y).mean():13.3f}"
        lines.append(f"{name:34}{numbers}{inside[0]:13.1f}{inside[1]:7.1f}{inside[2]:7.1f}")
    return "\n".join(lines)


def plot_residuals(path: Path, t: Tensor, Y: Tensor, prediction: Prediction) -> None:
    series = (t, Y, *prediction, prediction.standardised(Y))
    times, y, mean, deviation, z = (x.flatten().numpy() for x in series)
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(12, 6), sharex=True, height_ratios=[2, 1], layout="constrained"
    )
    style = {
        "color": BLUE,
        "alpha": 0.25,
        "lw": 0,
        "label": "predicted from all other months, 95 %",
    }
    top.fill_between(times, mean - 1.96 * deviation, mean + 1.96 * deviation, **style)
    top.plot(times, y, ".", color="black", ms=2.5, label="observed")
    far = abs(z) > 3
    style = {"marker": "o", "ls": "", "mfc": "none", "mec": ORANGE, "ms": 8, "mew": 1.4}
    top.plot(times[far], y[far], **style, label="beyond 3 standard deviations")
    top.axhline(0, color="0.8", lw=0.8, zorder=0)
    top.set_ylabel("anomaly (°C)")
    top.set_ylim(None, y.max() + 0.9)
    for year, place in ((1972.8, 2.4), (1983.2, 4.7), (1997.9, 4.5)):
        top.text(year, place + 0.3, "El Niño", ha="center", color="0.35", fontsize=9)
    figure.legend(*top.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    bottom.vlines(times, 0, z, color="0.6", lw=0.7)
    bottom.plot(times[far], z[far], **style)
    for level in (-1.96, 1.96):
        bottom.axhline(level, color=BLUE, lw=0.8, ls="--")
    bottom.margins(y=0.12)
    bottom.set(ylabel="error /\nstandard deviation", xlim=(times[0] - 0.5, times[-1] + 0.5))
    save(figure, path)


def plot_calibration(path: Path, predictions: dict[str, Prediction], Y: Tensor) -> None:
    levels = torch.linspace(0, 0.999, 400, dtype=Y.dtype)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11.5, 5.2), width_ratios=[1, 1.25], layout="constrained"
    )
    # the Kolmogorov–Smirnov band for as many independent predictions
    band = 1.36 / math.sqrt(Y.numel())
    left.fill_between(levels, levels - band, levels + band, color="0.88", lw=0)
    left.plot([0, 1], [0, 1], color="0.5", lw=0.8)
    for name, prediction in predictions.items():
        style = {"color": COLOR[name], "ls": "-" if name in (MONTH, SEASON) else "--"}
        left.plot(levels, coverage(prediction, Y, levels), **style, lw=1.6)
        right.plot(MONTHS, rms(Y - prediction.mean, 0), "o", **style, lw=1.4, ms=5, label=name)
    left.set(xlabel="central part of the prediction", ylabel="part of the observations inside")
    left.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title="calibration")
    right.set(title="error of the prediction in each month", ylabel="RMSE (°C)", ylim=(0, None))
    right.grid(axis="y", color="0.92")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"wrote {path}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Leave-one-out validation on sea temperatures")
    parser.add_argument("--steps", type=int, default=100, help="iterations of L-BFGS for each fit")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)

    t, Y = load()
    objectives = {
        "maximum likelihood": log_likelihood,
        "maximum leave-one-out density": tk.leave_one_out_log_prob,
    }
    predictions = {}
    with tqdm(unit="evaluation") as bar:
        for name, objective in objectives.items():
            predictions[name] = predict_left_out(Y, fit(Y, objective, options.steps, bar))
    for name, found in predictions.items():
        print(f"\n{name}\n{report(found, Y)}")
    print(f"\nfor comparison\n{report(baselines(Y), Y)}")
    shown = predictions["maximum likelihood"]
    plot_residuals(options.output / "residuals.png", t, Y, shown[MONTH])
    plot_calibration(options.output / "calibration.png", {**shown, **baselines(Y)}, Y)


if __name__ == "__main__":
    main()
