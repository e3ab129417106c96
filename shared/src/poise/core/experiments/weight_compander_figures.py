"""Figures of the Weight Compander experiment."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from poise.core.lab.report import PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


NAMES = {
    "learned": "a, b learnt",
    "slope_1": "a / b = 1",
    "slope_2": "a / b = 2",
    "slope_4": "a / b = 4",
}
"""What the figures call the companders; an arm without one is called plain."""


def histograms(arms: Mapping[str, Mapping[str, Tensor]]) -> "Figure":
    """Density of the weights of each layer, a panel per layer; of the first and the last four if there are many."""
    from matplotlib.figure import Figure

    every = list(next(iter(arms.values())))
    shown = [(number, name) for number, name in enumerate(every) if len(every) <= 8 or not 4 <= number < len(every) - 4]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.7 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, (number, name) in zip(panels.flat, shown, strict=False):
        widest = max(float(layers[name].abs().max()) for layers in arms.values())
        for colour, (arm, layers) in zip(PALETTE, arms.items(), strict=False):
            density, edges = torch.histogram(layers[name].flatten().float(), 80, range=(-widest, widest), density=True)
            axes.stairs(density, edges, color=colour, label=_name(arm), linewidth=1.8)
        axes.set_title(_place(number, len(every)), fontsize=14)
        axes.set_yscale("log")
        axes.set_xlabel("weight", fontsize=12)
        axes.tick_params(labelsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    for axes in panels[:, 0]:
        axes.set_ylabel("density", fontsize=12)
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=5, frameon=False, fontsize=12, columnspacing=1.2)
    return figure


def _name(arm: str) -> str:
    return next((name for compander, name in NAMES.items() if arm.endswith(compander)), "plain")


def _place(number: int, count: int) -> str:
    """Which layer it is, in words."""
    return "last layer" if number == count - 1 else f"layer {number + 1}"


def generalization(
    metrics: Mapping[str, Mapping[str, float]], groups: Mapping[str, Sequence[str]], labels: Sequence[str]
) -> "Figure":
    """Test minus training loss, and test accuracy, of each group of arms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    for axes, metric, title in zip(
        figure.subplots(1, 2), ("loss_gap", "accuracy"), ("test loss - training loss", "test accuracy"), strict=True
    ):
        for colour, (group, arms) in zip(PALETTE, groups.items(), strict=False):
            if not any(arm in metrics for arm in arms):
                continue
            places = [place for place, arm in enumerate(arms) if arm in metrics]
            axes.plot(places, [metrics[arms[place]][metric] for place in places], "o-", color=colour, label=group)
        axes.set_xticks(range(len(labels)), labels, fontsize=11)
        axes.set_title(title, fontsize=13)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=11)
    return figure
