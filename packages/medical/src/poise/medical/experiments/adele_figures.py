"""Figures of the ADELE experiment."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from poise.medical.experiments.adele_measures import MEASURES
from poise.medical.segmentation.adele.curve import FEWEST, fit_iou_curve, flat_start
from poise.medical.segmentation.adele.detector import MemorizationDetector

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

TITLES = {
    "iou_noisy": "training IoU with the masks as given, %",
    "iou_clean": "training IoU with the true masks, %",
    "label_iou": "IoU of masks in use with the true ones, %",
    "miou": "test mIoU, %",
}

NAMES = {
    "baseline": "masks as given",
    "global": "correction, one trigger",
    "correction": "correction, a trigger per class",
    "consistency": "consistency alone",
    "both": "ADELE: correction and consistency",
    "dilated": "correction, all masks dilated",
}
"""The arms in words."""

COLOURS = dict(zip(NAMES.values(), ("#222222", "#e69f00", "#009e73", "#cc79a7", "#0072b2", "#999999"), strict=True))
STYLES = dict(zip(NAMES.values(), (":", "-.", "--", (0, (1, 1)), "-", "--"), strict=True))
CLASSES = ("#e8e8e8", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
"""Of the masks: the background, then the classes; where there are more, a colour map."""


def iou_curves(detector: MemorizationDetector, names: Sequence[str]) -> "Figure":
    """Training IoU of every foreground class, the curve fitted to it when it was triggered (or at the end), and when that was."""
    from matplotlib.figure import Figure

    history, interval = detector.history.numpy(), detector.interval
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(names[1:], start=1):
        colour = f"C{index - 1}"
        values, trigger = history[:, index], int(detector.trigger_epochs[index])
        known = values if trigger < 0 else values[: round((trigger + 1) / interval)]
        start = flat_start(known) if detector.skip_flat else 0
        label = f"{name}: not triggered" if trigger < 0 else f"{name}: after epoch {trigger + 1}"
        axes.plot(
            interval * np.arange(1, len(values) + 1), values, ".", color=colour, markersize=3, alpha=0.6, label=label
        )
        count = len(known) - start
        if count >= FEWEST:
            curve = fit_iou_curve(known[start:], np.linspace(0, interval * count, count))
            t = np.linspace(0, interval * (len(values) - start), 200)
            # The fit's time begins at the first value that it sees, and runs to the last in one step more than there are.
            axes.plot(interval * (start + 1) + t * (count - 1) / count, curve(t), color=colour)
        if trigger >= 0:
            axes.axvline(trigger + 1, color=colour, linestyle=":", linewidth=1)
    axes.set(
        xlabel="epoch",
        ylabel="training IoU with the masks in use",
        title="dots: measured; lines: fitted; dotted: triggered",
    )
    axes.legend(frameon=False, fontsize=11)
    return figure


def histories(arms: Mapping[str, Tensor]) -> "Figure":
    """Test mIoU, IoU of the masks in use, and training IoU of all arms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    for axes, name in zip(figure.subplots(2, 2).flat, reversed(TITLES), strict=True):
        for arm, history in arms.items():
            _plot(axes, history[:, MEASURES.index(name)], arm)
        axes.set_title(TITLES[name], fontsize=11)
        _finish(axes)
    _legend(figure, figure.axes[0])
    return figure


def early_learning(history: Tensor) -> "Figure":
    """Without correction: what the predictions come closer to, the masks as given or the true ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    _plot(axes, history[:, MEASURES.index("iou_noisy")], "with the masks as given")
    _plot(axes, history[:, MEASURES.index("iou_clean")], "with the true masks")
    axes.set_title("IoU of training predictions without correction, %", fontsize=12)
    _finish(axes)
    axes.legend(frameon=False, fontsize=11)
    return figure


def masks(images: Tensor, shown: Mapping[str, Tensor], classes: int) -> "Figure":
    """Some training images above their masks."""
    rows = {"image": images, **shown}
    return _grid({name: list(row) for name, row in rows.items()}, classes)


def corrections(masks: Mapping[str, Tensor], arm: str, histories: Mapping[str, Tensor], most: int = 3) -> "Figure":
    """Some training images with their masks, above the IoU of the masks in use and of the test images.

    Args:
        masks: of one arm: image, clean, noisy, corrected and prediction.
        arm: that arm in words.
        histories: of all arms, by their names in words.
        most: how many images.
    """
    from matplotlib.figure import Figure

    columns = {
        "image": masks["image"],
        "true mask": masks["clean"],
        "mask as given": masks["noisy"],
        "after correction": masks["corrected"],
        "prediction": masks["prediction"],
    }
    count = min(most, len(masks["image"]))
    classes = 1 + max(int(mask.where(mask != 255, 0).max()) for mask in list(columns.values())[1:])
    figure = Figure(figsize=(8, 1.55 * count + 4.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.55 * count + 0.7, 3.9])
    above.suptitle(f"training images and their masks; {arm}", fontsize=12)
    for row, line in enumerate(above.subplots(count, len(columns), squeeze=False)):
        for axes, (name, pictures) in zip(line, columns.items(), strict=True):
            _show(axes, pictures[row], classes)
            axes.set_title(name if row == 0 else "", fontsize=12)
    panels = {"label_iou": "masks in use, against the true ones", "miou": "predictions on test images"}
    pair = below.subplots(1, 2)
    for axes, (name, title) in zip(pair, panels.items(), strict=True):
        for other, history in histories.items():
            _plot(axes, history[:, MEASURES.index(name)], other)
        axes.set_title(title, fontsize=12)
        _finish(axes)
    pair[0].set_ylabel("mean IoU, %", fontsize=12)
    _legend(below, pair[0])
    return figure


def _plot(axes: "Axes", values: Tensor, label: str) -> None:
    measured = values.isfinite()
    (line,) = axes.plot(1 + torch.arange(len(values))[measured], values[measured], label=label, linewidth=2.2)
    if label in COLOURS:
        line.set(color=COLOURS[label], linestyle=STYLES[label])


def _finish(axes: "Axes") -> None:
    axes.set_xlabel("epoch", fontsize=12)
    axes.tick_params(labelsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _legend(figure: "FigureBase", axes: "Axes") -> None:
    lines, names = axes.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=2, frameon=False, fontsize=12, handlelength=3)


def _show(axes: "Axes", picture: Tensor, classes: int) -> None:
    from matplotlib.colors import ListedColormap

    if picture.ndim == 3:
        low, high = picture.amin(), picture.amax()
        pixels = (picture - low) / (high - low).clamp_min(1e-6)
        axes.imshow(pixels.permute(1, 2, 0), cmap="gray", vmin=0, vmax=1)
    else:
        few = classes <= len(CLASSES)
        colours = ListedColormap(CLASSES) if few else "nipy_spectral"
        visible = np.ma.masked_equal(picture.numpy(), 255)
        most = len(CLASSES) - 1 if few else classes
        axes.imshow(visible, cmap=colours, vmin=0, vmax=most, interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def _grid(rows: Mapping[str, list[Tensor]], classes: int) -> "Figure":
    from matplotlib.figure import Figure

    columns = len(next(iter(rows.values())))
    figure = Figure(figsize=(1.2 * columns + 0.8, 1.3 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, pictures) in zip(grid, rows.items(), strict=True):
        for axes, picture in zip(line, pictures, strict=True):
            _show(axes, picture, classes)
        line[0].set_ylabel(name, fontsize=11)
    return figure
