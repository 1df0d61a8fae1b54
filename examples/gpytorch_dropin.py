"""One line changed in a GPyTorch model: the same numbers, sooner.

    likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks=D)     # before
    likelihood = tkg.MultitaskGaussianLikelihood(num_tasks=D)                      # after

Model, kernels, ``ExactMarginalLogLikelihood``, optimiser and prediction code are GPyTorch's own and
stay as they are. Everything is done twice, before and after the change, from the same start:

* the problem of GPyTorch's multitask tutorial: sine and cosine in noise;
* five measures of the US economy, quarter by quarter for fifty years, with three stretches of two
  years hidden from the model and predicted;
* a training step at growing size.

Printed are the results side by side, and their distance from GPyTorch's dense computation (Cholesky
factors of whole covariance matrices). The picture ``gpytorch_dropin.png`` shows the predictions of
both, one on top of the other, and the times.

Data: the ``macrodata`` set of statsmodels, in the public domain, from the Federal Reserve Bank of
St. Louis.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gpytorch
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from statsmodels.datasets import macrodata
from torch import Tensor
from tqdm import tqdm

import torch_kronlik.gpytorch as tkg

BEFORE, AFTER = "GPyTorch", "one line changed"
LIKELIHOODS = {
    BEFORE: gpytorch.likelihoods.MultitaskGaussianLikelihood,
    AFTER: tkg.MultitaskGaussianLikelihood,
}
COLOR = {BEFORE: "#0072B2", AFTER: "#D55E00"}
SERIES = ["unemployment", "interest", "inflation", "saving", "investment"]


class Data(NamedTuple):
    x: Tensor  # (T,)
    y: Tensor  # (T, D)
    x_new: Tensor  # (S,)
    y_new: Tensor  # (S, D)


class Prediction(NamedTuple):
    mean: Tensor  # (S, D)
    deviation: Tensor  # (S, D), standard deviation
    log_density: float  # of y_new, jointly, in nats


class MultitaskModel(gpytorch.models.ExactGP):
    """The model of GPyTorch's multitask tutorial, with a kernel to choose."""

    def __init__(self, data: Data, likelihood: Any, kernel: Any, rank: int = 1) -> None:
        super().__init__(data.x, data.y, likelihood)
        D = data.y.shape[-1]
        self.mean_module = gpytorch.means.MultitaskMean(gpytorch.means.ConstantMean(), num_tasks=D)
        self.covar_module = gpytorch.kernels.MultitaskKernel(kernel, num_tasks=D, rank=rank)

    def forward(self, x: Tensor) -> Any:
        return gpytorch.distributions.MultitaskMultivariateNormal(
            self.mean_module(x), self.covar_module(x)
        )


# ---------------------------------------------------------------- the code that stays as it is


