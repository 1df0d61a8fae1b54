"""The pictures of train_multioutput_gp.py, from plain arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"


class Panel(NamedTuple):
    """One output over time, each array (T,) in the unit of the series."""

    name: str
    unit: str
    observed: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    independent: np.ndarray
    given_others: np.ndarray


def plot_fits(
    path: Path, t: np.ndarray, panels: Sequence[Panel], held_out: np.ndarray, shaded: np.ndarray
) -> None:
    """Every output's data, prediction with its 95 % band, and held-out points."""
    size = (12, 2 * len(panels) + 0.7)
    figure, axes = plt.subplots(len(panels), 1, figsize=size, sharex=True, layout="constrained")
    for axis, panel in zip(axes, panels, strict=True):
        for quarter in t[shaded]:
            axis.axvspan(quarter - 0.125, quarter + 0.125, color="0.92", lw=0, zorder=-1)
        axis.axhline(0, color="0.8", lw=0.8, zorder=0)
        draw_panel(axis, t, panel, held_out)
    axes[0].set_xlim(t[0] - 0.3, t[-1] + 0.3)
    figure.align_ylabels()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    save(figure, path)


def draw_panel(axis: Any, t: np.ndarray, panel: Panel, held_out: np.ndarray) -> None:
    low, high = panel.mean - 1.96 * panel.deviation, panel.mean + 1.96 * panel.deviation
    axis.fill_between(t, low, high, color=BLUE, alpha=0.25, lw=0)
    axis.plot(t, panel.mean, color=BLUE, lw=1.3, label="multi-output GP, 95 % band")
    axis.plot(t, panel.independent, color=ORANGE, lw=1.2, ls="--", label="independent GP")
    seen, out = ~held_out, held_out
    axis.plot(t[seen], panel.observed[seen], "k.", ms=3.5, label="training data")
    given = dict(marker="D", ls="", color=GREEN, ms=3.5, label="prediction given the other outputs")
    axis.plot(t[out], panel.given_others[out], **given)
    ring = dict(marker="o", ls="", mfc="none", mec="black", ms=6, mew=1, label="held-out data")
    axis.plot(t[out], panel.observed[out], **ring)
    axis.set_ylabel(f"{panel.name}\n({panel.unit})")


def plot_errors(
    path: Path,
    names: Sequence[str],
    parts: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    """A dot for the error (D,) of each model and output; ``parts[title][model]``, side by side."""
    marks = [("s", GREY), ("o", ORANGE), ("o", BLUE), ("D", GREEN)]
    figure, axes = plt.subplots(
        1, len(parts), figsize=(11, 4.4), sharex=True, sharey=True, layout="constrained"
    )
    for axis, (title, models) in zip(axes, parts.items(), strict=True):
        for (model, error), (marker, color) in zip(models.items(), marks, strict=True):
            axis.plot(error, names, marker, color=color, ms=8, alpha=0.85, label=model)
        axis.set(title=title, xlabel="RMSE, in standard deviations of the output")
        axis.grid(axis="y", color="0.9")
        axis.set_xlim(left=0)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save(figure, path)


def plot_correlation(path: Path, names: Sequence[str], K: np.ndarray, noise: np.ndarray) -> None:
    """The correlations in K (D, D), and each output's noise (D,) as a share of its variance."""
    deviation = np.sqrt(np.diagonal(K))
    correlation = K / deviation / deviation[:, None]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.6, 5.6), sharey=True, width_ratios=[3, 1.2], layout="constrained"
    )
    image = left.imshow(correlation, cmap="RdBu_r", vmin=-1, vmax=1)
    for (i, j), r in np.ndenumerate(correlation):
        text = f"{r:.2f}".replace("-", "\N{MINUS SIGN}")
        color = "white" if abs(r) > 0.6 else "black"
        left.text(j, i, text, ha="center", va="center", color=color)
    positions = np.arange(len(names))
    left.set_xticks(positions, names, rotation=35, ha="right", rotation_mode="anchor")
    left.set_yticks(positions, names)
    left.set_title("Learned correlation of the outputs (K)")
    figure.colorbar(image, ax=left, shrink=0.85)
    share = 100 * noise / (noise + deviation**2)
    bars = right.barh(positions, share, height=0.6, color=GREY)
    labels = [f"{x:.1f} %" if x >= 0.05 else "below 0.05 %" for x in share]
    right.bar_label(bars, labels, padding=4)
    right.set(title="Share of noise", xlabel="% of the variance")
    right.margins(x=0.35)
    right.tick_params(left=False)
    save(figure, path)


def plot_learning_curve(path: Path, curves: Mapping[str, Sequence[np.ndarray]]) -> None:
    """For each model the losses of every fold, as the best so far."""
    figure, axis = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
    for (name, folds), color in zip(curves.items(), (BLUE, ORANGE), strict=True):
        for k, losses in enumerate(folds):
            best = np.minimum.accumulate(losses)
            axis.plot(best, color=color, lw=1.4, alpha=0.8, label=name if k == 0 else None)
    axis.set_xlabel("evaluations of the likelihood and its gradient")
    axis.set_ylabel("negative log likelihood per entry,\nbest so far (nats)")
    axis.legend(title="one line per fold", frameon=False)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"wrote {path}")
