"""Figures of the Weight Compander experiment."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from poise.core.lab.report import PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def histograms(arms: Mapping[str, Mapping[str, Tensor]]) -> "Figure":
    """Density of the weights of each layer, a panel per layer; of the first and the last four if there are many."""
    from matplotlib.figure import Figure

    names = list(next(iter(arms.values())))
    names = names if len(names) <= 8 else names[:4] + names[-4:]
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.3 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        widest = max(float(layers[name].abs().max()) for layers in arms.values())
        for colour, (arm, layers) in zip(PALETTE, arms.items(), strict=False):
            density, edges = torch.histogram(layers[name].flatten().float(), 80, range=(-widest, widest), density=True)
            axes.stairs(density, edges, color=colour, label=arm)
        axes.set(title=name, yscale="log", xlabel="w")
        axes.title.set_fontsize(8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, fontsize=8
    )
    return figure


def generalization(
    metrics: Mapping[str, Mapping[str, float]], groups: Mapping[str, Sequence[str]], labels: Sequence[str]
) -> "Figure":
    """Test minus training loss, and test accuracy, of each group of arms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    for axes, metric, title in zip(
        figure.subplots(1, 2), ("loss_gap", "accuracy"), ("test loss - training loss", "test accuracy"), strict=True
    ):
        for colour, (group, arms) in zip(PALETTE, groups.items(), strict=False):
            if not any(arm in metrics for arm in arms):
                continue
            places = [place for place, arm in enumerate(arms) if arm in metrics]
            axes.plot(places, [metrics[arms[place]][metric] for place in places], "o-", color=colour, label=group)
        axes.set_xticks(range(len(labels)), labels, fontsize=8)
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return figure
