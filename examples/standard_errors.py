"""How well are variance components, a correlation and a length scale known? Four answers compared.

Fifty years of inflation and of the interest rate on treasury bills, in half-year means, are taken
as two slow components and noise:

    Y ~ N(0, M ⊗ K + I ⊗ Diag(noise)),   M a Matérn-3/2 kernel in time, K the 2×2 covariance of the
                                          slow components

with six parameters: a length scale, two variances in K and their correlation, two noise variances.
They are fitted by Newton's method, whose Hessian is the observed information, and then

* standard errors come from the observed and the expected information, through the delta method;
* the Laplace approximation takes the parameters, on the scale in which they are unconstrained, as
  normal around the estimate, with the inverse of the observed information as covariance;
* the profile likelihood fixes one parameter after the other on a grid and refits the rest;
* a random-walk Metropolis sampler, 32 chains in one batch, draws from the posterior under a prior
  that is uniform on the unconstrained scale within six standard errors.

They agree for what the data determine well. The noise of the interest rate is small beside its slow
component: its posterior has a long tail towards zero, which no standard error shows and the profile
likelihood does. The picture ``standard_errors.png`` shows all of them.

Data: the ``macrodata`` set of statsmodels, in the public domain; from FRED, Federal Reserve Bank of
St. Louis.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from statsmodels.datasets import macrodata
from torch import Tensor
from tqdm import tqdm

import torch_kronlik as tk
from torch_kronlik import Estimates

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.82"
SERIES = ["inflation", "treasury bills"]
NAMES = [
    "length scale (years)",
    "slow inflation, s.d. (%)",
    "slow bill rate, s.d. (%)",
    "correlation",
    "inflation noise, s.d. (%)",
    "bill rate noise, s.d. (%)",
]
CORRELATION = 3
Z95 = 1.96


def load() -> tuple[Tensor, Tensor]:
    """Times in years (T,), and per cent a year (T, 2), less their means over time."""
    data = macrodata.load_pandas().data[:200]  # whole years
    quarters = torch.tensor(data[["infl", "tbilrate"]].to_numpy(), dtype=torch.float64)
    Y = quarters.reshape(-1, 2, 2).mean(1)
    t = 1959.25 + torch.arange(len(Y), dtype=Y.dtype) / 2
    return t, Y - Y.mean(0)


# ---------------------------------------------------------------- the model


class Model(NamedTuple):
    t: Tensor  # (T,)
    Y: Tensor  # (T, D)

    def covariance(self, theta: Tensor) -> tk.KroneckerPlusNoise:
        """theta (*batch, 6): the quantities of ``NAMES`` by their logarithms, and an artanh."""
        value = natural(theta)
        distance = (self.t[:, None] - self.t).abs() / value[..., 0, None, None]
        M = (1 + math.sqrt(3) * distance) * torch.exp(-math.sqrt(3) * distance)
        deviation, r = value[..., 1:3], value[..., CORRELATION, None, None]
        eye = torch.eye(2, dtype=r.dtype)
        K = deviation[..., :, None] * (eye + r * (1 - eye)) * deviation[..., None, :]
        return tk.KroneckerPlusNoise(M, K, log_noise=2 * theta[..., 4:6])

    def nll(self, theta: Tensor) -> Tensor:
        U = self.covariance(theta)
        return tk.kron_gaussian_nll(self.Y, U.M, U.K, log_noise=U.log_noise)


def natural(theta: Tensor) -> Tensor:
    """The quantities of ``NAMES``."""
    return torch.cat([theta[..., :3].exp(), theta[..., 3:4].tanh(), theta[..., 4:].exp()], -1)


def unconstrained(value: float, i: int) -> float:
    return math.atanh(value) if i == CORRELATION else math.log(value)


# ---------------------------------------------------------------- Newton


def minimise(model: Model, theta: Tensor, free: list[int], steps: int = 60) -> tuple[Tensor, float]:
    """Newton's method in some of the parameters; downhill also where the Hessian is indefinite."""
    theta = theta.clone()
    for _ in range(steps):
        at = theta.clone().requires_grad_()
        value = model.nll(at)
        gradient = torch.autograd.grad(value, at)[0][free]
        H = tk.observed_information(model.covariance, theta, Y=model.Y).matrix[free][:, free]
        curvature, V = torch.linalg.eigh(H)
        step = V @ ((V.mT @ gradient) / curvature.abs().clamp_min(1e-3))
        length = 1.0
        while length > 1e-6:
            trial = theta.clone()
            trial[free] -= length * step.clamp(-1, 1)
            if model.nll(trial) < value:
                break
            length /= 2
        else:
            break
        theta = trial
        if gradient @ step < 1e-12:
            break
    return theta, float(model.nll(theta))


