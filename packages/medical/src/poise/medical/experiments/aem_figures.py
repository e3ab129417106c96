"""Figures of the AEM experiment."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = {
    "entropy": "attention entropy on test bags,\nrelative to even",
    "auc": "test AUC, %",
    "nll": "test negative log-likelihood",
    "largest_weight": "largest weight of a bag",
}
"""What is measured after every epoch."""


def curves(histories: Mapping[str, Mapping[str, Tensor]]) -> "Figure":
    """Every measure over the epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.2), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for arm, history in histories.items():
            axes.plot(range(1, len(history[name]) + 1), history[name], label=arm)
        axes.set(xlabel="epoch", title=title)
    figure.axes[0].legend(frameon=False)
    return figure


def entropy_and_auc(histories: Mapping[str, Mapping[str, Tensor]], first: int = 5) -> "Figure":
    """Test AUC against test entropy over the epochs of models without AEM."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for arm, history in histories.items():
        axes.plot(history["entropy"][first - 1 :], history["auc"][first - 1 :], "o", markersize=3, label=arm)
    axes.set(
        xlabel="attention entropy relative to even", ylabel="test AUC, %", title=f"epochs from {first} on, lambda = 0"
    )
    axes.legend(frameon=False, fontsize=8)
    return figure


def pairs(metrics: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]]) -> "Figure":
    """AUC, likelihood and entropy of every model without and with AEM."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    panels = {"auc": "test AUC, %", "nll": "test negative log-likelihood", "entropy": "attention entropy"}
    for axes, (name, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for place, both in enumerate(metrics.values()):
            before, after = (one[name] for one in both)
            axes.annotate("", (place, after), (place, before), arrowprops={"arrowstyle": "->", "color": "0.6"})
            axes.plot(place, before, "o", color="C0", label="without AEM" if place == 0 else None)
            axes.plot(place, after, "o", color="C1", label="with AEM" if place == 0 else None)
        axes.set_xticks(range(len(metrics)), list(metrics), rotation=20)
        axes.set_title(title)
    figure.axes[0].legend(frameon=False)
    return figure


def bags(shown: Mapping[str, Mapping[str, Tensor]], most: int = 16) -> "Figure":
    """The instances of one positive bag by the attention they get; a frame marks those that make it positive."""
    from matplotlib.figure import Figure

    count = min(most, len(next(iter(shown.values()))["weights"]))
    figure = Figure(figsize=(0.75 * count + 1, 1.1 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), count, squeeze=False)
    for row, (arm, bag) in zip(grid, shown.items(), strict=True):
        order = bag["weights"].argsort(descending=True)[:count]
        for axes, index in zip(row, order.tolist(), strict=True):
            picture = bag["pictures"][index]
            axes.imshow(picture.permute(1, 2, 0) if picture.ndim == 3 else picture, cmap="gray", vmin=0, vmax=1)
            axes.set_title(f"{100 * bag['weights'][index]:.1f} %", fontsize=7)
            axes.set(xticks=[], yticks=[])
            telling = bool(bag["truth"][index])
            for side in axes.spines.values():
                side.set(color="C1" if telling else "0.8", linewidth=3 if telling else 0.5)
        row[0].set_ylabel(arm, fontsize=8)
    return figure
