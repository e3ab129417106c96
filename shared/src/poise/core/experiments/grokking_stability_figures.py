"""Figures of the grokking stability experiment."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from poise.core.lab import ArmResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

CURVES = (
    "train_accuracy",
    "test_accuracy",
    "nlm_cosine",
    "weight_norm",
    "margin",
    "gradient_norm",
    "collapsed",
    "zero_loss",
    "fidelity",
)
"""What is measured along the way."""

LABELS = {
    "test_accuracy": "test accuracy",
    "nlm_cosine": "cosine of −g and w, raw gradient",
    "weight_norm": "norm of the weights",
    "margin": "mean margin of the top logit",
    "collapsed": "share of samples whose softmax collapses",
    "gradient_norm": "norm of the gradient",
}

TABLES = ("baseline", "perp_grad", "perp_grad_unscaled", "stablemax", "weight_decay", "squared_error")
"""The arms whose tables are shown side by side."""

COLOURS = {
    "baseline": "#222222",
    "perp_grad": "#d1495b",
    "perp_grad_unscaled": "#edae49",
    "stablemax": "#00798c",
    "softmax_float16": "#9d8df1",
    "softmax_float64": "#66a182",
    "weight_decay": "#4361ee",
    "l1": "#a0522d",
    "small_output": "#c38d9e",
    "squared_error": "#8a817c",
}


def curves(title: str, every: int, values: Mapping[str, Tensor]) -> "Figure":
    """What happens in one arm."""
    figure = _figure(10, 5)
    steps = [index * every for index in range(len(values["margin"]))]
    for index, name in enumerate(LABELS):
        axes = figure.add_subplot(2, 3, index + 1)
        axes.plot(steps, values[name].numpy())
        if name == "test_accuracy":
            axes.plot(steps, values["train_accuracy"].numpy(), color="0.6", linestyle="--", label="training")
            axes.legend(fontsize=7)
        _finish(axes, name)
    figure.suptitle(title, fontsize=10)
    return figure


def grokking(steps: int, results: Mapping[str, ArmResult]) -> "Figure":
    """What the networks know of the operation, and how they got there: above up to the common number of steps, below to the end."""
    known = {arm: results[arm].load("table")["right"] for arm in TABLES if arm in results and results[arm].has("table")}
    figure = _figure(12, 9.2 if known else 6.4)
    parts = figure.subfigures(2 if known else 1, 1, height_ratios=[1, 2.4] if known else None, squeeze=False)[:, 0]
    _tables(parts[0], known)
    for index, name in enumerate(LABELS):
        axes = parts[-1].add_subplot(2, 3, index + 1)
        for arm, result in results.items():
            values = result.load("curves")
            strong = arm in ("baseline", "perp_grad", "stablemax")
            style = {"linewidth": 1.8 if strong else 0.9, "zorder": 3 if strong else 2}
            axes.plot(values["step"].numpy(), values[name].numpy(), color=COLOURS[arm], label=arm, **style)
        if index < 3:
            axes.set_xlim(0, steps)
        _finish(axes, name)
    parts[-1].legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    return figure


def _tables(part: "SubFigure", known: Mapping[str, Tensor]) -> None:
    """The table of the operation as a network knows it: memorised entries are scattered, a learned rule fills it."""
    for index, (arm, right) in enumerate(known.items()):
        axes = part.add_subplot(1, len(known), index + 1)
        axes.imshow(right.numpy(), cmap="Blues", vmin=0, vmax=1.2, interpolation="nearest")
        axes.set_title(f"{arm}: {right.double().mean():.0%} right", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])


def _finish(axes: "Axes", name: str) -> None:
    axes.set_title(LABELS[name], fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    if name in ("margin", "gradient_norm"):
        axes.set_yscale("log")


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