# ---------------------------------------------------------------- profile likelihood


class Profile(NamedTuple):
    theta: np.ndarray  # (n,)
    drop: np.ndarray  # (n,), in nats below the maximum

    def interval(self) -> tuple[float, float]:
        """Where the signed root of twice the drop is −1.96 and 1.96; infinite if nowhere."""
        middle = self.theta[self.drop.argmin()]
        root = np.sign(self.theta - middle) * np.sqrt(2 * self.drop.clip(0))
        low, high = np.interp([-Z95, Z95], root, self.theta)
        return (low if root[0] < -Z95 else -math.inf), (high if root[-1] > Z95 else math.inf)


def profile(model: Model, fit: Tensor, errors: Tensor, i: int, points: int) -> Profile:
    """From the estimate outwards, so that each fit starts from its neighbour's."""
    best, free = float(model.nll(fit)), [j for j in range(6) if j != i]
    found = {0.0: 0.0}
    for side in (-1, 1):
        theta = fit.clone()
        for z in torch.linspace(0, side * 4.8, points + 1)[1:].tolist():
            theta[i] = fit[i] + z * errors[i]
            theta, value = minimise(model, theta, free)
            found[z] = value - best
    z, drop = (np.array(x) for x in zip(*sorted(found.items()), strict=True))
    return Profile(float(fit[i]) + z * float(errors[i]), drop)


# ---------------------------------------------------------------- Metropolis


class Chains(NamedTuple):
    draws: Tensor  # (steps, chains, 6)
    acceptance: float

    def r_hat(self) -> float:
        """The largest potential scale reduction of split chains (Gelman et al., BDA3, 11.4)."""
        n = len(self.draws) // 2
        halves = torch.cat([self.draws[:n], self.draws[n : 2 * n]], 1)
        within = halves.var(0).mean(0)
        between = n * halves.mean(0).var(0)
        return float((((n - 1) / n * within + between / n) / within).sqrt().max())

    def effective_size(self) -> float:
        """The least over the parameters, from the variance of the chains' means."""
        steps, chains, _ = self.draws.shape
        total = self.draws.flatten(0, 1).var(0)
        return float((chains * total / self.draws.mean(0).var(0)).min().clamp_max(steps * chains))


@torch.no_grad()
def metropolis(model: Model, fit: Tensor, covariance: Tensor, steps: int, chains: int) -> Chains:
    """A random walk in steps of 2.4/√6 Laplace approximations (Roberts & Rosenthal 2001)."""
    root, errors = torch.linalg.cholesky(covariance), covariance.diagonal().sqrt()

    def log_density(theta: Tensor) -> Tensor:
        inside = ((theta - fit).abs() < 6 * errors).all(-1)
        return torch.where(inside, -model.nll(theta), -torch.inf)

    theta = fit + torch.randn(chains, 6, dtype=fit.dtype) @ root.mT
    density, kept, accepted = log_density(theta), [], 0.0
    burn_in = steps // 5
    for _ in tqdm(range(steps + burn_in), desc="Metropolis", leave=False):
        proposal = theta + 2.4 / math.sqrt(6) * torch.randn_like(theta) @ root.mT
        proposed = log_density(proposal)
        accept = torch.rand(chains, dtype=fit.dtype).log() < proposed - density
        theta = torch.where(accept[:, None], proposal, theta)
        density = torch.where(accept, proposed, density)
        accepted += accept.double().mean().item() / (steps + burn_in)
        kept.append(theta)
    return Chains(torch.stack(kept[burn_in:]), accepted)


# ---------------------------------------------------------------- what is written


def report(
    fit: Tensor, estimates: Estimates, expected: Estimates, profiles: list[Profile],
    errors: Tensor, chains: Chains,
) -> str:  # fmt: skip
    intervals = "".join(f"{name + ' 95 %':>20}" for name in ("Laplace", "profile", "Metropolis"))
    lines = [f"{'':27}{'estimate ± s.e.':>18}{'expected':>10}{intervals}"]
    quantiles = chains.draws.flatten(0, 1).quantile(torch.tensor([0.025, 0.975]).to(fit), 0)
    for i, name in enumerate(NAMES):
        value, error = estimates.values[i], estimates.standard_errors[i]
        laplace = fit[i] - Z95 * errors[i], fit[i] + Z95 * errors[i]
        three = [laplace, profiles[i].interval(), quantiles[:, i]]
        ends = [[float(natural(fit.new_full((6,), float(x)))[i]) for x in two] for two in three]
        text = "".join(f"{f'{low:.2f} to {high:.2f}':>20}" for low, high in ends)
        both = f"{f'{value:.3f} ± {error:.3f}':>18}{expected.standard_errors[i]:10.3f}"
        lines.append(f"{name:27}{both}{text}")
    return "\n".join(lines)


