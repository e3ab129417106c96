"""Figures of the SHISRCNet experiment."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = {"accuracy": "accuracy, %", "psnr": "PSNR, dB"}
"""What is measured along the way."""


def triptychs(columns: Mapping[str, Tensor], truth: Tensor, title: str = "") -> "Figure":
    """The same images by several means, the truth last; each with its PSNR."""
    from matplotlib.figure import Figure

    shown = {**columns, "high resolution": truth}
    figure = Figure(figsize=(2.3 * len(shown), 2.5 * len(truth)), layout="constrained")
    for row, axes in enumerate(figure.subplots(len(truth), len(shown), squeeze=False)):
        for place, (name, images) in zip(axes, shown.items(), strict=True):
            place.imshow(images[row].clamp(0, 1).permute(1, 2, 0), interpolation="nearest")
            place.set(xticks=[], yticks=[])
            heading = name if row == 0 else ""
            if images.shape == truth.shape and images is not truth:
                error = (images[row].clamp(0, 1) - truth[row]).square().mean()
                heading += f"\n{-10 * error.log10():.1f} dB"
            place.set_title(heading, fontsize=9)
    if title:
        figure.suptitle(title)
    return figure


def curves(histories: Mapping[str, Mapping[str, Tensor]]) -> "Figure":
    """Accuracy and PSNR over the epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for arm, history in histories.items():
            if name in history:
                axes.plot(history["epoch"], history[name], label=arm, linewidth=1.5)
        axes.set(xlabel="epoch", title=title)
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def arms(metrics: Mapping[str, Mapping[str, float]]) -> "Figure":
    """Accuracy and PSNR of every arm, and how close the two views of an image are."""
    from matplotlib.figure import Figure

    panels = {"accuracy": "accuracy, %", "psnr": "PSNR, dB", "view_gap": "cosine of the two views, same − different"}
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        held = {arm: values[name] for arm, values in metrics.items() if name in values}
        axes.barh(list(held), list(held.values()), color=["C1" if arm == "shisrcnet" else "C0" for arm in held])
        axes.invert_yaxis()
        least, most = min(held.values(), default=0), max(held.values(), default=1)
        axes.set_xlim(least - 0.5 * (most - least) - 1e-3, most + 0.1 * (most - least) + 1e-3)
        axes.set_title(title, fontsize=10)
    return figure
