"""A multi-output Gaussian process on fifty years of the US economy.

Rows are quarters (1959 to 2009), outputs are seven macroeconomic series, each as its deviation
from a straight line in time: real GDP, consumption, investment and disposable income (in per cent),
unemployment, the 3-month Treasury bill rate and inflation (in percentage points). They share the
business cycle, and their noise differs by orders of magnitude:

    Y ~ N(0, M ⊗ K + I ⊗ Diag(noise)),    M = exp(-|t - t'| / timescale)

M is a rough kernel over time, for series that wander like random walks in the short run; K is the
covariance between outputs and ``noise`` one variance per output. The timescale, K and the noise are
learned by maximum likelihood.

The quarters are held out in five parts, half of them in blocks of two years and half scattered, so
that each is predicted once by models that have not seen it. Two questions are asked:

* The whole quarter is missing. How good is the joint prediction of its seven outputs?
* One output of a held-out quarter is missing, its other six have been published. What is it?

The answers are compared with independent GPs (the same kernel, each output trained on its own),
with linear interpolation, and with the straight line alone. In the RMSE of whole missing quarters
the models are close, because an output's own neighbours in time know most of what can be known; the
correlations pay in the joint density and in the second question. Four pictures are written:

* ``fits.png``: the first fold. Line and band: the prediction of an observation and its central
  95 %. Rings: what was held out; the grey columns are its blocks. Diamonds: the second question.
* ``errors.png``: the error of each output in the held-out quarters, smaller is better.
* ``correlation.png``: the correlations in K, and the share of each output's variance that is noise.
* ``learning_curve.png``: the negative log likelihood while the models are trained.

Data: ``macrodata`` of statsmodels, in the public domain; from FRED, Federal Reserve Bank of
St. Louis, and the US Bureau of Labor Statistics.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pictures import Panel, plot_correlation, plot_errors, plot_fits, plot_learning_curve
from statsmodels.datasets import macrodata
from torch import Tensor, nn
from tqdm import tqdm

import torch_kronlik as tk

PER_CENT = {
    "GDP": "realgdp",
    "Consumption": "realcons",
    "Investment": "realinv",
    "Income": "realdpi",
}
POINTS = {"Unemployment": "unemp", "T-bill rate": "tbilrate", "Inflation": "infl"}
NAMES = [*PER_CENT, *POINTS]
UNITS = ["% from trend"] * len(PER_CENT) + ["points"] * len(POINTS)
TOGETHER, APART = "multi-output GP", "independent GPs"
LINES, TREND = "linear interpolation", "straight line alone"
BLOCK = 8  # quarters


class Forecast(NamedTuple):
    mean: Tensor  # (S, D)
    covariance: Tensor  # (S, D, D), between the observations of a row


class Scores(NamedTuple):
    log_density: Tensor  # (S,), of a row, in nats per entry
    error: Tensor  # (S, D), the whole row missing
    error_one_missing: Tensor  # (S, D), each output predicted from the others of its row as well


class Fold(NamedTuple):
    held_out: Tensor  # (T,) bool
    Y: Tensor  # (T, D), standardised
    scale: Tensor  # (D,), one unit of Y in units of the series
    model: MultiOutputGP
    forecasts: dict[str, Forecast]  # of every row, given the rows that are not held out
    losses: dict[str, np.ndarray]  # at each evaluation


class MultiOutputGP(nn.Module):
    """Y ~ N(0, M ⊗ K + I ⊗ Diag(noise)); with one output it is an ordinary GP."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.log_timescale = nn.Parameter(torch.tensor(3.0).log())  # years
        self.root = nn.Parameter(0.7 * torch.eye(num_outputs))
        self.loss = tk.KroneckerGaussianNLLLoss(num_outputs)

    @property
    def K(self) -> Tensor:
        L = self.root.tril()
        return L @ L.mT

    def M(self, t1: Tensor, t2: Tensor) -> Tensor:
        return torch.exp(-(t1[:, None] - t2).abs() / self.log_timescale.exp())

    def forward(self, t: Tensor, Y: Tensor) -> Tensor:
        """Negative log likelihood per entry."""
        nll: Tensor = self.loss(Y, self.M(t, t), self.K)
        return nll

    @torch.no_grad()
    def predict(self, t: Tensor, Y: Tensor, t_new: Tensor) -> Forecast:
        """New observations at t_new, given Y at t."""
        posterior = tk.condition(
            Y,
            self.M(t, t),
            self.K,
            self.M(t_new, t),
            torch.ones_like(t_new),  # the diagonal of M(t_new, t_new)
            log_noise=self.loss.log_noise,
        )
        return Forecast(posterior.mean, posterior.row_covariance + self.loss.Sigma)


def load() -> tuple[Tensor, Tensor]:
    """Quarters t in years (T,), and the seven series (T, D)."""
    data = macrodata.load_pandas().data.iloc[1:]  # the first inflation rate is a placeholder
    t = data["year"] + (data["quarter"] - 1) / 4
    series = [100 * np.log(data[column]) for column in PER_CENT.values()]
    series += [data[column] for column in POINTS.values()]
    return torch.tensor(t.to_numpy()), torch.tensor(np.stack(series, axis=1))


