"""Figures of the SHISRCNet experiment."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

CURVES = {"accuracy": "accuracy, %", "psnr": "PSNR, dB"}
"""What is measured along the way."""

ARMS = {
    "baseline": "bicubic",
    "two_stage": "restored first",
    "joint": "joint, one view",
    "no_contrast": "joint, not compared",
    "detached": "gradient cut",
    "shisrcnet": "SHISRCNet",
    "released": "wired as released",
    "hr": "high resolution",
}
"""The arms in few words."""


def triptychs(columns: Mapping[str, Tensor], truth: Tensor, title: str = "") -> "Figure":
    """The same images by several means, the truth last; each with its PSNR."""
    from matplotlib.figure import Figure

    shown = {**columns, "high resolution": truth}
    figure = Figure(figsize=(2.3 * len(shown), 2.5 * len(truth)), layout="constrained")
    for row, axes in enumerate(figure.subplots(len(truth), len(shown), squeeze=False)):
        for place, (name, images) in zip(axes, shown.items(), strict=True):
            _show(place, images[row])
            heading = name if row == 0 else ""
            if images.shape == truth.shape and images is not truth:
                heading += f"\n{psnr(images[row], truth[row]):.1f} dB"
            place.set_title(heading, fontsize=12)
    if title:
        figure.suptitle(title, fontsize=12)
    return figure


def curves(histories: Mapping[str, Mapping[str, Tensor]]) -> "Figure":
    """Accuracy and PSNR over the epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for arm, history in histories.items():
            if name in history:
                axes.plot(history["epoch"], history[name], label=ARMS[arm], linewidth=1.5)
        axes.set_xlabel("epoch", fontsize=12)
        axes.set_title(title, fontsize=12)
        axes.tick_params(labelsize=11)
    figure.axes[0].legend(frameon=False, fontsize=11)
    return figure


def arms(metrics: Mapping[str, Mapping[str, float]], pictures: Mapping[str, Tensor]) -> "Figure":
    """The same images by several means, over accuracy and PSNR of every arm.

    Args:
        metrics: of all arms.
        pictures: what to call each means, and its images; none, or the truth as the last.
    """
    from matplotlib.figure import Figure

    rows = min(2, *(len(images) for images in pictures.values())) if pictures else 0
    tall = 2.0 * rows + 0.6 * bool(rows)
    low = 0.36 * len(metrics) + 1.0
    figure = Figure(figsize=(8, tall + low), layout="constrained")
    below: FigureBase = figure
    if pictures:
        above, below = figure.subfigures(2, 1, height_ratios=[tall, low])
        *_, truth = pictures.values()
        for row, line in enumerate(above.subplots(rows, len(pictures), squeeze=False)):
            for axes, (name, images) in zip(line, pictures.items(), strict=True):
                _show(axes, images[row])
                axes.set_title(name if row == 0 else "", fontsize=12)
                if images.shape == truth.shape and images is not truth:
                    axes.set_xlabel(f"PSNR {psnr(images[row], truth[row]):.1f} dB", fontsize=11)
    left, right = below.subplots(1, 2, sharey=True)
    names = [ARMS[arm] for arm in metrics]
    for axes, metric, label in ((left, "accuracy", "test accuracy, %"), (right, "psnr", "PSNR on test images, dB")):
        for place, (arm, values) in enumerate(metrics.items()):
            if metric in values:
                marker, colour = ("D", "#d55e00") if arm == "shisrcnet" else ("o", "#0072b2")
                axes.plot(values[metric], place, marker, color=colour, markersize=8)
                axes.annotate(
                    f"{values[metric]:.1f}",
                    (values[metric], place),
                    (8, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=11,
                )
        axes.set_xlim(0, 105 if metric == "accuracy" else max(50.0, 1.2 * axes.get_xlim()[1]))
        axes.set_xlabel(label, fontsize=12)
        axes.tick_params(labelsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    return figure


def psnr(image: Tensor, truth: Tensor) -> float:
    """Of one image with values from 0 to 1."""
    return -10 * float((image.clamp(0, 1) - truth).square().mean().log10())


def _show(axes: "Axes", image: Tensor) -> None:
    axes.imshow(image.clamp(0, 1).permute(1, 2, 0), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