def fit(model: MultitaskModel, steps: int, name: str) -> float:
    """Maximise the marginal likelihood; returns the median time of a step, in seconds."""
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
    model.train()
    times = []
    for _ in (bar := tqdm(range(steps), desc=name, unit="step", leave=False)):
        start = time.perf_counter()
        optimiser.zero_grad()
        loss = -mll(model(*model.train_inputs), model.train_targets)
        loss.backward()
        optimiser.step()
        times.append(time.perf_counter() - start)
        bar.set_postfix_str(f"{loss.item():.4f} nats per entry")
    return sorted(times)[len(times) // 2]


@torch.no_grad()
def predict(model: MultitaskModel, data: Data) -> Prediction:
    model.eval()
    observed = model.likelihood(model(data.x_new))
    log_density = observed.log_prob(data.y_new).item()
    return Prediction(observed.mean, observed.variance.sqrt(), log_density)


# ---------------------------------------------------------------- before and after


class Run(NamedTuple):
    model: MultitaskModel
    prediction: Prediction
    step: float  # seconds
    predicting: float  # seconds


def run(data: Data, kernel: Callable[[], Any], rank: int, steps: int) -> dict[str, Run]:
    runs = {}
    for name, likelihood in LIKELIHOODS.items():
        torch.manual_seed(0)
        model = MultitaskModel(data, likelihood(num_tasks=data.y.shape[-1]), kernel(), rank)
        step = fit(model, steps, name)
        start = time.perf_counter()
        prediction = predict(model, data)
        runs[name] = Run(model, prediction, step, time.perf_counter() - start)
    return runs


def dense(model: MultitaskModel, data: Data) -> Prediction:
    """The same prediction by GPyTorch with whole covariance matrices."""
    before = MultitaskModel(
        data,
        LIKELIHOODS[BEFORE](num_tasks=data.y.shape[-1]),
        type(model.covar_module.data_covar_module)(),
        model.covar_module.task_covar_module.covar_factor.shape[-1],
    )
    before.load_state_dict(model.state_dict())
    with (
        gpytorch.settings.max_cholesky_size(data.y.numel() + data.y_new.numel()),
        gpytorch.settings.fast_computations(False, False, False),
    ):
        return predict(before, data)


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def report(title: str, data: Data, runs: dict[str, Run]) -> str:
    lines = [f"{title}: {data.y.shape[0]} x {data.y.shape[1]} observations", f"{'':44}"]
    lines[1] += "".join(f"{name:>20}" for name in runs)
    exact = {name: dense(r.model, data) for name, r in runs.items()}
    rows: dict[str, Callable[[str, Run], str]] = {
        "length scale": lambda n, r: f"{lengthscale(r.model):.8f}",
        "noise variance of the first task": lambda n, r: f"{first_noise(r.model):.8f}",
        "log density of what was hidden, nats": lambda n, r: f"{r.prediction.log_density:.8f}",
        "mean, distance from dense": lambda n, r: f"{distance(r.prediction[0], exact[n][0]):.1e}",
        "deviation, distance from dense": lambda n, r: (
            f"{distance(r.prediction[1], exact[n][1]):.1e}"
        ),
        "training step, ms": lambda n, r: f"{1e3 * r.step:.1f}",
        "prediction, ms": lambda n, r: f"{1e3 * r.predicting:.1f}",
    }
    for label, value in rows.items():
        lines.append(f"{label:44}" + "".join(f"{value(n, r):>20}" for n, r in runs.items()))
    return "\n".join(lines)


def lengthscale(model: MultitaskModel) -> float:
    return model.covar_module.data_covar_module.lengthscale.item()


def first_noise(model: MultitaskModel) -> float:
    return (model.likelihood.task_noises[0] + model.likelihood.noise).item()


def time_steps(sizes: Sequence[int], D: int, repeats: int) -> dict[str, list[float]]:
    """The median time of a training step at each T, in seconds."""
    times: dict[str, list[float]] = {name: [] for name in LIKELIHOODS}
    for T in sizes:
        x = torch.linspace(0, 1, T)
        y = torch.sin(6 * x[:, None] + torch.arange(D)) + 0.2 * torch.randn(T, D)
        for name, likelihood in LIKELIHOODS.items():
            torch.manual_seed(0)
            data = Data(x, y, x[:1], y[:1])
            model = MultitaskModel(data, likelihood(num_tasks=D), gpytorch.kernels.RBFKernel())
            times[name].append(fit(model, repeats + 1, f"{name}, T = {T}"))
    return times


# ---------------------------------------------------------------- data


def tutorial() -> Data:
    torch.manual_seed(0)
    x, x_new = torch.linspace(0, 1, 100), torch.linspace(0, 1, 51)
    truth = [
        torch.stack([f(2 * torch.pi * t) for f in (torch.sin, torch.cos)], -1) for t in (x, x_new)
    ]
    y, y_new = (f + 0.2 * torch.randn_like(f) for f in truth)
    return Data(x, y, x_new, y_new)


def economy() -> Data:
    """Rates of unemployment, interest and inflation, the shares of saving in income and of
    investment in GDP, standardised; x in decades."""
    table = {name: torch.tensor(c.to_numpy()) for name, c in macrodata.load_pandas().data.items()}
    rates = [table["unemp"], table["tbilrate"], table["infl"]]
    shares = [1 - table["realcons"] / table["realdpi"], table["realinv"] / table["realgdp"]]
    y = torch.stack([*rates, *shares], -1)
    y = (y - y.mean(0)) / y.std(0)
    x = (table["year"] + (table["quarter"] - 1) / 4) / 10
    hidden = torch.zeros(len(x), dtype=torch.bool)
    for first in (60, 92, 164):
        hidden[first : first + 8] = True
    return Data(x[~hidden], y[~hidden], x[hidden], y[hidden])


# ---------------------------------------------------------------- picture


def draw_both(axis: Any, x: Tensor, runs: dict[str, Prediction], task: int) -> None:
    """Before in a broad light line, after in a thin dark one on top."""
    for name, p in runs.items():
        mean, deviation = p.mean[:, task], p.deviation[:, task]
        first = name == BEFORE
        style = {"color": COLOR[name], "label": name}
        axis.plot(
            x,
            mean,
            **style,
            lw=6 if first else 1.5,
            alpha=0.35 if first else 1,
            solid_capstyle="butt",
        )
        for sign in (-2, 2):
            axis.plot(
                x,
                mean + sign * deviation,
                color=COLOR[name],
                lw=4 if first else 0.9,
                alpha=0.25 if first else 1,
            )


def plot_tutorial(axes: Sequence[Any], data: Data, runs: dict[str, Run]) -> None:
    predictions = {name: r.prediction for name, r in runs.items()}
    for task, (axis, title) in enumerate(zip(axes, ("sine", "cosine"), strict=True)):
        axis.plot(data.x, data.y[:, task], ".", color="black", ms=3, label="observed")
        draw_both(axis, data.x_new, predictions, task)
        axis.set(title=f"tutorial: {title}", xlim=(0, 1), ylim=(-2, 2))


def plot_economy(axis: Any, data: Data, runs: dict[str, Run], task: int) -> None:
    """The series, and the predictions over the whole time."""
    x = torch.cat([data.x, data.x_new]).sort().values
    grid = Data(data.x, data.y, x, torch.zeros(len(x), data.y.shape[-1]))
    draw_both(axis, 10 * x, {n: predict(r.model, grid) for n, r in runs.items()}, task)
    axis.plot(10 * data.x, data.y[:, task], ".", color="black", ms=3)
    style = {"mfc": "white", "mec": "black", "ms": 4.5, "mew": 0.9}
    axis.plot(10 * data.x_new, data.y_new[:, task], "o", **style, label="hidden from the model")
    for stretch in (10 * data.x_new).split(8):
        axis.axvspan(stretch[0] - 0.125, stretch[-1] + 0.125, color="0.94", lw=0, zorder=0)
    title = f"US economy: {SERIES[task]}, one of {len(SERIES)} series"
    axis.set(title=title, ylabel="standard deviations", xlim=(1958.5, 2010))


def plot_times(axis: Any, sizes: Sequence[int], D: int, times: dict[str, list[float]]) -> None:
    for name, seconds in times.items():
        axis.loglog(
            [T * D for T in sizes], [1e3 * s for s in seconds], "o-", color=COLOR[name], ms=5
        )
        axis.annotate(
            f" {name}", (sizes[-1] * D, 1e3 * seconds[-1]), color=COLOR[name], va="center"
        )
    axis.set(title=f"time of a training step, {D} tasks", xlabel="observations", ylabel="ms")
    axis.axvline(800, color="0.6", lw=0.8, ls="--")
    style = {"va": "top", "color": "0.4", "transform": axis.get_xaxis_transform()}
    axis.text(850, 0.98, "GPyTorch: dense up to 800", **style)
    axis.set_ylim(None, 6e3 * max(max(seconds) for seconds in times.values()))
    axis.set_xlim(None, 6 * sizes[-1] * D)
    axis.set_xticks([T * D for T in sizes], [str(T * D) for T in sizes])
    axis.minorticks_off()
    axis.grid(color="0.92")


def plot(path: Path, parts: Sequence[tuple[Data, dict[str, Run]]], times: Any, D: int) -> None:
    figure, axes = plt.subplot_mosaic(
        [["sine", "cosine", "times"], ["economy", "economy", "economy"]],
        figsize=(13, 7.5),
        layout="constrained",
    )
    plot_tutorial([axes["sine"], axes["cosine"]], *parts[0])
    plot_economy(axes["economy"], *parts[1], SERIES.index("unemployment"))
    plot_times(axes["times"], *times[:1], D, times[1])
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
    handles = {}
    for axis in (axes["sine"], axes["economy"]):
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"wrote {path}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A GPyTorch model before and after the change")
    parser.add_argument("--steps", type=int, default=60, help="training steps of each model")
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 100, 200, 400, 800, 1600])
    parser.add_argument("--repeats", type=int, default=5, help="timed steps at each size")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float64)

    first, second, D = tutorial(), economy(), 4
    parts = [
        (first, run(first, gpytorch.kernels.RBFKernel, 1, options.steps)),
        (second, run(second, gpytorch.kernels.MaternKernel, 2, options.steps)),
    ]
    print(report("\nGPyTorch's tutorial", *parts[0]))
    print(report("\nUS economy", *parts[1]))
    times = time_steps(options.sizes, D, options.repeats)
    print(f"\ntraining step, ms{'':7}" + "".join(f"{T * D:>10}" for T in options.sizes))
    for name, seconds in times.items():
        print(f"{name:24}" + "".join(f"{1e3 * s:10.1f}" for s in seconds))
    plot(options.output / "gpytorch_dropin.png", parts, (options.sizes, times), D)


if __name__ == "__main__":
    main()
