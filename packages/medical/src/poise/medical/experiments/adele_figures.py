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
    from matplotlib.figure import Figure

TITLES = {
    "iou_noisy": "training IoU with the masks as given, %",
    "iou_clean": "training IoU with the true masks, %",
    "label_iou": "IoU of masks in use with the true ones, %",
    "miou": "test mIoU, %",
}


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
    axes.legend(frameon=False, fontsize=8)
    return figure


def histories(arms: Mapping[str, Tensor]) -> "Figure":
    """Test mIoU, IoU of the masks in use, and training IoU of all arms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(TITLES)), reversed(TITLES), strict=True):
        for arm, history in arms.items():
            _plot(axes, history[:, MEASURES.index(name)], arm)
        axes.set_xlabel("epoch")
        axes.set_title(TITLES[name], fontsize=9)
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def early_learning(history: Tensor) -> "Figure":
    """Without correction: what the predictions come closer to, the masks as given or the true ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    _plot(axes, history[:, MEASURES.index("iou_noisy")], "with the masks as given")
    _plot(axes, history[:, MEASURES.index("iou_clean")], "with the true masks")
    axes.set(xlabel="epoch", title="IoU of training predictions, %")
    axes.legend(frameon=False)
    return figure


def masks(images: Tensor, shown: Mapping[str, Tensor], classes: int) -> "Figure":
    """Some training images above their masks."""
    rows = {"image": images, **shown}
    return _grid({name: list(row) for name, row in rows.items()}, classes)


def corrections(arms: Mapping[str, Mapping[str, Tensor]]) -> "Figure":
    """Some training images, their masks as given, what each arm made of them, and the true ones."""
    first = next(iter(arms.values()))
    classes = int(torch.stack([first["clean"], first["noisy"]]).where(first["clean"] != 255, 0).max()) + 1
    rows = {"image": first["image"], "given": first["noisy"]}
    rows |= {arm: each["corrected"] for arm, each in arms.items()} | {"true": first["clean"]}
    return _grid({name: list(row) for name, row in rows.items()}, classes)


def _plot(axes: "Axes", values: Tensor, label: str) -> None:
    measured = values.isfinite()
    axes.plot(1 + torch.arange(len(values))[measured], values[measured], label=label)


def _grid(rows: Mapping[str, list[Tensor]], classes: int) -> "Figure":
    from matplotlib.figure import Figure

    columns = len(next(iter(rows.values())))
    figure = Figure(figsize=(1.2 * columns + 0.8, 1.25 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, pictures) in zip(grid, rows.items(), strict=True):
        for axes, picture in zip(line, pictures, strict=True):
            if picture.ndim == 3:
                low, high = picture.amin(), picture.amax()
                pixels = (picture - low) / (high - low).clamp_min(1e-6)
                axes.imshow(pixels.permute(1, 2, 0), cmap="gray", vmin=0, vmax=1)
            else:
                visible = np.ma.masked_equal(picture.numpy(), 255)
                axes.imshow(visible, cmap="nipy_spectral", vmin=0, vmax=classes)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=9)
    return figure
