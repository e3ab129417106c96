"""Figures of the AEM experiment."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

CURVES = {
    "entropy": "attention entropy on test bags\n(1: even attention)",
    "auc": "test AUC, %",
    "nll": "test negative log-likelihood",
    "largest_weight": "largest weight of a bag",
}
"""What is measured after every epoch."""

COLOURS = ("#222222", "#e69f00", "#0072b2", "#009e73")
STYLES = (":", "-.", "-", "--")
"""Of up to four arms."""


def curves(histories: Mapping[str, Mapping[str, Tensor]]) -> "Figure":
    """Every measure over the epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.8), layout="constrained")
    for axes, name in zip(figure.subplots(2, 2).flat, CURVES, strict=True):
        _plot(axes, histories, name)
    _legend(figure, figure.axes[0])
    return figure


def entropy_and_auc(histories: Mapping[str, Mapping[str, Tensor]], first: int = 5) -> "Figure":
    """Test AUC against test entropy over the epochs of models without AEM."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for arm, history in histories.items():
        axes.plot(history["entropy"][first - 1 :], history["auc"][first - 1 :], "o", markersize=3, label=arm)
    axes.set(
        xlabel="attention entropy relative to even", ylabel="test AUC, %", title=f"epochs from {first} on, lambda = 0"
    )
    axes.legend(frameon=False, fontsize=11)
    return figure


def pairs(metrics: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]]) -> "Figure":
    """AUC, likelihood and entropy of every model without and with AEM."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = {"auc": "test AUC, %", "nll": "test negative log-likelihood", "entropy": "attention entropy"}
    for axes, (name, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for place, both in enumerate(metrics.values()):
            before, after = (one[name] for one in both)
            axes.annotate("", (place, after), (place, before), arrowprops={"arrowstyle": "->", "color": "0.6"})
            axes.plot(place, before, "o", color="#222222", label="without AEM" if place == 0 else None)
            axes.plot(place, after, "o", color="#e69f00", label="with AEM" if place == 0 else None)
        axes.set_xticks(range(len(metrics)), list(metrics), rotation=30, fontsize=11)
        axes.tick_params(labelsize=11)
        axes.set_title(title, fontsize=12)
    figure.axes[0].legend(frameon=False, fontsize=11)
    return figure


def bags(
    shown: Mapping[str, Mapping[str, Tensor]], histories: Mapping[str, Mapping[str, Tensor]], most: int = 7
) -> "Figure":
    """The instances of one positive bag by the attention they get, over entropy and AUC; a frame marks those that make it positive.

    Args:
        shown: weights, pictures and truth of the bag, by arm in words.
        histories: of the arms whose curves are drawn, by arm in words.
        most: how many instances.
    """
    from matplotlib.figure import Figure

    count = min(most, len(next(iter(shown.values()))["weights"]))
    tall = 1.65 * len(shown) + 0.5
    figure = Figure(figsize=(8, tall + 4.0), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[tall, 4.0])
    above.suptitle("instances with most attention in one positive bag; framed: positive", fontsize=12)
    for part, (arm, bag) in zip(np.atleast_1d(above.subfigures(len(shown), 1)), shown.items(), strict=True):
        part.suptitle(arm, fontsize=12)
        order = bag["weights"].argsort(descending=True)[:count]
        for axes, index in zip(part.subplots(1, count, squeeze=False)[0], order.tolist(), strict=True):
            picture = bag["pictures"][index]
            axes.imshow(picture.permute(1, 2, 0) if picture.ndim == 3 else picture, cmap="gray", vmin=0, vmax=1)
            axes.set_xlabel(f"{100 * bag['weights'][index]:.1f} %", fontsize=12)
            axes.set(xticks=[], yticks=[])
            telling = bool(bag["truth"][index])
            for side in axes.spines.values():
                side.set(color="#e69f00" if telling else "0.8", linewidth=4 if telling else 0.5)
    pair = below.subplots(1, 2)
    for axes, name in zip(pair, ("entropy", "auc"), strict=True):
        _plot(axes, histories, name)
    _legend(below, pair[0])
    return figure


def _plot(axes: "Axes", histories: Mapping[str, Mapping[str, Tensor]], name: str) -> None:
    for (arm, history), colour, style in zip(histories.items(), COLOURS, STYLES, strict=False):
        epochs = range(1, len(history[name]) + 1)
        axes.plot(epochs, history[name], label=arm, color=colour, linestyle=style, linewidth=2.2)
    axes.set_title(CURVES[name], fontsize=12)
    axes.set_xlabel("epoch", fontsize=12)
    axes.tick_params(labelsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _legend(figure: "FigureBase", axes: "Axes") -> None:
    lines, names = axes.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=2, frameon=False, fontsize=12, handlelength=3)
