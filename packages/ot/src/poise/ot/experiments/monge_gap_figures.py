"""Figures of the Monge gap experiment."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from poise.core.lab import ArmResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = ("divergence", "squared_gap", "euclidean_gap")
"""What the curves show."""

LABELS = {
    "divergence": "Sinkhorn divergence to the target",
    "squared_gap": "exact gap, squared Euclidean cost",
    "euclidean_gap": "exact gap, Euclidean cost",
    "uvp": "L2-UVP, percent",
}


NAMES = {
    "baseline": "fitting loss alone",
    "monge_gap": "with the Monge gap",
    "strong_gap": "Monge gap, larger λ",
    "euclidean": "Monge gap, Euclidean cost",
    "strong_euclidean": "the same, larger λ",
    "icnn_dual": "convex network",
}
"""What the figures call the arms."""

STORY = ("baseline", "monge_gap")
"""The arms that are compared at a glance."""


def pictures(source: Tensor, target: Tensor, results: Mapping[str, ArmResult]) -> "Figure":
    """The source and the target, the source recoloured without and with the Monge gap, and where its colours went."""
    shown = [arm for arm in STORY if arm in results] or list(results)[:2]
    figure = _figure(7.0, 7.9)
    panels = figure.subplots(3, 2, height_ratios=(1, 1, 1.05))
    _photograph(panels[0, 0], "source", source)
    _photograph(panels[0, 1], "target colours", target)
    panels[2, 1].sharex(panels[2, 0])
    panels[2, 1].sharey(panels[2, 0])
    for column, arm in enumerate(shown):
        _photograph(panels[1, column], NAMES[arm], results[arm].load("picture")["picture"])
        _paths(panels[2, column], results[arm].load("clouds"))
    for axes in panels[1:, len(shown) :].flat:
        axes.set_axis_off()
    return figure


def recoloured(results: Mapping[str, ArmResult]) -> "Figure":
    """The source recoloured by each arm."""
    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    figure = _figure(4.2 * columns, 3.2 * rows)
    for index, (name, result) in enumerate(results.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        _photograph(axes, NAMES[name], result.load("picture")["picture"])
    return figure


def maps(results: Mapping[str, ArmResult]) -> "Figure":
    """For each arm the displacements of a few points, in the same plane."""
    columns = min(3, len(results))
    figure = _figure(3.6 * columns, 3.9 * -(-len(results) // columns))
    for index, (name, result) in enumerate(results.items()):
        axes = figure.add_subplot(-(-len(results) // columns), columns, index + 1)
        _arrows(axes, result.load("clouds"), colours=False)
        uvp = f"\nL2-UVP {result.metrics['uvp']:.2f} %" if "uvp" in result.metrics else ""
        axes.set_title(f"{NAMES[name]}{uvp}", fontsize=15)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=14, frameon=False, markerscale=2)
    return figure


def displacements(title: str, clouds: Mapping[str, Tensor], *, colours: bool) -> "Figure":
    """Where a few points go, over the target."""
    figure = _figure(6.4, 5.6)
    axes = figure.add_subplot()
    _arrows(axes, clouds, colours=colours)
    axes.set_title(title, fontsize=11)
    axes.legend(loc="best", fontsize=11)
    return figure


def curves(title: str, values: Mapping[str, Tensor]) -> "Figure":
    """Fit and gaps over the steps."""
    figure = _figure(6.4, 4.0)
    axes = figure.add_subplot()
    for name in CURVES:
        axes.plot(values["step"].numpy(), values[name].numpy(), label=LABELS[name])
    axes.set_yscale("log")
    axes.set_xlabel("step", fontsize=11)
    axes.set_title(title, fontsize=11)
    axes.legend(fontsize=11)
    return figure


def metrics(results: Mapping[str, ArmResult]) -> "Figure":
    """Fit and gaps of all arms, side by side."""
    shown = [name for name in LABELS if all(name in result.metrics for result in results.values())]
    figure = _figure(4.2 * len(shown), 0.5 * len(results) + 1.4)
    for index, name in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), index + 1)
        axes.barh(
            [NAMES[arm] for arm in results], [result.metrics[name] for result in results.values()], color=f"C{index}"
        )
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_title(LABELS[name], fontsize=12)
        axes.tick_params(labelsize=12)
        if index:
            axes.set_yticklabels([])
    return figure


def _arrows(axes: "Axes", clouds: Mapping[str, Tensor], *, colours: bool, count: int = 120) -> None:
    """Points and their images in the plane of the target's largest variance; a known optimal map as hollow circles."""
    centre = clouds["y"].mean(0)
    _, _, directions = torch.linalg.svd(clouds["y"] - centre, full_matrices=False)
    plane = {name: ((cloud - centre) @ directions[:2].T).numpy() for name, cloud in clouds.items()}
    x, t = plane["x"][:count], plane["t"][:count]
    inks = clouds["x"][:count].clamp(0, 1).numpy() if colours else "C0"
    axes.scatter(*plane["y"].T, s=4, color="0.8", label="target")
    axes.quiver(*x.T, *(t - x).T, angles="xy", scale_units="xy", scale=1, width=0.0025, color="0.35")
    axes.scatter(*x.T, s=14, c=inks, edgecolors="0.3", linewidths=0.3, label="x", zorder=3)
    axes.scatter(
        *t.T, s=14, c=inks if colours else "C1", marker="s", edgecolors="0.3", linewidths=0.3, label="T(x)", zorder=3
    )
    if "optimal" in plane:
        axes.scatter(
            *plane["optimal"][:count].T, s=26, facecolors="none", edgecolors="C3", linewidths=0.8, label="optimal"
        )
    axes.set_xticks([])
    axes.set_yticks([])


def _photograph(axes: "Axes", title: str, image: Tensor) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set_title(title, fontsize=17)
    axes.set_axis_off()


def _paths(axes: "Axes", clouds: Mapping[str, Tensor], count: int = 70) -> None:
    """From where to where a few colours go, in the plane of largest variance, drawn in the colours along the way."""
    from matplotlib.collections import LineCollection

    x, t = (clouds[name][:count] for name in ("x", "t"))
    every = torch.cat((clouds["x"], clouds["y"]))
    centre = every.mean(0)
    _, _, directions = torch.linalg.svd(every - centre, full_matrices=False)
    steps = torch.linspace(0, 1, 17)[:, None, None]
    way = x + steps * (t - x)
    places = ((way - centre) @ directions[:2].T).transpose(0, 1)
    inks = way.transpose(0, 1).clamp(0, 1)
    segments = torch.stack((places[:, :-1], places[:, 1:]), 2).flatten(0, 1)
    axes.add_collection(
        LineCollection(list(segments.numpy()), colors=inks[:, :-1].flatten(0, 1).numpy(), linewidths=1.6)
    )
    for place, ink, marker in ((places[:, 0], inks[:, 0], "o"), (places[:, -1], inks[:, -1], "s")):
        axes.scatter(*place.T.numpy(), s=34, c=ink.numpy(), marker=marker, edgecolors="0.25", linewidths=0.6, zorder=3)
    axes.set_title("where its colours go (○ → □)", fontsize=14)
    axes.set_facecolor("0.93")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