def plot(
    path: Path, t: Tensor, Y: Tensor, fit: Tensor, errors: Tensor, profiles: list[Profile],
    chains: Chains,
) -> None:  # fmt: skip
    figure = plt.figure(figsize=(12, 9), layout="constrained")
    grid = figure.add_gridspec(3, 3, height_ratios=[0.9, 1, 1])
    top = figure.add_subplot(grid[0, :])
    for name, y, color in zip(SERIES, Y.T.numpy(), (ORANGE, BLUE), strict=True):
        top.plot(t.numpy(), y, color=color, lw=1.4, label=name)
    top.axhline(0, color="0.8", lw=0.8, zorder=0)
    top.set(ylabel="per cent a year, less mean", xlim=(float(t[0]), float(t[-1])))
    top.legend(frameon=False, ncols=2, loc="upper right")
    for i, name in enumerate(NAMES):
        axes = figure.add_subplot(grid[1 + i // 3, i % 3])
        plot_parameter(axes, i, float(fit[i]), float(errors[i]), profiles[i], chains)
        axes.set_title(name, fontsize=11)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_parameter(
    axes: Axes, i: int, fit: float, error: float, along: Profile, chains: Chains
) -> None:
    """On the unconstrained scale, where Laplace's approximation is a normal curve."""
    draws = chains.draws[..., i].flatten().numpy()
    low, high = min(np.quantile(draws, 0.002), fit - 3.5 * error), fit + 3.5 * error
    low = max(low, fit - 6 * error)
    style = {"bins": 45, "range": (low, high), "weights": np.full(len(draws), 45 / (high - low))}
    style["weights"] = style["weights"] / len(draws)
    axes.hist(draws, color=GREY, label="Metropolis: posterior draws", **style)
    x = np.linspace(low, high, 300)
    peak = 1 / (error * math.sqrt(2 * math.pi))
    laplace = peak * np.exp(-0.5 * ((x - fit) / error) ** 2)
    axes.plot(x, laplace, color=BLUE, lw=2, label="Laplace: observed information")
    root = np.sign(along.theta - fit) * np.sqrt(along.drop.clip(0))
    between = np.interp(x, along.theta, root, left=np.nan, right=np.nan)
    axes.plot(x, peak * np.exp(-(between**2)), color=ORANGE, lw=2, ls="--",
              label="profile likelihood, scaled")  # fmt: skip
    axes.set(xlim=(low, high), yticks=[])
    axes.spines[["left", "right", "top"]].set_visible(False)
    marks = ticks(low, high, i)
    axes.set_xticks([unconstrained(m, i) for m in marks], [f"{m:g}" for m in marks])


def ticks(low: float, high: float, i: int) -> list[float]:
    """Round numbers of the natural scale, at most seven."""
    steps = [0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8]
    if i == CORRELATION:
        steps = [-0.5, 0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95]
    scaled = steps if i == CORRELATION else [s * k for k in (0.01, 0.1, 1, 10) for s in steps]
    inside = sorted({round(s, 4) for s in scaled if low < unconstrained(s, i) < high})
    return inside[:: 1 + len(inside) // 8]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1500, help="of each Metropolis chain")
    parser.add_argument("--chains", type=int, default=32)
    parser.add_argument("--points", type=int, default=6, help="of a profile, on each side")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of the picture")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    t, Y = load()
    model = Model(t, Y)
    fit, value = minimise(model, torch.zeros(6, dtype=Y.dtype), list(range(6)))
    print(f"{len(Y)} half-years, {value:.2f} nats at the estimate")
    observed = tk.observed_information(model.covariance, fit, Y=Y)
    expected = tk.fisher_information(model.covariance, fit)
    errors = observed.standard_errors
    profiles = [
        profile(model, fit, errors, i, options.points) for i in tqdm(range(6), desc="profiles")
    ]
    chains = metropolis(model, fit, observed.covariance, options.steps, options.chains)
    estimates = observed.delta_method(natural), expected.delta_method(natural)
    print(report(fit, *estimates, profiles, errors, chains))
    print(
        f"Metropolis: {chains.draws[..., 0].numel()} draws, acceptance {chains.acceptance:.2f}, "
        f"R-hat {chains.r_hat():.3f}, effective size {chains.effective_size():.0f}"
    )
    path = options.output / "standard_errors.png"
    plot(path, t, Y, fit, errors, profiles, chains)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
