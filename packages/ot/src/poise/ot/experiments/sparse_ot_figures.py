"""Figures of the sparse OT experiment."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from poise.core.lab import ArmResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAN_NAMES = {
    "baseline": "exact, not regularised",
    "kl": "entropic",
    "l2": "quadratic",
    "k1": "at most 1 per column",
    "k4": "at most 4 per column",
    "k16": "at most 16 per column",
}
"""The plans that are drawn, in words."""

ROUTER_NAMES = {
    "top1": "best expert by a softmax",
    "balanced": "with a balancing loss",
    "sinkhorn": "best expert by an entropic plan",
    "sparse": "sparse plan",
}
"""The routers in words."""


def colour_transfer(source: Tensor, target: Tensor, results: Mapping[str, ArmResult]) -> "Figure":
    """The two photographs and the recoloured one, over the nonzeros of some plans."""
    shown = [arm for arm in PLAN_NAMES if arm in results]
    blocks = -(-len(shown) // 3)
    figure = _figure(8.0, 1.9 + 3.1 * blocks)
    grid = figure.subplots(1 + blocks, 3, height_ratios=[1.0] + [1.35] * blocks, squeeze=False)
    photographs = {"source": source, "target": target}
    for arm in [arm for arm in ("k4", *shown) if arm in results][:1]:
        photographs[f"recoloured, {PLAN_NAMES[arm]}"] = results[arm].load("result")["picture"]
    for axes, (title, picture) in zip(grid[0], photographs.items(), strict=False):
        axes.imshow(picture.permute(1, 2, 0).numpy())
        axes.set_title(title, fontsize=11)
    for axes in (*grid[0], *grid[1:].flat[len(shown) :]):
        axes.set_axis_off()
    for axes, arm in zip(grid[1:].flat, shown, strict=False):
        metrics, filled = results[arm].metrics, results[arm].load("result")["plan"] > 0
        rows, columns = filled.nonzero().T.numpy()
        axes.plot(columns, rows, "s", color="#0072b2", markersize=max(1.0, 250 / len(filled)), markeredgewidth=0)
        axes.set_title(
            f"{PLAN_NAMES[arm]}\nfullest column: {metrics['nonzeros_max']:.0f} of {len(filled)}\n"
            f"cost {metrics['cost']:.3f}, row error {metrics['row_error']:.1g}",
            fontsize=11,
        )
        axes.set(xticks=[], yticks=[], xlim=(-1, filled.shape[1]), ylim=(filled.shape[0], -1))
    for axes in grid[1:, 0]:
        axes.set_ylabel("source colours", fontsize=11)
    for axes in grid[-1]:
        axes.set_xlabel("target colours", fontsize=11)
    return figure


def smoothness(results: Mapping[str, ArmResult], arms: Mapping[str, str]) -> "Figure":
    """Distance to the optimal dual value over the steps of one fixed method."""
    figure = _figure(7.6, 4.8)
    axes = figure.add_subplot()
    for name, result in results.items():
        if result.has("curve"):
            axes.semilogy(
                result.load("curve")["gap"].clamp_min(1e-9).numpy(), label=f"{name}: {arms[name]}", linewidth=1.6
            )
    axes.set_xlabel("step of Adam from zero", fontsize=12)
    axes.set_ylabel("distance to the optimal dual value", fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(fontsize=11, frameon=False)
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
    axes.set_title(title, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.set(yticks=[0, 1], yticklabels=["target", "source"], xticks=[])
    axes.spines[:].set_visible(False)
    return figure


def loads(results: Mapping[str, ArmResult]) -> "Figure":
    """Mean load of every expert, and what the fullest one had to take."""
    rows = -(-len(results) // 2)
    figure = _figure(8.0, 3.4 * rows)
    grid = figure.subplots(rows, 2, sharey=True, squeeze=False)
    for axes, (name, result) in zip(grid.flat, results.items(), strict=False):
        load = result.load("loads")["load"].sort(descending=True).values
        axes.bar(range(len(load)), load.numpy(), color="#0072b2")
        axes.axhline(1.0, color="#d55e00", linewidth=1.5)
        metrics = result.metrics
        axes.set_title(
            f"{ROUTER_NAMES[name]}\naccuracy {metrics['accuracy']:.1%}, {metrics['dropped_tokens']:.1%} dropped\n"
            f"fullest expert {metrics['max_load']:.2f} of its capacity",
            fontsize=12,
        )
        axes.set_xlabel("experts, by load", fontsize=12)
        axes.set_xticks([])
        axes.tick_params(labelsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(results) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("mean load, in capacities", fontsize=12)
    return figure


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
