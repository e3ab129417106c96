"""Figures of the sparse OT experiment."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from poise.core.lab import ArmResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def colour_transfer(
    source: Tensor, target: Tensor, results: Mapping[str, ArmResult], arms: Mapping[str, str]
) -> "Figure":
    """The two photographs, and for each arm the recoloured photograph over the nonzeros of its plan."""
    columns = min(4, len(results) + 1)
    blocks = -(-(len(results) + 1) // columns)
    figure = _figure(3.6 * columns, 5.8 * blocks)
    grid = figure.subplots(2 * blocks, columns, height_ratios=[1.0, 1.25] * blocks, squeeze=False)
    panels = [
        (grid[2 * block, column], grid[2 * block + 1, column]) for block in range(blocks) for column in range(columns)
    ]
    for axes, title, picture in zip(panels[0], ("source", "target"), (source, target), strict=True):
        axes.imshow(picture.permute(1, 2, 0).numpy())
        axes.set_title(title, fontsize=10)
    for axes in panels[0] + sum(panels[len(results) + 1 :], ()):
        axes.set_axis_off()
    for (top, bottom), (name, result) in zip(panels[1:], results.items(), strict=False):
        saved = result.load("result")
        top.imshow(saved["picture"].permute(1, 2, 0).numpy())
        top.set_title(f"{name}\n{arms[name]}", fontsize=8)
        top.set_axis_off()
        bottom.imshow((saved["plan"] > 0).numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        metrics = result.metrics
        bottom.set_title(
            f"{metrics['nonzeros_mean']:.1f} nonzeros per column, at most {metrics['nonzeros_max']:.0f}\n"
            f"cost {metrics['cost']:.4f}, rows off by {metrics['row_error']:.1g}",
            fontsize=8,
        )
        bottom.set(xticks=[], yticks=[], xlabel="target colours", ylabel="source colours")
    return figure


def smoothness(results: Mapping[str, ArmResult], arms: Mapping[str, str]) -> "Figure":
    """Distance to the optimal dual value over the steps of one fixed method."""
    figure = _figure(6.4, 4.2)
    axes = figure.add_subplot()
    for name, result in results.items():
        if result.has("curve"):
            axes.semilogy(
                result.load("curve")["gap"].clamp_min(1e-9).numpy(), label=f"{name}: {arms[name]}", linewidth=1.6
            )
    axes.set(xlabel="step of Adam from zero", ylabel="distance to the optimal dual value")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(fontsize=8, frameon=False)
    return figure


def plan(title: str, source: Tensor, target: Tensor, plan: Tensor) -> "Figure":
    """A plan as lines between two palettes, sorted by brightness."""
    figure = _figure(6.4, 4.6)
    axes = figure.add_subplot()
    rows, columns = (torch.argsort(palette.sum(1)) for palette in (source, target))
    place_x, place_y = (torch.empty_like(order) for order in (rows, columns))
    place_x[rows], place_y[columns] = torch.arange(len(rows)), torch.arange(len(columns))
    strongest = float(plan.max())
    for i, j in plan.nonzero().tolist():
        strength = float(plan[i, j]) / strongest
        if strength > 1e-3:
            colour = source[i].clamp(0, 1).tolist()
            axes.plot(
                [place_x[i], place_y[j]], [1, 0], color=colour, linewidth=0.3 + 2.5 * strength, alpha=0.8, zorder=1
            )
    for places, palette, height in ((place_x, source, 1.0), (place_y, target, 0.0)):
        axes.scatter(
            places.numpy(), [height] * len(palette), c=palette.clamp(0, 1).numpy(), s=28, zorder=2, edgecolors="none"
        )
    axes.set_title(title, fontsize=10)
    axes.set(yticks=[0, 1], yticklabels=["target", "source"], xticks=[])
    axes.spines[:].set_visible(False)
    return figure


def loads(results: Mapping[str, ArmResult], arms: Mapping[str, str]) -> "Figure":
    """Mean load of every expert, and what the fullest one had to take."""
    figure = _figure(3.2 * len(results), 3.4)
    for axes, (name, result) in zip(
        figure.subplots(1, len(results), sharey=True, squeeze=False)[0], results.items(), strict=True
    ):
        load = result.load("loads")["load"].sort(descending=True).values
        axes.bar(range(len(load)), load.numpy(), color="#2563eb")
        axes.axhline(1.0, color="#dc2626", linewidth=1)
        metrics = result.metrics
        axes.set_title(
            f"{name}: accuracy {metrics['accuracy']:.1%}\nfullest expert {metrics['max_load']:.2f} of its capacity, "
            f"{metrics['dropped_tokens']:.1%} dropped",
            fontsize=8,
        )
        axes.set(xlabel="experts", xticks=[])
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("mean load, in capacities")
    return figure


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