def standardise(t: Tensor, series: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """Deviations from the training rows' straight lines, in their standard deviations (D,)."""
    X = torch.stack([torch.ones_like(t), t - t.mean()], dim=1)
    residuals = series - X @ torch.linalg.lstsq(X[train], series[train]).solution
    scale = residuals[train].std(0)
    return residuals / scale, scale


def assign_folds(T: int, folds: int) -> tuple[Tensor, Tensor]:
    """The fold that holds out each row (T,), and whether it does so as part of a block (T,).

    Every second stretch of BLOCK rows is held out as a whole, the rows between are scattered.
    """
    rng = np.random.default_rng(0)
    stretch = np.arange(T) // BLOCK
    in_block = stretch % 2 == 0
    fold = np.empty(T, dtype=int)
    fold[in_block] = deal(T, folds, rng)[stretch[in_block] // 2]
    fold[~in_block] = deal(int((~in_block).sum()), folds, rng)
    return torch.tensor(fold), torch.tensor(in_block)


def deal(cards: int, players: int, rng: np.random.Generator) -> np.ndarray:
    """A player for each card, evenly and at random."""
    rounds = [rng.permutation(players) for _ in range(math.ceil(cards / players))]
    return np.concatenate(rounds)[:cards]


def train(t: Tensor, Y: Tensor, steps: int, bar: tqdm) -> tuple[MultiOutputGP, np.ndarray]:
    """A model fitted by maximum likelihood, and the loss at each evaluation."""
    model = MultiOutputGP(Y.shape[1]).to(Y.dtype)
    optimiser = torch.optim.LBFGS(
        model.parameters(), max_iter=steps, max_eval=2 * steps, line_search_fn="strong_wolfe"
    )
    losses = []

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss: Tensor = model(t, Y)
        loss.backward()
        losses.append(loss.item())
        bar.set_postfix_str(f"{losses[-1]:.3f} nats per entry")
        return loss

    optimiser.step(closure)
    bar.update()
    return model, np.array(losses)


def side_by_side(forecasts: Sequence[Forecast]) -> Forecast:
    """Forecasts of one output each, as one of independent outputs."""
    mean = torch.cat([f.mean for f in forecasts], dim=1)
    variance = torch.cat([f.covariance[:, 0] for f in forecasts], dim=1)
    return Forecast(mean, torch.diag_embed(variance))


def average(losses: Sequence[np.ndarray]) -> np.ndarray:
    """The mean over models, each standing still after its last evaluation."""
    length = max(map(len, losses))
    padded = np.stack([np.pad(x, (0, length - len(x)), mode="edge") for x in losses])
    return np.asarray(padded.mean(0))


def interpolate(t: Tensor, Y: Tensor, t_new: Tensor) -> Forecast:
    """Straight lines between neighbours, with the variance of Brownian motion around them."""
    mean = np.stack([np.interp(t_new, t, y) for y in Y.T], axis=1)
    lag = t_new[:, None] - t
    past = lag.where(lag > 0, torch.inf).amin(1, keepdim=True)
    future = (-lag).where(lag < 0, torch.inf).amin(1, keepdim=True)
    rate = (Y.diff(dim=0).square() / t.diff()[:, None]).mean(0)
    return Forecast(torch.from_numpy(mean), torch.diag_embed(rate / (1 / past + 1 / future)))


def straight_line(Y: Tensor, t_new: Tensor) -> Forecast:
    """No deviation from the trend, with the variance of the training rows."""
    mean = torch.zeros(len(t_new), Y.shape[1], dtype=Y.dtype)
    return Forecast(mean, torch.diag(Y.square().mean(0)).expand(len(t_new), -1, -1))


def run_fold(t: Tensor, series: Tensor, held_out: Tensor, steps: int, bar: tqdm) -> Fold:
    """Train on the rows that are not held out and forecast every row."""
    Y, scale = standardise(t, series, ~held_out)
    t_seen, seen = t[~held_out], Y[~held_out]
    model, losses = train(t_seen, seen, steps, bar)
    outputs = seen.split(1, dim=1)
    single, losses_single = zip(*[train(t_seen, y, steps, bar) for y in outputs], strict=True)
    apart = [gp.predict(t_seen, y, t) for gp, y in zip(single, outputs, strict=True)]
    forecasts = {
        TOGETHER: model.predict(t_seen, seen, t),
        APART: side_by_side(apart),
        LINES: interpolate(t_seen, seen, t),
        TREND: straight_line(seen, t),
    }
    losses_by_name = {TOGETHER: losses, APART: average(losses_single)}
    return Fold(held_out, Y, scale, model, forecasts, losses_by_name)


def from_the_others(error: Tensor, covariance: Tensor) -> Tensor:
    """What the other outputs' errors of a row say about each one: its mean given them, (S, D)."""
    precision = covariance.inverse()
    remaining = (precision @ error[..., None])[..., 0] / precision.diagonal(dim1=-2, dim2=-1)
    return error - remaining


def score(forecast: Forecast, Y: Tensor) -> Scores:
    mean, covariance = forecast
    log_density = torch.distributions.MultivariateNormal(mean, covariance).log_prob(Y)
    error = Y - mean
    return Scores(log_density / Y.shape[1], error, error - from_the_others(error, covariance))


def evaluate(folds: Sequence[Fold], name: str) -> Scores:
    """Every row scored in the fold that held it out."""
    scores = []
    for fold in folds:
        forecast = Forecast(*(x[fold.held_out] for x in fold.forecasts[name]))
        scores.append(score(forecast, fold.Y[fold.held_out]))
    rows = torch.cat([fold.held_out.nonzero()[:, 0] for fold in folds]).argsort()
    return Scores(*(torch.cat(x)[rows] for x in zip(*scores, strict=True)))


def rms(x: Tensor, dim: int | None = None) -> Tensor:
    return x.square().mean(dim).sqrt()


def table(scores: dict[str, Scores], in_block: Tensor) -> str:
    """Averages over all held-out rows, in blocks and scattered."""
    heads = ["log density", "RMSE", "RMSE, one missing"]
    lines = ["".join([" " * 23, *(f"{head:>22}" for head in heads)])]
    lines.append(" " * 23 + f"{'blocks':>12}{'scattered':>10}" * len(heads))
    for name, s in scores.items():
        lines.append(f"{name:23}")
        for value, x in ((Tensor.mean, s.log_density), (rms, s.error), (rms, s.error_one_missing)):
            lines[-1] += f"{value(x[in_block]).item():12.3f}{value(x[~in_block]).item():10.3f}"
    return "\n".join(lines)


def learned(fold: Fold) -> str:
    """The timescale, and the noise in the units of the series."""
    noise = fold.model.loss.noise.detach().sqrt() * fold.scale
    by_output = ", ".join(f"{name} {x:.2g}" for name, x in zip(NAMES, noise.tolist(), strict=True))
    timescale = fold.model.log_timescale.exp().item()
    return f"First fold: timescale {timescale:.1f} years; noise (sd): {by_output}."


def panels(fold: Fold) -> list[Panel]:
    mean, covariance = fold.forecasts[TOGETHER]
    deviation = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    given_others = mean + from_the_others(fold.Y - mean, covariance)
    arrays = (fold.Y, mean, deviation, fold.forecasts[APART].mean, given_others)
    columns = [(x * fold.scale).T.numpy() for x in arrays]
    return [Panel(*column) for column in zip(NAMES, UNITS, *columns, strict=True)]


def draw(output: Path, t: Tensor, in_block: Tensor, folds: Sequence[Fold]) -> None:
    first = folds[0]
    shaded = (first.held_out & in_block).numpy()
    plot_fits(output / "fits.png", t.numpy(), panels(first), first.held_out.numpy(), shaded)
    scores = {name: evaluate(folds, name) for name in (LINES, APART, TOGETHER)}
    errors = {name: s.error for name, s in scores.items()}
    errors[f"{TOGETHER}, given the other outputs"] = scores[TOGETHER].error_one_missing
    parts = {"blocks of two years": in_block, "scattered quarters": ~in_block}
    by_part = {
        title: {name: rms(x[rows], 0).numpy() for name, x in errors.items()}
        for title, rows in parts.items()
    }
    plot_errors(output / "errors.png", NAMES, by_part)
    K, noise = first.model.K.detach().numpy(), first.model.loss.noise.detach().numpy()
    plot_correlation(output / "correlation.png", NAMES, K, noise)
    curves = {name: [fold.losses[name] for fold in folds] for name in (TOGETHER, APART)}
    plot_learning_curve(output / "learning_curve.png", curves)


def main(arguments: Sequence[str] | None = None) -> dict[str, Scores]:
    parser = argparse.ArgumentParser(description="A multi-output GP on US macroeconomic data.")
    parser.add_argument("--steps", type=int, default=80, help="L-BFGS iterations for each model")
    parser.add_argument("--folds", type=int, default=5, help="parts to hold out in turn")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)

    t, series = load()
    fold_of, in_block = assign_folds(len(t), options.folds)
    with tqdm(total=options.folds * (1 + len(NAMES)), unit="model") as bar:
        folds = [
            run_fold(t, series, fold_of == k, options.steps, bar) for k in range(options.folds)
        ]
    scores = {name: evaluate(folds, name) for name in folds[0].forecasts}
    print("\nHeld-out quarters; log density in nats per entry, RMSE in standard deviations.\n")
    print(table(scores, in_block))
    print(f"\n{learned(folds[0])}\n")
    draw(options.output, t, in_block, folds)
    return scores


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices of this size gain nothing from more
    main()
