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


def pictures(source: Tensor, target: Tensor, results: Mapping[str, ArmResult], arms: Mapping[str, str]) -> "Figure":
    """The source, the target, and the source recoloured by each arm."""
    panels = [("source", source), ("target", target)]
    for name, result in results.items():
        gaps = f"gap {result.metrics['squared_gap']:.1e} (squared), {result.metrics['euclidean_gap']:.1e} (Euclidean)"
        panels.append((f"{name}: {arms[name]}\n{gaps}", result.load("picture")["picture"]))
    columns = 3 if len(panels) > 4 else 2
    rows = -(-len(panels) // columns)
    figure = _figure(6.4 * columns, 4.9 * rows)
    for index, (title, image) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    return figure


def maps(results: Mapping[str, ArmResult], arms: Mapping[str, str]) -> "Figure":
    """For each arm the displacements of a few points, in the same plane."""
    figure = _figure(4.6 * min(3, len(results)), 4.4 * -(-len(results) // 3))
    for index, (name, result) in enumerate(results.items()):
        axes = figure.add_subplot(-(-len(results) // 3), min(3, len(results)), index + 1)
        _arrows(axes, result.load("clouds"), colours=False)
        uvp = f"\nL2-UVP {result.metrics['uvp']:.2f} %" if "uvp" in result.metrics else ""
        axes.set_title(f"{name}: {arms[name]}{uvp}", fontsize=8)
    return figure


def displacements(title: str, clouds: Mapping[str, Tensor], *, colours: bool) -> "Figure":
    """Where a few points go, over the target."""
    figure = _figure(6.4, 5.6)
    axes = figure.add_subplot()
    _arrows(axes, clouds, colours=colours)
    axes.set_title(title, fontsize=10)
    axes.legend(loc="best", fontsize=8)
    return figure


def curves(title: str, values: Mapping[str, Tensor]) -> "Figure":
    """Fit and gaps over the steps."""
    figure = _figure(6.4, 4.0)
    axes = figure.add_subplot()
    for name in CURVES:
        axes.plot(values["step"].numpy(), values[name].numpy(), label=LABELS[name])
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    return figure


def metrics(results: Mapping[str, ArmResult]) -> "Figure":
    """Fit and gaps of all arms, side by side."""
    shown = [name for name in LABELS if all(name in result.metrics for result in results.values())]
    figure = _figure(3.6 * len(shown), 0.5 * len(results) + 1.4)
    for index, name in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), index + 1)
        axes.barh(list(results), [result.metrics[name] for result in results.values()], color=f"C{index}")
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_title(LABELS[name], fontsize=9)
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


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
